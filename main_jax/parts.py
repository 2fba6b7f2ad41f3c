"""Tables in parts: written in chunks that stay, read back part by part, dealt out between processes.

    rows = stage_rows(read_pairs(source), folder / "rows", 1024, facts={})     # by the first process, once
    done = map_chunks(rows, folder / "data", 1024, work)                       # each process its own chunks

A part file is there whole or not at all: what is killed continues with the parts that are missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from main_jax.errors import UserError
from main_jax.lm.multihost import Preempted, barrier, deal, first, stop_asked
from main_jax.lm.progress import mark, track
from main_jax.pairs import batched, set_column, table_of, write_json, write_table

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
    A mistake in the rows is every process's UserError.
    """
    directory = epath.Path(directory)
    whole = directory / STAGED
    if first() and not whole.exists():
        told = {}
        try:
            with track(f"read {directory.name}", None, "rows") as bar:
                for part, chunk in enumerate(batched(rows, chunk_rows)):
                    _write_part(_part_path(directory, part), table_of(chunk))
                    bar.advance(len(chunk))
        except UserError as error:
            told = {"error": str(error)}
        write_json(whole, told | {"facts": dict(facts)})
    barrier(f"rows staged in {directory}")
    _wait_for(whole)
    if error := json.loads(whole.read_text()).get("error"):
        drop_staged(directory)
        raise UserError(error)
    return Rows(directory)


def staged_facts(directory: epath.PathLike) -> dict:
    """What `stage_rows` has kept beside the rows."""
    return json.loads((epath.Path(directory) / STAGED).read_text())["facts"]


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
    write_table(path, table, own=True)


def _wait_for(path: epath.Path) -> None:
    until = time.monotonic() + VISIBLE_S
    while not path.exists():
        if time.monotonic() > until:
            raise UserError(
                f"{path}: another process has written it, but it does not show here; output_dir must be "
                "one folder for all processes"
            )
        time.sleep(0.5)
