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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
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


# ------------------------------------------------------------------------------------------- parts

ROW_GROUP = 4096
STAGED = "staged.json"
VISIBLE_S = 90.0
"""How long a folder on a network may take to show what another machine has written."""


def read_parts(directory: epath.PathLike, columns: Sequence[str] | None = None) -> pa.Table:
    """All `part-*.parquet` of a directory, in order; of `columns` those that are there."""
    tables = [_read_part(part, columns) for part in parts_of(directory)]
    return pa.concat_tables(tables, promote_options="default")


def parts_of(directory: epath.PathLike) -> list[epath.Path]:
    """The part files of a directory, in order."""
    return sorted(epath.Path(directory).glob("part-*.parquet"))


def _read_part(part: epath.Path, columns: Sequence[str] | None = None) -> pa.Table:
    with part.open("rb") as handle:
        file = pq.ParquetFile(handle)
        names = file.schema_arrow.names
        return file.read(names if columns is None else [c for c in columns if c in names])


def _num_rows(part: epath.Path) -> int:
    with part.open("rb") as handle:
        return pq.read_metadata(handle).num_rows


class Rows:
    """The rows of all `part-*.parquet` of a directory; a part is read when rows of it are asked for."""

    def __init__(self, directory: epath.PathLike):
        self._parts = parts_of(directory)
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

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Part by part, with `columns` alone where they are given."""
        for part in self._parts:
            yield _read_part(part, columns)

    def column(self, name: str) -> list:
        """One column of all rows."""
        return [value for table in self.tables([name]) for value in table[name].to_pylist()]


def stage_rows(
    rows: Iterable[dict], directory: epath.PathLike, chunk_rows: int, facts: Mapping[str, Any]
) -> Rows:
    """Commits rows that come one by one as part files; only the first process goes through them.

    So a source is read once, however many processes there are, and never held in memory; what was staged
    before is not read again. `facts` is kept beside the rows, as it is when all have passed (`staged_facts`).
    """
    directory = epath.Path(directory)
    whole = directory / STAGED
    if first() and not whole.exists():
        with track(f"read {directory.name}", None, "rows") as bar:
            for part, chunk in enumerate(batched(rows, chunk_rows)):
                _write_part(_part_path(directory, part), table_of(chunk))
                bar.advance(len(chunk))
        write_json(whole, dict(facts))
    barrier(f"rows staged in {directory}")
    _wait_for(whole)
    return Rows(directory)


def staged_facts(directory: epath.PathLike) -> dict:
    """What `stage_rows` has kept beside the rows."""
    return json.loads((epath.Path(directory) / STAGED).read_text())


def drop_staged(directory: epath.PathLike) -> None:
    """Removes staged rows that nobody needs any more."""
    directory = epath.Path(directory)
    barrier(f"{directory}: read")
    if first() and directory.exists():
        (directory / STAGED).unlink(
            missing_ok=True
        )  # first: half of the parts are not to be taken for all
        directory.rmtree()


def set_columns(directory: epath.PathLike, new: pa.Table, destination: epath.PathLike) -> None:
    """Writes every part of a directory anew, with the columns of `new`, a part in memory at a time."""
    if not first():
        return
    start = 0
    for part in parts_of(directory):
        table = _read_part(part)
        for name in new.column_names:
            table = set_column(table, name, new[name].slice(start, table.num_rows))
        write_table(epath.Path(destination) / part.name, table)
        start += table.num_rows


def set_column(table: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The table with a column of that name, in its place where there was one."""
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, values)
    return table.append_column(name, values)


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
    paths = [_part_path(directory, part) for part in range(len(starts))]
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


def _part_path(directory: epath.Path, part: int) -> epath.Path:
    return directory / f"part-{part:05}.parquet"


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


def batched(rows: Iterable[dict], size: int) -> Iterator[list[dict]]:
    """Lists of `size` rows, the last one shorter; one empty list when there are none."""
    rows = iter(rows)
    yield list(islice(rows, size))
    while batch := list(islice(rows, size)):
        yield batch
