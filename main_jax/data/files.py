"""Files of rows, local or `gs://`: JSONL, Parquet and CSV, a row at a time; and digests of files.

    for row in Files("data/part-*.jsonl.gz").rows(): ...

What is wrong with a file is one line that names it and the row, counted as an editor counts lines (JSONL,
CSV) or from 1 (Parquet).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from main_jax.errors import UserError

CODECS = {".gz": "gzip", ".zst": "zstd"}
FOREIGN = {
    b"\x1f\x8b": "gzip; its name must end in .gz",
    b"\x28\xb5\x2f\xfd": "zstd; its name must end in .zst",
    b"PAR1": "Parquet; its name must end in .parquet",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
}
"""What a file begins with that is read as text and is none."""


class Missing(UserError):
    """What a source names is not here."""


class Row(NamedTuple):
    """A raw row and where it stands: the file (or data set) and its number there, from 1."""

    file: str
    number: int
    values: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.file}, row {self.number}"


class Files:
    """The rows of a file, or of all files that match a glob, in the order of their names."""

    def __init__(self, pattern: str, weight: str = "weight"):
        self._files, self._weight = find_files(pattern), weight

    def rows(self) -> Iterator[Row]:
        """File by file; every file's rows are numbered from 1."""
        for file in self._files:
            for number, values in read_file(file, self._weight):
                yield Row(str(file), number, values)

    def fingerprint(self) -> str:
        """A file counts by its content, several also by their names, which order them."""
        if len(self._files) == 1:
            return digest(self._files[0])
        base = self._files[0].parent
        while not all(file.is_relative_to(base) for file in self._files):
            base = base.parent
        return digest(base, self._files)

    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.stat().length for file in self._files)


def find_files(pattern: str) -> list[epath.Path]:
    """The file of that name, or all that match a glob, sorted. Raises Missing when there is none."""
    path = epath.Path(pattern).expanduser()
    if path.is_dir():
        raise UserError(f"{path}: is a directory, expected a .jsonl, .parquet or .csv file, a glob of them, "
                        "or hf:DIR for a data set")  # fmt: skip
    if path.exists():  # also where its name looks like a glob
        return [path]
    parts = path.parts
    first = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), None)
    if first is None:
        raise Missing(f"{path}: no such file")
    matches = epath.Path(*parts[:first]).glob("/".join(parts[first:]))
    if not (found := sorted(file for file in matches if not file.is_dir())):
        raise Missing(f"{path}: no file matches")
    return found


def read_file(file: epath.Path, weight: str = "weight") -> Iterator[tuple[int, dict]]:
    """The rows of a file as (row number, row); by its name Parquet or CSV, else JSONL.

    JSONL and CSV may be compressed (`.gz`, `.zst`). A field of a CSV file is text, but for the column
    `weight`. Raises UserError, one line.
    """
    name = file.name.lower()
    if name.endswith(".parquet"):
        return _parquet(file)
    tabular = name.endswith(tuple(f".csv{codec}" for codec in ("", *CODECS)))
    return _csv(file, weight) if tabular else _jsonl(file)


def brief(error: object, length: int = 120) -> str:
    """An error's message on one line, cut."""
    return " ".join(str(error).split())[:length]


def _parquet(file: epath.Path) -> Iterator[tuple[int, dict]]:
    number = 0
    try:
        with file.open("rb") as handle:
            table = pq.ParquetFile(handle)
            _check_names(table.schema_arrow.names, f"{file}")
            for batch in table.iter_batches(1024):
                try:
                    rows = batch.to_pylist()
                except Exception:  # of a value somewhere in it: row by row, up to where
                    rows = (batch.slice(i, 1).to_pylist()[0] for i in range(len(batch)))
                for row in rows:
                    number += 1
                    yield number, row
    except UnicodeDecodeError:
        raise UserError(f"{file}, row {number + 1}: a text in it is not valid UTF-8") from None
    except (pa.ArrowException, OSError) as error:
        after = f" after row {number}" if number else ""
        raise UserError(f"{file}: not a readable Parquet file{after} ({brief(error)})") from None
    except (ArithmeticError, LookupError, ValueError) as error:  # dates beyond Python's, time zones
        place = f"{file}, row {number + 1}"
        raise UserError(f"{place}: a value in it cannot be read ({brief(error)})") from None


