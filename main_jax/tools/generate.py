"""`main-jax generate`: a model's completions of the rows of a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache

import pyarrow as pa
from etils import epath

from main_jax import parts
from main_jax.augment import complete
from main_jax.checks import check_room
from main_jax.config import Runtime
from main_jax.data.files import digest
from main_jax.data.reading import read_instructions, read_responses
from main_jax.errors import UserError
from main_jax.hub import find_model
from main_jax.lm.generate import Sampling, Statistics
from main_jax.lm.progress import say
from main_jax.lm.sharding import MeshShape, use_mesh
from main_jax.models import open_checkpoint
from main_jax.prompts import Direction, resolve_template
from main_jax.tools import files


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
    source, output = files.open_both(prompts, "--prompts", output, columns)
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
    given = files.as_given(source)
    theirs = files.their_columns(output, given)  # better now than after the work
    check_room(output, 6 * (source.size_bytes() or 0) + 1_000_000, "the output")
    load, statistics = cache(checkpoint.model), Statistics()

    def write_chunk(chunk: Sequence[dict], advance: Callable[[int], None]) -> list[dict]:
        with use_mesh(MeshShape(), local=True):
            completions = complete(
                chunk, direction, load(), prompt, sampling,
                seed=seed, batch_size=batch_size, on_done=advance, statistics=statistics,
            )  # fmt: skip
        return [{"completion": c.text, "finish_reason": c.finish_reason} for c in completions]

    settings = {
        "model": digest(epath.Path(checkpoint.path)), "prompts": source.fingerprint(),
        "columns": source.columns, "template": template, "direction": direction,
        "sampling": dataclasses.asdict(sampling), "seed": seed, "batch_size": batch_size,
    }  # fmt: skip
    with files.partial_folder(output, settings) as folder:
        read = read_instructions if forward else read_responses
        rows = files.staged_rows(source, read(source), folder)
        written = parts.map_chunks(
            rows, folder / "generated", files.CHUNK_ROWS, write_chunk, "generate"
        )
        new = {"completion": pa.string(), "finish_reason": pa.string()}
        answered = (
            raw.values | {name: row[name] for name in new}
            for raw, row in zip(given, written, strict=True)
        )
        files.write(output, answered, theirs | new)
    if statistics.steps:
        say(f"generate: {statistics}")
    say(f"{output}: {len(written):,} rows, {files.memory()}")
