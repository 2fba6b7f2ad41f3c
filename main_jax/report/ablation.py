"""An ablation as one page, `ablation.html`: every variant's arms with their mean and spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath

from main_jax.lm.multihost import first
from main_jax.report import charts, html
from main_jax.report.charts import Interval

FIGURES = {
    "heldout": "exact match on held-out questions",
    "right": "right answers to your questions",
    "precision": "precision of the kept pairs",
    "nll_nats_per_token": "NLL of your references, nats per token",
    "validation_nll_nats_per_token": "held-out NLL, nats per token",
}
"""What is drawn where it was measured; the page's tables have everything."""


def write_page(page: epath.Path, results: Mapping[str, Any], table: str) -> None:
    """Writes the page of `ablation.json`; `table` is its text."""
    if not first():
        return
    drawn = {
        name: {
            title: charts.intervals(rows, "mean ± standard deviation")
            for key, title in FIGURES.items()
            if (rows := _rows(figures.get(key, {})))
        }
        for name, figures in results["variants"].items()
    }
    html.write(page, html.render(
        "ablation.html", name=page.parent.name, drawn=drawn, seeds=results["seeds"],
        by=results["by"], table=table, versions=results["versions"],
    ))  # fmt: skip


def _rows(arms: Mapping[str, Any]) -> dict[str, dict[str, Interval]]:
    rows = {}
    for arm, found in arms.items():
        if found["mean"] is not None:
            spread = found["sd"] or 0.0
            ends = (found["mean"] - spread, found["mean"] + spread) if spread else ()
            rows[arm] = {"": Interval(found["mean"], *ends)}
    return rows
