"""The pair table: its columns, its ids, and reading and writing it as Parquet or JSONL.

Every table of the project is a `pyarrow.Table` with (a prefix of) these columns; a dropped row never
leaves it, it keeps `keep = false` and its `drop_reason`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from main_jax.errors import UserError
from main_jax.lm.multihost import Preempted, barrier, first, stop_asked

COLUMNS: dict[str, pa.DataType] = {
    "id": pa.string(),
    "instruction": pa.string(),
    "input": pa.string(),
    "response": pa.string(),
    "origin": pa.string(),  # seed | aligned | augmented
    "source": pa.string(),  # the file the row was read from
    "weight": pa.float64(),
    "round": pa.int32(),
    "forward_nll_sum": pa.float64(),  # nats, of the response given the instruction
    "forward_tokens": pa.int32(),  # tokens of the response and its EOS
    "reverse_nll_sum": pa.float64(),  # nats, of the instruction given the response
    "reverse_tokens": pa.int32(),
    "response_nll_sum": pa.float64(),  # nats, of the response alone, by the forward model
    "instruction_nll_sum": pa.float64(),  # nats, of the instruction alone, by the reverse model
    "keep": pa.bool_(),
    "drop_reason": pa.string(),
    "truncated": pa.bool_(),
    "finish_reason": pa.string(),
}


def table_of(rows: Sequence[dict]) -> pa.Table:
    """A table with every column of `COLUMNS` (null where a row lacks it), then the rows' own others."""
    arrays = {name: pa.array([r.get(name) for r in rows], t) for name, t in COLUMNS.items()}
    others = dict.fromkeys(name for row in rows for name in row if name not in COLUMNS)
    arrays |= {name: pa.array([r.get(name) for r in rows]) for name in others}
    return pa.table(arrays)


def joined_instruction(row: dict) -> str:
    """The instruction with its Alpaca `input`, as both directions see it."""
    instruction, extra = row.get("instruction") or "", row.get("input") or ""
    return f"{instruction}\n\n{extra}" if extra else instruction


# ---------------------------------------------------------------------------------------------- reading


def read_rows(path: str) -> list[tuple[int, dict]]:
    """The rows of a JSONL or Parquet file as (row number from 1, row). Raises UserError, one line."""
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"{path}: no such file")
    if file.is_dir():
        raise UserError(f"{path}: is a directory, expected a .jsonl or .parquet file")
    rows = _read_parquet(file) if file.suffix == ".parquet" else _read_jsonl(file)
    if not rows:
        raise UserError(f"{path}: no rows in it")
    return rows


def _read_parquet(file: epath.Path) -> list[tuple[int, dict]]:
    try:
        with file.open("rb") as handle:
            return list(enumerate(pq.read_table(handle).to_pylist(), start=1))
    except UnicodeDecodeError:
        raise UserError(f"{file}: a text in it is not valid UTF-8") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable Parquet file ({_brief(error)})") from None


def _read_jsonl(file: epath.Path) -> list[tuple[int, dict]]:
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            row = json.loads(text)
        except UnicodeDecodeError:
            raise UserError(f"{file}, row {number}: not valid UTF-8") from None
        except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
            raise UserError(f"{file}, row {number}: not valid JSON ({_brief(error)})") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}, row {number}: expected an object like {{...}}")
        rows.append((number, row))
    return rows


def _brief(error: object) -> str:
    return " ".join(str(error).split())[:120]


PAIR_COLUMNS = (
    ("instruction", "response"),
    ("instruction", "output"),  # Alpaca
    ("prompt", "completion"),
    ("prompt", "response"),
    ("messages",),
    ("conversations",),  # ShareGPT
)
RESPONSE_COLUMNS = (("response",), ("text",), ("content",), ("output",), ("completion",))
PROMPT_COLUMNS = (("instruction",), ("prompt",))


def read_pairs(path: str) -> list[dict]:
    """Rows with id, instruction, input, response; formats are recognised by their column names."""
    return _read(path, PAIR_COLUMNS, _pair)


def read_responses(path: str) -> list[dict]:
    """Rows with id and response, from a column named response, text, content, output or completion."""
    return _read(path, RESPONSE_COLUMNS, lambda row, names: {"response": row[names[0]]})


def read_instructions(path: str) -> list[dict]:
    """Rows with id, instruction and input."""
    return _read(
        path,
        PROMPT_COLUMNS,
        lambda row, names: {"instruction": row[names[0]], "input": row.get("input")},
    )


def _pair(row: dict, names: tuple[str, ...]) -> dict:
    if names[0] in ("messages", "conversations"):
        return _conversation(row[names[0]])
    return {"instruction": row[names[0]], "input": row.get("input"), "response": row[names[1]]}


def _conversation(turns: Any) -> dict:
    """The last assistant turn is the response, everything before it the instruction."""
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        raise ValueError("expected a list of turns")
    texts = []
    for turn in turns:
        role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(text, str):
            raise ValueError("every turn needs a role and a text")
        texts.append((role, text))
    answers = [i for i, (role, _) in enumerate(texts) if role in ("assistant", "gpt", "model")]
    if not answers:
        raise ValueError("no assistant turn")
    before = [text for _, text in texts[: answers[-1]]]
    return {"instruction": "\n\n".join(before), "input": None, "response": texts[answers[-1]][1]}


