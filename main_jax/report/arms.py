"""The arms of a run side by side: exact matches on a world, held-out NLL on a user's own files."""

from __future__ import annotations

from typing import Any

from scipy.stats import binomtest

from main_jax.bootstrap import INTERVAL, NLL, REFERENCES
from main_jax.report import charts
from main_jax.report.charts import NATS, Interval
from main_jax.report.files import RunFiles


def arms(run: RunFiles) -> dict[str, Any]:
    """Charts and figures of the arms, with their 95 % intervals; nothing before they are measured."""
    results = run.json(run.folder("evaluate") / "results.json")
    if not results:
        return {}
    counts = run.stages["finetune"]["counts"]
    kept = {arm: counts.get(f"{arm}_kept") for arm in results["arms"]}
    found = _held_out(results) if "auroc" not in results else _exact_match(run, results)
    return {"results": results, "kept": kept, "test": _own_test(results)} | found


def _own_test(results: dict[str, Any]) -> dict[str, Any] | None:
    """The user's own questions: by model the NLL of the references and the share of right answers."""
    if (test := results.get("test")) is None:
        return None
    asked = test["questions"].get("asked", 0)
    nll = {name: _interval(m, "nll_nats_per_token") for name, m in test["models"].items()}
    right = {
        name: _share(m["right"], asked)
        for name, m in test["models"].items()
        if m.get("right") is not None
    }
    title = "share of right answers"
    return {
        "questions": test["questions"], "checker": test["checker"], "nll": nll, "right": right,
        "chart": charts.intervals({n: {title: i} for n, i in right.items()}, title) if right else None,
    }  # fmt: skip


def _exact_match(run: RunFiles, results: dict[str, Any]) -> dict[str, Any]:
    tests = run.json(run.folder("world") / "tests.json")
    rows = {
        arm: {
            name.replace("heldout", "held-out"): _share(r[name], len(questions))
            for name, questions in tests.items()
        }
        for arm, r in results["arms"].items()
    }
    return {
        "rows": rows, "chart": charts.intervals(rows, "exact match, share of questions"),
        "questions": {name: len(questions) for name, questions in tests.items()},
    }  # fmt: skip


def _share(value: float, count: int) -> Interval:
    """A share of `count` answers with its 95 % interval (Wilson)."""
    ends = binomtest(round(value * count), count).proportion_ci(method="wilson")
    return Interval(value, float(ends.low), float(ends.high))


def _held_out(results: dict[str, Any]) -> dict[str, Any]:
    """Means and paired differences; without intervals where there are none (one pair, an older version)."""
    models = {"base": results["base"], **results["arms"]}
    rows = {name: _interval(m, NLL) for name, m in models.items()}
    minus = {
        other: {
            name: _interval(m["difference_to"][other], "nats_per_token")
            for name, m in models.items()
            if other in m.get("difference_to", {})
        }
        for other in REFERENCES
    }
    minus = {other: differences for other, differences in minus.items() if differences}
    measured = all(i.value is not None for i in rows.values())
    key, against = "held-out NLL", next(reversed(minus), None)  # the seed alone, else the base
    return {
        "rows": rows, "minus": minus, "spread": rows["base"].low is not None, "against": against,
        "chart": charts.intervals({n: {key: i} for n, i in rows.items()}, f"{key}, {NATS}")
        if measured else None,
        "difference": charts.intervals(
            {n: {key: i} for n, i in minus[against].items()}, f"difference to {against}, {NATS}",
            mark=0.0,
        ) if measured and against else None,
    }  # fmt: skip


def _interval(figures: dict[str, Any], key: str) -> Interval:
    return Interval(figures[key], *(figures.get(INTERVAL) or ()))
