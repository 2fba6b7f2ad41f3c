"""The one likelihood of the project: per-example negative log-likelihood, never `[B, T, V]`.

Training, the dynamic weights and the scorer all call `per_example_nll`, so that the filter measures
exactly what training optimises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from main_jax.lm.attention import platform
from main_jax.lm.batches import Batch
from main_jax.lm.model import Decoder
from main_jax.lm.sharding import constrain, row_shards

CHUNK_LOGITS = {"cpu": 1 << 23, "gpu": 1 << 26, "tpu": 1 << 26}
"""Logits alive at once on a device; the number of tokens per chunk follows from V. On a CPU 32 MiB, about
what caches hold; on accelerators so many that reading the `[D, V]` matrix is not what a chunk waits for."""


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
        float32, of the targets' shape. It has no gradient: `weighted_token_nll` has.
    """
    (nll,) = _measure(_nll, 1, hidden, unembed, targets, counted, chunk_logits)
    return nll


def _normaliser_and_nll(logits, targets):
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return normaliser, normaliser - jnp.take_along_axis(logits, targets, axis=-1)


def _nll(logits, targets):
    return _normaliser_and_nll(logits, targets)[1:]


def _nll_and_miss(logits, targets):
    miss = jnp.argmax(logits, axis=-1, keepdims=True) != targets
    return *_nll(logits, targets), miss.astype(jnp.float32)


def _measure(measure, outputs: int, hidden, unembed, targets, counted, chunk_logits=None):
    """The outputs of `measure([..., V] float32 logits, [..., A] targets)` for all tokens, chunk by chunk."""
    chunks = _Chunks.of(counted, unembed, chunk_logits)
    hidden, unembed, shape = chunks.cut(hidden), _gathered(unembed, hidden), targets.shape
    targets = chunks.cut(targets.reshape(*shape[:2], -1))

    def body(chunk, found):
        new = measure(_logits(chunk.read(hidden), unembed), chunk.read(targets))
        return tuple(chunk.write(a, x) for a, x in zip(found, new, strict=True))

    nothing = (jnp.zeros(targets.shape, jnp.float32),) * outputs
    return tuple(chunks.join(x).reshape(shape) for x in chunks.fold(body, nothing))


def weighted_token_nll(hidden, unembed, targets, counted, weights, chunk_logits: int | None = None):
    """Sum of weight times NLL over the counted tokens, with its gradient by `hidden` and `unembed`.

    Arguments as of `token_nll`, targets [B, T]; weights: [B, T] float32, which get no gradient.

    Returns:
        (the sum, [B, T] NLLs as of `token_nll`, which have no gradient). The weights being known, the
        gradient of a chunk is computed while its logits are there: neither direction keeps more than one
        chunk, and none is computed twice (as in Liger Kernel, arXiv 2410.10989).
    """
    total, nll = _weighted(hidden, unembed, targets, counted, weights, chunk_logits)
    return total, jax.lax.stop_gradient(nll)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _weighted(hidden, unembed, targets, counted, weights, chunk_logits):
    nll = token_nll(hidden, unembed, targets, counted, chunk_logits)
    return jnp.sum(jnp.where(counted, weights, 0) * nll), nll


def _weighted_forward(hidden, unembed, targets, counted, weights, chunk_logits):
    chunks = _Chunks.of(counted, unembed, chunk_logits)
    matrix, weights_in_place = _gathered(unembed, hidden), jnp.where(counted, weights, 0)
    hidden, targets, weights = map(chunks.cut, (hidden, targets, weights_in_place))

    def body(chunk, carry):
        nll, d_hidden, d_unembed = carry
        h, target, weight = (
            chunk.read(hidden),
            chunk.read(targets)[..., None],
            chunk.read(weights)[..., None],
        )
        logits = _logits(h, matrix)
        normaliser, new = _normaliser_and_nll(logits, target)
        is_target = jnp.arange(matrix.shape[1]) == target
        d_logits = weight * (jnp.exp(logits - normaliser) - is_target)
        d_logits = constrain(d_logits.astype(h.dtype), "BTV")
        d_h = jnp.einsum("GTV,DV->GTD", d_logits, matrix, preferred_element_type=jnp.float32)
        d_matrix = jnp.einsum("GTD,GTV->GDV", h, d_logits, preferred_element_type=jnp.float32)
        return (
            chunk.write(nll, new[..., 0]),
            chunk.write(d_hidden, d_h.astype(h.dtype)),
            constrain(d_unembed + d_matrix, "BDV"),
        )

    # Each device adds up its own; only the sum travels.
    d_unembed = constrain(jnp.zeros((hidden.shape[0], *matrix.shape), jnp.float32), "BDV")
    nothing = jnp.zeros(targets.shape, jnp.float32), jnp.zeros_like(hidden), d_unembed
    nll, d_hidden, d_unembed = chunks.fold(body, nothing)
    d_unembed = constrain(d_unembed.sum(0), "DV", parameter=True).astype(unembed.dtype)
    nll = chunks.join(nll)
    return (jnp.sum(weights_in_place * nll), nll), (chunks.join(d_hidden), d_unembed)


