"""The one likelihood of the project: per-example negative log-likelihood, never `[B, T, V]`.

Training, the dynamic weights and the scorer all call `per_example_nll`, so that the filter measures
exactly what training optimises.
"""

from __future__ import annotations

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
        targets: [B, T] int32.
        chunk_logits: how many logits may be alive at once.

    Returns:
        [B, T] float32. The chunks are rematerialised in the backward pass, so neither direction keeps
        more than one chunk of logits. A chunk is some tokens of every row, so that every device that has
        rows works on each.
    """

    def chunk_nll(h, t):
        flat = h.reshape(-1, h.shape[-1])
        logits = jnp.dot(flat, unembed.astype(h.dtype), preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(logits, t.reshape(-1, 1), axis=-1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=-1) - picked).reshape(t.shape)

    rows, length, features = hidden.shape
    size = max(1, chunk_logits // (unembed.shape[1] * rows))
    if length <= size:
        return chunk_nll(hidden, targets)
    pad = -length % size
    chunks = (
        jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(rows, -1, size, features),
        jnp.pad(targets, ((0, 0), (0, pad))).reshape(rows, -1, size),
    )
    chunks = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), chunks)
    _, nll = jax.lax.scan(lambda _, c: (None, jax.checkpoint(chunk_nll)(*c)), None, chunks)
    return jnp.swapaxes(nll, 0, 1).reshape(rows, -1)[:, :length]


def per_example_nll(decoder: Decoder, params, batch: Batch):
    """The NLL of every example of a packed batch.

    Returns:
        (sum [E] float32 in nats, count [E] float32 target tokens). They travel apart: whoever needs a
        mean divides once, over everything it averages.
    """
    hidden, _ = decoder.apply(params, batch.tokens, batch.positions, batch.segment_ids)
    with jax.named_scope("loss"):
        num_examples = batch.fields["valid"].shape[0]
        nll = token_nll(hidden, decoder.unembed(params), batch.targets).reshape(-1)
        owner = batch.example.reshape(-1)
        counted = (owner < num_examples).astype(jnp.float32)
        sums = jax.ops.segment_sum(nll * counted, owner, num_examples + 1)[:-1]
        counts = jax.ops.segment_sum(counted, owner, num_examples + 1)[:-1]
    return constrain(sums, "E"), constrain(counts, "E")


@partial(jax.jit, static_argnames=("decoder",))
def example_nll(decoder: Decoder, params, batch: Batch):
    """`per_example_nll`, compiled once per batch shape."""
    return per_example_nll(decoder, params, batch)
