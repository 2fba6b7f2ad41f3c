"""What generation runs on the device: `admit` puts prompts into rows, `decode` takes steps of all rows.

A `State` of B rows, each at a place of its own in a static KV cache, stays on the device. Both programs own
it while they change it. A row that is done makes place for the next prompt without anything compiled anew,
and `decode` comes back to the host, `lm/generate.py`, only when enough rows are free.

Letters: B rows, P prompts, T tokens, V vocabulary; the rest as in `lm/model.py`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from main_jax.lm import row_cache
from main_jax.lm.model import Decoder
from main_jax.lm.row_cache import RowCache, on_rows
from main_jax.lm.sampling import Sampling, sample
from main_jax.lm.sharding import abstract_like, constrain


class State(NamedTuple):
    """What the device holds: `_axes` says how it is cut up."""

    cache: RowCache
    logits: Any  # [B, V] float32, of the next token
    keys: Any  # [B, 2] uint32
    limits: Any  # [B] int32
    tokens: Any  # [B, max_new_tokens] int32, the new ones
    counts: Any  # [B] int32, their number
    live: Any  # [B] bool


class Report(NamedTuple):
    """What the host learns when it is asked."""

    lengths: Any  # of the cache's rows; the rest as in `State`
    live: Any
    counts: Any
    tokens: Any
    steps: Any  # [] int32
    live_row_steps: Any  # [] int32


def _axes(state: State) -> State:
    cache = replace(state.cache, keys="LBKSH", values="LBKSH", lengths="B")
    return State(cache, "BV", "BT", "B", "BT", "B", "B")


def _pinned(state: State) -> State:
    """In its place: what a program gives is what the next one was compiled for."""
    return jax.tree.map(constrain, state, _axes(state))


@partial(jax.jit, static_argnames=("decoder", "rows", "prompt", "new"))
def empty_state(decoder: Decoder, rows: int, prompt: int, new: int) -> State:
    """A state of free rows, for prompts of up to `prompt` tokens and `new` ones."""
    counts = jnp.zeros(rows, jnp.int32)
    return _pinned(State(
        row_cache.empty(decoder, rows, prompt + new),
        jnp.zeros((rows, decoder.config.vocab_size)), jnp.zeros((rows, 2), jnp.uint32), counts,
        jnp.zeros((rows, new), jnp.int32), counts, jnp.zeros(rows, bool),
    ))  # fmt: skip


def abstract_state(decoder: Decoder, rows: int, prompt: int, new: int) -> State:
    """Shapes, dtypes and places of `empty_state`, under a mesh."""
    shapes = jax.eval_shape(partial(empty_state, decoder, rows, prompt, new))
    return abstract_like(shapes, _axes(shapes))


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
        hidden, new = decoder.apply(params, tokens, slots, segments, prefill=True)
        keys_and_values = (x.swapaxes(2, 3) for x in new)
        last = jnp.maximum(lengths - 1, 0)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]

    def insert(old: State, new: State, rows: jax.Array) -> State:
        def put(letters: str, old: jax.Array, new: jax.Array) -> jax.Array:
            at: list[Any] = [slice(size) for size in new.shape]  # of longer rows their beginning
            at[letters.index("B")] = rows
            return old.at[tuple(at)].set(new, mode="drop")

        return jax.tree.map(put, _axes(old), old, new)

    with jax.named_scope("insert"):
        new = State(
            RowCache(*keys_and_values, lengths, state.cache.width),
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
        constrain(state.cache.lengths, "E"), constrain(state.live, "E"),
        constrain(state.counts, "E"), constrain(state.tokens, "ET"), steps, live,
    )  # fmt: skip
    slots = state.cache.keys.shape[3]
    return _pinned(state._replace(cache=replace(state.cache, width=slots))), report
