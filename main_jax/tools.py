"""`score`, `generate` and `filter` outside a run: any checkpoint, any file, rows in the same order out.

Scoring and generation commit chunks beside the output, in OUTPUT.partial, until it is written: what is
stopped or killed continues with the same command. Several processes share the chunks.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from main_jax import pairs
from main_jax.augment import complete
from main_jax.checks import check_output, check_room
from main_jax.config import Runtime
from main_jax.data.files import digest
from main_jax.data.reading import read_instructions, read_pairs, read_responses
from main_jax.data.sources import Source, open_source
from main_jax.errors import UserError
from main_jax.filter import score_columns, with_filter
from main_jax.hub import find_model
from main_jax.lm.generate import Sampling
from main_jax.lm.multihost import barrier, first
from main_jax.lm.progress import say
from main_jax.lm.sharding import MeshShape, use_mesh
from main_jax.models import Checkpoint, open_checkpoint
from main_jax.prompts import Direction, resolve_template
from main_jax.score import score_rows

CHUNK_ROWS = 1024
MEASURED = (
    "id", "forward_nll_sum", "forward_tokens", "reverse_nll_sum", "reverse_tokens",
    "response_nll_sum", "instruction_nll_sum", "drop_reason",
)  # fmt: skip
"""Columns that a filter needs."""
NOT_OURS = ("source", "origin", "round", "finish_reason")
"""Columns of the pair table that scoring does not fill where the user has them."""


def score_file(
    forward_model: str,
    reverse_model: str | None,
    data: str,
    output: str,
    *,
    template: str = "auto",
    max_length: int | None = None,
    excess_length_strategy: str = "drop",
    tokens_per_batch: int = 8192,
    seed: int = 0,
    show_example: bool = False,
) -> None:
    """Writes `data` with the NLLs in both directions and every filter score.

    The user's other columns stay. Without `reverse_model` the forward model serves both directions.
    Raises UserError, one line; also when no row could be scored (the output is there all the same).
    """
    source, output = _open_both(data, "--data", output)
    resolve_template(template)
    forward_model = find_model(forward_model, "--forward-model")
    if reverse_model is not None:
        reverse_model = find_model(reverse_model, "--reverse-model")
    paths = (forward_model, reverse_model or forward_model)
    opened: dict[str, Checkpoint] = {}
    for path in dict.fromkeys(paths):
        opened[path] = open_checkpoint(path, Runtime())
    templates = {}
    for path, checkpoint in opened.items():
        limit = max_length or min(2048, checkpoint.decoder.config.max_position_embeddings)
        templates[path] = checkpoint.prompt(template, limit, excess_length_strategy)
    rows = read_pairs(source)
    _say_skipped(source)
    check_room(output, 4 * (source.size_bytes() or 0) + 1_000_000, "the output")
    if output.endswith(".parquet"):
        user_table(output, [row["raw"] for row in rows])  # better now than after the work
    if show_example and first():
        for direction, path in zip(Direction, paths, strict=True):
            row = rows[0]
            print(
                templates[path].show(
                    direction, pairs.joined_instruction(row), row["response"] or ""
                )
            )
    model = cache(lambda path: opened[path].model())

    def score_chunk(chunk: Sequence[dict], advance: Callable[[int], None]) -> list[dict]:
        with use_mesh(MeshShape(), local=True):
            forward, reverse = ((model(path), templates[path]) for path in paths)
            scored = score_rows(chunk, forward, reverse, tokens_per_batch)
        advance(len(chunk))
        return [{k: row.get(k) for k in pairs.COLUMNS} for row in scored]

    settings = {
        "models": [digest(epath.Path(path)) for path in paths], "data": source.fingerprint(),
        "template": template, "max_length": max_length, "excess": excess_length_strategy,
        "tokens_per_batch": tokens_per_batch,
    }  # fmt: skip
    with _partial(output, settings) as folder:
        scored = list(pairs.map_chunks(rows, folder, CHUNK_ROWS, score_chunk, "score", "pairs"))
        _write_scored(output, rows, scored, seed)
    dropped = sum(not row["keep"] for row in scored)
    if dropped == len(scored):
        raise UserError(f"{source}: no row could be scored; {output} says why (drop_reason)")
    say(f"{output}: {len(scored):,} rows, {dropped:,} of them without scores (see drop_reason)")


def _write_scored(output: str, rows: Sequence[dict], scored: Sequence[dict], seed: int) -> None:
    """The user's rows with what was measured and every filter score."""
    table = pairs.table_of(scored)
    for name, values in score_columns(table, seed).items():
        table = table.append_column(name, pa.array(values, mask=~np.isfinite(values)))
    theirs = dict.fromkeys(name for row in rows for name in row["raw"])
    table = table.drop_columns([name for name in NOT_OURS if name in theirs])
    own = [{k: v for k, v in row["raw"].items() if k not in table.column_names} for row in rows]
    if output.endswith(".parquet"):
        others = user_table(output, own)
        for name in others.column_names:
            table = table.append_column(name, others[name])
        pairs.write_table(output, table)
    else:
        both = zip(table.to_pylist(), own, strict=True)
        pairs.write_jsonl(output, [ours | theirs for ours, theirs in both])


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
    source, output = _open_both(scored, "SCORED", output)
    rows = [row.values for row in source]
    missing = [name for name in MEASURED if not any(name in row for row in rows)]
    if missing:
        raise UserError(f"{scored}: no column {missing[0]}; `main-jax score` writes it")
    table = user_table(output, rows)
    for name in MEASURED:
        place = table.column_names.index(name)
        table = table.set_column(place, name, table[name].cast(pairs.COLUMNS[name]))
    table = with_filter(table, by, select, keep, seed)
    kept = table.filter(table["keep"])
    pairs.write_table(output, table if every_pair else kept)
    say(f"{output}: {by} keeps {kept.num_rows:,} of {table.num_rows:,} rows")


