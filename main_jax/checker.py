"""Whether an answer is right, by its reference: for a test of one's own.

exact: the same text, but for case, white space and punctuation at its ends. contains: the reference is in
the answer, in whole words, likewise. number: the last number of both is the same, 1,234.50 = 1234.5.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def normal(text: str) -> str:
    """A text without what does not count."""
    return re.sub(r"^\W+|\W+$", "", " ".join(text.casefold().split()))


def last_number(text: str) -> Decimal | None:
    """The last number in a text, thousands separated by commas or not; None without one."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def exact(answer: str, reference: str) -> bool:
    """See the module."""
    return normal(answer) == normal(reference)


def contains(answer: str, reference: str) -> bool:
    """See the module; an empty reference is in nothing."""
    wanted = normal(reference)
    return (
        bool(wanted) and re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", normal(answer)) is not None
    )


def number(answer: str, reference: str) -> bool:
    """See the module; False where the reference has no number."""
    wanted = last_number(reference)
    return wanted is not None and last_number(answer) == wanted


CHECKERS: dict[str, Callable[[str, str], bool]] = {
    "exact": exact, "contains": contains, "number": number,
}  # fmt: skip
