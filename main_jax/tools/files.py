"""What comes in from a user's file and what goes out: columns of their own, chunks that stay, the output."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from main_jax import pairs, parts
from main_jax.checks import check_output
from main_jax.config import COLUMNS
from main_jax.data.reading import staged
from main_jax.data.sources import Source, open_source
from main_jax.errors import UserError
from main_jax.lm.multihost import barrier, first
from main_jax.lm.progress import say
from main_jax.lm.runtime import peak_memory_bytes
from main_jax.strict_yaml import nearest

CHUNK_ROWS = 1024
SETTINGS = "settings.json"
Types = dict[str, pa.DataType]


@contextmanager
def partial_folder(output: str, settings: dict) -> Generator[epath.Path]:
    """The folder of committed chunks; what was begun with other settings is begun anew."""
    folder = epath.Path(f"{output}.partial")
    told = json.dumps(settings, sort_keys=True)
    file = folder / SETTINGS
    old = file.read_text() if file.exists() else None
    barrier(f"{folder}: seen")
    if old == told:
        say(f"{output}: continues")
    elif first():
        _remove(folder)
        pairs.write_text(file, told)
    barrier(f"{folder}: begins")
    yield folder
    barrier(f"{folder}: read")
    if first():
        _remove(folder)


def _remove(folder: epath.Path) -> None:
    """First what says whose chunks they are: those that a kill leaves are nobody's, and not continued."""
    if folder.exists():
        (folder / SETTINGS).unlink(missing_ok=True)
        folder.rmtree()


def staged_rows(source: Source, rows: Iterator[dict], folder: epath.Path) -> parts.Rows:
    """The rows of a source, read once; what its rules leave out is said. Raises UserError."""
    try:
        found, skipped = staged(source, rows, folder / "rows", CHUNK_ROWS)
    except UserError:  # of all processes alike: nobody can use what is there
        barrier(f"{folder}: refused")
        if first():
            _remove(folder)
        raise
    for reason, n in skipped.items():
        say(f"{source}: {n:,} rows left out by its rules: {reason}")
    return found


def their_columns(output: str, source: Source) -> Types:
    """The columns of the user's rows. Raises UserError where the output is Parquet and cannot hold them."""
    names: Types = {}
    schema = pa.schema([])
    for batch in pairs.batched((row.values for row in source), pairs.ROW_GROUP):
        names |= {name: pa.null() for row in batch for name in row if name not in names}
        if not output.endswith(".parquet"):
            continue
        try:
            table = pa.Table.from_pylist([{n: row.get(n) for n in names} for row in batch])
            schema = pa.unify_schemas([schema, table.schema], promote_options="permissive")
            pq.write_table(schema.empty_table(), pa.BufferOutputStream())
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            raise UserError(
                f"{output}: the other columns do not fit a Parquet table ({error}); "
                "choose a name that ends in .jsonl"
            ) from None
    return names | {field.name: field.type for field in schema}


def write(output: str, rows: Iterator[dict], columns: Types) -> None:
    """Writes the rows as they come, as the name of the output says."""
    schema = pa.schema(list(columns.items())) if output.endswith(".parquet") else None
    pairs.write_rows(output, rows, schema)


def memory() -> str:
    """What this process has held at most, for the last line of a verb."""
    return f"{peak_memory_bytes() / 1e6:,.0f} MB of host memory at most"


def open_both(data: str, key: str, output: str, columns: str | None = None) -> tuple[Source, str]:
    """First the files: a model may have to be fetched, which takes long."""
    source, path = open_source(data, key, _mapping(columns)), epath.Path(output).expanduser()
    if path.is_dir():
        raise UserError(f"--output: {path}: is a directory, expected a .jsonl or .parquet file")
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--output: {path}: expected a name that ends in .jsonl or .parquet")
    check_output(path.parent, "--output")
    return source, str(path)


def _mapping(columns: str | None) -> dict[str, str]:
    """`instruction=prompt,response=completion`: our columns' names -> theirs. Raises UserError."""
    found: dict[str, str] = {}
    for pair in columns.split(",") if columns else ():
        ours, _, theirs = (part.strip() for part in pair.partition("="))
        if ours not in COLUMNS:
            raise UserError(f"--columns: unknown column {ours}{nearest(ours, COLUMNS)}")
        if not theirs or ours in found:
            raise UserError(f"--columns: {ours}: expected it once, as {ours}=THEIRS")
        found[ours] = theirs
    return found


def as_given(source: Source) -> Source:
    """The same rows with the user's own names of columns; what an extraction makes has them no more."""
    return source if source.rules else dataclasses.replace(source, columns={})
