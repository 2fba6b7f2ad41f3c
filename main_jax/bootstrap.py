"""How far a mean over pairs can be trusted, and the difference of two models on the same pairs.

    compare({"base": [3.0, 9.0], "mutual": [2.0, 8.0]}, tokens=[2, 4], seed=0)

The mean is per token, Σ nll / Σ tokens. What is drawn with replacement is pairs, not tokens: those of one
pair go together. Every model is given the same draws, so that a difference is paired: what makes a pair hard
for all models drops out of it. The intervals are percentiles of the draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
REFERENCES = ("base", "seed_only")
"""The models that the others are compared with, where they are there."""
NLL = "validation_nll_nats_per_token"
INTERVAL = "interval_nats_per_token"


def resampled_means(
    sums: np.ndarray, tokens: np.ndarray, seed: int, resamples: int = RESAMPLES
) -> np.ndarray:
    """[B, M] means per token of M models on B bootstrap samples of N pairs; [N, M] sums, [N] tokens."""
    draw, n = np.random.default_rng(seed), len(tokens)
    means = np.empty((resamples, sums.shape[1]))
    for mean in means:
        times = np.bincount(draw.integers(n, size=n), minlength=n).astype(float)
        mean[:] = times @ sums / (times @ tokens)
    return means


def interval(draws: np.ndarray) -> list[float]:
    """The ends of the percentile interval of bootstrap draws."""
    return np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()


def compare(
    nll_sums: Mapping[str, Sequence[float] | np.ndarray],
    tokens: Sequence[int] | np.ndarray,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Of every model its mean NLL, and its differences to those of `REFERENCES` before it in that order.

    Args:
        nll_sums: of each model, [N] nats: of the same N pairs.
        tokens: [N], the same for all models.
        seed: of the bootstrap.

    Returns:
        By model; a mean is null where there is no pair, an interval where there are fewer than two.
    """
    names, count = list(nll_sums), np.asarray(tokens, float)
    sums = np.stack([np.asarray(nll_sums[name], float) for name in names], axis=1)
    means = sums.sum(axis=0) / count.sum() if len(count) else None
    draws = resampled_means(sums, count, seed) if len(count) > 1 else None

    def figures(key: str, model: str, less: str | None = None) -> dict[str, Any]:
        """Of a model's mean, or of what it is above that of another."""

        def of(x: np.ndarray) -> np.ndarray:
            value = x[..., names.index(model)]
            return value if less is None else value - x[..., names.index(less)]

        return {
            key: None if means is None else float(of(means)),
            INTERVAL: None if draws is None else interval(of(draws)),
        }

    found = {}
    for name in names:
        at = REFERENCES.index(name) if name in REFERENCES else len(REFERENCES)
        others = [r for r in REFERENCES[:at] if r in names]
        difference = {other: figures("nats_per_token", name, other) for other in others}
        found[name] = figures(NLL, name) | ({"difference_to": difference} if others else {})
    return found
