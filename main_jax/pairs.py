"""The pair table: its columns, its ids, writing it as Parquet or JSONL, and its parts.

Every table of the project is a `pyarrow.Table` with (a prefix of) these columns; a dropped row never
leaves it, it keeps `keep = false` and its `drop_reason`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from main_jax.errors import UserError
from main_jax.lm.multihost import Preempted, barrier, deal, first, stop_asked
from main_jax.lm.progress import mark, track

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


def assign_ids(rows: Sequence[dict]) -> None:
    """Given ids stay (a repeat is an error); others are a content hash with an ordinal for repeats."""
    seen: Counter[str] = Counter()
    taken: dict[str, dict] = {}
    for row in rows:
        given = row["id"]
        if given is None:
            text = "\0".join(row.get(k) or "" for k in ("instruction", "input", "response"))
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
            row["id"] = f"{digest}-{seen[digest]}" if seen[digest] else digest
            seen[digest] += 1
        if row["id"] in taken:
            earlier = taken[row["id"]]
            of = "" if earlier["source"] == row["source"] else f" of {earlier['source']}"
            raise UserError(
                f"{row['source']}, row {row['row_number']}, id: {row['id']!r} was already given in "
                f"row {earlier['row_number']}{of}"
            )
        taken[row["id"]] = row


# ---------------------------------------------------------------------------------------------- writing


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


def write_table(path: epath.PathLike, table: pa.Table) -> None:
    """Writes Parquet, or JSONL when the name ends in .jsonl; atomically."""
    if str(path).endswith(".jsonl"):
        write_jsonl(path, table.to_pylist())
    else:
        write_atomically(path, lambda temporary: _write_parquet(temporary, table))


def _write_parquet(path: epath.Path, table: pa.Table) -> None:
    with path.open("wb") as handle:
        pq.write_table(table, handle)


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


# ------------------------------------------------------------------------------------------- parts

VISIBLE_S = 90.0
"""How long a folder on a network may take to show what another machine has written."""


def read_parts(directory: epath.PathLike) -> pa.Table:
    """All `part-*.parquet` of a directory, in order."""
    tables = [_read_part(part) for part in _parts(directory)]
    return pa.concat_tables(tables, promote_options="default")


def _parts(directory: epath.PathLike) -> list[epath.Path]:
    return sorted(epath.Path(directory).glob("part-*.parquet"))


def _read_part(part: epath.Path, columns: list[str] | None = None) -> pa.Table:
    with part.open("rb") as handle:
        return pq.read_table(handle, columns=columns)


def _num_rows(part: epath.Path) -> int:
    with part.open("rb") as handle:
        return pq.read_metadata(handle).num_rows


class Rows:
    """The rows of all `part-*.parquet` of a directory; a part is read when rows of it are asked for."""

    def __init__(self, directory: epath.PathLike):
        self._parts = _parts(directory)
        self._ends = list(accumulate(map(_num_rows, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[dict]:
        for part in self._parts:
            yield from _read_part(part).to_pylist()

    def __getitem__(self, index: slice) -> list[dict]:
        start, stop, step = index.indices(len(self))
        assert step == 1, "a chunk is rows that follow one another"
        rows, begin = [], 0
        for part, end in zip(self._parts, self._ends, strict=True):
            first, last = max(start, begin), min(stop, end)
            if first < last:
                rows += _read_part(part).slice(first - begin, last - first).to_pylist()
            begin = end
        return rows

    def column(self, name: str) -> list:
        """One column of all rows."""
        return [v for part in self._parts for v in _read_part(part, [name])[name].to_pylist()]


def map_chunks(
    rows: Sequence[dict] | Rows,
    directory: epath.PathLike,
    chunk_rows: int,
    function: Callable[[Sequence[dict], Callable[[int], None]], list[dict]],
    label: str = "",
    unit: str = "rows",
) -> Rows:
    """Applies `function` to fixed chunks of rows, committing one part file each; resumes.

    Chunks are cut by number, so that a restart repeats the same shapes. Parts that exist are not computed
    again. The others are dealt out: of several processes each reads, computes and writes its own, and
    nothing in `function` may need another process.

    Args:
        rows: what is mapped; sliced only where this process has a chunk to compute.
        directory: gets `part-*.parquet`.
        chunk_rows: rows of a chunk.
        function: (a chunk, what it tells how many rows are done) -> as many rows.
        label: of the progress bar, which counts this process's share and what was there; "": none.
        unit: what a row is called there.

    Raises:
        Preempted: the program was asked to stop; every process has committed a chunk.
        UserError: what another process has written does not show here.
    """
    directory = epath.Path(directory)
    starts = range(0, max(len(rows), 1), chunk_rows)
    paths = [directory / f"part-{part:05}.parquet" for part in range(len(starts))]
    sizes = [min(chunk_rows, len(rows) - start) for start in starts]
    missing = [part for part, path in enumerate(paths) if not path.exists()]
    barrier(f"chunks of {directory}")  # all see the same parts missing
    rounds = deal(missing)
    done = len(rows) - sum(sizes[part] for part in missing)
    total = done + sum(sizes[part] for part in rounds if part is not None)
    with track(f"{mark()}{label}", total, unit, done, shown=bool(label)) as bar:
        for number, part in enumerate(rounds, start=1):
            if part is None:  # in the last round, after which nobody asks whether to stop
                break
            chunk = rows[starts[part] : starts[part] + chunk_rows]
            _write_part(paths[part], table_of(function(chunk, bar.advance)))
            if number < len(rounds) and stop_asked():
                raise Preempted(f"{directory}: stopped after {paths[part].name}")
    barrier(f"parts in {directory}")
    for part in missing:
        _wait_for(paths[part])
    return Rows(directory)


def _write_part(path: epath.Path, table: pa.Table) -> None:
    write_atomically(path, lambda temporary: _write_parquet(temporary, table), own=True)


def _wait_for(path: epath.Path) -> None:
    until = time.monotonic() + VISIBLE_S
    while not path.exists():
        if time.monotonic() > until:
            raise UserError(
                f"{path}: another process has written it, but it does not show here; output_dir must be "
                "one folder for all processes"
            )
        time.sleep(0.5)


def chunks(rows: Sequence[dict], size: int) -> Iterator[Sequence[dict]]:
    """Slices of `size` rows; one empty slice when there are none."""
    for start in range(0, max(len(rows), 1), size):
        yield rows[start : start + size]
