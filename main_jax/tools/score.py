"""`main-jax score` of a file: the user's rows with what both directions say of them, and a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np
import pyarrow as pa
from etils import epath

from main_jax import pairs, parts
from main_jax.checks import check_room
from main_jax.config import Runtime
from main_jax.data.files import digest
from main_jax.data.reading import read_pairs
from main_jax.data.sources import Source
from main_jax.errors import UserError
from main_jax.filter import READ, score_columns
from main_jax.hub import find_model
from main_jax.lm.multihost import first
from main_jax.lm.progress import say
from main_jax.lm.sharding import MeshShape, use_mesh
from main_jax.models import Checkpoint, open_checkpoint
from main_jax.prompts import Direction, resolve_template
from main_jax.report.scores import Scorer, refresh_page
from main_jax.score import score_rows
from main_jax.self_curation import Curator, read_prompt
from main_jax.tools import files

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
    self_curation: bool = False,
    curation_prompt: str | None = None,
    seed: int = 0,
    show_example: bool = False,
    columns: str | None = None,
) -> None:
    """Writes `data` with the NLLs in both directions and every filter score, and a page of them beside it.

    The user's other columns stay. Without `reverse_model` the forward model serves both directions. With
    `self_curation` it also grades every pair, asked as the file `curation_prompt` does, or as we do.
    Raises UserError, one line; also when no row could be scored (the output is there all the same).
    """
    source, output = files.open_both(data, "--data", output, columns)
    resolve_template(template)
    asking = read_prompt(curation_prompt) if self_curation or curation_prompt else None
    named = (forward_model, reverse_model or forward_model)
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
    given = files.as_given(source)
    theirs = files.their_columns(output, given)  # better now than after the work
    check_room(output, 6 * (source.size_bytes() or 0) + 1_000_000, "the output")
    model = cache(lambda path: opened[path].model())
    curator = Curator(templates[forward_model], asking) if asking else None

    def score_chunk(chunk: Sequence[dict], advance: Callable[[int], None]) -> list[dict]:
        with use_mesh(MeshShape(), local=True):
            forward, reverse = ((model(path), templates[path]) for path in paths)
            scored = score_rows(chunk, forward, reverse, tokens_per_batch, curator)
        advance(len(chunk))
        return [{k: row.get(k) for k in pairs.COLUMNS} for row in scored]

    settings = {
        "models": [digest(epath.Path(path)) for path in paths], "data": source.fingerprint(),
        "columns": source.columns, "template": template, "max_length": max_length,
        "excess": excess_length_strategy, "tokens_per_batch": tokens_per_batch, "curation": asking,
    }  # fmt: skip
    with files.partial_folder(output, settings) as folder:
        rows = files.staged_rows(source, read_pairs(source), folder)
        if show_example and first():
            row = rows[:1][0]
            for direction, path in zip(Direction, paths, strict=True):
                instruction, response = pairs.joined_instruction(row), row["response"] or ""
                print(templates[path].show(direction, instruction, response))
        scored = parts.map_chunks(
            rows, folder / "scored", files.CHUNK_ROWS, score_chunk, "score", "pairs"
        )
        table = parts.read_parts(folder / "scored", READ)
        scores = score_columns(table, seed)
        files.write(output, *_scored(given, scored, scores, theirs))
        parsed = Counter(scored.column("rating_parsed"))
        page = None
        if first():
            with_what = zip(Direction, named, paths, strict=True)
            scorers = {d: Scorer(name, template, templates[path]) for d, name, path in with_what}
            page = refresh_page(output, folder / "scored", data, scorers, seed)
    dropped = table["forward_nll_sum"].null_count
    if dropped == len(table):
        raise UserError(f"{source}: no row could be scored; {output} says why (drop_reason)")
    shown = f"; see {page}" if page else ""
    unscored = f"{dropped:,} of them without scores (drop_reason)"
    say(f"{output}: {len(table):,} rows, {unscored}, {files.memory()}{shown}")
    if curator:
        unparsed, rated = parsed[False], parsed[False] + parsed[True]
        say(f"{output}: for {unparsed:,} of {rated:,} pairs no grade is the likeliest answer")


def _scored(
    source: Source, scored: parts.Rows, scores: dict[str, np.ndarray], theirs: files.Types
) -> tuple[Iterator[dict], files.Types]:
    """The user's rows with what was measured and every filter score; and their columns."""
    ours = {k: t for k, t in pairs.COLUMNS.items() if k not in NOT_OURS or k not in theirs}
    ours |= dict.fromkeys(scores, pa.float64())
    others = {k: t for k, t in theirs.items() if k not in ours}

    def rows() -> Iterator[dict]:
        columns = zip(*scores.values(), strict=True)
        for raw, row, values in zip(source, scored, columns, strict=True):
            found = row | {
                n: float(v) if np.isfinite(v) else None for n, v in zip(scores, values, strict=True)
            }
            yield {k: found[k] for k in ours} | {
                k: v for k, v in raw.values.items() if k not in ours
            }

    return rows(), ours | others
