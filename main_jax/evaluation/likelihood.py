"""Log-likelihoods of continuations, packed; requests that differ in their last token share a computation.

Multiple choice asks for the same context several times, with A, B, C and D: one segment of one row
answers them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from main_jax.lm.batches import Batch, Example, pack_table
from main_jax.lm.loss import example_nll_and_misses
from main_jax.lm.sharding import place_rows, row_shards
from main_jax.models import LanguageModel


class Likelihood(NamedTuple):
    """Of one continuation: in nats, whether greedy decoding gives it, whether something was cut off."""

    log_likelihood: float
    is_greedy: bool
    truncated: bool


def likelihoods(
    model: LanguageModel,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    max_length: int,
    budget: int,
) -> list[Likelihood]:
    """The likelihood of each continuation after its context, (context ids, continuation ids), in order.

    At most `max_length` tokens are seen at once: what is longer loses its beginning. `budget` is the
    number of padded tokens of a batch.
    """
    tokens = [[*context, *continuation][-max_length - 1 :] for context, continuation in requests]
    counts = [min(len(r[1]), len(t) - 1) for r, t in zip(requests, tokens, strict=True)]
    groups: dict[tuple, list[int]] = {}
    for i, (ids, count) in enumerate(zip(tokens, counts, strict=True)):
        groups.setdefault((tuple(ids[:-1]), count), []).append(i)
    members = list(groups.values())
    examples = [_example(tokens[group[0]], counts[group[0]]) for group in members]
    width = 1 << (max(map(len, members), default=1) - 1).bit_length()  # few shapes to compile
    last = np.zeros((len(members), width), np.int32)
    for g, group in enumerate(members):
        last[g, : len(group)] = [tokens[i][-1] for i in group]
    found: dict[int, Likelihood] = {}
    for indices, batch in pack_table(examples, budget, max_length + 1, row_shards()):
        nll, misses = jax.device_get(
            example_nll_and_misses(
                model.decoder, model.params, place_rows(with_alternatives(batch, last[indices]))
            )
        )
        for row, g in enumerate(indices):
            for place, i in enumerate(members[g], start=row * width):
                cut = len(tokens[i]) < sum(map(len, requests[i]))
                found[i] = Likelihood(-float(nll[place]), not misses[place], cut)
    return [found[i] for i in range(len(requests))]


def _example(ids: Sequence[int], count: int) -> Example:
    return Example(np.asarray(ids, np.int32), np.arange(len(ids)) >= len(ids) - count)


def with_alternatives(batch: Batch, last: np.ndarray) -> Batch:
    """The batch with a last axis of alternatives: example e becomes e * A, ..., e * A + A - 1.

    `last` is [e, A] int32: the last token of each. All other tokens are those of the example.
    """
    valid, width = batch.fields["valid"], last.shape[1]
    owner = batch.example[..., None]
    example = np.where(owner < len(valid), owner * width + np.arange(width), len(valid) * width)
    targets = np.repeat(batch.targets[..., None], width, axis=-1)
    rows, slots = np.nonzero(batch.example < len(valid))
    final = np.full((len(valid), 2), -1)
    final[batch.example[rows, slots]] = np.stack([rows, slots], axis=-1)  # the latest slot stays
    final = final[: len(last)]
    has = final[:, 0] >= 0
    targets[final[has, 0], final[has, 1]] = last[has]
    return batch._replace(
        targets=targets, example=example.astype(np.int32), fields={"valid": np.repeat(valid, width)}
    )
