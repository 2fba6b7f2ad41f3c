"""Did it help? What can be measured at the end of a run, written to `results.json`.

On the embedded world the truth is known (`main_jax.world.measure`). On a user's own files: the forward NLL
per token of the held-out seed pairs under the base and under every arm, with its spread over pairs, and the
funnel of pairs; and, of questions with references (`data.eval_path`), the same NLL and the share of right
answers. The NLL of each pair under each model is in `held_out.parquet` and `test.parquet` beside it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from main_jax.augment import write_chunks
from main_jax.bootstrap import INTERVAL, LEVEL, NLL, compare
from main_jax.checker import CHECKERS
from main_jax.data.reading import read_pairs, staged
from main_jax.finetune import arms, finetuned, kept_by_arm
from main_jax.models import LanguageModel
from main_jax.pairs import write_json, write_table
from main_jax.parts import map_chunks, read_parts
from main_jax.prepare import in_columns, mark
from main_jax.prompts import Direction
from main_jax.run import Run, derive_seed
from main_jax.score import Side, nll_sums
from main_jax.units import pair_units, tokenise

TOKENS_PER_BATCH = 8192
TEST_NLL = "nll_nats_per_token"


Models = dict[str, Callable[[], LanguageModel]]
"""`base` and the arms, each loaded when it is asked for."""


def evaluate(run: Run, out: epath.Path) -> dict[str, int]:
    """Writes `out/results.json`."""
    if run.world:
        from main_jax.world.measure import measure

        results = measure(run, out)
    else:
        models: Models = {"base": run.base.model}
        models |= {arm: partial(finetuned, run, arm) for arm in arms(run)}
        results = _held_out(run, out, models)
        if run.config.data.eval_path:
            results["test"] = _own_test(run, out, models)
    write_json(out / "results.json", results)
    return {"arms": len(results["arms"])}


def _held_out(run: Run, out: epath.Path, models: Models) -> dict[str, Any]:
    rows = run.rows("prepare", "validation")
    table = _measured(run, out / "tokens", rows, models)
    write_table(out / "held_out.parquet", table)
    figures = _compared(run, table, models)
    results: dict[str, Any] = {"arms": {}, "base": figures["base"]}
    for arm in arms(run):
        results["arms"][arm] = {"kept_pairs": int(kept_by_arm(run, arm).sum())} | figures[arm]
    drop_reasons = read_parts(run.directory("filter") / "data", ["drop_reason"])["drop_reason"]
    reasons = Counter(reason or "kept" for reason in drop_reasons.to_pylist())
    results["pairs"] = {
        "seed": len(run.rows("prepare", "seed")),
        "validation": len(table),
        "augmented": len(drop_reasons),
        "augmented_by_reason": dict(sorted(reasons.items())),
    }
    return results


def _own_test(run: Run, out: epath.Path, models: Models) -> dict[str, Any]:
    """The user's questions: the NLL of their references, and with a checker the share of right answers."""
    prompt, source, folder = run.inference_prompt, run.sources["eval"], out / "test"
    chunk_rows, name = run.config.runtime.chunk_rows, run.config.evaluate.checker

    def marked(chunk: Sequence[dict], advance: Callable[[int], None]) -> list[dict]:
        mark(chunk, prompt, (Direction.FORWARD,))
        return in_columns(chunk, "eval")

    read, _ = staged(source, read_pairs(source), folder / "read", chunk_rows)
    rows = list(map_chunks(read, folder / "data", chunk_rows, marked))
    table = _measured(run, folder / "tokens", rows, models)
    write_table(out / "test.parquet", table)
    figures = {
        model: {TEST_NLL if key == NLL else key: value for key, value in found.items()}
        for model, found in _compared(run, table, models).items()
    }
    asked = [row for row in rows if not row["drop_reason"]]
    for model, load in models.items() if name else ():
        answers = write_chunks(
            run, folder / "answers" / model, asked, Direction.FORWARD, load,
            run.config.evaluate.sampling, purpose="evaluate", label=f"evaluate answers {model}",
            prompt=prompt,
        )  # fmt: skip
        right = [
            CHECKERS[str(name)](answer["response"] or "", row["response"])
            for answer, row in zip(answers, asked, strict=True)
        ]
        figures[model]["right"] = float(np.mean(right)) if right else None
    reasons = Counter(row["drop_reason"] or "asked" for row in rows)
    return {"questions": dict(sorted(reasons.items())), "checker": name, "models": figures}


def _measured(run: Run, tokens: epath.Path, rows: Sequence[dict], models: Models) -> pa.Table:
    """id, target tokens and MODEL_nll_sum of the rows that fit the template."""
    prompt = run.inference_prompt
    pairs = tokenise(rows, tokens, prompt, run.config.runtime.chunk_rows)
    units = [pair_units([pair], Direction.FORWARD, prompt) for pair in pairs]  # none: does not fit
    examples = [e for found in units for u in found for e in u.examples]
    ids = [row["id"] for row, found in zip(rows, units, strict=True) if found]
    sums: dict[str, Any] = dict.fromkeys(models, ())
    counts: Any = ()
    for name, load in models.items() if examples else ():
        side = Side(load(), examples, prompt.max_length)
        sums[name], counts = nll_sums([side], TOKENS_PER_BATCH)[0]
    table = pa.table({"id": pa.array(ids, pa.string()), "tokens": pa.array(counts, pa.int32())})
    for name, column in sums.items():
        table = table.append_column(f"{name}_nll_sum", pa.array(column, pa.float64()))
    return table


def _compared(run: Run, table: pa.Table, models: Models) -> dict[str, dict[str, Any]]:
    sums = {name: table[f"{name}_nll_sum"].to_numpy() for name in models}
    return compare(sums, table["tokens"].to_numpy(), derive_seed(run.config.seed, "evaluate"))


def show(results: dict[str, Any]) -> str:
    """The results as a table for people."""
    if "auroc" in results:
        from main_jax.world.measure import show as show_world

        return show_world(results)
    shown = _show_models({"base": results["base"], **results["arms"]}, "held-out NLL (nats/token)")
    if test := results.get("test"):
        questions = ", ".join(f"{n:,} {reason}" for reason, n in test["questions"].items())
        checked = f"; right: {test['checker']}" if test["checker"] else ""
        shown += f"\n\nyour questions ({questions}{checked})\n"
        shown += _show_models(test["models"], "references' NLL", TEST_NLL)
    return shown


def _show_models(models: dict[str, Any], title: str, key: str = NLL) -> str:
    references = dict.fromkeys(r for m in models.values() for r in m.get("difference_to", ()))
    heads = [title, *(f"minus {r}" for r in references)]
    kept_or_right = "right" if any("right" in m for m in models.values()) else "kept pairs"
    lines = [f"{'model':<12} {kept_or_right:>10}" + "".join(f"   {head:>27}" for head in heads)]
    for name, m in models.items():
        kept, minus = m.get("kept_pairs"), m.get("difference_to", {})
        first = (
            f"{m['right']:.3f}"
            if m.get("right") is not None
            else "–"
            if kept is None
            else f"{kept:,}"
        )
        cells = [_with_interval(m, key, "")]
        cells += [_with_interval(minus.get(r, {}), "nats_per_token", "+") for r in references]
        shown = "".join(f"   {cell:>27}" for cell in cells)
        lines.append(f"{name:<12} {first:>10}{shown}")
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
