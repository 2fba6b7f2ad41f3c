"""α: how much a training example counts, recomputed in every step from the model's own losses.

    loss = Σ_i w_i·L_i / Σ_i w_i
    w_i = α_i·v_i / Σ_aligned v      for aligned rows (the condition was generated)
    w_i = (1 − α_i)·v_i / Σ_seed v   for seed rows

v is the data's own `weight` column, L an example's mean NLL in nats per target token. Weighting by α and
training on human targets only is MAIN's (arXiv 2504.12913); the rules below are ours.

| strategy | α |
|---|---|
| constant(alpha) | α |
| loss_ratio | EMA(L_seed) / (EMA(L_seed) + EMA(L_aligned)): trusts the group that is explained better |
| inverse_loss_ratio | its complement |
| schedule(low, high) | low + (high − low)·(steps done)/(steps in all rounds) |
| pair_ratio | per pair: L_seed,i / (L_seed,i + L_aligned,i); both rows share their target |
| softmax(temperature) | w_i ∝ v_i·exp(−L_i/τ) over all rows |
| seed_softmax(temperature) | the same over the seed rows only: the control, plain loss trimming |

α of the two ratios is 1/2 in a training's first step; the EMAs (`decay`) start at the first losses seen.
Fields of an example: `weight` (v), `aligned` (bool), `unit` (rows of one pair share it), `valid`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

Strategy = Literal[
    "constant",
    "loss_ratio",
    "inverse_loss_ratio",
    "schedule",
    "pair_ratio",
    "softmax",
    "seed_softmax",
]


@dataclass(frozen=True)
class Weighting:
    """A strategy and its numbers. Implements `lm.step.ExampleWeights`.

    alpha: of `constant`. low, high: of `schedule`. temperature: τ of the softmaxes, in nats per token,
    at least 0.1 (below, float32 cannot hold the weights). decay: of the EMAs.
    """

    strategy: Strategy = "pair_ratio"
    alpha: float = 0.5
    low: float = 0.1
    high: float = 0.9
    temperature: float = 1.0
    decay: float = 0.9

    def __post_init__(self):
        if self.temperature < 0.1:
            raise ValueError(
                f"weighting.temperature must be at least 0.1, found {self.temperature}"
            )
        for name in ("alpha", "low", "high"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"weighting.{name} must be in [0, 1], found {getattr(self, name)}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"weighting.decay must be in [0, 1), found {self.decay}")

    def init(self) -> dict:
        """Running mean losses of both groups; NaN until a group was seen."""
        # Two buffers: the state is donated, and one buffer cannot be donated twice.
        # Typed, not weakly typed: the step would be compiled again for what it gives back.
        return {name: jnp.array(jnp.nan, jnp.float32) for name in ("seed_nll", "aligned_nll")}

    def prepare(self, fields: dict) -> dict:
        """Adds `share` = v_i / Σ_group v over the global batch, and `alone`: the other group is absent."""
        v = fields["weight"] * fields["valid"]
        aligned = fields["aligned"]
        of_aligned, of_seed = jnp.sum(v * aligned), jnp.sum(v * ~aligned)
        group = jnp.where(aligned, of_aligned, of_seed)
        other = jnp.where(aligned, of_seed, of_aligned)
        share = v / jnp.where(group > 0, group, 1)
        return fields | {"share": share, "alone": other == 0}

    def weigh(self, nll, fields: dict, state: dict, progress):
        """[E] weights from [E] mean NLLs. A missing group's (or twin's) share goes to the other."""
        aligned = fields["aligned"]
        if self.strategy in ("softmax", "seed_softmax"):
            # Any common reference gives the same normalised weights; the running loss (a usual one in the
            # first step) keeps exp() within float32.
            reference = jnp.nan_to_num(state["seed_nll"], nan=5.0)
            weights = fields["weight"] * jnp.exp((reference - nll) / self.temperature)
            return jnp.where(aligned, 0, weights) if self.strategy == "seed_softmax" else weights
        if self.strategy == "pair_ratio":
            alpha, alone = self._pair_alpha(nll, fields)
        else:
            alpha, alone = self._group_alpha(state, progress), fields["alone"]
        return jnp.where(alone, 1, jnp.where(aligned, alpha, 1 - alpha)) * fields["share"]

    def _group_alpha(self, state: dict, progress):
        if self.strategy == "constant":
            return self.alpha
        if self.strategy == "schedule":
            return self.low + (self.high - self.low) * progress
        seed, aligned = state["seed_nll"], state["aligned_nll"]
        ratio = jnp.nan_to_num(seed / (seed + aligned), nan=0.5)
        return ratio if self.strategy == "loss_ratio" else 1 - ratio

    @staticmethod
    def _pair_alpha(nll, fields: dict):
        unit, n = fields["unit"], nll.shape[0]
        aligned, valid = fields["aligned"], fields["valid"]

        def per_unit(values, rows):
            return jax.ops.segment_sum(jnp.where(rows & valid, values, 0), unit, n)[unit]

        seed, twin = per_unit(nll, ~aligned), per_unit(nll, aligned)
        both = (per_unit(1.0, ~aligned) > 0) & (per_unit(1.0, aligned) > 0)
        # Two perfectly explained rows tell nothing apart: α = 1/2.
        alpha = jnp.where(seed + twin > 0, seed / jnp.maximum(seed + twin, 1e-9), 0.5)
        return alpha, ~both

    def sums(self, nll, weights, fields: dict) -> dict:
        """What `update` needs, as sums over examples."""
        seed, aligned = fields["valid"] & ~fields["aligned"], fields["valid"] & fields["aligned"]
        return {
            "seed_nll": jnp.sum(nll * seed),
            "seed_rows": jnp.sum(seed.astype(jnp.float32)),
            "aligned_nll": jnp.sum(nll * aligned),
            "aligned_rows": jnp.sum(aligned.astype(jnp.float32)),
            "aligned_weight": jnp.sum(weights * aligned),
            "total_weight": jnp.sum(weights),
        }

    def update(self, state: dict, sums: dict) -> tuple[dict, dict]:
        """New running means, and the step's group losses and effective α."""
        new, metrics = {}, {}
        for group in ("seed", "aligned"):
            rows = sums[f"{group}_rows"]
            mean = sums[f"{group}_nll"] / jnp.maximum(rows, 1)
            old = state[f"{group}_nll"]
            ema = jnp.where(jnp.isnan(old), mean, self.decay * old + (1 - self.decay) * mean)
            new[f"{group}_nll"] = jnp.where(rows > 0, ema, old)
            metrics[f"{group}_nll_nats_per_token"] = jnp.where(rows > 0, mean, jnp.nan)
        metrics["alpha"] = sums["aligned_weight"] / sums["total_weight"]
        return new, metrics
