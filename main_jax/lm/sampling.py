"""How tokens are drawn from logits, and what a row's random key is.

A row's result depends on its id and the seed, not on its neighbours: the key of its token n is folded
from the row's id, the seed and n.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


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


def _argmax(logits):
    """As `jnp.argmax` over the last axis, which takes twelve times as long on a CPU."""
    size = logits.shape[-1]
    best = logits.max(axis=-1, keepdims=True)
    first = jnp.where(logits == best, jnp.arange(size, dtype=jnp.int32), size - 1)
    return first.min(axis=-1)


def nucleus_mask(probs, top_p: float):
    """[B, V] bool from [B, V] float32: the smallest set of most likely tokens that reaches top_p.

    Tokens as likely as the last one of the set are in it too. A large vocabulary takes long to sort:
    instead the least probability is bisected. As floats that are not negative are ordered as their bits
    are, 30 halvings tell it exactly.
    """
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def halve(_, bounds):
        reaches, falls_short = bounds
        middle = reaches + (falls_short - reaches) // 2
        mass = jnp.where(bits >= middle, probs, 0).sum(axis=-1, keepdims=True)
        enough = mass >= top_p
        return jnp.where(enough, middle, reaches), jnp.where(enough, falls_short, middle)

    zero = jnp.zeros_like(bits[:, :1])
    above_one = jnp.full_like(zero, np.float32(1).view(np.int32) + 1)
    least, _ = jax.lax.fori_loop(0, 30, halve, (zero, above_one))
    return bits >= least


def sample(logits, keys, sampling: Sampling):
    """One token per row from [B, V] float32 logits and [B] keys; [B] int32.

    Nucleus sampling keeps the smallest set of most likely tokens whose probability reaches top_p;
    top_k is applied before it.
    """
    if sampling.temperature == 0:
        return _argmax(logits)
    scaled, ids = logits / sampling.temperature, None
    if 0 < sampling.top_k < logits.shape[-1]:
        scaled, ids = jax.lax.top_k(scaled, sampling.top_k)
    if sampling.top_p < 1:
        kept = nucleus_mask(jax.nn.softmax(scaled, axis=-1), sampling.top_p)
        scaled = jnp.where(kept, scaled, -jnp.inf)
    choice = jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
    return choice if ids is None else jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]
