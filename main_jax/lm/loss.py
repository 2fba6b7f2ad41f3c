"""The one likelihood of the project: per-example negative log-likelihood, never `[B, T, V]`.

Training, the dynamic weights and the scorer all call `per_example_nll`, so that the filter measures
exactly what training optimises.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from main_jax.lm.attention import platform
from main_jax.lm.batches import Batch
from main_jax.lm.model import Decoder
from main_jax.lm.sharding import constrain, row_shards

CHUNK_LOGITS = {"cpu": 1 << 21, "gpu": 1 << 24, "tpu": 1 << 24}
"""Logits alive at once on a device; the number of tokens per chunk follows from V. On a CPU 8 MiB, which its
caches hold: with 64 MiB the head of a model of 15 million parameters takes a third longer."""
GRADIENT_CHUNK_LOGITS = 1 << 24
"""The same where there are gradients: that of the head is added up once per chunk."""


def token_nll(hidden, unembed, targets, counted, chunk_logits: int | None = None):
    """Negative log-likelihood of each counted target token, in nats; 0 for the others.

    Args:
        hidden: [B, T, D] final hidden states, in the compute dtype.
        unembed: [D, V].
        targets: [B, T] int32, or [B, T, A] for A alternatives in each place.
        counted: [B, T] bool.
        chunk_logits: how many logits may be alive at once on a device; default: `CHUNK_LOGITS`.

    Returns:
        float32, of the targets' shape. The chunks are rematerialised in the backward pass, so neither
        direction keeps more than one chunk of logits. A chunk is some tokens of every row, so that every
        device that has rows works on each; those that are counted come first, and chunks without one cost
        nothing.
    """
    return _over_chunks(_nll, hidden, unembed, targets, counted, chunk_logits)


def _nll(logits, targets):
    picked = jnp.take_along_axis(logits, targets, axis=-1)
    return jax.nn.logsumexp(logits, axis=-1, keepdims=True) - picked


def _nll_and_miss(logits, targets):
    miss = jnp.argmax(logits, axis=-1, keepdims=True) != targets
    return _nll(logits, targets), miss.astype(jnp.float32)


def _over_chunks(measure, hidden, unembed, targets, counted, chunk_logits: int | None = None):
    """What `measure` makes of ([n, V] float32 logits, [n, A] targets), for all tokens, chunk by chunk."""
    rows, length, _ = hidden.shape
    chunk_logits = chunk_logits or CHUNK_LOGITS[platform()]
    size = min(length, max(1, chunk_logits * row_shards() // (unembed.shape[1] * rows)))
    # Known before the loop: devices need not ask each other in it.
    wanted = -(-counted.sum(1).max() // size)
    order = jnp.argsort(~counted, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)

    def compute(h, t):
        flat = h.reshape(-1, h.shape[-1])
        logits = jnp.dot(flat, unembed.astype(h.dtype), preferred_element_type=jnp.float32)
        found = measure(logits, t.reshape(flat.shape[0], -1))
        return jax.tree.map(lambda x: x.reshape(t.shape), found)

    @jax.checkpoint
    def of_chunk(i, h, t):
        nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(compute, h, t))
        return jax.lax.cond(i < wanted, compute, lambda h, t: nothing, h, t)

    def cut(x, axes):  # [B, T, ...] -> [chunks, B, size, ...]
        x = _take(x, order, back)
        x = jnp.pad(x, ((0, 0), (0, -length % size)) + ((0, 0),) * (x.ndim - 2))
        x = constrain(x.reshape(rows, -1, size, *x.shape[2:]), axes)
        return jnp.swapaxes(x, 0, 1)

    def join(x):
        x = jnp.swapaxes(x, 0, 1)
        x = _take(x.reshape(rows, -1, *x.shape[3:])[:, :length], back, order)
        return jnp.where(counted.reshape(*counted.shape, *[1] * (x.ndim - 2)), x, 0)

    chunks = cut(hidden, "BTTD"), cut(targets, "BTTE"[: targets.ndim + 1])
    numbers = jnp.arange(chunks[0].shape[0])
    _, found = jax.lax.scan(lambda _, c: (None, of_chunk(*c)), None, (numbers, *chunks))
    return jax.tree.map(join, found)


@jax.custom_vjp
def _take(x, order, back):
    """`[B, T, ...]` with the tokens of each row in the order of `[B, T]`; `back` is its inverse."""
    index = order.reshape(*order.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


# A gather the other way; by itself it would be a scatter.
_take.defvjp(
    lambda x, order, back: (_take(x, order, back), (order, back)),
    lambda saved, d: (_take(d, *saved[::-1]), None, None),
)


def _sum_by_example(values, batch: Batch):
    """[E] sums of what each token has, over the targets of each example."""
    num_examples = batch.fields["valid"].shape[0]
    owner = batch.example.reshape(-1)
    counted = (owner < num_examples).astype(jnp.float32)
    sums = jax.ops.segment_sum(values.reshape(-1) * counted, owner, num_examples + 1)[:-1]
    return constrain(sums, "E")


def per_example_nll(decoder: Decoder, params, batch: Batch, chunk_logits: int | None = None):
    """The NLL of every example of a packed batch; `chunk_logits` as in `token_nll`.

    Returns:
        (sum [E] float32 in nats, count [E] float32 target tokens). They travel apart: whoever needs a
        mean divides once, over everything it averages.
    """
    hidden, _ = decoder.apply(params, batch.tokens, batch.positions, batch.segment_ids)
    with jax.named_scope("loss"):
        counted = batch.example < batch.fields["valid"].shape[0]
        nll = token_nll(hidden, decoder.unembed(params), batch.targets, counted, chunk_logits)
        return _sum_by_example(nll, batch), _sum_by_example(jnp.ones_like(nll), batch)


@partial(jax.jit, static_argnames=("decoders",))
def example_nlls(decoders: tuple[Decoder, ...], params: Sequence, batches: Sequence[Batch]):
    """`per_example_nll` of several models, each on a batch of its own, in one program.

    One after another: side by side they would need each other's memory, and on a CPU each other's caches.
    """
    found = []
    for decoder, weights, batch in zip(decoders, params, batches, strict=True):
        if found:
            found[-1], batch = jax.lax.optimization_barrier((found[-1], batch))
        found.append(per_example_nll(decoder, weights, batch))
    return tuple(found)


@partial(jax.jit, static_argnames=("decoder",))
def example_nll_and_misses(decoder: Decoder, params, batch: Batch):
    """(NLL [E] float32 in nats, [E] float32 how many targets are not the most likely token).

    `batch.targets` and `batch.example` may have a last axis of A alternatives: examples that differ in
    single tokens of one segment share its computation, each place's target counting for its own example.
    """
    hidden, _ = decoder.apply(params, batch.tokens, batch.positions, batch.segment_ids)
    with jax.named_scope("loss"):
        counted = (batch.example < batch.fields["valid"].shape[0]).any(-1)
        found = _over_chunks(_nll_and_miss, hidden, decoder.unembed(params), batch.targets, counted)
        return tuple(_sum_by_example(values, batch) for values in found)
