"""Filters, weightings and rounds against each other, over seeds, in one harness.

    OUT/seed-S/rounds-K[-WEIGHTING]/    a run: one aligned pair of models, one augmentation, one scoring, and
                                        an arm per filter from one base with equal steps (and equal epochs)
    OUT/ablation.{json,md,html}         every figure of every seed; mean and spread; drawn

The runs of a seed share what does not depend on the alignment: the world and its base model, or the prepared
data. All are runs as any other: what is stopped or killed continues with the same command.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
from etils import epath

from main_jax import pipeline
from main_jax.config import Config
from main_jax.errors import UserError
from main_jax.evaluate import TEST_NLL
from main_jax.filter import SCORES
from main_jax.finetune import EPOCHS
from main_jax.lm.progress import say
from main_jax.pairs import write_json, write_text
from main_jax.report.ablation import write_page
from main_jax.run import Run, share, versions
from main_jax.strict_yaml import nearest
from main_jax.weighting import Strategy

SHARED = ("world", "prepare")


class Variant(NamedTuple):
    """One aligned pair of models. `weighting` is None without a round: nothing is weighted then."""

    rounds: int
    weighting: str | None

    def __str__(self) -> str:
        return f"rounds-{self.rounds}" + (f"-{self.weighting}" if self.weighting else "")


def variants(rounds: Sequence[int], weightings: Sequence[str]) -> list[Variant]:
    """Every combination that differs."""
    found = (Variant(k, w if k else None) for k in rounds for w in weightings)
    return list(dict.fromkeys(found))


def ablate(
    config: Config,
    filters: Sequence[str],
    rounds: Sequence[int],
    weightings: Sequence[str],
    seeds: int,
    equal_epochs: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Runs everything; writes and returns `ablation.json`. Raises UserError.

    Args:
        config: of each run; what varies takes the place of its values. `output_dir` is OUT.
        filters: arms, as `finetune.arms` names them.
        rounds: values of K.
        weightings: strategies of the weight of aligned pairs; they differ only where K is 1 or more.
        seeds: how many, from `config.seed` on.
        equal_epochs: filters whose set is also trained for as many epochs as that of the main filter; by
            default `none`, where it is one of the filters.
    """
    if equal_epochs is None:
        equal_epochs = [name for name in ("none",) if name in filters]
    for name in equal_epochs:
        if name not in filters:
            raise UserError(f"--equal-epochs: {name} is none of --filters{nearest(name, filters)}")
    arms = [*filters, *(f"{name}{EPOCHS}" for name in equal_epochs)]
    for name in weightings:
        if name not in get_args(Strategy):
            raise UserError(
                f"--weighting: unknown strategy {name}{nearest(name, get_args(Strategy))}"
            )
    out = epath.Path(config.output_dir).expanduser()
    found: dict[str, dict[int, dict[str, Any]]] = {}
    numbers = range(config.seed, config.seed + seeds)
    compared = variants(rounds, weightings)
    planned = [
        (
            number,
            variant,
            _config(config, variant, arms, number, out / f"seed-{number}" / str(variant)),
        )
        for number in numbers
        for variant in compared
    ]
    for number, variant, of_run in planned:
        say(f"seed {number}, {variant}:")
        if variant != compared[0]:
            share(epath.Path(of_run.output_dir), SHARED, f"../{compared[0]}")
        run = pipeline.open_run(of_run)
        for stage in run.stages:
            if stage != "export":
                pipeline.execute(run, stage)
        found.setdefault(str(variant), {})[number] = _figures(run)
    results = {
        "filters": list(filters), "rounds": list(rounds), "weightings": list(weightings),
        "seeds": list(numbers), "by": _by(config, filters), "config": config.as_dict(),
        "versions": versions(),
        "variants": {name: _over_seeds(of_seeds) for name, of_seeds in found.items()},
    }  # fmt: skip
    write_json(out / "ablation.json", results)
    table = show(results)
    write_text(out / "ablation.md", table + "\n")
    write_page(out / "ablation.html", results, table)
    return results


def _by(config: Config, filters: Sequence[str]) -> str:
    """The filter whose number of epochs the arms of equal epochs have: the configured one, if it is asked."""
    known = [name for name in filters if name in SCORES]
    return config.filter.by if config.filter.by in known or not known else known[-1]


