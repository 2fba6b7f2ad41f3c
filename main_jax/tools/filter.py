"""`main-jax filter` of a scored file: in seconds, without a model."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from main_jax import pairs
from main_jax.data.files import Row
from main_jax.data.sources import Source
from main_jax.errors import UserError
from main_jax.filter import MEASURED, READ, with_filter
from main_jax.lm.progress import say
from main_jax.tools import files


def filter_file(
    scored: str,
    output: str,
    *,
    by: str,
    select: str,
    keep: float,
    every_pair: bool = False,
    seed: int = 0,
) -> None:
    """Writes the rows of a scored file that the score `by` keeps, or all with `keep` and `drop_reason`.

    Needs no model: every score follows from the NLLs and token counts. Raises UserError, one line.
    """
    source, output = files.open_both(scored, "SCORED", output)
    theirs = files.their_columns(output, source)
    if missing := [name for name in MEASURED if name not in theirs]:
        raise UserError(f"{scored}: no column {missing[0]}; `main-jax score` writes it")
    table = _measured(source)
    table = with_filter(table, by, select, keep, seed)
    columns = theirs | dict(zip(table.column_names, table.schema.types, strict=True))

    def rows() -> Iterator[dict]:
        new = (row for batch in table.to_batches(pairs.ROW_GROUP) for row in batch.to_pylist())
        for raw, row in zip(source, new, strict=True):
            if every_pair or row["keep"]:
                yield raw.values | row

    files.write(output, rows(), columns)
    kept = int(np.count_nonzero(np.asarray(table["keep"])))
    say(f"{output}: {by} keeps {kept:,} of {len(table):,} rows, {files.memory()}")


def _measured(source: Source) -> pa.Table:
    """What a filter needs of a scored file. Raises UserError for a value that no scorer writes."""
    columns: dict[str, list] = {name: [] for name in READ}
    for row in source:
        scored = _number(row, "forward_nll_sum", float) is not None
        for name, column in columns.items():
            if pairs.COLUMNS[name] != pa.string():
                kind = int if name.endswith("_tokens") else float
                value = _number(row, name, kind)
                if scored and value is None and name != "rating":
                    raise UserError(f"{row}, {name}: expected a number, as forward_nll_sum is one")
            else:
                value = row.values.get(name)
                if name == "id" and type(value) is int:
                    value = str(value)
                if not isinstance(value, str) and (value is not None or name == "id"):
                    raise UserError(f"{row}, {name}: expected text, found {type(value).__name__}")
            column.append(value)
    return pa.table({n: pa.array(c, pairs.COLUMNS[n]) for n, c in columns.items()})


def _number(row: Row, name: str, kind: type[int] | type[float]) -> float | None:
    value = row.values.get(name)
    if value is None or value != value:  # NaN, as pandas writes it
        return None
    wanted, least = ("a whole number >= 1", 1) if kind is int else ("a number >= 0", 0)
    right = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not right or not least <= value < math.inf or kind(value) != value:
        raise UserError(f"{row}, {name}: expected {wanted}, found {str(value)[:40]!r}")
    return kind(value)
