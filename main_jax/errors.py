"""The user's mistakes: one line each, exit code 2, never a traceback."""


class UserError(Exception):
    """Something the user can mend; the message is one line that says what, where and what to do."""
