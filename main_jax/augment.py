"""Step 2: the reverse model writes an instruction for every unlabelled response.

`write_chunks` serves every stage that generates: also the alignment rounds, where either model writes the
condition of a seed pair. `complete` is what lies below it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

from etils import epath

from main_jax.lm.generate import Sampling, Statistics, generate
from main_jax.lm.progress import say
from main_jax.lm.sharding import use_mesh
from main_jax.models import LanguageModel
from main_jax.pairs import joined_instruction
from main_jax.parts import Rows, map_chunks
from main_jax.prompts import Direction, Prompt
from main_jax.run import Run, derive_seed


class Completion(NamedTuple):
    """A generated text, or None with the reason in `finish_reason`: `empty_*` or `too_long`.

    `truncated` says that the prompt had to be cut.
    """

    text: str | None
    finish_reason: str
    truncated: bool = False


def complete(
    rows: Sequence[dict],
    direction: Direction,
    model: LanguageModel,
    prompt: Prompt,
    sampling: Sampling,
    *,
    seed: int,
    batch_size: int,
    on_done: Callable[[int], None] = lambda rows: None,
    statistics: Statistics | None = None,
) -> list[Completion]:
    """The target side of `direction` for every row, from its other side; same order.

    A prompt may have up to `max_position_embeddings − max_new_tokens` tokens. Rows with a `drop_reason`
    are not generated; it becomes their finish reason.
    """
    given, _ = direction.sides("instruction", "response")
    limit = model.decoder.config.max_position_embeddings - sampling.max_new_tokens
    texts = [direction.sides(joined_instruction(r), r.get("response") or "")[0] for r in rows]
    conditions = prompt.encode_all(texts)
    prompts = [prompt.question(direction, ids, limit) for ids in conditions]
    results: dict[int, Completion] = {}
    asked = []
    for i, (row, text, tokens) in enumerate(zip(rows, texts, prompts, strict=True)):
        reason = row.get("drop_reason") or (None if text.strip() else f"empty_{given}")
        if reason or tokens is None:
            results[i] = Completion(None, reason or "too_long")
        else:
            asked.append((i, tokens))
    on_done(len(results))
    generated = generate(
        model.decoder, model.params, [tokens for _, tokens in asked],
        [rows[i]["id"] for i, _ in asked], sampling,
        stop_ids=prompt.stop_ids, seed=seed, batch_size=batch_size, on_done=on_done,
        statistics=statistics,
    )  # fmt: skip
    for (i, _), generation in zip(asked, generated, strict=True):
        text = prompt.decode(generation.tokens)
        cut = prompt.room(direction, limit) < len(conditions[i])
        results[i] = Completion(text, generation.finish_reason, cut)
    return [results[i] for i in range(len(rows))]


def write_side(
    rows: Sequence[dict], direction: Direction, model: LanguageModel, prompt: Prompt,
    sampling: Sampling, **how,
) -> list[dict]:  # fmt: skip
    """The rows with the target side of `direction` generated from the other side; same order.

    REVERSE writes `instruction` (and clears `input`), FORWARD writes `response`, stripped of outer white
    space. A row that cannot be asked, or whose text comes out empty, keeps null or the empty text and a
    `drop_reason`. `how` is passed on to `complete`.
    """
    _, written = direction.sides("instruction", "response")
    done = []
    completions = complete(rows, direction, model, prompt, sampling, **how)
    for row, (text, reason, truncated) in zip(rows, completions, strict=True):
        row = row | ({"input": None} if direction is Direction.REVERSE else {})
        if text is None:
            row |= {written: None, "drop_reason": reason}
        else:
            text = text.strip()
            row |= {written: text, "finish_reason": reason}
            row["truncated"] = bool(row.get("truncated")) or truncated
            row["drop_reason"] = None if text else f"empty_{written}"
        done.append(row)
    return done


def write_chunks(
    run: Run,
    out: epath.Path,
    rows: Sequence[dict] | Rows,
    direction: Direction,
    load: Callable[[], LanguageModel],
    sampling: Sampling,
    *,
    purpose: str,
    label: str,
    prompt: Prompt | None = None,
    finish: Callable[[list[dict]], list[dict]] = lambda rows: rows,
) -> Rows:
    """`write_side` in committed chunks under `out/data`, with a progress bar; resumes.

    Each of several processes writes chunks of its own, with a model of its own on its own devices.

    Args:
        run: gives the template, the chunk size and the seed.
        out: where `data/part-*.parquet` go.
        rows: see `write_side`.
        direction: which side is written.
        load: gives the writer; called only when a chunk is missing, with the mesh for it set.
        sampling: how tokens are drawn.
        purpose: what the seed is derived for.
        label: what the bar is called.
        prompt: the template; default: the run's.
        finish: a last look at the rows of a chunk before they are committed.
    """
    load, runtime = cache(load), run.config.runtime
    seed, statistics = derive_seed(run.config.seed, purpose), Statistics()

    def write(chunk: Sequence[dict], advance: Callable[[int], None]) -> list[dict]:
        with use_mesh(run.config.inference_mesh, local=True):
            return finish(write_side(
                chunk, direction, load(), prompt or run.prompt, sampling,
                seed=seed, batch_size=runtime.generation_batch_size, on_done=advance,
                statistics=statistics,
            ))  # fmt: skip

    written = map_chunks(rows, out / "data", runtime.chunk_rows, write, label)
    if statistics.steps:
        say(f"{label}: {statistics}")
    return written
