"""Generation: prompts in, new tokens out, with slot refill, so that no row waits for its neighbours.

    results = generate(decoder, params, prompts, row_ids, sampling, stop_ids=(2,), seed=0)

The device decodes B rows, `lm/decode.py`; this is the host's part: which prompt goes into which free row,
and what a row that is done has given. The programs are as many as there are length buckets of prompts, and
one for decoding (on accelerators a few, see `_width`). Prompts go in longest first: those of one bucket come
together, and what is looked at of the cache shrinks.

A row's result depends on its id and the seed, not on its neighbours: its random keys are folded from the
row id, and the length bucket it is padded to follows from its own length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from main_jax.lm.attention import platform
from main_jax.lm.batches import length_bucket
from main_jax.lm.decode import admit, decode, empty_state
from main_jax.lm.model import Decoder
from main_jax.lm.sampling import Generation, Sampling, row_key
from main_jax.lm.sharding import place_rows, row_shards

REFILL_SHARE = 1 / 16
"""Of a device's rows, how many are free before prompts are put there, and are run together."""


class Row(NamedTuple):
    """What is asked: token ids, the raw random key, and how many new tokens there may be."""

    prompt: np.ndarray
    key: np.ndarray
    limit: int


@dataclass
class Statistics:
    """What was done; adds up over calls."""

    rows: int = 0
    new_tokens: int = 0
    steps: int = 0
    row_steps: int = 0  # steps times rows
    live_row_steps: int = 0  # of them, those of a row that was not done
    prefills: int = 0
    returns: int = 0  # how often the host was asked

    @property
    def utilisation(self) -> float:
        """Share of the row steps that served a row."""
        return self.live_row_steps / max(self.row_steps, 1)

    def __str__(self) -> str:
        return (
            f"{self.new_tokens:,} new tokens; {self.utilisation:.0%} of the rows' steps served one"
        )


def generate(
    decoder: Decoder,
    params,
    prompts: Sequence[np.ndarray],
    row_ids: Sequence[str],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    seed: int,
    batch_size: int = 32,
    limits: Sequence[int] | None = None,
    on_done: Callable[[int], None] = lambda rows: None,
    statistics: Statistics | None = None,
) -> list[Generation]:
    """Generates for every prompt, in order.

    Args:
        decoder: the model.
        params: its parameters.
        prompts: token ids.
        row_ids: an id for each.
        sampling: how tokens are drawn.
        stop_ids: token ids that end a row.
        seed: of all random keys.
        batch_size: rows decoded together.
        limits: new tokens that each row may have, max_new_tokens at most, which is the default.
        on_done: is told how many rows were finished, now and then.
        statistics: what was done is added here.

    Raises ValueError for an empty prompt or one longer than max_position_embeddings − max_new_tokens, and
    for limits outside of 1 to max_new_tokens.
    """
    new = sampling.max_new_tokens
    limit = decoder.config.max_position_embeddings - new
    limits = [new] * len(prompts) if limits is None else limits
    for prompt, row_id, most in zip(prompts, row_ids, limits, strict=True):
        if not 0 < len(prompt) <= limit:
            raise ValueError(f"prompt {row_id}: {len(prompt)} tokens, expected 1 to {limit}")
        if not 0 < most <= new:
            raise ValueError(f"prompt {row_id}: at most {most} new tokens, expected 1 to {new}")
    if not prompts:
        return []
    rows = [Row(p, row_key(seed, i), n) for p, i, n in zip(prompts, row_ids, limits, strict=True)]
    statistics = statistics or Statistics()
    slots = _Slots(rows, limit, batch_size)
    state = empty_state(decoder, slots.size, max(slots.buckets), new)
    results: list[Generation | None] = [None] * len(rows)
    while slots.waiting or slots.busy:
        while slots.waiting and slots.busy < slots.size:
            state = admit(params, state, *place_rows(slots.fill()), decoder=decoder)
            statistics.prefills += 1
        state, report = decode(
            params, state, np.int32(slots.until), decoder=decoder, sampling=sampling,
            stop_ids=tuple(stop_ids), width=_width(int(slots.lengths.max()), state.cache.width),
        )  # fmt: skip
        report = jax.device_get(report)
        done = slots.free(report.live, report.lengths)
        for place, i in done:
            count = report.counts[place]
            reason = "stop" if count < rows[i].limit else "length"
            results[i] = Generation(report.tokens[place, :count].copy(), reason)
            statistics.new_tokens += int(count)
        statistics.rows += len(done)
        statistics.steps += int(report.steps)
        statistics.row_steps += int(report.steps) * slots.size
        statistics.live_row_steps += int(report.live_row_steps)
        statistics.returns += 1
        on_done(len(done))
    return [r for r in results if r is not None]


