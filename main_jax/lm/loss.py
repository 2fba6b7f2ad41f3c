"""The one likelihood of the project: per-example negative log-likelihood, never `[B, T, V]`.

Training, the dynamic weights and the scorer all call `per_example_nll`, so that the filter measures
exactly what training optimises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

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


# --------------------------------------------------------------------------------------- by token


def token_nll(hidden, unembed, targets, counted, chunk_logits: int | None = None):
    """Negative log-likelihood of each counted target token, in nats; 0 for the others.

    Args:
        hidden: [B, T, D] final hidden states, in the compute dtype.
        unembed: [D, V].
        targets: [B, T] int32, or [B, T, A] for A alternatives in each place.
        counted: [B, T] bool.
        chunk_logits: how many logits may be alive at once on a device; default: `CHUNK_LOGITS`.

    Returns:
        float32, of the targets' shape. It has no gradient: `weighted_nll` has.
    """
    (nll,) = _measure(_nll, hidden, unembed, targets, counted, chunk_logits)
    return nll


def _nll(logits, targets):
    picked = jnp.take_along_axis(logits, targets, axis=-1)
    return (jax.nn.logsumexp(logits, axis=-1, keepdims=True) - picked,)


def _nll_and_miss(logits, targets):
    miss = jnp.argmax(logits, axis=-1, keepdims=True) != targets
    return *_nll(logits, targets), miss.astype(jnp.float32)


def _measure(measure, hidden, unembed, targets, counted, chunk_logits: int | None = None):
    """What `measure` makes of ([n, V] float32 logits, [n, A] targets), for all tokens, chunk by chunk."""
    chunks = _Chunks.of(counted, unembed, chunk_logits or CHUNK_LOGITS[platform()])
    hidden, targets, unembed = chunks.cut(hidden), chunks.cut(targets), _gathered(unembed, hidden)

    def body(i, found):
        logits = _logits(_flat(hidden[i]), unembed)
        new = measure(logits, targets[i].reshape(len(logits), -1))
        return tuple(a.at[i].set(x.reshape(a.shape[1:])) for a, x in zip(found, new, strict=True))

    a_chunk = jax.ShapeDtypeStruct((1, unembed.shape[1]), jnp.float32)
    outputs = jax.eval_shape(measure, a_chunk, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    nothing = tuple(jnp.zeros(targets.shape, x.dtype) for x in outputs)
    return tuple(map(chunks.join, jax.lax.fori_loop(0, chunks.wanted, body, nothing)))


def weighted_token_nll(hidden, unembed, targets, counted, weights, chunk_logits: int | None = None):
    """Sum of weight times NLL over the counted tokens, with its gradient by `hidden` and `unembed`.

    Arguments as of `token_nll`, targets [B, T]; weights: [B, T] float32, which get no gradient.

    Returns:
        (the sum, [B, T] NLLs as of `token_nll`, which have no gradient). The weights being known, the
        gradient of a chunk is computed while its logits are there: neither direction keeps more than one
        chunk, and none is computed twice (as in Liger Kernel, arXiv 2410.10989).
    """
    chunk_logits = chunk_logits or GRADIENT_CHUNK_LOGITS
    total, nll = _weighted(hidden, unembed, targets, counted, weights, chunk_logits)
    return total, jax.lax.stop_gradient(nll)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _weighted(hidden, unembed, targets, counted, weights, chunk_logits):
    nll = token_nll(hidden, unembed, targets, counted, chunk_logits)
    return jnp.sum(weights * nll), nll


def _weighted_forward(hidden, unembed, targets, counted, weights, chunk_logits):
    chunks = _Chunks.of(counted, unembed, chunk_logits)
    weights = jnp.where(counted, weights, 0)
    tokens = tuple(map(chunks.cut, (hidden, targets, weights)))
    matrix = _gathered(unembed, hidden)

    def body(i, carry):
        nll, d_hidden, d_unembed = carry
        h, target, weight = (_flat(x[i]) for x in tokens)
        logits = _logits(h, matrix)
        (new,) = _nll(logits, target)
        of_target = jnp.arange(logits.shape[1]) == target
        probability = jnp.exp(logits - (new + jnp.take_along_axis(logits, target, axis=-1)))
        d_logits = (weight * (probability - of_target)).astype(h.dtype)
        d_h = jnp.dot(d_logits, matrix.T, preferred_element_type=jnp.float32)
        d_unembed += jnp.dot(h.T, d_logits, preferred_element_type=jnp.float32)
        return (
            nll.at[i].set(new.reshape(nll.shape[1:])),
            d_hidden.at[i].set(d_h.reshape(d_hidden.shape[1:]).astype(h.dtype)),
            constrain(d_unembed, "DV", parameter=True),
        )

    nothing = jnp.zeros(tokens[1].shape, jnp.float32), jnp.zeros_like(tokens[0])
    nothing = *nothing, constrain(jnp.zeros(unembed.shape, jnp.float32), "DV", parameter=True)
    nll, d_hidden, d_unembed = jax.lax.fori_loop(0, chunks.wanted, body, nothing)
    nll, d_hidden = chunks.join(nll), chunks.join(d_hidden)
    return (jnp.sum(weights * nll), nll), (d_hidden, d_unembed.astype(unembed.dtype))


def _weighted_backward(chunk_logits, saved, d):
    return *((d[0] * x).astype(x.dtype) for x in saved), None, None, None


_weighted.defvjp(_weighted_forward, _weighted_backward)


# --------------------------------------------------------------------------------------- chunks


class _Chunks(NamedTuple):
    """Which tokens are computed together: those that are counted first, so many of each device's."""

    order: Any  # [G, N] the tokens of each group: a device's rows, one after another
    back: Any  # [G, N] its inverse
    wanted: Any  # chunks that have a counted token
    size: int  # tokens of a group in a chunk
    counted: Any  # [B, T]

    @classmethod
    def of(cls, counted, unembed, chunk_logits: int) -> _Chunks:
        groups = math.gcd(counted.shape[0], row_shards())
        grouped = constrain(counted.reshape(groups, -1), "BT")
        size = min(grouped.shape[1], max(1, chunk_logits // unembed.shape[1]))
        order = jnp.argsort(~grouped, axis=1, stable=True)
        # Known before the loop: devices need not ask each other in it.
        wanted = -(-grouped.sum(1).max() // size)
        return cls(order, jnp.argsort(order, axis=1), wanted, size, counted)

    def cut(self, x):
        """[B, T, ...] -> [chunks, G, size, ...]"""
        groups, tokens = self.order.shape
        x = _take(x.reshape(groups, tokens, *x.shape[2:]), self.order)
        x = jnp.pad(x, ((0, 0), (0, -tokens % self.size)) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(groups, -1, self.size, *x.shape[2:])
        return jnp.swapaxes(constrain(x, "BTT" + "E" * (x.ndim - 3)), 0, 1)

    def join(self, x):
        """[chunks, G, size, ...] -> [B, T, ...], the tokens in their places; 0 for those not counted."""
        x = jnp.swapaxes(x, 0, 1)
        x = x.reshape(len(self.order), -1, *x.shape[3:])[:, : self.order.shape[1]]
        x = _take(x, self.back).reshape(*self.counted.shape, *x.shape[2:])
        x = jnp.where(self.counted.reshape(*self.counted.shape, *[1] * (x.ndim - 2)), x, 0)
        return constrain(x, "BT" + "E" * (x.ndim - 2))


def _take(x, order):
    """`[G, N, ...]` with the tokens of each group in this order."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)


def _flat(x):
    """[G, size, D] -> [n, D]; [G, size] -> [n, 1]"""
    return x.reshape(x.shape[0] * x.shape[1], -1)


def _gathered(unembed, hidden):
    """The `[D, V]` matrix as it multiplies: once for all chunks."""
    return constrain(unembed.astype(hidden.dtype), "DV")


def _logits(hidden, unembed):
    return jnp.dot(hidden, unembed, preferred_element_type=jnp.float32)


# --------------------------------------------------------------------------------------- by example


def _counted(batch: Batch):
    return batch.example < batch.fields["valid"].shape[0]


def _sum_by_example(values, batch: Batch):
    """[E] sums of what each token has, over the targets of each example."""
    num_examples = batch.fields["valid"].shape[0]
    owner = batch.example.reshape(-1)
    counted = (owner < num_examples).astype(jnp.float32)
    sums = jax.ops.segment_sum(values.reshape(-1) * counted, owner, num_examples + 1)[:-1]
    return constrain(sums, "E")


def per_example_nll(decoder: Decoder, params, batch: Batch, chunk_logits: int | None = None):
    """The NLL of every example of a packed batch; `chunk_logits` as in `token_nll`. No gradient.

    Returns:
        (sum [E] float32 in nats, count [E] float32 target tokens). They travel apart: whoever needs a
        mean divides once, over everything it averages.
    """
    hidden, _ = decoder.apply(params, batch.tokens, batch.positions, batch.segment_ids)
    with jax.named_scope("loss"):
        counted = _counted(batch)
        nll = token_nll(hidden, decoder.unembed(params), batch.targets, counted, chunk_logits)
        return _sum_by_example(nll, batch), _sum_by_example(counted, batch)


def weighted_nll(decoder: Decoder, params, batch: Batch, weigh: Callable):
    """Sum of weight times NLL over the examples of a packed batch, with its gradient by `params`.

    weigh: (sums [E], counts [E]) as of `per_example_nll` -> ([E] weights, anything). No gradient flows
        through it. Where it does not look at the sums, they are not computed for it.

    Returns:
        (the sum, sums [E], counts [E], what else `weigh` gave)
    """
    hidden, _ = decoder.apply(params, batch.tokens, batch.positions, batch.segment_ids)
    with jax.named_scope("loss"):
        counted, unembed = _counted(batch), decoder.unembed(params)
        counts = _sum_by_example(counted, batch)
        # Dead code where the weights do not depend on it.
        nll = token_nll(*jax.lax.stop_gradient((hidden, unembed)), batch.targets, counted)
        weights, more = jax.lax.stop_gradient(weigh(_sum_by_example(nll, batch), counts))
        by_token = jnp.append(weights, 0)[batch.example]
        total, nll = weighted_token_nll(hidden, unembed, batch.targets, counted, by_token)
        return total, _sum_by_example(nll, batch), counts, more


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
        counted, unembed = _counted(batch).any(-1), decoder.unembed(params)
        found = _measure(_nll_and_miss, hidden, unembed, batch.targets, counted)
        return tuple(_sum_by_example(values, batch) for values in found)
