"""`score` and `generate` outside a run: any checkpoint, any file, the same rows in the same order out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from main_jax import pairs
from main_jax.augment import complete
from main_jax.checks import check_file, check_output, check_room
from main_jax.config import Runtime
from main_jax.errors import UserError
from main_jax.filter import score_columns
from main_jax.hub import find_model
from main_jax.lm.generate import Sampling
from main_jax.lm.multihost import first
from main_jax.lm.progress import say, track
from main_jax.lm.sharding import MeshShape, use_mesh
from main_jax.models import Checkpoint, open_checkpoint
from main_jax.prompts import Direction, resolve_template
from main_jax.score import score_rows

CHUNK_ROWS = 1024
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
    data, output = (str(epath.Path(path).expanduser()) for path in (data, output))
    _check_paths(data, output, "--data")
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
    rows = pairs.read_pairs(data)
    check_room(output, 4 * epath.Path(data).stat().length + 1_000_000, "the output")
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
    scored: list[dict] = []
    with use_mesh(MeshShape()), track("score", len(rows), "pairs") as bar:
        loaded = {
            path: (checkpoint.model(), templates[path]) for path, checkpoint in opened.items()
        }
        forward, reverse = (loaded[path] for path in paths)
        for chunk in pairs.chunks(rows, CHUNK_ROWS):
            scored += score_rows(chunk, forward, reverse, tokens_per_batch)
            bar.advance(len(chunk))
    table = pairs.table_of([{k: row.get(k) for k in pairs.COLUMNS} for row in scored])
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
    dropped = sum(not row["keep"] for row in scored)
    if dropped == len(scored):
        raise UserError(f"{data}: no row could be scored; {output} says why (drop_reason)")
    say(f"{output}: {len(scored):,} rows, {dropped:,} of them without scores (see drop_reason)")


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
    prompts, output = (str(epath.Path(path).expanduser()) for path in (prompts, output))
    _check_paths(prompts, output, "--prompts")
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
    rows = (pairs.read_instructions if forward else pairs.read_responses)(prompts)
    check_room(output, 4 * epath.Path(prompts).stat().length + 1_000_000, "the output")
    if output.endswith(".parquet"):
        user_table(output, [row["raw"] for row in rows])  # better now than after the work
    columns: list[dict] = []
    with use_mesh(MeshShape()), track("generate", len(rows), "rows") as bar:
        loaded = checkpoint.model()
        for chunk in pairs.chunks(rows, CHUNK_ROWS):
            completions = complete(
                chunk, direction, loaded, prompt, sampling,
                seed=seed, batch_size=batch_size, on_done=bar.advance,
            )  # fmt: skip
            columns += [
                row["raw"] | {"completion": c.text, "finish_reason": c.finish_reason}
                for row, c in zip(chunk, completions, strict=True)
            ]
    if output.endswith(".parquet"):
        pairs.write_table(output, user_table(output, columns))
    else:
        pairs.write_jsonl(output, columns)
    say(f"{output}: {len(columns):,} rows")


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


def _check_paths(data: str, output: str, key: str) -> None:
    """First the files: a model may have to be fetched, which takes long."""
    check_file(data, key)
    if Path(output).is_dir():
        raise UserError(f"--output: {output}: is a directory, expected a .jsonl or .parquet file")
    if Path(output).suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--output: {output}: expected a name that ends in .jsonl or .parquet")
    check_output(Path(output).parent, "--output")
