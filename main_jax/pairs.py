"""The pair table: its columns, its ids, and writing it as Parquet or JSONL.

Every table of the project is a `pyarrow.Table` with (a prefix of) these columns; a dropped row never
leaves it, it keeps `keep = false` and its `drop_reason`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from main_jax.errors import UserError
from main_jax.lm.multihost import first

COLUMNS: dict[str, pa.DataType] = {
    "id": pa.string(),
    "instruction": pa.string(),
    "input": pa.string(),
    "response": pa.string(),
    "origin": pa.string(),  # seed | aligned | augmented
    "source": pa.string(),  # the file or data set that the row was read from
    "weight": pa.float64(),
    "round": pa.int32(),
    "forward_nll_sum": pa.float64(),  # nats, of the response given the instruction
    "forward_tokens": pa.int32(),  # tokens of the response and its EOS
    "reverse_nll_sum": pa.float64(),  # nats, of the instruction given the response
    "reverse_tokens": pa.int32(),
    "response_nll_sum": pa.float64(),  # nats, of the response alone, by the forward model
    "instruction_nll_sum": pa.float64(),  # nats, of the instruction alone, by the reverse model
    "rating": pa.float64(),  # 1 to 5, by the forward model (self-curation)
    "rating_parsed": pa.bool_(),  # whether it would have written one of these
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


def assign_ids(rows: Iterable[dict]) -> Iterator[dict]:
    """The rows, each with its id as it passes: a given one stays, others are a hash of the content.

    A repeated content gets an ordinal. Raises UserError for a given id that was there before.
    """
    taken: dict[str, tuple[str, int]] = {}
    repeats: Counter[str] = Counter()
    for row in rows:
        if row["id"] is None:
            text = "\0".join(row.get(k) or "" for k in ("instruction", "input", "response"))
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
            repeats[digest] += digest in taken
            row["id"] = f"{digest}-{repeats[digest]}" if digest in taken else digest
        if row["id"] in taken:
            source, number = taken[row["id"]]
            of = "" if source == row["source"] else f" of {source}"
            raise UserError(
                f"{row['source']}, row {row['row_number']}, id: {row['id']!r} was already given in "
                f"row {number}{of}"
            )
        taken[row["id"]] = row["source"], row["row_number"]
        yield row


def set_column(table: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The table with a column of that name, in its place where there was one."""
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, values)
    return table.append_column(name, values)


# ---------------------------------------------------------------------------------------------- writing

ROW_GROUP = 4096


def batched(rows: Iterable[dict], size: int) -> Iterator[list[dict]]:
    """Lists of `size` rows, the last one shorter; one empty list when there are none."""
    rows = iter(rows)
    yield list(islice(rows, size))
    while batch := list(islice(rows, size)):
        yield batch


def write_atomically(
    path: epath.PathLike, write: Callable[[epath.Path], Any], *, own: bool = False
) -> None:
    """Calls `write` with a temporary name beside `path`, then renames.

    Of several processes the first one does, or any that calls with a file of its `own`.
    """
    if not (own or first()):
        return
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_table(path: epath.PathLike, table: pa.Table, *, own: bool = False) -> None:
    """Writes Parquet, or JSONL when the name ends in .jsonl; atomically. `own`: see `write_atomically`."""
    if str(path).endswith(".jsonl"):
        write_jsonl(path, table.to_pylist())
    else:
        write_atomically(path, lambda temporary: _write_parquet(temporary, table), own=own)


def _write_parquet(path: epath.Path, table: pa.Table) -> None:
    with path.open("wb") as handle:
        pq.write_table(table, handle)


def write_rows(path: epath.PathLike, rows: Iterable[dict], schema: pa.Schema | None) -> None:
    """Writes rows as they come, as Parquet of this schema or as JSONL (`schema` None); atomically."""
    if schema is None:
        write_jsonl(path, rows)
        return

    def write(temporary: epath.Path) -> None:
        with temporary.open("wb") as handle, pq.ParquetWriter(handle, schema) as writer:
            for batch in batched(rows, ROW_GROUP):
                writer.write_table(pa.Table.from_pylist(batch, schema))

    write_atomically(path, write)


def write_jsonl(path: epath.PathLike, rows: Iterable[dict]) -> None:
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
