"""Did it help? What can be measured at the end of a run, written to `results.json`.

On the embedded world the truth is known (`main_jax.world.measure`). On a user's own files: the forward NLL
per token of the held-out seed pairs under the base and under every arm, and the funnel of pairs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from etils import epath

from main_jax.finetune import arms, finetuned, kept_by_arm
from main_jax.lm.train import mean_nll
from main_jax.models import LanguageModel
from main_jax.pairs import read_parts, write_json
from main_jax.prompts import Direction
from main_jax.run import Run
from main_jax.units import pair_units, tokenise


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
    examples = [e for u in pair_units(pairs, Direction.FORWARD, prompt) for e in u.examples]
    drop_reasons = read_parts(run.directory("filter") / "data", ["drop_reason"])["drop_reason"]

    def nll(load: Callable[[], LanguageModel]) -> float | None:
        if not examples:
            return None
        model = load()
        return mean_nll(model.decoder, model.params, examples, prompt.max_length)

    results: dict[str, Any] = {"arms": {}}
    results["base"] = {"validation_nll_nats_per_token": nll(run.base.model)}
    for arm in arms(run):
        results["arms"][arm] = {
            "kept_pairs": int(kept_by_arm(run, arm).sum()),
            "validation_nll_nats_per_token": nll(lambda arm=arm: finetuned(run, arm)),
        }
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
    lines = [f"{'model':<12} kept pairs   held-out NLL (nats/token)"]
    for name, r in {"base": results["base"], **results["arms"]}.items():
        kept, nll = r.get("kept_pairs"), r["validation_nll_nats_per_token"]
        shown = "–" if nll is None else f"{nll:.4f}"
        lines.append(f"{name:<12} {'–' if kept is None else f'{kept:,}':>10}   {shown:>25}")
    return "\n".join(lines)


def read_results(run: Run) -> dict[str, Any]:
    """`RUN/results.json`."""
    return json.loads((run.path / "results.json").read_text())
