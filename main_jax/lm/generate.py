"""Sampling: prefill, then decode with a static KV cache until every row has stopped.

    results = generate(decoder, params, prompts, row_ids, sampling, stop_ids=(2,), seed=0)

A row's result depends on its id and the seed, not on its neighbours: its random keys are folded from the
row id, and the length bucket it is padded to follows from its own length.

Letters: B rows, P prompt slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from main_jax.lm.batches import length_bucket
from main_jax.lm.model import Decoder
from main_jax.lm.refill import Row, Statistics, collate, run
from main_jax.lm.sampling import Generation, Sampling, row_key, sample
from main_jax.lm.sharding import constrain, place_rows, row_shards

__all__ = ["Generation", "Sampling", "generate", "generate_batch", "row_key", "sample"]


@partial(jax.jit, static_argnames=("decoder", "sampling", "stop_ids"))
def generate_batch(
    params,
    tokens,
    lengths,
    keys,
    limits=None,
    *,
    decoder: Decoder,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
):
    """Prefill and decode loop of one batch.

    Args:
        params: the model's parameters.
        tokens: [B, P] int32 prompts, right padded.
        lengths: [B] int32; 0 marks a row that is only there to fill the batch.
        keys: [B, 2] uint32 raw keys.
        limits: [B] int32, new tokens that a row may have; None: max_new_tokens.
        decoder: the model.
        sampling: how tokens are drawn.
        stop_ids: token ids that end a row.

    Returns:
        ([B, max_new_tokens] int32 new tokens, [B] int32 their number without the stop token,
        [B] bool whether a stop token came).
    """
    rows, width = tokens.shape
    new = sampling.max_new_tokens
    limits = new if limits is None else limits
    unembed = decoder.unembed(params)
    stops = jnp.asarray(stop_ids or (-1,), jnp.int32)
    keys = jax.vmap(jax.random.wrap_key_data)(keys)

    def logits_of(hidden):
        return jnp.dot(hidden, unembed.astype(hidden.dtype), preferred_element_type=jnp.float32)

    with jax.named_scope("prefill"):
        slots = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), tokens.shape)
        segments = (slots < jnp.maximum(lengths, 1)[:, None]).astype(jnp.int32)
        cache = decoder.init_cache(rows, width + new)
        hidden, cache = decoder.apply(params, tokens, slots, segments, cache, prefill=True)
        last = jnp.maximum(lengths - 1, 0)
        logits = logits_of(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])

    def unfinished(carry):
        step, _, _, _, _, stopped = carry
        return (step < new) & jnp.any(~stopped & (step < limits))

    def decode(carry):
        step, cache, logits, out, count, stopped = carry
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        token = sample(logits, step_keys, sampling)
        stopped |= jnp.any(token[:, None] == stops, axis=-1) & (step < limits)
        live = ~stopped & (step < limits)
        out = out.at[:, step].set(jnp.where(live, token, 0))
        count = jnp.where(live, step + 1, count)
        position = (lengths + step)[:, None]
        # A finished row goes on writing into its own slots; nobody reads what it writes.
        hidden, cache = decoder.apply(
            params, token[:, None], position, jnp.ones((rows, 1), jnp.int32), cache
        )
        return step + 1, cache, logits_of(hidden[:, 0]), out, count, stopped

    with jax.named_scope("decode"):
        carry = (
            jnp.int32(0), cache, logits, jnp.zeros((rows, new), jnp.int32),
            jnp.zeros(rows, jnp.int32), lengths == 0,
        )  # fmt: skip
        _, _, _, out, count, stopped = jax.lax.while_loop(unfinished, decode, carry)
    return constrain(out, "ET"), constrain(count, "E"), constrain(stopped, "E")


def generate(
    decoder: Decoder,
    params,
    prompts: Sequence[np.ndarray],
    row_ids: Sequence[str],
    sampling: Sampling,
    *,
    stop_ids: tuple[int, ...],
    seed: int,
    batch_size: int = 32,
    limits: Sequence[int] | None = None,
    on_done: Callable[[int], None] = lambda rows: None,
    refill: bool = False,
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
        refill: a finished row makes place for the next prompt at once, see `lm/refill.py`.
        statistics: what refilling did is added here.

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
    rows = [Row(p, row_key(seed, i), n) for p, i, n in zip(prompts, row_ids, limits, strict=True)]
    batch_size += -batch_size % row_shards()
    static: Any = dict(decoder=decoder, sampling=sampling, stop_ids=tuple(stop_ids))
    if refill:
        return run(params, rows, batch_size, on_done, statistics or Statistics(), **static)
    buckets: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        buckets.setdefault(length_bucket(len(row.prompt), limit), []).append(i)
    results: list[Generation | None] = [None] * len(rows)
    for width, members in sorted(buckets.items()):
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            batch = collate([rows[i] for i in chosen], batch_size, width)
            out, count, stopped = jax.device_get(
                generate_batch(params, *place_rows(batch), **static)
            )
            for place, i in enumerate(chosen):
                reason = "stop" if stopped[place] else "length"
                results[i] = Generation(out[place, : count[place]], reason)
            on_done(len(chosen))
    return [r for r in results if r is not None]
