"""A chat-completions endpoint on this machine: what a test's function says, with every request kept.

    with stub(lambda a, b: "[[A]]") as server:
        judge = open_judge(server.url, "stub")

The function is given both answers as our judge prompt shows them, and gives the judge's text, a status with
a body, or a status with a body and headers.
"""

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ANSWERS = re.compile(
    r"<answer_a>\n(.*)\n</answer_a>\n\n<answer_b>\n(.*)\n</answer_b>", flags=re.DOTALL
)


class Server(ThreadingHTTPServer):
    """Counts what it is asked: `asked` has both answers of every request, `seen` its path, key, body."""

    daemon_threads = True

    def __init__(self, say):
        super().__init__(("127.0.0.1", 0), Handler)
        self.say, self.asked, self.seen = say, [], []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_):
        """A client that is gone is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (message,) = body["messages"]
        found = ANSWERS.search(message["content"])
        both = found.groups() if found else (message["content"], "")
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        self.server.asked.append(both)
        said = self.server.say(*both)
        status, text, headers = (*(said if isinstance(said, tuple) else (200, said)), {})[:3]
        if status == 200 and not text.startswith("{"):
            text = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@contextmanager
def stub(say):
    server = Server(say)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
