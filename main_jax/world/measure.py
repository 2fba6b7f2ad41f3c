"""What the truth says of a run on the embedded world: exact matches, precision, AUROC.

Exact match: the greedy answer states exactly the asked fact and nothing else. Precision: share of the kept
augmented pairs that are true. AUROC: how well a score tells true pairs from others, oriented by the end
that the score keeps. Reverse accuracy: share of clean responses whose greedy instruction asks for the fact
that they state.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath
from scipy.stats import rankdata

from main_jax.align import trained
from main_jax.augment import write_chunks
from main_jax.filter import SCORES, keep_by, pool_of
from main_jax.finetune import arms, finetuned, kept_by_arm
from main_jax.parts import read_parts
from main_jax.prompts import Direction
from main_jax.run import Run
from main_jax.world.judge import exact_match, is_true_pair, reverse_correct

SHARES = (0.2, 0.4, 0.6)
"""Kept shares at which precision is reported: it depends on the share against the true share."""


def measure(run: Run, out: epath.Path) -> dict[str, Any]:
    """The contents of `results.json` (without the seconds)."""
    table = read_parts(run.directory("filter") / "data")
    truth = _truth(run)
    is_true, kinds = _labels(table, truth)
    pool = pool_of(table)
    results: dict[str, Any] = {"arms": {}}
    for arm in arms(run):
        kept = kept_by_arm(run, arm)
        results["arms"][arm] = {"precision": _mean(is_true[kept])} | _exact_match(run, out, arm)
    scored = [name for name in SCORES if name != "random" and name in table.column_names]
    columns = {name: _oriented(table, name) for name in scored}
    results["auroc"] = {n: auroc(c[pool], is_true[pool]) for n, c in columns.items()}
    results["auroc_by_kind"] = {
        kind: {n: auroc(c[chosen], is_true[chosen]) for n, c in columns.items()}
        for kind in ("truncated", "no_fact", "pronoun", "boilerplate", "mixed")
        for chosen in [pool & (is_true | (kinds == kind))]
    }
    results["reverse_accuracy"] = _reverse_accuracy(run, out, truth)
    results["true_share"] = _mean(is_true[pool])
    results["precision_at"] = {
        str(share): {n: _mean(is_true[keep_by(table, n, "fraction", share)]) for n in scored}
        for share in SHARES
    }
    return results


def oracle_kept(run: Run, table: pa.Table, share: float) -> np.ndarray:
    """[N] bool: the first min(share of the pool, all) true pairs in data order."""
    pool = pool_of(table)
    true = np.flatnonzero(_labels(table, _truth(run))[0] & pool)
    kept = np.zeros(len(pool), bool)
    kept[true[: int(share * pool.sum() + 0.5)]] = True
    return kept


def auroc(score: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the ROC curve by the rank-sum statistic; None when a class is empty."""
    n, p = len(positive), int(positive.sum())
    if p in (0, n):
        return None
    ranks = rankdata(score)
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * (n - p)))


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _truth(run: Run) -> dict:
    return json.loads((run.directory("world") / "truth.json").read_text())


def _labels(table: pa.Table, truth: dict) -> tuple[np.ndarray, np.ndarray]:
    """([N] bool whether the pair is true, [N] kind of its response)."""
    kinds, true = [], []
    for row in table.select(["id", "instruction", "response"]).to_pylist():
        kind = truth["responses"][row["id"]]["kind"]
        kinds.append(kind)
        true.append(is_true_pair(row["instruction"] or "", row["response"] or "", kind))
    return np.asarray(true), np.asarray(kinds)


def _oriented(table: pa.Table, name: str) -> np.ndarray:
    """The score's column with the end that is kept made the high one."""
    column = np.asarray(table[name].to_numpy(zero_copy_only=False), np.float64)
    return -column if SCORES[name].keep == "low" else column


def _exact_match(run: Run, out: epath.Path, arm: str) -> dict[str, float]:
    tests = json.loads((run.directory("world") / "tests.json").read_text())
    questions = [
        {"id": f"{test}/{q['id']}", "instruction": q["question"], "response": None}
        for test, rows in tests.items()
        for q in rows
    ]
    answers = _generate(
        run, out / arm, questions, Direction.FORWARD, lambda: finetuned(run, arm), f"answers {arm}"
    )
    right: dict[str, list[bool]] = {test: [] for test in tests}
    for answer, (test, q) in zip(
        answers, ((t, q) for t, rows in tests.items() for q in rows), strict=True
    ):
        fact = (q["entity"], q["attribute"], q["value"])
        right[test].append(exact_match(answer["response"] or "", *fact))
    return {test: float(np.mean(values)) for test, values in right.items()}


def _reverse_accuracy(run: Run, out: epath.Path, truth: dict) -> dict[str, float | None]:
    settings, stage = run.config.align, run.directory("align")
    clean = {i: t["asked"] for i, t in truth["responses"].items() if t["kind"] == "clean"}
    responses = [r for r in run.rows("prepare", "responses") if r["id"] in clean]
    models = {"round_0": lambda: trained(stage, "round-0", Direction.REVERSE, run.base)}
    for k in range(1, settings.rounds + 1):
        models[f"round_{k}"] = lambda k=k: trained(stage, f"round-{k}", Direction.REVERSE, run.base)
    if settings.control:
        models["control"] = lambda: trained(stage, "control", Direction.REVERSE, run.base)
    accuracy = {}
    for name, load in models.items():
        rows = _generate(
            run, out / f"reverse-{name}", responses, Direction.REVERSE, load, f"reverse {name}"
        )
        right = [reverse_correct(r["instruction"] or "", *clean[r["id"]]) for r in rows]
        accuracy[name] = float(np.mean(right))
    return accuracy


def _generate(
    run: Run, out: epath.Path, rows: Sequence[dict], direction: Direction, load, label: str
) -> list[dict]:
    """Texts with the sampling of `evaluate`, greedy by default."""
    return list(write_chunks(
        run, out, rows, direction, load, run.config.evaluate.sampling,
        purpose="evaluate", label=f"evaluate {label}",
        prompt=run.inference_prompt if direction is Direction.FORWARD else None,
    ))  # fmt: skip


def show(results: dict[str, Any]) -> str:
    """The results as a table for people."""

    def number(value: float | None) -> str:
        return "    –" if value is None else f"{value:5.3f}"

    lines = [f"{'arm':<12} precision  held-out  paraphrase   seen"]
    for arm, r in results["arms"].items():
        lines.append(
            f"{arm:<12}     {number(r['precision'])}     {number(r['heldout'])}"
            f"       {number(r['paraphrase'])}  {number(r['seen'])}"
        )
    kinds = list(results["auroc_by_kind"])
    lines += ["", f"{'AUROC':<12}   all  " + " ".join(f"{kind:>11}" for kind in kinds)]
    for name, value in results["auroc"].items():
        by_kind = " ".join(f"      {number(results['auroc_by_kind'][k][name])}" for k in kinds)
        lines.append(f"{name:<12} {number(value)}  {by_kind}")
    accuracies = results["reverse_accuracy"].items()
    lines += ["", "reverse accuracy on clean responses: "]
    lines[-1] += ", ".join(
        f"{name.replace('_', ' ')} {number(v).strip()}" for name, v in accuracies
    )
    return "\n".join(lines)
