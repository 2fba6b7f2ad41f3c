"""Files of outputs to instructions: AlpacaEval's JSON list, or anything else that `data/sources.py` reads.

[{"instruction": ..., "output": ..., "generator": ..., "dataset": ..., "datasplit": "eval"}, ...]
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence

from etils import epath

from main_jax.data.files import Row, brief, digest
from main_jax.data.reading import read_pairs
from main_jax.data.sources import Source, open_source
from main_jax.errors import UserError
from main_jax.pairs import joined_instruction


class JsonList:
    """The rows of a file that holds one JSON list of objects; numbered from 1."""

    def __init__(self, file: epath.Path):
        self._file = file

    def rows(self) -> Iterator[Row]:
        """The whole file is read at once. Raises UserError."""
        try:
            values = json.loads(self._file.read_bytes().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:  # of the encoding, too
            raise UserError(f"{self._file}: not a valid JSON list ({brief(error)})") from None
        for number, row in enumerate(values, start=1):
            if not isinstance(row, dict):
                raise UserError(f"{self._file}, row {number}: expected an object like {{...}}")
            yield Row(str(self._file), number, row)

    def fingerprint(self) -> str:
        """Of its content."""
        return digest(self._file)

    def size_bytes(self) -> int:
        """On the disk."""
        return self._file.stat().length


def open_list(text: str, key: str) -> Source:
    """A .json file with one list as a source, any other string as `open_source` does. Raises UserError."""
    file = epath.Path(text).expanduser()
    if file.suffix == ".json" and file.exists() and not file.is_dir():
        with file.open("rb") as handle:
            if handle.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                return Source(str(file), JsonList(file), {})
    return open_source(text, key)


def read_outputs(text: str, key: str) -> list[tuple[str, str]]:
    """(instruction, output) of every row. Raises UserError."""
    rows = read_pairs(open_list(text, key))
    return [(joined_instruction(row), row["response"] or "") for row in rows]


def match(instructions: Sequence[str], reference: str) -> list[str]:
    """The reference's output to every instruction; of a repeated one, the next each time.

    Raises UserError for the first instruction that the reference does not answer.
    """
    outputs: dict[str, deque[str]] = defaultdict(deque)
    for instruction, output in read_outputs(reference, "--reference"):
        outputs[instruction].append(output)
    found = []
    for number, instruction in enumerate(instructions, start=1):
        if not outputs[instruction]:
            raise UserError(
                f"--reference: {reference}: no output for question {number}, {brief(instruction, 60)!r}"
            )
        found.append(outputs[instruction].popleft())
    return found
