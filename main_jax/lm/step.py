"""The one jitted training step: weighted per-example loss, accumulation, AdamW.

    loss = Σ_i w_i·L_i / Σ_i w_i     over the examples of the *global* batch

Numerators and denominators are summed apart over microbatches and divided once, so that K microbatches
equal one batch. The weights come from a strategy object (`ExampleWeights`); no gradient flows through
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from main_jax.lm.arch import DecoderConfig
from main_jax.lm.batches import Batch
from main_jax.lm.loss import weighted_nll
from main_jax.lm.model import Decoder
from main_jax.lm.sharding import (
    abstract_like_params,
    constrain_like_params,
    place_like_params,
    shardings_like_params,
)


class ExampleWeights(Protocol):
    """Per-example weights as pure functions; a hashable value, so that it can be a static argument."""

    def init(self) -> Any:
        """The strategy's state before the first step (a pytree, possibly empty)."""

    def prepare(self, fields: dict) -> dict:
        """Sees the fields of the whole global batch [K, E] once, before any loss is known."""

    def weigh(self, nll, fields: dict, state, progress):
        """[E] weights of one microbatch from its [E] mean NLLs; `progress` is the share of steps done."""

    def sums(self, nll, weights, fields: dict) -> dict:
        """Scalars to add up over the microbatches."""

    def update(self, state, sums: dict) -> tuple[Any, dict]:
        """(state, metrics) after the step, from the summed scalars."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW as in the field: decay on matrices only, clipping by the global norm.

    mu_dtype: of the first moment; bfloat16 takes 10 bytes per parameter with the rest, in place of 12.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mu_dtype: str = "float32"
    loss_normalization: Literal["example", "token"] = "example"

    def transform(self) -> optax.GradientTransformation:
        """Everything but the learning rate, which is an argument of the step (no recompile)."""
        return _transform(self)


@cache  # the same functions for an equal optimizer: JAX compiles `init` once
def _transform(o: Optimizer) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(o.max_grad_norm),
        optax.scale_by_adam(b1=o.beta1, b2=o.beta2, eps=o.epsilon, mu_dtype=o.mu_dtype),
        optax.add_decayed_weights(o.weight_decay, mask=is_matrix),
    )


class TrainState(NamedTuple):
    """What a step consumes and gives back; donated."""

    params: Any
    opt_state: Any
    weighting: Any


def is_matrix(params):
    """True for kernels and embeddings. By name: stacked layers give norm scales two axes as well."""
    matrices = ("kernel", "embedding")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in matrices, params)


def init_state(
    params, config: DecoderConfig, optimizer: Optimizer, weighting: ExampleWeights
) -> TrainState:
    """A fresh state around `params`, which the first step will donate; in its place on the mesh."""
    make = optimizer.transform().init
    params = place_like_params(params, config)
    places = shardings_like_params(jax.eval_shape(make, params), config)
    opt_state = jax.jit(make, out_shardings=places)(params)
    # Committed to their places like restored ones, so that both run the same compiled step.
    return TrainState(params, opt_state, place_like_params(weighting.init(), config))


def abstract_state(decoder: Decoder, optimizer: Optimizer, weighting: ExampleWeights) -> TrainState:
    """Shapes, dtypes and places of a state, without any array."""

    def make() -> TrainState:
        params = decoder.init(jax.random.key(0))
        return TrainState(params, optimizer.transform().init(params), weighting.init())

    return abstract_like_params(jax.eval_shape(make), decoder.config)


def abstract_params(decoder: Decoder, *, inference: bool = False) -> Any:
    """Shapes, dtypes and places of the parameters; for inference in `decoder.inference_dtype`."""
    # The key too is made while tracing: on a mesh of devices that are not there, nothing can be run.
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0)))
    if inference:
        shapes = jax.tree_util.tree_map_with_path(
            lambda path, x: x.update(dtype=jnp.dtype(decoder.inference_dtype(path[-1].key))), shapes
        )
    return abstract_like_params(shapes, decoder.config)


def accumulate(
    params, batches: Batch, weighting_state, progress, *, decoder, optimizer, weighting
) -> tuple[Any, Any, dict]:
    """Loss and gradient of the global batch, from K stacked microbatches.

    Returns:
        (loss, gradients, sums): the loss and the gradients already divided by the global denominator;
        `sums` is what the weighting strategy adds up.
    """
    batches = batches._replace(fields=weighting.prepare(batches.fields))

    by_token = optimizer.loss_normalization == "token"

    def mean(sums, counts):
        return sums / jnp.maximum(counts, 1)

    def weighted_sum(params, batch):
        def weigh(sums, counts):
            found = weighting.weigh(mean(sums, counts), batch.fields, weighting_state, progress)
            weights = found * (batch.fields["valid"] & (counts > 0))
            return weights if by_token else weights / jnp.maximum(counts, 1), weights

        numerator, sums, counts, weights = weighted_nll(decoder, params, batch, weigh)
        denominator = jnp.sum(weights * (counts if by_token else 1.0))
        fields = batch.fields | {"valid": batch.fields["valid"] & (counts > 0)}
        groups = weighting.sums(mean(sums, counts), weights, fields)
        return numerator, (denominator, jnp.sum(counts), groups)

    def microbatch(batch):
        (numerator, aux), grads = jax.value_and_grad(weighted_sum, has_aux=True)(params, batch)
        return numerator, constrain_like_params(grads, decoder.config), *aux

    first = microbatch(jax.tree.map(lambda x: x[0], batches))
    total, _ = (
        jax.lax.scan(
            lambda total, batch: (jax.tree.map(jnp.add, total, microbatch(batch)), None),
            first,
            jax.tree.map(lambda x: x[1:], batches),
        )
        if batches.tokens.shape[0] > 1
        else (first, None)
    )
    numerator, grads, denominator, tokens, sums = total
    denominator = jnp.where(denominator > 0, denominator, 1)  # nothing weighs: nothing is learnt
    grads = jax.tree.map(lambda g: g / denominator, grads)
    return numerator / denominator, grads, sums | {"target_tokens": tokens}


@partial(jax.jit, static_argnames=("decoder", "optimizer", "weighting"), donate_argnames=("state",))
def train_step(
    state: TrainState,
    batches: Batch,
    learning_rate,
    progress,
    *,
    decoder: Decoder,
    optimizer: Optimizer,
    weighting: ExampleWeights,
) -> tuple[TrainState, dict]:
    """One optimiser step on K stacked microbatches; returns the new state and scalar metrics."""
    loss, grads, sums = accumulate(
        state.params, batches, state.weighting, progress,
        decoder=decoder, optimizer=optimizer, weighting=weighting,
    )  # fmt: skip
    with jax.named_scope("optimizer"):
        direction, opt_state = optimizer.transform().update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, d: p - learning_rate * d, state.params, direction)
    target_tokens = sums.pop("target_tokens")
    weighting_state, metrics = weighting.update(state.weighting, sums)
    metrics |= {
        "loss_nats_per_token": loss,
        "grad_norm": optax.global_norm(grads),
        "target_tokens": target_tokens,
    }
    state = TrainState(params, opt_state, weighting_state)
    return constrain_like_params(state, decoder.config), metrics
