"""What was measured of a run's model afterwards: `RUN/evaluations/*.json`, of the harness and of a judge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from main_jax.report.charts import Interval
from main_jax.report.files import RunFiles

FOLDER = "evaluations"


class Figure(NamedTuple):
    """A line of a table: what was measured on what, with its interval or standard error."""

    task: str
    metric: str
    value: Interval


def evaluations(run: RunFiles) -> dict[str, list[Figure]]:
    """By file, in order of the names; AlpacaEval's outputs themselves are no figures."""
    found = {}
    for file in sorted((run.path / FOLDER).glob("*.json")):
        content = run.json(file)
        if not isinstance(content, dict):
            continue
        figures = _judged(content) if "win_rate" in content else _of_harness(content)
        if figures := list(figures):
            found[file.name] = figures
    return found


def _judged(results: Mapping[str, Any]) -> Iterator[Figure]:
    task = (
        f"against {results.get('reference', 'a reference')}, by {results.get('judge', 'a judge')}"
    )
    yield Figure(task, "win rate", Interval(results["win_rate"], *(results["interval"] or ())))
    yield Figure(task, "length ratio", Interval(results["length_ratio"]))
    yield Figure(task, "unparsable answers, share", Interval(results["unparsable_share"]))


def _of_harness(results: Mapping[str, Any]) -> Iterator[Figure]:
    """The leaderboards' own numbers first; then each task's, value ± 1.96 standard errors."""
    for board, scores in results.get("normalised", {}).items():
        for task, score in scores.items():
            yield Figure(f"{board}: {task}", "as published, %", Interval(score))
    for task, metrics in results.get("results", {}).items():
        for key, value in metrics.items():
            metric, _, how = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{metric}_stderr,{how}")
            ends = ()
            if isinstance(error, (int, float)):
                ends = value - 1.96 * error, value + 1.96 * error
            named = metric if how in ("", "none") else f"{metric} ({how})"
            yield Figure(task, named, Interval(value, *ends))
