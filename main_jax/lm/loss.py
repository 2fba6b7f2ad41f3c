"""The one likelihood of the project: per-example negative log-likelihood, never `[B, T, V]`.

Training, the dynamic weights and the scorer all call `per_example_nll`, so that the filter measures
exactly what training optimises.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from main_jax.lm.batches import Batch
from main_jax.lm.model import Decoder
from main_jax.lm.sharding import constrain

CHUNK_LOGITS = 1 << 24
"""Logits alive at once (float32: 64 MiB); the number of tokens per chunk follows from V."""


def token_nll(hidden, unembed, targets, chunk_logits: int = CHUNK_LOGITS):
    """Negative log-likelihood of each target token, in nats.

    Args:
        hidden: [B, T, D] final hidden states, in the compute dtype.
        unembed: [D, V].
        targets: [B, T] int32, or [B, T, A] for A alternatives in each place.
        chunk_logits: how many logits may be alive at once.

    Returns:
        float32, of the targets' shape. The chunks are rematerialised in the backward pass, so neither
        direction keeps more than one chunk of logits. A chunk is some tokens of every row, so that every
        device that has rows works on each.
    """
    return _over_chunks(_nll, hidden, unembed, targets, chunk_logits)


def _nll(logits, targets):
    picked = jnp.take_along_axis(logits, targets, axis=-1)
    return jax.nn.logsumexp(logits, axis=-1, keepdims=True) - picked


def _nll_and_miss(logits, targets):
    miss = jnp.argmax(logits, axis=-1, keepdims=True) != targets
    return _nll(logits, targets), miss.astype(jnp.float32)


def _over_chunks(measure, hidden, unembed, targets, chunk_logits: int):
    """What `measure` makes of ([n, V] float32 logits, [n, A] targets), for all tokens, chunk by chunk."""

    def of_chunk(h, t):
        flat = h.reshape(-1, h.shape[-1])
        logits = jnp.dot(flat, unembed.astype(h.dtype), preferred_element_type=jnp.float32)
        found = measure(logits, t.reshape(flat.shape[0], -1))
        return jax.tree.map(lambda x: x.reshape(t.shape), found)

    rows, length, _ = hidden.shape
    size = max(1, chunk_logits // (unembed.shape[1] * rows))
    if length <= size:
        return of_chunk(hidden, targets)

    def cut(x):  # [B, T, ...] -> [chunks, B, size, ...]
        x = jnp.pad(x, ((0, 0), (0, -length % size)) + ((0, 0),) * (x.ndim - 2))
        return jnp.swapaxes(x.reshape(rows, -1, size, *x.shape[2:]), 0, 1)

    def join(x):
        x = jnp.swapaxes(x, 0, 1)
        return x.reshape(rows, -1, *x.shape[3:])[:, :length]

    chunks = cut(hidden), cut(targets)
    _, found = jax.lax.scan(lambda _, c: (None, jax.checkpoint(of_chunk)(*c)), None, chunks)
    return jax.tree.map(join, found)


def _sum_by_example(values, batch: Batch):
    """[E] sums of what each token has, over the targets of each example."""
    num_examples = batch.fields["valid"].shape[0]
    owner = batch.example.reshape(-1)
    counted = (owner < num_examples).astype(jnp.float32)
    sums = jax.ops.segment_sum(values.reshape(-1) * counted, owner, num_examples + 1)[:-1]
    return constrain(sums, "E")


def per_example_nll(decoder: Decoder, params, batch: Batch):
    """The NLL of every example of a packed batch.

    Returns:
        (sum [E] float32 in nats, count [E] float32 target tokens). They travel apart: whoever needs a
        mean divides once, over everything it averages.
    """
    hidden, _ = decoder.apply(params, batch.tokens, batch.positions, batch.segment_ids)
    with jax.named_scope("loss"):
        nll = token_nll(hidden, decoder.unembed(params), batch.targets)
        return _sum_by_example(nll, batch), _sum_by_example(jnp.ones_like(nll), batch)


@partial(jax.jit, static_argnames=("decoders",))
def example_nlls(decoders: tuple[Decoder, ...], params: Sequence, batches: Sequence[Batch]):
    """`per_example_nll` of several models, each on a batch of its own, in one program."""
    return tuple(map(per_example_nll, decoders, params, batches))


@partial(jax.jit, static_argnames=("decoder",))
def example_nll_and_misses(decoder: Decoder, params, batch: Batch):
    """(NLL [E] float32 in nats, [E] float32 how many targets are not the most likely token).

    `batch.targets` and `batch.example` may have a last axis of A alternatives: examples that differ in
    single tokens of one segment share its computation, each place's target counting for its own example.
    """
    hidden, _ = decoder.apply(params, batch.tokens, batch.positions, batch.segment_ids)
    with jax.named_scope("loss"):
        found = _over_chunks(
            _nll_and_miss, hidden, decoder.unembed(params), batch.targets, CHUNK_LOGITS
        )
        return tuple(_sum_by_example(values, batch) for values in found)
