"""Generation with slot refill: a row that is done makes place for the next prompt, nothing is compiled anew.

    results = run(params, rows, batch_size, on_done, statistics, decoder=..., sampling=..., stop_ids=(2,))

The device holds a `State` of B rows, each at a place of its own in a static KV cache. Two programs change
it, and own it while they do: `admit` runs some prompts of one length bucket and puts them into rows that
are free; `decode` takes steps of all rows, and comes back only when enough of them are free again. So the
programs are as many as the buckets and one more (elsewhere than on a CPU a few more, see `_width`).

Prompts go in longest first: prompts of one bucket come together, and what is looked at of the cache shrinks.

Letters: B rows, P prompts, T tokens, V vocabulary; the rest as in `lm/model.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from main_jax.lm import row_cache
from main_jax.lm.attention import platform
from main_jax.lm.batches import length_bucket
from main_jax.lm.model import Decoder
from main_jax.lm.row_cache import RowCache, on_rows
from main_jax.lm.sampling import Generation, Sampling, sample
from main_jax.lm.sharding import constrain, place_rows, row_shards

REFILL_SHARE = 1 / 16
"""Of the rows, how many are free before prompts are put there, and how many prompts are run together."""


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


class State(NamedTuple):
    """What the device holds: `AXES` says how it is cut up."""

    cache: RowCache
    logits: Any  # [B, V] float32, of the next token
    keys: Any  # [B, 2] uint32
    limits: Any  # [B] int32
    tokens: Any  # [B, max_new_tokens] int32, the new ones
    counts: Any  # [B] int32, their number
    live: Any  # [B] bool


class Report(NamedTuple):
    """What the host learns when it is asked."""

    live: Any
    counts: Any
    tokens: Any
    steps: Any  # [] int32
    live_row_steps: Any  # [] int32


def _axes(state: State) -> State:
    cache = replace(state.cache, keys="LBSKH", values="LBSKH", lengths="B")
    return State(cache, "BV", "BT", "B", "BT", "B", "B")


def _pinned(state: State) -> State:
    """In its place: what a program gives is what the next one was compiled for."""
    return jax.tree.map(constrain, state, _axes(state))


# ------------------------------------------------------------------------------------------- programs


@partial(jax.jit, static_argnames=("decoder", "rows", "prompt", "new"))
def empty_state(decoder: Decoder, rows: int, prompt: int, new: int) -> State:
    """A state of free rows, for prompts of up to `prompt` tokens and `new` ones."""
    counts = jnp.zeros(rows, jnp.int32)
    return _pinned(State(
        row_cache.empty(decoder, rows, prompt + new),
        jnp.zeros((rows, decoder.config.vocab_size)), jnp.zeros((rows, 2), jnp.uint32), counts,
        jnp.zeros((rows, new), jnp.int32), counts, jnp.zeros(rows, bool),
    ))  # fmt: skip


def _logits(decoder: Decoder, params, hidden):
    unembed = decoder.unembed(params).astype(hidden.dtype)
    return jnp.dot(hidden, unembed, preferred_element_type=jnp.float32)


@partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def admit(params, state: State, tokens, lengths, keys, limits, rows, *, decoder: Decoder) -> State:
    """Run prompts and put them into rows.

    Args:
        params: the model's parameters.
        state: is donated.
        tokens: [P, T] int32, right padded; each device has P / `row_shards()` of them, for its own rows.
        lengths: [P] int32; 0 marks one that is only there to fill the batch.
        keys: [P, 2] uint32 raw keys.
        limits: [P] int32, new tokens that there may be.
        rows: [P] int32, where to, among the device's own rows; behind the last: nowhere.
        decoder: the model.
    """
    with jax.named_scope("prefill"):
        slots = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        segments = (slots < jnp.maximum(lengths, 1)[:, None]).astype(jnp.int32)
        cache = decoder.init_cache(*tokens.shape)
        hidden, cache = decoder.apply(params, tokens, slots, segments, cache, prefill=True)
        last = jnp.maximum(lengths - 1, 0)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]

    def insert(old: State, new: State, rows: jax.Array) -> State:
        def put(letters: str, old: jax.Array, new: jax.Array) -> jax.Array:
            at = [slice(size) for size in new.shape]  # of longer rows their beginning
            at[letters.index("B")] = rows
            return old.at[tuple(at)].set(new, mode="drop")

        return jax.tree.map(put, _axes(old), old, new)

    with jax.named_scope("insert"):
        new = State(
            replace(state.cache, keys=cache.keys, values=cache.values, lengths=lengths),
            _logits(decoder, params, hidden), keys, limits,
            jnp.zeros((len(rows), 1), jnp.int32), jnp.zeros_like(lengths), lengths > 0,
        )  # fmt: skip
        axes = _axes(state)
        return _pinned(on_rows(insert, (axes, axes, "B"), axes)(state, new, rows))


@partial(
    jax.jit,
    static_argnames=("decoder", "sampling", "stop_ids", "width"),
    donate_argnames="state",
)
def decode(
    params,
    state: State,
    until,
    *,
    decoder: Decoder,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    width: int,
) -> tuple[State, Report]:
    """Steps of all rows, until no more than `until` are live or one has filled its `width` slots.

    Each draws a token from the logits of every live row, and the next logits. `state` is donated.
    """
    stops = jnp.asarray(stop_ids or (-1,), jnp.int32)
    keys = jax.vmap(jax.random.wrap_key_data)(state.keys)
    state = state._replace(cache=replace(state.cache, width=width))

    def wanted(carry):
        state, _, _ = carry
        return (jnp.sum(state.live) > until) & (jnp.max(state.cache.lengths) < width)

    def step(carry):
        state, steps, live_row_steps = carry
        cache, logits, _, limits, tokens, counts, live = state
        live_row_steps += jnp.sum(live)
        with jax.named_scope("sample"):
            token = sample(logits, jax.vmap(jax.random.fold_in)(keys, counts), sampling)
            live &= jnp.all(token[:, None] != stops, axis=-1)
            here = live[:, None] & (jnp.arange(sampling.max_new_tokens) == counts[:, None])
            tokens = jnp.where(here, token[:, None], tokens)
            counts += live
            live &= counts < limits
        # A row without a length costs no attention on a CPU.
        lengths = jnp.where(live, cache.lengths, 0)
        cache = replace(cache, lengths=lengths)
        segments = live[:, None].astype(jnp.int32)
        hidden, cache = decoder.apply(params, token[:, None], lengths[:, None], segments, cache)
        logits = _logits(decoder, params, hidden[:, 0])
        state = State(cache, logits, state.keys, limits, tokens, counts, live)
        return _pinned(state), steps + 1, live_row_steps

    with jax.named_scope("decode"):
        zero = jnp.int32(0)
        state, steps, live = jax.lax.while_loop(wanted, step, (state, zero, zero))
    report = Report(
        constrain(state.live, "E"), constrain(state.counts, "E"), constrain(state.tokens, "ET"),
        steps, live,
    )  # fmt: skip
    slots = state.cache.keys.shape[2]
    return _pinned(state._replace(cache=replace(state.cache, width=slots))), report


# ------------------------------------------------------------------------------------------- the host


def collate(rows: Sequence[Row], size: int, width: int) -> tuple[np.ndarray, ...]:
    """[size, width] tokens, [size] lengths, [size, 2] keys and [size] limits; places left are zeros."""
    tokens = np.zeros((size, width), np.int32)
    lengths, limits = np.zeros((2, size), np.int32)
    keys = np.zeros((size, 2), np.uint32)
    for place, (prompt, key, limit) in enumerate(rows):
        tokens[place, : len(prompt)] = prompt
        lengths[place], keys[place], limits[place] = len(prompt), key, limit
    return tokens, lengths, keys, limits


def _width(longest: int, slots: int) -> int:
    """How many slots to look at where the longest row has so many: a power of two, with room to go on.

    A CPU looks at what each row has.
    """
    wide = 256
    while wide < longest + 64 and platform() != "cpu":
        wide *= 2
    return min(wide, slots) if platform() != "cpu" else slots


def run(
    params,
    rows: Sequence[Row],
    batch_size: int,
    on_done: Callable[[int], None],
    statistics: Statistics,
    *,
    decoder: Decoder,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
) -> list[Generation]:
    """The new tokens of every row, in order; `batch_size`, a multiple of `row_shards()`, at a time."""
    new = sampling.max_new_tokens
    limit = decoder.config.max_position_embeddings - new
    results: list[Any] = [None] * len(rows)
    waiting = sorted(range(len(rows)), key=lambda i: -len(rows[i].prompt))
    widths = [length_bucket(len(row.prompt), limit) for row in rows]
    shards = row_shards()
    own = batch_size // shards  # rows of each device
    few = max(1, round(own * REFILL_SHARE))
    state = empty_state(decoder, batch_size, max(widths, default=1), new)
    slots = state.cache.keys.shape[2]
    owner: list[int | None] = [None] * batch_size

    while waiting or any(i is not None for i in owner):
        free = [[r for r in range(s * own, (s + 1) * own) if owner[r] is None] for s in range(shards)]
        while waiting and any(free):
            # A batch has a part for each device, with prompts for its own free rows.
            width, here = widths[waiting[0]], []
            for shard in range(shards):
                ...
    return results
