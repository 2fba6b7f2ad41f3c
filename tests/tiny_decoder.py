"""A tiny decoder with drawn parameters, drawn examples, and their losses the slow way.

All dimensions differ, and logits are a few units large, so that examples differ in their losses and
neither a transposition nor a wrong weight can hide.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from main_jax.lm.arch import DecoderConfig
from main_jax.lm.batches import Example
from main_jax.lm.model import Decoder

CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=10,
    max_position_embeddings=96,
)
DECODER = Decoder(CONFIG)

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiler options of a test's own programs, where compiling costs more than running."""


@functools.cache
def drawn_params(seed=0, decoder=DECODER):
    """Draw NumPy parameters, norm scales included; a program cannot donate those."""
    leaves, tree = jax.tree.flatten(decoder.init(jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    noisy = [np.asarray(x + 0.2 * rng.normal(size=x.shape), np.float32) for x in leaves]
    params = jax.tree.unflatten(tree, noisy)
    params["head"]["kernel"] = 2 * params["head"]["kernel"]
    return params


def fresh(params):
    """Copy parameters to the device, for a step that will donate them."""
    return jax.tree.map(jnp.array, params)


def example(condition, target):
    """Join token ids, the target marked."""
    tokens = np.asarray([*condition, *target], np.int32)
    return Example(tokens, np.arange(len(tokens)) >= len(condition))


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def _logits(decoder, params, tokens):
    positions = jnp.arange(tokens.shape[0])[None]
    hidden, _ = decoder.apply(params, tokens[None], positions, jnp.ones_like(positions))
    return hidden[0] @ decoder.unembed(params)


def logits_of(tokens, params=None, decoder=DECODER):
    """Run one sequence on its own, `[T]` -> `[T, V]` in float64; what follows does not matter."""
    padded = np.zeros(decoder.config.max_position_embeddings, np.int32)
    padded[: len(tokens)] = tokens
    logits = _logits(decoder, drawn_params() if params is None else params, padded)
    return np.asarray(logits, np.float64)[: len(tokens)]


def slow_nll(tokens, is_target, params=None, decoder=DECODER):
    """Sum over the targets of -log softmax(logits)[target], in nats, and their number."""
    total, count = 0.0, 0
    for t, row in enumerate(logits_of(tokens, params, decoder)[:-1]):
        if is_target[t + 1]:
            top = row.max()
            total += top + np.log(np.exp(row - top).sum()) - row[tokens[t + 1]]
            count += 1
    return total, count
