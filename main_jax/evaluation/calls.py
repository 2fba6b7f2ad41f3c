"""What process 0 asks of all: a list of requests, answered in chunks that every process takes part in.

    calls = Calls(folder, {"loglikelihood": (answer_chunk, 1024)})
    found = calls.lead(work) if first() else calls.serve()    # `work` calls calls.ask(kind, rows)

Process 0 does what only one process should: it runs the harness, which downloads. Each of its calls has a
folder, named by its number and a digest of the requests, where requests and answers are kept: what is
killed and started again asks the same and finds what is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from main_jax.errors import UserError
from main_jax.lm.multihost import barrier
from main_jax.parts import Rows, map_chunks, stage_rows

Answer = Callable[[Sequence[dict], Callable[[int], None]], list[dict]]
"""Of a chunk of requests and what it tells how many are done: an answer for each."""

ROWS_OF_A_FILE = 8192
MESSAGE_BYTES = 4096
ERROR_BYTES = 600
"""Of an error's text: as JSON at most six times as many, where every byte of it is escaped."""


class Calls:
    """One conversation: every process makes this object; one leads and the others serve.

    Args:
        folder: where the calls' folders are kept; one place for all processes.
        work: how requests of each kind are answered, and how many are one chunk.
    """

    def __init__(self, folder: epath.PathLike, work: Mapping[str, tuple[Answer, int]]):
        self.folder, self.work = epath.Path(folder), work
        self.asked, self._answering = 0, False

    def lead(self, work: Callable[[], Any]) -> Any:
        """Process 0: what `work` returns. What fails there, between calls, ends the others too."""
        try:
            found = work()
        except Exception as error:
            if not self._answering:  # else the others are at work, and do not listen
                _tell({"error": cut(str(error))})
            raise
        _tell({})
        return found

    def serve(self) -> None:
        """The other processes: answer until process 0 is done. Raises UserError where that has failed."""
        while "kind" in (told := _tell()):
            self._answer(told["kind"], told["name"], ())
        if "error" in told:
            raise UserError(told["error"])

    def ask(self, kind: str, rows: Sequence[dict]) -> Rows:
        """Process 0: the answers to requests of one kind, in their order."""
        digest = hashlib.sha256(kind.encode())
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True).encode())
        name = f"{self.asked:03}-{digest.hexdigest()[:16]}"
        self.asked += 1
        _tell({"kind": kind, "name": name})
        return self._answer(kind, name, rows)

    def _answer(self, kind: str, name: str, rows: Sequence[dict]) -> Rows:
        self._answering = True
        function, chunk_rows = self.work[kind]
        folder = self.folder / name
        requests = stage_rows(rows, folder / "requests", ROWS_OF_A_FILE, {})
        answers = map_chunks(requests, folder, chunk_rows, function, kind, "requests")
        self._answering = False
        return answers


def _tell(message: dict | None = None) -> dict:
    """In every process the message of process 0, however long the others wait for it."""
    if jax.process_count() == 1:
        return message or {}
    barrier("what process 0 asks next")
    told = multihost_utils.broadcast_one_to_all(packed(message))
    return json.loads(np.asarray(told, np.uint8).tobytes())


def cut(text: str) -> str:
    """The beginning of an error's text that fits a message."""
    return text.encode(errors="replace")[:ERROR_BYTES].decode(errors="ignore")


def packed(message: dict | None) -> np.ndarray:
    """[MESSAGE_BYTES] uint8: all that is broadcast must have one shape in every process."""
    told = json.dumps(message, ensure_ascii=False).encode().ljust(MESSAGE_BYTES)
    assert len(told) == MESSAGE_BYTES, "longer than a message may be"
    return np.frombuffer(told, np.uint8)