def _weighted_backward(chunk_logits, saved, d):
    return *((d[0] * x).astype(x.dtype) for x in saved), None, None, None


_weighted.defvjp(_weighted_forward, _weighted_backward)


# --------------------------------------------------------------------------------------- chunks


class _Chunk(NamedTuple):
    """Some tokens of every group."""

    start: Any
    size: int

    def read(self, x):
        """Give [G, size, ...] of [G, N, ...]."""
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size, axis=1)

    def write(self, x, new):
        """`x` with these tokens replaced by new ones."""
        return jax.lax.dynamic_update_slice_in_dim(x, new, self.start, axis=1)


class _Chunks(NamedTuple):
    """Which tokens are computed together: those that are counted first, so many of each device's."""

    order: Any  # [G, N] the tokens of each group: a device's rows, one after another
    back: Any  # [G, N] its inverse
    counted: Any  # [B, T]
    most: Any  # counted tokens of the group that has the most
    sizes: list[int]  # tokens of a group in a chunk: large, and a quarter for what is left

    @classmethod
    def of(cls, counted, unembed, chunk_logits: int | None) -> _Chunks:
        groups = row_shards() if counted.shape[0] % row_shards() == 0 else 1
        grouped = constrain(counted.reshape(groups, -1), "BT")
        chunk_logits, tokens = chunk_logits or CHUNK_LOGITS[platform()], grouped.shape[1]
        quarter = max(1, chunk_logits // unembed.shape[1] // 4)
        quarter -= quarter % 16 if quarter > 16 else 0
        sizes = [4 * quarter, quarter] if 4 * quarter < tokens else [-(-tokens // 4)]
        order = jnp.argsort(~grouped, axis=1, stable=True)
        # Known before the loop: devices need not ask each other in it.
        most = grouped.sum(1).max()
        return cls(order, jnp.argsort(order, axis=1), counted, most, sizes)

    def cut(self, x):
        """[B, T, ...] -> [G, N, ...], and so much more that the last chunk is full."""
        groups, tokens = self.order.shape
        x = _take(x.reshape(groups, tokens, *x.shape[2:]), self.order)
        x = jnp.pad(x, ((0, 0), (0, -tokens % self.sizes[-1])) + ((0, 0),) * (x.ndim - 2))
        return constrain(x, "BT" + "E" * (x.ndim - 2))

    def fold(self, body, carry):
        """Call `body(chunk, carry)` for each chunk that has a counted token."""
        start = 0
        for size in self.sizes:
            left = self.most - start
            chunks = -(-left // size) if size == self.sizes[-1] else left // size

            def at(i, carry, start=start, size=size):
                return body(_Chunk(start + i * size, size), carry)

            carry = jax.lax.fori_loop(0, chunks, at, carry)
            start += chunks * size
        return carry

    def join(self, x):
        """[G, N, ...] -> [B, T, ...], the tokens in their places; 0 for those not counted."""
        x = _take(x[:, : self.order.shape[1]], self.back)
        x = x.reshape(*self.counted.shape, *x.shape[2:])
        x = jnp.where(self.counted.reshape(*self.counted.shape, *[1] * (x.ndim - 2)), x, 0)
        return constrain(x, "BT" + "E" * (x.ndim - 2))


def _take(x, order):
    """`[G, N, ...]` with the tokens of each group in this order."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)


def _gathered(unembed, hidden):
    """The `[D, V]` matrix as it multiplies: once for all chunks."""
    return constrain(unembed.astype(hidden.dtype), "DV")


def _logits(hidden, unembed):
    logits = jnp.einsum("GTD,DV->GTV", hidden, unembed, preferred_element_type=jnp.float32)
    return constrain(logits, "BTV")


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


def per_example_nll(decoder: Decoder, params, batch: Batch):
    """The NLL of every example of a packed batch, without a gradient.

    Returns:
        (sum [E] float32 in nats, count [E] float32 target tokens). They travel apart: whoever needs a
        mean divides once, over everything it averages.
    """
    hidden, _ = decoder.apply(params, batch.tokens, batch.positions, batch.segment_ids)
    with jax.named_scope("loss"):
        counted = _counted(batch)
        nll = token_nll(hidden, decoder.unembed(params), batch.targets, counted)
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

    `batch.targets` and `batch.example` have a last axis of A alternatives: examples that differ in
    single tokens of one segment share its computation, each place's target counting for its own example.
    """
    hidden, _ = decoder.apply(params, batch.tokens, batch.positions, batch.segment_ids)
    with jax.named_scope("loss"):
        counted, unembed = _counted(batch).any(-1), decoder.unembed(params)
        found = _measure(_nll_and_miss, 2, hidden, unembed, batch.targets, counted)
        return tuple(_sum_by_example(values, batch) for values in found)
