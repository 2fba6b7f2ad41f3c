"""Did it help? What can be measured at the end of a run, written to `results.json`.

On the embedded world the truth is known (`main_jax.world.measure`). On a user's own files: the forward NLL
per token of the held-out seed pairs under the base and under every arm, with its spread over pairs, and the
funnel of pairs. The NLL of each held-out pair under each model is in `held_out.parquet` beside it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pyarrow as pa
from etils import epath

from main_jax.bootstrap import INTERVAL, LEVEL, NLL, compare
from main_jax.finetune import arms, finetuned, kept_by_arm
from main_jax.models import LanguageModel
from main_jax.pairs import read_parts, write_json, write_table
from main_jax.prompts import Direction
from main_jax.run import Run, derive_seed
from main_jax.score import nll_sums
from main_jax.units import pair_units, tokenise

TOKENS_PER_BATCH = 8192


def evaluate(run: Run, out: epath.Path) -> dict[str, int]:
    """Writes `out/results.json`."""
    if run.world:
        from main_jax.world.measure import measure

        results = measure(run, out)
    else:
        results = _held_out(run, out)
    write_json(out / "results.json", results)
    return {"arms": len(results["arms"])}


def _held_out(run: Run, out: epath.Path) -> dict[str, Any]:
    rows = run.rows("prepare", "validation")
    prompt = run.inference_prompt
    pairs = tokenise(rows, out / "tokens", prompt, run.config.runtime.chunk_rows)
    units = [pair_units([pair], Direction.FORWARD, prompt) for pair in pairs]  # none: does not fit
    examples = [e for found in units for u in found for e in u.examples]
    ids = [row["id"] for row, found in zip(rows, units, strict=True) if found]
    models: dict[str, Callable[[], LanguageModel]] = {"base": run.base.model}
    models |= {arm: partial(finetuned, run, arm) for arm in arms(run)}
    sums, tokens = dict.fromkeys(models, ()), ()
    for name, load in models.items() if examples else ():
        sums[name], tokens = nll_sums(load(), examples, prompt.max_length, TOKENS_PER_BATCH)
    table = pa.table({"id": pa.array(ids, pa.string()), "tokens": pa.array(tokens, pa.int32())})
    for name, column in sums.items():
        table = table.append_column(f"{name}_nll_sum", pa.array(column, pa.float64()))
    write_table(out / "held_out.parquet", table)
    figures = compare(sums, tokens, derive_seed(run.config.seed, "evaluate"))
    results: dict[str, Any] = {"arms": {}, "base": figures["base"]}
    for arm in arms(run):
        results["arms"][arm] = {"kept_pairs": int(kept_by_arm(run, arm).sum())} | figures[arm]
    drop_reasons = read_parts(run.directory("filter") / "data", ["drop_reason"])["drop_reason"]
    reasons = Counter(reason or "kept" for reason in drop_reasons.to_pylist())
    results["pairs"] = {
        "seed": len(run.rows("prepare", "seed")),
        "validation": len(examples),
        "augmented": len(drop_reasons),
        "augmented_by_reason": dict(sorted(reasons.items())),
    }
    return results


def show(results: dict[str, Any]) -> str:
    """The results as a table for people."""
    if "auroc" in results:
        from main_jax.world.measure import show as show_world

        return show_world(results)
    models = {"base": results["base"], **results["arms"]}
    references = dict.fromkeys(r for m in models.values() for r in m.get("difference_to", ()))
    heads = ["held-out NLL (nats/token)", *(f"minus {r}" for r in references)]
    lines = [f"{'model':<12} kept pairs" + "".join(f"   {head:>27}" for head in heads)]
    for name, m in models.items():
        kept, minus = m.get("kept_pairs"), m.get("difference_to", {})
        cells = [_with_interval(m, NLL, "")]
        cells += [_with_interval(minus.get(r, {}), "nats_per_token", "+") for r in references]
        shown = "".join(f"   {cell:>27}" for cell in cells)
        lines.append(f"{name:<12} {'–' if kept is None else f'{kept:,}':>10}{shown}")
    if any(m.get(INTERVAL) for m in models.values()):
        lines.append(
            f"[{LEVEL:.0%} intervals over held-out pairs, not over trainings; differences paired]"
        )
    return "\n".join(lines)


def _with_interval(figures: dict[str, Any], key: str, sign: str) -> str:
    if (value := figures.get(key)) is None:
        return "–"
    if not (ends := figures.get(INTERVAL)):  # one pair, or an older version
        return f"{value:{sign}.4f}"
    return f"{value:{sign}.4f} [{ends[0]:{sign}.4f}, {ends[1]:{sign}.4f}]"


def read_results(run: Run) -> dict[str, Any]:
    """`RUN/results.json`."""
    return json.loads((run.path / "results.json").read_text())