def _check_names(names: Sequence[str], where: str) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{where}: two columns are called {twice[0]!r}")


def _jsonl(file: epath.Path) -> Iterator[tuple[int, dict]]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, row {number}: not valid JSON ({error.msg}: column {error.pos + 1}); "
                            "expected one object {...} a line") from None  # fmt: skip
        except (ValueError, RecursionError) as error:  # also a number of 5,000 digits
            raise UserError(f"{file}, row {number}: not valid JSON ({brief(error)})") from None
        if not isinstance(row, dict):
            raise UserError(
                f"{file}, row {number}: expected an object like {{...}} a line, found {type(row).__name__}"
            )
        yield number, row


def _object(items: list[tuple[str, Any]]) -> dict:
    """Refuses two equal keys, of which the last would count, without a word."""
    found = dict(items)
    if len(found) < len(items):
        names = [name for name, _ in items]
        raise ValueError(f"two keys are called {next(n for n in names if names.count(n) > 1)!r}")
    return found


def _csv(file: epath.Path, weight: str) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(sys.maxsize)  # web texts are longer than the module's 128 KiB
    reader = csv.reader((line for _, line in _lines(file)), strict=True)
    header: list[str] = []
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = brief(error).partition(" - ")[0]  # after it, advice to programmers
            raise UserError(f"{file}, row {number}: not valid CSV ({reason})") from None
        if any("\0" in field for field in fields):
            raise UserError(f"{file}, row {number}: a NUL character in it; expected UTF-8 text")
        if not fields:
            continue
        if not header:
            header = fields
            _check_names(header, f"{file}, row {number}")
            continue
        if len(fields) != len(header):
            raise UserError(
                f"{file}, row {number}: {len(fields)} fields, but the header names {len(header)} columns"
            )
        row: dict = dict(zip(header, fields, strict=True))
        if weight in row:
            row[weight] = _number(row[weight])
        yield number, row


def _number(text: str) -> float | str | None:
    try:
        return float(text) if text.strip() else None
    except ValueError:
        return text  # whoever reads the weight refuses it


def _lines(file: epath.Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with _open(file) as handle:
            for number, line in enumerate(handle, start=1):
                if number == 1 and (kind := next(filter(line.startswith, FOREIGN), None)):
                    raise UserError(f"{file}, row 1: not valid UTF-8 but {FOREIGN[kind]}")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} in place {error.start + 1}"
        raise UserError(f"{file}, row {number}: not valid UTF-8 ({found})") from None
    except OSError as error:  # also what a codec says
        raise UserError(f"{file}: cannot be read after row {number} ({brief(error)})") from None


@contextmanager
def _open(file: epath.Path) -> Generator[IO[bytes]]:
    with file.open("rb") as handle:
        codec = CODECS.get(file.suffix.lower())
        if codec is None:
            yield handle
        else:
            stream = pa.CompressedInputStream(pa.PythonFile(handle, mode="r"), codec)
            yield cast(IO[bytes], io.BufferedReader(cast(io.RawIOBase, stream)))


# ------------------------------------------------------------------------------------------- digests


def digest(path: epath.Path, files: Sequence[epath.Path] | None = None) -> str:
    """sha256 of a file, or of a folder's files (all, or those given) with their names.

    Of a file above 64 MiB in a folder (weights) only the size, the first and last MiB and one MiB in
    sixteen evenly spaced places are read.
    """
    found = hashlib.sha256()
    for file in sorted(files_below(path) if files is None else files):
        size = file.stat().length
        name = "" if file == path else str(file.relative_to(path))
        found.update(f"{name}\0{size}\0".encode())
        block = 1 << 20
        with file.open("rb") as handle:
            if size <= 64 * block or file == path:
                while chunk := handle.read(64 * block):
                    found.update(chunk)
                continue
            for i in range(18):
                handle.seek((size - block) * i // 17)
                found.update(handle.read(block))
    return found.hexdigest()


def hashed(value: Any) -> str:
    """sha256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def files_below(path: epath.Path) -> list[epath.Path]:
    """The file itself, or all files of a folder; object stores do not list recursively."""
    if not path.is_dir():
        return [path] if path.exists() else []
    return [file for child in path.iterdir() for file in files_below(child)]
