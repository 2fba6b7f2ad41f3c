"""`score`, `generate` and `filter` outside a run: any checkpoint, any file, rows in the same order out.

Scoring and generation commit chunks beside the output, in OUTPUT.partial, until it is written: what is
stopped or killed continues with the same command. Several processes share the chunks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from main_jax import pairs, parts
from main_jax.augment import complete
from main_jax.checks import check_output, check_room
from main_jax.config import COLUMNS, Runtime
from main_jax.data.files import Row, digest
from main_jax.data.reading import read_instructions, read_pairs, read_responses, staged
from main_jax.data.sources import Source, open_source
from main_jax.errors import UserError
from main_jax.filter import MEASURED, READ, score_columns, with_filter
from main_jax.hub import find_model
from main_jax.lm.generate import Sampling
from main_jax.lm.multihost import barrier, first
from main_jax.lm.progress import say
from main_jax.lm.sharding import MeshShape, use_mesh
from main_jax.models import Checkpoint, open_checkpoint
from main_jax.prompts import Direction, resolve_template
from main_jax.report.scores import Scorer, refresh_page
from main_jax.score import score_rows
from main_jax.self_curation import Curator, read_prompt
from main_jax.strict_yaml import nearest

CHUNK_ROWS = 1024
Types = dict[str, pa.DataType]
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
    source, output = _open_both(data, "--data", output, columns)
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
    given = _as_given(source)
    theirs = _their_columns(output, given)  # better now than after the work
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
    with _partial(output, settings) as folder:
        rows = _staged(source, read_pairs(source), folder)
        if show_example and first():
            row = rows[:1][0]
            for direction, path in zip(Direction, paths, strict=True):
                instruction, response = pairs.joined_instruction(row), row["response"] or ""
                print(templates[path].show(direction, instruction, response))
        scored = parts.map_chunks(
            rows, folder / "scored", CHUNK_ROWS, score_chunk, "score", "pairs"
        )
        table = parts.read_parts(folder / "scored", READ)
        scores = score_columns(table, seed)
        _write(output, *_scored(given, scored, scores, theirs))
        page = None
        if first():
            with_what = zip(Direction, named, paths, strict=True)
            scorers = {d: Scorer(name, template, templates[path]) for d, name, path in with_what}
            page = refresh_page(output, folder / "scored", data, scorers, seed)
    dropped = table["forward_nll_sum"].null_count
    if dropped == len(table):
        raise UserError(f"{source}: no row could be scored; {output} says why (drop_reason)")
    shown = f"; see {page}" if page else ""
    say(f"{output}: {len(table):,} rows, {dropped:,} of them without scores (drop_reason){shown}")


def _scored(
    source: Source, scored: parts.Rows, scores: dict[str, np.ndarray], theirs: Types
) -> tuple[Iterator[dict], Types]:
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
    theirs = _their_columns(output, source)
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

    _write(output, rows(), columns)
    kept = int(np.count_nonzero(np.asarray(table["keep"])))
    say(f"{output}: {by} keeps {kept:,} of {len(table):,} rows")


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
    columns: str | None = None,
) -> None:
    """Writes the rows of `prompts` with `completion` and `finish_reason`.

    A prompt longer than `max_position_embeddings − max_new_tokens` has a null completion and the finish
    reason `too_long`, an empty one `empty_instruction` or `empty_response`. Raises UserError, one line.
    """
    source, output = _open_both(prompts, "--prompts", output, columns)
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
    given = _as_given(source)
    theirs = _their_columns(output, given)  # better now than after the work
    check_room(output, 6 * (source.size_bytes() or 0) + 1_000_000, "the output")
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
        "columns": source.columns, "template": template, "direction": direction,
        "sampling": dataclasses.asdict(sampling), "seed": seed, "batch_size": batch_size,
    }  # fmt: skip
    with _partial(output, settings) as folder:
        read = read_instructions if forward else read_responses
        rows = _staged(source, read(source), folder)
        written = parts.map_chunks(rows, folder / "generated", CHUNK_ROWS, write_chunk, "generate")
        new = {"completion": pa.string(), "finish_reason": pa.string()}
        answered = (
            raw.values | {name: row[name] for name in new}
            for raw, row in zip(given, written, strict=True)
        )
        _write(output, answered, theirs | new)
    say(f"{output}: {len(written):,} rows")


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


def _staged(source: Source, rows: Iterator[dict], folder: epath.Path) -> parts.Rows:
    try:
        found, skipped = staged(source, rows, folder / "rows", CHUNK_ROWS)
    except UserError:  # what nobody can use; other processes may be there
        if jax.process_count() == 1:
            folder.rmtree()
        raise
    for reason, n in skipped.items():
        say(f"{source}: {n:,} rows left out by its rules: {reason}")
    return found


def _their_columns(output: str, source: Source) -> Types:
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


def _write(output: str, rows: Iterator[dict], columns: Types) -> None:
    schema = pa.schema(list(columns.items())) if output.endswith(".parquet") else None
    pairs.write_rows(output, rows, schema)


def _open_both(data: str, key: str, output: str, columns: str | None = None) -> tuple[Source, str]:
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


def _as_given(source: Source) -> Source:
    """The same rows with the user's own names of columns; what an extraction makes has them no more."""
    return source if source.rules else dataclasses.replace(source, columns={})
