"""Sampling: prefill, then decode with a static KV cache until every row has stopped.

    results = generate(decoder, params, prompts, row_ids, sampling, stop_ids=(2,), seed=0)

A row's result depends on its id and the seed, not on its neighbours: its random keys are folded from the
row id, and the length bucket it is padded to follows from its own length.

Letters: B rows, P prompt slots, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from main_jax.lm.batches import length_bucket
from main_jax.lm.model import Decoder
from main_jax.lm.sharding import constrain, place_rows, row_shards


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_p 1 and top_k 0 are off."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError("sampling needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0")


class Generation(NamedTuple):
    """New token ids (without the stop token) and why they ended."""

    tokens: np.ndarray
    finish_reason: Literal["stop", "length"]


def row_key(seed: int, row_id: str) -> np.ndarray:
    """[2] uint32: a raw random key that depends on the seed and the row's id alone."""
    digest = hashlib.sha256(f"{seed}\0{row_id}".encode()).digest()
    return np.frombuffer(digest[:8], np.uint32)


def sample(logits, keys, sampling: Sampling):
    """One token per row from [B, V] float32 logits and [B] keys; [B] int32.

    Nucleus sampling keeps the smallest set of most likely tokens whose probability reaches top_p;
    top_k is applied before it.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    if k == logits.shape[-1] and sampling.top_p == 1:
        return jax.vmap(jax.random.categorical)(keys, logits / sampling.temperature).astype(
            jnp.int32
        )
    ordered, ids = jax.lax.top_k(logits / sampling.temperature, k)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = jnp.where(before < sampling.top_p, ordered, -jnp.inf)
    choice = jax.vmap(jax.random.categorical)(keys, kept)
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


@partial(jax.jit, static_argnames=("decoder", "sampling", "stop_ids"))
def generate_batch(
    params,
    tokens,
    lengths,
    keys,
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
        decoder: the model.
        sampling: how tokens are drawn.
        stop_ids: token ids that end a row.

    Returns:
        ([B, max_new_tokens] int32 new tokens, [B] int32 their number without the stop token,
        [B] bool whether a stop token came).
    """
    rows, width = tokens.shape
    new = sampling.max_new_tokens
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
        return (step < new) & ~jnp.all(stopped)

    def decode(carry):
        step, cache, logits, out, count, stopped = carry
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        token = sample(logits, step_keys, sampling)
        stopped |= jnp.any(token[:, None] == stops, axis=-1)
        live = ~stopped
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
    on_done: Callable[[int], None] = lambda rows: None,
) -> list[Generation]:
    """Generates for every prompt, in order. `on_done` is told how many rows each batch finished.

    Raises ValueError for an empty prompt or one longer than max_position_embeddings − max_new_tokens.
    """
    limit = decoder.config.max_position_embeddings - sampling.max_new_tokens
    buckets: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= limit:
            raise ValueError(f"prompt {row_ids[i]}: {len(prompt)} tokens, expected 1 to {limit}")
        buckets.setdefault(length_bucket(len(prompt), limit), []).append(i)
    results: list[Generation | None] = [None] * len(prompts)
    batch_size += -batch_size % row_shards()
    for width, members in sorted(buckets.items()):
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            tokens = np.zeros((batch_size, width), np.int32)
            lengths = np.zeros(batch_size, np.int32)
            keys = np.zeros((batch_size, 2), np.uint32)
            for row, i in enumerate(chosen):
                lengths[row] = len(prompts[i])
                tokens[row, : lengths[row]] = prompts[i]
                keys[row] = row_key(seed, row_ids[i])
            out, count, stopped = jax.device_get(
                generate_batch(
                    params,
                    *place_rows((tokens, lengths, keys)),
                    decoder=decoder,
                    sampling=sampling,
                    stop_ids=tuple(stop_ids),
                )
            )
            for row, i in enumerate(chosen):
                reason = "stop" if stopped[row] else "length"
                results[i] = Generation(out[row, : count[row]], reason)
            on_done(len(chosen))
    return [r for r in results if r is not None]
