"""Pairs become units of training: their texts are tokenised once, each process its share, then rendered.

seeds = tokenise(rows, out / "tokens" / "seed", prompt, chunk_rows)
units = pair_units(seeds, Direction.FORWARD, prompt)
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from etils import epath

from main_jax.lm.batches import Unit
from main_jax.pairs import joined_instruction
from main_jax.parts import Rows, map_chunks
from main_jax.prompts import Direction, Prompt


class TokenPair(NamedTuple):
    """The two texts of a pair as [T] int32 tokens, and its weight."""

    instruction: np.ndarray
    response: np.ndarray
    weight: float


def tokenise(
    rows: Sequence[dict] | Rows,
    directory: epath.PathLike,
    prompt: Prompt,
    chunk_rows: int,
    wanted: Container[str] | None = None,
) -> list[TokenPair | None]:
    """The rows in tokens, in their order: of several processes each does its own chunks, all get all.

    None stands for a row that nobody trains on: one with a `drop_reason`, or, where `wanted` says which
    ids are, any other.
    """

    def encode(chunk: Sequence[dict], advance: Callable[[int], None]) -> list[dict]:
        chosen = [
            not row["drop_reason"] if wanted is None else row["id"] in wanted for row in chunk
        ]
        members = [row for row, is_chosen in zip(chunk, chosen, strict=True) if is_chosen]
        texts = [t for row in members for t in (joined_instruction(row), row["response"] or "")]
        ids = iter(prompt.encode_all(texts))
        return [
            {
                "id": row["id"],
                "weight": row["weight"] if is_chosen else None,
                "instruction_tokens": np.asarray(next(ids) if is_chosen else [], np.int32),
                "response_tokens": np.asarray(next(ids) if is_chosen else [], np.int32),
            }
            for row, is_chosen in zip(chunk, chosen, strict=True)
        ]

    written = map_chunks(rows, directory, chunk_rows, encode)
    names = ("weight", "instruction_tokens", "response_tokens")
    return [pair for part in written.tables(names) if len(part) for pair in _token_pairs(part)]


def _token_pairs(part: pa.Table) -> Iterator[TokenPair | None]:
    instructions, responses = (
        _arrays(part[f"{side}_tokens"].combine_chunks()) for side in ("instruction", "response")
    )
    weights = part["weight"].to_pylist()
    for instruction, response, weight in zip(instructions, responses, weights, strict=True):
        yield None if weight is None else TokenPair(instruction, response, weight)


def _arrays(lists: pa.ListArray) -> Iterator[np.ndarray]:
    """The lists of a column, none of them copied."""
    offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy()
    return (values[start:stop] for start, stop in pairwise(offsets))


def pair_units(
    seeds: Sequence[TokenPair | None],
    direction: Direction,
    prompt: Prompt,
    twins: Sequence[TokenPair | None] = (),
) -> list[Unit]:
    """One unit per seed pair: its example and, where it has one, its aligned twin's (same target).

    What is None or does not fit the template is left out; a twin follows its seed pair there.
    """
    units = []
    for seed, twin in zip(seeds, twins or [None] * len(seeds), strict=True):
        rendered = [
            None if pair is None else prompt.render(direction, pair.instruction, pair.response)
            for pair in (seed, twin)
        ]
        examples = [None if r is None else r.example for r in rendered]
        if seed is None or examples[0] is None:
            continue
        members = [(e, aligned) for e, aligned in zip(examples, (False, True), strict=True) if e]
        fields = tuple({"weight": seed.weight, "aligned": aligned} for _, aligned in members)
        units.append(Unit(tuple(e for e, _ in members), fields))
    return units
