"""Step 3b: scores -> kept pairs. Every filter is a column computed from four sums and two counts.

Scoring runs once, filtering as often as one likes:

    columns = score_columns(table)
    kept = select(columns["mutual"], SCORES["mutual"], ids, pool, "fraction", 0.4)

Letters: N rows of the table; the *pool* is the scored rows, after the hard drops.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from scipy.stats import rankdata

from main_jax.errors import UserError
from main_jax.pairs import set_column


@dataclass(frozen=True)
class PairScores:
    """What the scorer measured, over the pool: NLLs in nats per target token, and lengths in tokens."""

    ids: Sequence[str]
    seed: int
    forward: np.ndarray  # L_f(R|I)
    reverse: np.ndarray  # L_r(I|R)
    response: np.ndarray  # L_f(R)
    instruction: np.ndarray  # L_r(I)
    response_tokens: np.ndarray
    rating: np.ndarray  # 1 to 5, NaN where the pair was not graded


@dataclass(frozen=True)
class Score:
    """A filter score: its formula, which end is kept, and who is eligible.

    eligible: scores for which a pair may be kept at all; others keep the pool and k unchanged.
    """

    formula: Callable[[PairScores], np.ndarray]
    keep: Literal["low", "high"]
    eligible: Callable[[np.ndarray], np.ndarray] | None = None


def _rank(x: np.ndarray) -> np.ndarray:
    return rankdata(x, method="average") / len(x)


def _z(x: np.ndarray) -> np.ndarray:
    deviation = x.std()
    return (x - x.mean()) / deviation if deviation > 0 else np.zeros_like(x)


def _dual(p: PairScores) -> np.ndarray:
    a, b = _z(p.forward), _z(p.reverse)
    return np.exp(-(np.abs(a - b) + (a + b) / 2))


def _uniform(p: PairScores) -> np.ndarray:
    """In [0, 1), from the seed and the id alone: a row's luck does not depend on its neighbours."""
    digests = (hashlib.sha256(f"{p.seed}\0{i}".encode()).digest() for i in p.ids)
    return np.asarray([int.from_bytes(d[:8], "big") / 2**64 for d in digests])


SCORES: dict[str, Score] = {
    # The most literal reading of MAIN, and its mirror image.
    "forward_ce": Score(lambda p: p.forward, "low"),
    "reverse_ce": Score(lambda p: p.reverse, "low"),
    # Ours: a pair is as good as its worse direction.
    "mutual": Score(lambda p: np.maximum(_rank(p.forward), _rank(p.reverse)), "low"),
    "mutual_z": Score(lambda p: _z(p.forward) + _z(p.reverse), "low"),
    "mutual_sum": Score(lambda p: p.forward + p.reverse, "low"),
    # Dual conditional cross-entropy, Junczys-Dowmunt 2018.
    "dual_ce": Score(_dual, "high"),
    # Pointwise mutual information, per response token.
    "pmi": Score(lambda p: p.response - p.forward, "high"),
    # Superfiltering, Selective Reflection: keeps hard pairs.
    "ifd": Score(lambda p: np.exp(p.forward - p.response), "high", lambda score: score < 1),
    # Cherry_LLM.
    "ifd_ratio": Score(lambda p: p.forward / p.response, "high", lambda score: score <= 1),
    # Selective Reflection.
    "reverse_ifd": Score(lambda p: np.exp(p.reverse - p.instruction), "low"),
    # The paper's "score-based filtering": the forward model's own grade (Humpback).
    "self_curation": Score(lambda p: p.rating, "high", eligible=np.isfinite),
    # Baselines.
    "length": Score(lambda p: p.response_tokens.astype(float), "high"),
    "random": Score(_uniform, "low"),
    "none": Score(lambda p: np.zeros(len(p.ids)), "low"),
}


MEASURED = (
    "id", "forward_nll_sum", "forward_tokens", "reverse_nll_sum", "reverse_tokens",
    "response_nll_sum", "instruction_nll_sum", "drop_reason",
)  # fmt: skip
"""The columns that a filter needs."""
READ = (*MEASURED, "rating")
"""Those that it reads; `rating` is there where `score` was asked for it."""
CUT = "filter_"
"""Prefix of the drop reason of what a filter cut; such rows stay in the pool of the next filter."""