def _read(path: str, formats: Sequence[tuple[str, ...]], convert: Callable) -> list[dict]:
    numbered = read_rows(path)
    first = numbered[0][1]
    names = next((f for f in formats if all(name in first for name in f)), None)
    if names is None:
        wanted = " or ".join("+".join(f) for f in formats)
        raise UserError(f"{path}, row {numbered[0][0]}: missing column: expected {wanted}; "
                        f"found {', '.join(map(str, first)) or 'none'}")  # fmt: skip
    rows = []
    for number, raw in numbered:
        missing = [name for name in names if name not in raw]
        if missing:
            raise UserError(f"{path}, row {number}: missing column {missing[0]!r}")
        try:
            row = convert(raw, names)
        except ValueError as error:
            raise UserError(f"{path}, row {number}, {names[0]}: {error}") from None
        for name, value in row.items():
            if value is not None and not isinstance(value, str):
                kind = type(value).__name__
                raise UserError(f"{path}, row {number}, {name}: expected text, found {kind}")
            _check_text(value or "", path, number, name)
        row |= {"weight": _weight(raw, path, number), "source": str(path), "raw": raw}
        given = raw.get("id")
        if given is not None and (isinstance(given, bool) or not isinstance(given, (str, int))):
            raise UserError(f"{path}, row {number}, id: expected text or a whole number")
        row["id"] = None if given is None else str(given)
        _check_text(row["id"] or "", path, number, "id")
        row["row_number"] = number
        rows.append(row)
    _assign_ids(rows, path)
    return rows


def _check_text(text: str, path: str, number: int, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}, row {number}, {name}: half a surrogate pair, not text") from None


def _weight(raw: dict, path: str, number: int) -> float:
    value = raw.get("weight")
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise UserError(f"{path}, row {number}, weight: expected a number >= 0, found {value!r}")
    return float(value)


def _assign_ids(rows: list[dict], path: str) -> None:
    """Given ids stay (a repeat is an error); others are a content hash with an ordinal for repeats."""
    seen: Counter[str] = Counter()
    taken: dict[str, int] = {}
    for row in rows:
        given = row["id"]
        if given is None:
            text = "\0".join(row.get(k) or "" for k in ("instruction", "input", "response"))
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
            row["id"] = f"{digest}-{seen[digest]}" if seen[digest] else digest
            seen[digest] += 1
        if row["id"] in taken:
            earlier = taken[row["id"]]
            raise UserError(
                f"{path}, row {row['row_number']}, id: {row['id']!r} was already given in row {earlier}"
            )
        taken[row["id"]] = row["row_number"]


# ---------------------------------------------------------------------------------------------- writing


def write_atomically(path: epath.PathLike, write: Callable[[epath.Path], Any]) -> None:
    """Calls `write` with a temporary name beside `path`, then renames; the first process alone does."""
    if not first():
        return
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_table(path: epath.PathLike, table: pa.Table) -> None:
    """Writes Parquet, or JSONL when the name ends in .jsonl; atomically."""
    if str(path).endswith(".jsonl"):
        return write_jsonl(path, table.to_pylist())

    def write(temporary: epath.Path) -> None:
        with temporary.open("wb") as handle:
            pq.write_table(table, handle)

    write_atomically(path, write)


def write_jsonl(path: epath.PathLike, rows: Sequence[dict]) -> None:
    """Writes one JSON object a line, atomically; what JSON lacks (dates) as text."""

    def line(row: dict) -> bytes:
        try:
            return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"
        except UnicodeEncodeError:  # half a surrogate pair, in a column that is not ours
            return json.dumps(row, default=str).encode() + b"\n"

    def write(temporary: epath.Path) -> None:
        with temporary.open("wb") as handle:
            handle.writelines(map(line, rows))

    write_atomically(path, write)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes UTF-8 text, atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))


def read_parts(directory: epath.PathLike) -> pa.Table:
    """All `part-*.parquet` of a directory, in order."""
    parts = sorted(epath.Path(directory).glob("part-*.parquet"))
    tables = []
    for part in parts:
        with part.open("rb") as handle:
            tables.append(pq.read_table(handle))
    return pa.concat_tables(tables, promote_options="default")


def map_chunks(
    rows: Sequence[dict],
    directory: epath.PathLike,
    chunk_rows: int,
    function: Callable[[Sequence[dict]], list[dict]],
) -> pa.Table:
    """Applies `function` to fixed chunks of rows, committing one part file each; resumes.

    Chunks are cut by number, so that a restart repeats the same shapes. Parts that exist are not
    computed again. Raises Preempted where the program was asked to stop.
    """
    directory = epath.Path(directory)
    parts = list(chunks(rows, chunk_rows))
    paths = [directory / f"part-{part:05}.parquet" for part in range(len(parts))]
    missing = [not path.exists() for path in paths]
    barrier(f"chunks of {directory}")  # all see the same parts missing
    for path, chunk, wanted in zip(paths, parts, missing, strict=True):
        if wanted:
            write_table(path, table_of(function(chunk)))
            if path != paths[-1] and stop_asked():
                raise Preempted(f"{directory}: stopped after {path.name}")
    barrier(f"parts in {directory}")
    return read_parts(directory)


def rows_done(directory: epath.PathLike, chunk_rows: int, total: int) -> int:
    """How many of `total` rows `map_chunks` has already committed."""
    parts = len(list(epath.Path(directory).glob("part-*.parquet")))
    return min(parts * chunk_rows, total)


def chunks(rows: Sequence[dict], size: int) -> Iterator[Sequence[dict]]:
    """Slices of `size` rows; one empty slice when there are none."""
    for start in range(0, max(len(rows), 1), size):
        yield rows[start : start + size]