def _config(
    config: Config, variant: Variant, filters: Sequence[str], seed: int, path: epath.Path
) -> Config:
    weighting = config.align.weighting
    if variant.weighting:
        weighting = dataclasses.replace(weighting, strategy=variant.weighting)
    try:
        return dataclasses.replace(
            config, seed=seed, output_dir=str(path),
            align=dataclasses.replace(config.align, rounds=variant.rounds, weighting=weighting),
            score=dataclasses.replace(
                config.score,
                self_curation=config.score.self_curation or "self_curation" in filters,
            ),
            filter=dataclasses.replace(config.filter, by=_by(config, filters)),
            finetune=dataclasses.replace(config.finetune, arms=tuple(filters)),
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"--filters: {error}") from None


def _figures(run: Run) -> dict[str, Any]:
    """What a run has found, as name -> arm or score -> number."""
    # The stage's own file: `RUN/results.json` is what the first process makes of it for people, later.
    results = json.loads((run.directory("evaluate") / "results.json").read_text())
    figures: dict[str, dict[str, float]] = {}
    for model, found in _models(results):
        for name, value in found.items():
            if isinstance(value, (int, float)):
                figures.setdefault(name, {})[model] = value
    for name in ("auroc", "reverse_accuracy"):
        figures |= {name: results[name]} if name in results else {}
    for kind, found in results.get("auroc_by_kind", {}).items():
        figures[f"auroc_{kind}"] = found
    for kept, found in results.get("precision_at", {}).items():
        figures[f"{PRECISION_AT}{kept}"] = found
    return figures


def _models(results: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What was found of every arm, and on data of one's own of the base and on one's own questions."""
    yield from ({"base": results["base"]} if "base" in results else {}).items()
    yield from results["arms"].items()
    yield from results.get("test", {}).get("models", {}).items()


def _over_seeds(of_seeds: Mapping[int, Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Name -> arm -> the values of all seeds, their mean and standard deviation (ddof 1)."""
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for figures in of_seeds.values() for name in figures):
        merged[name] = {}
        for arm in dict.fromkeys(arm for f in of_seeds.values() for arm in f.get(name, {})):
            values = [f.get(name, {}).get(arm) for f in of_seeds.values()]
            known = [value for value in values if value is not None]
            merged[name][arm] = {
                "mean": float(np.mean(known)) if known else None,
                "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
                "values": values,
            }
    return merged


PRECISION_AT = "precision_at_"
COLUMNS = {
    "precision": "precision", "heldout": "held-out", "paraphrase": "paraphrase", "seen": "seen",
    "kept_pairs": "kept pairs", "validation_nll_nats_per_token": "held-out NLL (nats/token)",
    "right": "right", TEST_NLL: "your references' NLL (nats/token)",
}  # fmt: skip


def show(results: Mapping[str, Any]) -> str:
    """The results as Markdown tables."""
    seeds = results["seeds"]
    lines = [f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}."]
    for name, figures in results["variants"].items():
        columns = {key: title for key, title in COLUMNS.items() if key in figures}
        lines += ["", f"### {name}", "", "| arm | " + " | ".join(columns.values()) + " |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for arm in dict.fromkeys(arm for key in columns for arm in figures[key]):
            cells = [_cell(figures[key].get(arm)) for key in columns]
            shown = arm.removesuffix(EPOCHS) + (" (equal epochs)" if arm.endswith(EPOCHS) else "")
            lines.append(f"| {shown} | " + " | ".join(cells) + " |")
        shares = {key: key.removeprefix(PRECISION_AT) for key in figures if PRECISION_AT in key}
        facts = {"auroc": "AUROC", "reverse_accuracy": "Reverse accuracy"}
        facts |= {key: f"Precision of the best {float(n):.0%}" for key, n in shares.items()}
        for key, title in facts.items():
            if key in figures:
                found = ", ".join(f"`{n}` {_cell(v)}" for n, v in figures[key].items())
                lines += ["", f"{title}: {found}."]
    return "\n".join(lines)


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None or found["mean"] is None:
        return "–"
    spread = "" if found["sd"] is None else f" ± {found['sd']:.3f}"
    return f"{found['mean']:.3f}{spread}"