def pool_of(table: pa.Table) -> np.ndarray:
    """[N] bool: the rows that were scored and not dropped for another reason than a filter's cut."""
    hard = [
        reason is not None and not reason.startswith(CUT)
        for reason in table["drop_reason"].to_pylist()
    ]
    return np.asarray(table["forward_nll_sum"].is_valid()) & ~np.asarray(hard, bool)


def score_columns(table: pa.Table, seed: int) -> dict[str, np.ndarray]:
    """Every score as an [N] float64 column, NaN outside the pool.

    `none` has no column, and without grades `self_curation` has none.
    """
    pool = pool_of(table)
    rated = "rating" in table.column_names and table["rating"].null_count < len(table)
    absent = ("none",) if rated else ("none", "self_curation")
    columns = {name: np.full(table.num_rows, np.nan) for name in SCORES if name not in absent}
    if not pool.any():
        return columns

    def numbers(name: str) -> np.ndarray:
        return np.asarray(table[name].filter(pa.array(pool)), np.float64)

    forward_tokens, reverse_tokens = numbers("forward_tokens"), numbers("reverse_tokens")
    scores = PairScores(
        ids=table["id"].filter(pa.array(pool)).to_pylist(),
        seed=seed,
        forward=numbers("forward_nll_sum") / forward_tokens,
        reverse=numbers("reverse_nll_sum") / reverse_tokens,
        response=numbers("response_nll_sum") / forward_tokens,
        instruction=numbers("instruction_nll_sum") / reverse_tokens,
        response_tokens=forward_tokens,
        rating=numbers("rating") if rated else np.full(int(pool.sum()), np.nan),
    )
    for name, column in columns.items():
        column[pool] = SCORES[name].formula(scores)
    return columns


def select(
    column: np.ndarray,
    score: Score,
    ids: Sequence[str],
    pool: np.ndarray,
    how: Literal["fraction", "top_k", "quantile", "threshold"],
    amount: float,
) -> np.ndarray:
    """[N] bool: which rows are kept. Ties at the cut of `fraction` and `top_k` are broken by id.

    Args:
        column: [N] the score.
        score: says which end is kept and who is eligible.
        ids: [N].
        pool: [N] bool.
        how: `fraction` of the pool (rounded to the nearest count), `top_k` pairs, the best `quantile`
            of the score or everything not beyond the `threshold`; the last two include ties.
        amount: the share, the count, the share or the score.
    """
    sign = 1.0 if score.keep == "low" else -1.0
    eligible = pool if score.eligible is None else pool & score.eligible(column)
    kept = np.zeros(len(column), bool)
    if not eligible.any():
        return kept
    if how == "threshold":
        return eligible & (sign * column <= sign * amount)
    if how == "quantile":
        known = sign * column[pool]  # but for pairs without a grade
        return eligible & (sign * column <= np.nanquantile(known, amount))
    k = math.floor(amount * pool.sum() + 0.5) if how == "fraction" else int(amount)
    order = sorted(np.flatnonzero(eligible), key=lambda i: (sign * column[i], ids[i]))
    kept[order[:k]] = True
    return kept


def keep_by(table: pa.Table, name: str, how: str, amount: float) -> np.ndarray:
    """[N] bool: the pairs that the score `name` keeps, from a table with its score columns."""
    pool = pool_of(table)
    if name == "none":
        return pool
    if name not in table.column_names:
        raise UserError(f"{name}: the pairs were scored without it; score them with self-curation")
    column = np.asarray(table[name].to_numpy(zero_copy_only=False), np.float64)
    return select(column, SCORES[name], table["id"].to_pylist(), pool, how, amount)  # ty: ignore


def with_filter(table: pa.Table, name: str, how: str, amount: float, seed: int) -> pa.Table:
    """The table with all score columns, `keep`, and `drop_reason = filter_<name>` for what is cut."""
    for column, values in score_columns(table, seed).items():
        field = pa.array(values, mask=~np.isfinite(values))
        table = set_column(table, column, field)
    pool, kept = pool_of(table), keep_by(table, name, how, amount)
    reasons = np.asarray(table["drop_reason"].to_pylist(), object)
    reasons[pool] = None
    reasons[pool & ~kept] = f"{CUT}{name}"
    table = set_column(table, "keep", pa.array(kept))
    return set_column(table, "drop_reason", pa.array(reasons, pa.string()))
