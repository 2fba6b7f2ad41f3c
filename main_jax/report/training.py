"""The charts of a run's losses and α, from the `metrics.jsonl` of its trainings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from etils import epath

from main_jax.report import charts
from main_jax.report.charts import NATS
from main_jax.report.files import RunFiles, metrics


def training(run: RunFiles) -> dict[str, Any]:
    """The charts: `align` by direction, `alpha`, `finetune` and `validation`; `pretraining` of a world."""
    drawn: dict[str, Any] = {"align": {}, "alpha": None, "finetune": None, "validation": None}
    alphas = {}
    for direction in ("forward", "reverse"):
        joined: dict[str, tuple[list, list]] = {}
        marks, offset, ends = {}, 0.0, []
        for k, folder in enumerate(_rounds(run.folder("align"))):
            found = metrics(folder / direction / "metrics.jsonl")
            if not found:
                break
            marks[offset] = f"round {k}"
            for key, name in {
                "seed_nll_nats_per_token": "seed pairs",
                "aligned_nll_nats_per_token": "aligned pairs",
                "validation_nll_nats_per_token": "held-out pairs",
                "alpha": "alpha",
            }.items():
                if key in found and not (key == "alpha" and k == 0):
                    steps, values = joined.setdefault(name, ([], []))
                    steps.extend(found[key][0] + offset)
                    values.extend(found[key][1])
            offset += max(steps[-1] for steps, _ in found.values())
            ends.append(offset)
        control = metrics(run.folder("align") / "control" / direction / "metrics.jsonl")
        if ends and "seed_nll_nats_per_token" in control:
            steps, values = control["seed_nll_nats_per_token"]
            joined["seed pairs, control"] = (list(steps + ends[0]), list(values))
        if "alpha" in joined:
            alphas[direction] = joined.pop("alpha")
        if joined:
            drawn["align"][direction] = charts.lines(joined, "optimiser steps", NATS, marks)
    if alphas:
        drawn["alpha"] = charts.lines(alphas, "optimiser steps", "α (share of aligned pairs)")
    by, order = (
        run.config.get(section, {}).get(key) or ""
        for section, key in (("filter", "by"), ("finetune", "arms"))
    )
    found = (folder.parent for folder in run.folder("finetune").glob("*/metrics.jsonl"))
    folders = sorted(found, key=lambda f: (f.name not in order, [*order, f.name].index(f.name)))
    arms = {folder.name: metrics(folder / "metrics.jsonl") for folder in folders}
    for name, key in (
        ("finetune", "loss_nats_per_token"),
        ("validation", "validation_nll_nats_per_token"),
    ):
        series = {arm: m[key] for arm, m in arms.items() if key in m}
        if any(len(steps) > 1 for steps, _ in series.values()):
            drawn[name] = charts.lines(series, "optimiser steps", NATS, strong=by)
    if run.world and (found := metrics(run.folder("world") / "pretraining" / "metrics.jsonl")):
        drawn["pretraining"] = charts.lines(
            {"loss": found["loss_nats_per_token"]}, "optimiser steps", NATS, strong="loss"
        )
    return drawn


def _rounds(folder: epath.Path) -> Iterator[epath.Path]:
    k = 0
    while (found := folder / f"round-{k}").exists():
        yield found
        k += 1