def generate_file(
    model: str,
    prompts: str,
    output: str,
    *,
    template: str = "auto",
    direction: Direction = Direction.FORWARD,
    sampling: Sampling,
    seed: int = 0,
    batch_size: int = 32,
) -> None:
    """Writes the rows of `prompts` with `completion` and `finish_reason`.

    A prompt longer than `max_position_embeddings − max_new_tokens` has a null completion and the finish
    reason `too_long`, an empty one `empty_instruction` or `empty_response`. Raises UserError, one line.
    """
    source, output = _open_both(prompts, "--prompts", output)
    resolve_template(template)
    checkpoint = open_checkpoint(find_model(model, "--model"), Runtime())
    positions = checkpoint.decoder.config.max_position_embeddings
    if sampling.max_new_tokens >= positions:
        raise UserError(
            f"max_new_tokens {sampling.max_new_tokens} leaves no room for a prompt; "
            f"the model has {positions} positions"
        )
    prompt = checkpoint.prompt(template, positions)
    forward = direction is Direction.FORWARD
    rows = (read_instructions if forward else read_responses)(source)
    _say_skipped(source)
    check_room(output, 4 * (source.size_bytes() or 0) + 1_000_000, "the output")
    if output.endswith(".parquet"):
        user_table(output, [row["raw"] for row in rows])  # better now than after the work
    load = cache(checkpoint.model)

    def write_chunk(chunk: Sequence[dict], advance: Callable[[int], None]) -> list[dict]:
        with use_mesh(MeshShape(), local=True):
            completions = complete(
                chunk, direction, load(), prompt, sampling,
                seed=seed, batch_size=batch_size, on_done=advance,
            )  # fmt: skip
        return [{"completion": c.text, "finish_reason": c.finish_reason} for c in completions]

    settings = {
        "model": digest(epath.Path(checkpoint.path)), "prompts": source.fingerprint(),
        "template": template, "direction": direction, "sampling": dataclasses.asdict(sampling),
        "seed": seed, "batch_size": batch_size,
    }  # fmt: skip
    with _partial(output, settings) as folder:
        written = pairs.map_chunks(rows, folder, CHUNK_ROWS, write_chunk, "generate")
        columns = [
            row["raw"] | {name: new[name] for name in ("completion", "finish_reason")}
            for row, new in zip(rows, written, strict=True)
        ]
        _write_generated(output, columns)
    say(f"{output}: {len(columns):,} rows")


def _write_generated(output: str, columns: Sequence[dict]) -> None:
    if output.endswith(".parquet"):
        pairs.write_table(output, user_table(output, columns))
    else:
        pairs.write_jsonl(output, columns)


@contextmanager
def _partial(output: str, settings: dict) -> Generator[epath.Path]:
    """The folder of committed chunks; what was begun with other settings is begun anew."""
    folder = epath.Path(f"{output}.partial")
    told = json.dumps(settings, sort_keys=True)
    file = folder / "settings.json"
    old = file.read_text() if file.exists() else None
    barrier(f"{folder}: seen")
    if old == told:
        say(f"{output}: continues")
    elif first():
        if folder.exists():
            folder.rmtree()
        pairs.write_text(file, told)
    barrier(f"{folder}: begins")
    yield folder
    barrier(f"{folder}: read")
    if first():
        folder.rmtree()


def user_table(output: str, rows: Sequence[dict]) -> pa.Table:
    """A table of rows with columns of the user's own. Raises UserError when Parquet cannot hold them."""
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
        pq.write_table(table.slice(0, 0), pa.BufferOutputStream())
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise UserError(
            f"{output}: the other columns do not fit a Parquet table ({error}); "
            "choose a name that ends in .jsonl"
        ) from None
    return table


def _open_both(data: str, key: str, output: str) -> tuple[Source, str]:
    """First the files: a model may have to be fetched, which takes long."""
    source, output = open_source(data, key), str(epath.Path(output).expanduser())
    if Path(output).is_dir():
        raise UserError(f"--output: {output}: is a directory, expected a .jsonl or .parquet file")
    if Path(output).suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--output: {output}: expected a name that ends in .jsonl or .parquet")
    check_output(Path(output).parent, "--output")
    return source, output


def _say_skipped(source: Source) -> None:
    for reason, n in sorted(source.skipped.items()):
        say(f"{source}: {n:,} rows left out by its rules: {reason}")