def prompts_together(batch_size: int) -> int:
    """How many prompts are run together, over all devices that have rows."""
    own = -(-batch_size // row_shards())  # rows of each device
    return row_shards() * max(1, round(own * REFILL_SHARE))


class _Slots:
    """Who is where: the device's rows, and the prompts that wait for one.

    Each device has rows of its own, so a batch of prompts has a part for each.
    """

    def __init__(self, rows: Sequence[Row], limit: int, batch_size: int):
        self.rows, self.shards = rows, row_shards()
        self.buckets = [length_bucket(len(row.prompt), limit) for row in rows]
        self.waiting = deque(sorted(range(len(rows)), key=lambda i: -len(rows[i].prompt)))
        self.own = -(-batch_size // self.shards)  # rows of each device
        self.few = prompts_together(batch_size) // self.shards
        self.size = self.own * self.shards
        self.owner: list[int | None] = [None] * self.size
        self.lengths = np.zeros(self.size, np.int64)

    @property
    def busy(self) -> int:
        """Rows that are not free."""
        return self.size - self.owner.count(None)

    @property
    def until(self) -> int:
        """With how many live rows left the host wants to be asked."""
        return self.busy - self.shards * self.few if self.waiting else self.busy // 2

    def fill(self) -> tuple[np.ndarray, ...]:
        """Give free rows to prompts of one bucket; what `decode.admit` wants of them."""
        bucket = self.buckets[self.waiting[0]]
        asked, places = {}, np.full(self.shards * self.few, self.own, np.int32)
        for shard in range(self.shards):
            free = [r for r in range(self.own) if self.owner[shard * self.own + r] is None]
            for place, r in enumerate(free[: self.few], shard * self.few):
                if self.waiting and self.buckets[self.waiting[0]] == bucket:
                    i = self.owner[shard * self.own + r] = self.waiting.popleft()
                    asked[place], places[place] = self.rows[i], r
                    self.lengths[shard * self.own + r] = len(self.rows[i].prompt)
        return (*collate(asked, len(places), bucket), places)

    def free(self, live: np.ndarray, lengths: np.ndarray) -> list[tuple[int, int]]:
        """(place, prompt) of the rows that are done, which are free from now on."""
        done = [(r, i) for r, i in enumerate(self.owner) if i is not None and not live[r]]
        for r, _ in done:
            self.owner[r] = None
        self.lengths = np.array(lengths)
        return done


def collate(rows: Mapping[int, Row], size: int, width: int) -> tuple[np.ndarray, ...]:
    """By place: [size, width] tokens, [size] lengths, [size, 2] keys, [size] limits; zeros where none is."""
    tokens = np.zeros((size, width), np.int32)
    lengths, limits = np.zeros((2, size), np.int32)
    keys = np.zeros((size, 2), np.uint32)
    for place, (prompt, key, limit) in rows.items():
        tokens[place, : len(prompt)] = prompt
        lengths[place], keys[place], limits[place] = len(prompt), key, limit
    return tokens, lengths, keys, limits


def _width(longest: int, slots: int) -> int:
    """How many slots to look at: a power of two with room to go on; a CPU looks at what each row has."""
    return slots if platform() == "cpu" else min(max(256, 1 << (longest + 64).bit_length()), slots)
