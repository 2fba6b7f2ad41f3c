"""The run as one self-contained page: `RUN/report.html`, from the files of the run alone.

    write_report("runs/demo")       # after any stage; what is not there yet is named

Of the tables only the columns of the charts are read, and the texts of the examples that are shown. The
page has no script and loads nothing (its Content-Security-Policy forbids both); texts are escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
from etils import epath
from scipy.stats import binomtest

from main_jax.filter import CUT, SCORES, pool_of
from main_jax.lm.multihost import first
from main_jax.lm.progress import say
from main_jax.pairs import joined_instruction, write_atomically
from main_jax.report import charts
from main_jax.report.charts import Interval
from main_jax.report.files import LINE_POINTS, RunFiles, columns, drops, metrics, rows_at

POINTS = 3000
"""Points of the scatter; a seeded sample where there are more pairs."""
TEXT = 1500
"""Characters shown of a text."""
NATS = "nats per token"


def write_report(path: epath.PathLike) -> epath.Path:
    """Writes `report.html` of the run directory `path`; touches no device, so also beside a run at work.

    Raises UserError where there is no run.
    """
    page = epath.Path(path).expanduser() / "report.html"
    html = render(RunFiles(page.parent)).encode()
    write_atomically(page, lambda temporary: temporary.write_bytes(html), own=True)
    return page


def refresh_report(path: epath.PathLike) -> None:
    """`write_report` by the first process; what goes wrong is said in one line and stops no run."""
    if not first():
        return
    try:
        write_report(path)
    except Exception as error:
        say(f"report: not written ({type(error).__name__}: {' '.join(str(error).split())[:200]})")


def render(run: RunFiles) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = charts.number
    environment.filters["clock"] = clock
    source = files("main_jax.report") / "template.html"
    template = environment.from_string(source.read_text(encoding="utf-8"))
    html = template.render(
        name=run.path.name, world=run.world, config=run.config, config_text=run.config_text,
        colours=charts.COLOURS, stages=run.stages, versions=_versions(run), funnel=_funnel(run),
        seed=_seed(run), arms=_arms(run), training=_training(run), points=POINTS, line_points=LINE_POINTS,
        **_scores(run),
    )  # fmt: skip
    return html.encode("utf-8", "replace").decode()


def clock(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


# ------------------------------------------------------------------------------------------- funnel


def _funnel(run: RunFiles) -> dict[str, Any]:
    """From texts read to pairs kept: after each stage what is left, and what it dropped for which reason."""
    steps: list[dict[str, Any]] = []
    before: Counter[str] = Counter()
    read = 0
    for stage, part in (("prepare", "responses"), ("augment", ""), ("score", ""), ("filter", "")):
        found = drops(run.folder(stage) / "data" / part)
        if found is None:
            break
        rows = sum(found.values())
        read = read or rows
        dropped = found - before if rows == read else Counter()
        del dropped[""]
        steps.append({
            "stage": stage, "left": found[""], "rows": rows, "share": min(1.0, found[""] / read),
            "dropped": sorted(dropped.items()), "partial": rows < read,
        })  # fmt: skip
        before = found
    return {"read": read, "steps": steps}


def _seed(run: RunFiles) -> dict[str, Any]:
    """The seed pairs: read, dropped by reason, held out, and left for training."""
    train, held_out = (drops(run.folder("prepare") / "data" / t) for t in ("seed", "validation"))
    if train is None:
        return {}
    left, held = train.pop("", 0), sum((held_out or {}).values())
    dropped = sorted(train.items())
    return {
        "read": left + held + sum(train.values()), "dropped": dropped, "held_out": held, "left": left
    }  # fmt: skip


# ------------------------------------------------------------------------------------------- training


def _training(run: RunFiles) -> dict[str, Any]:
    """The charts of losses and α."""
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
    for name, key in (("finetune", "loss_nats"), ("validation", "validation_nll_nats_per_token")):
        series = {arm: m[key] for arm, m in arms.items() if key in m}
        if any(len(steps) > 1 for steps, _ in series.values()):
            drawn[name] = charts.lines(series, "optimiser steps", NATS, strong=by)
    if run.world and (found := metrics(run.folder("world") / "pretraining" / "metrics.jsonl")):
        drawn["pretraining"] = charts.lines(
            {"loss": found["loss_nats"]}, "optimiser steps", NATS, strong="loss"
        )
    return drawn


def _rounds(folder: epath.Path) -> Iterator[epath.Path]:
    k = 0
    while (found := folder / f"round-{k}").exists():
        yield found
        k += 1


# ------------------------------------------------------------------------------------------- scores

READ = (
    "drop_reason", "keep", "truncated", "finish_reason", "forward_nll_sum", "forward_tokens",
    "reverse_nll_sum", "reverse_tokens", *(name for name in SCORES if name not in ("none", "random")),
)  # fmt: skip


def _scores(run: RunFiles) -> dict[str, Any]:
    """Charts and examples of the scored pairs; of the filtered ones where they are there."""
    nothing = {"scores": None, "lengths": None, "examples": []}
    stage = next((s for s in ("filter", "score") if _has_parts(run.folder(s) / "data")), None)
    if stage is None:
        return nothing
    directory = run.folder(stage) / "data"
    table = columns(directory, READ)
    assert table is not None
    pool = pool_of(table)
    if not pool.any():
        return nothing

    def values(name: str) -> np.ndarray:
        return np.asarray(table[name].to_numpy(zero_copy_only=False), float)[pool]

    filtered = stage == "filter"
    manifest = run.stages["filter"]["manifest"] if filtered else {}
    settings = manifest.get("config", {}).get("filter", {})
    kept = np.asarray(table["keep"].to_numpy(zero_copy_only=False), bool)[pool]
    judged = _truth(run, directory)
    true = None if judged is None else judged[0][pool]

    def grouped(x: np.ndarray) -> dict[str, np.ndarray]:
        if true is not None:
            return {"true": x[true], "flawed": x[~true]}
        return {"kept": x[kept], "cut": x[~kept]} if filtered else {"scored": x}

    forward = values("forward_nll_sum") / values("forward_tokens")
    reverse = values("reverse_nll_sum") / values("reverse_tokens")
    chosen = np.arange(len(kept))
    if len(chosen) > POINTS:
        chosen = np.sort(np.random.default_rng(0).choice(len(chosen), POINTS, replace=False))
    sampled = np.isin(np.arange(len(kept)), chosen)
    places = grouped(np.arange(len(kept)))
    scores: dict[str, Any] = {
        "filtered": filtered, "pool": len(kept), "kept": int(kept.sum()), "truth": true is not None,
        "sampled": len(chosen), "by": settings.get("by"), "select": settings.get("select"),
        "keep": settings.get("keep"), "main": None, "others": {}, "cut": None, "ends": None,
        "scatter": charts.scatter(
            {name: (forward[i], reverse[i], kept[i])
             for name, i in ((name, i[sampled[i]]) for name, i in places.items())},
            f"forward: −log p(R|I), {NATS}", f"reverse: −log p(I|R), {NATS}",
        ),
    }  # fmt: skip
    for name in (n for n in SCORES if filtered and n in table.column_names):
        column = values(name)
        sign, side = (1.0, "≤") if SCORES[name].keep == "low" else (-1.0, "≥")
        cut = None
        if name == settings.get("by") and kept.any():
            cut = sign * float((sign * column[kept]).max())
        elif kept.any():  # where it would cut to keep as many
            eligible = SCORES[name].eligible
            ranked = np.sort(sign * (column if eligible is None else column[eligible(column)]))
            cut = sign * float(ranked[: kept.sum()][-1]) if len(ranked) else None
        text = f"keeps {side} {charts.number(cut)}"
        drawn = charts.histogram(grouped(column), name, cut=cut, cut_text=text)
        if name == settings.get("by"):
            scores |= {"main": drawn, "cut": cut, "ends": SCORES[name].keep}
        else:
            scores["others"][name] = drawn
    lengths: dict[str, Any] = {
        "response": charts.histogram(grouped(values("forward_tokens")), "response tokens"),
        "instruction": charts.histogram(grouped(values("reverse_tokens")), "instruction tokens"),
    }
    truncated = np.asarray(table["truncated"].fill_null(False))[pool]
    by_truncation = {"whole": values("forward_tokens")[~truncated]}
    by_truncation |= {"truncated": values("forward_tokens")[truncated]}
    finished = table["finish_reason"].value_counts().to_pylist()
    lengths |= {
        "truncated": int(truncated.sum()),
        "truncation": charts.histogram(by_truncation, "response tokens"),
        "finish": sorted((c["values"] or "–", c["counts"]) for c in finished),
    }
    examples = _examples(directory, table, pool, kept, settings.get("by"), judged, filtered)
    return {"scores": scores, "lengths": lengths, "examples": examples}


def _has_parts(directory: epath.Path) -> bool:
    return any(directory.glob("part-*.parquet"))


def _truth(run: RunFiles, directory: epath.Path) -> tuple[np.ndarray, list[str]] | None:
    """([N] bool whether the pair is true, its response's kind), on the embedded world alone."""
    if not run.world or not (known := run.json(run.folder("world") / "truth.json")):
        return None
    from main_jax.world.judge import is_true_pair

    table = columns(directory, ["id", "instruction", "response"])
    assert table is not None
    rows = table.to_pylist()
    if any(row["id"] not in known["responses"] for row in rows):  # of another world
        return None
    kinds = [known["responses"][row["id"]]["kind"] for row in rows]
    true = [
        is_true_pair(row["instruction"] or "", row["response"] or "", kind)
        for row, kind in zip(rows, kinds, strict=True)
    ]
    return np.asarray(true, bool), kinds


def _examples(
    directory: epath.Path, table: pa.Table, pool: np.ndarray, kept: np.ndarray, by: str | None,
    judged: tuple[np.ndarray, list[str]] | None, filtered: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """Pairs at several levels of the score, and one for each other drop reason."""
    levels: dict[str, list[int]] = {}
    if filtered:
        name = by if by and by in table.column_names else "mutual"
        sign = 1.0 if SCORES[name].keep == "low" else -1.0
        column = sign * np.asarray(table[name].to_numpy(zero_copy_only=False), float)
        members = np.flatnonzero(pool)
        for side, chosen in (("kept", members[kept]), ("cut", members[~kept])):
            order = [int(i) for i in chosen[np.argsort(column[chosen], kind="stable")]]
            middle = len(order) // 2
            titles = ("best kept", "middle of the kept", "last kept")
            if side == "cut":
                titles = ("first cut", "middle of the cut", "worst")
            ends = order[:2], order[2:][-2:]
            between = [i for i in order[middle : middle + 2] if i not in (*ends[0], *ends[1])]
            levels |= zip(titles, (ends[0], between, ends[1]), strict=True)
    reasons = table["drop_reason"].to_pylist()
    for i, reason in enumerate(reasons):
        if reason and not reason.startswith(CUT):
            levels.setdefault(f"dropped: {reason}", [])
            if not levels[f"dropped: {reason}"]:
                levels[f"dropped: {reason}"] = [i]
    wanted = [i for found in levels.values() for i in found]
    texts = rows_at(directory, wanted, ["id", "instruction", "input", "response"])

    def example(i: int) -> dict[str, Any]:
        row = table.slice(i, 1).to_pylist()[0]
        shown = {"id": texts[i]["id"], "keep": bool(row["keep"]) and filtered, "reason": reasons[i]}
        shown["instruction"] = _shorten(joined_instruction(texts[i]))
        shown["response"] = _shorten(texts[i]["response"] or "")
        facts = []
        if judged is not None:
            facts.append("true" if judged[0][i] else f"flawed ({judged[1][i]} response)")
        if row.get(by or "") is not None:
            facts.append(f"{by} {charts.number(row[by])}")
        for direction in ("forward", "reverse"):
            if tokens := row[f"{direction}_tokens"]:
                nll = row[f"{direction}_nll_sum"] / tokens
                facts.append(f"{direction} {charts.number(nll)} ({tokens} tokens)")
        return shown | {"facts": facts}

    return [
        {"title": title, "pairs": [example(i) for i in found]}
        for title, found in levels.items()
        if found
    ]


def _shorten(text: str) -> str:
    """What a page can show: without control characters, and cut when it is long."""
    text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text[: TEXT + 1])
    return text if len(text) <= TEXT else f"{text[:TEXT]} …"


# ------------------------------------------------------------------------------------------- results


def _arms(run: RunFiles) -> dict[str, Any]:
    """The arms side by side: exact matches on a world, held-out NLL on a user's own files."""
    results = run.json(run.folder("evaluate") / "results.json")
    if not results:
        return {}
    counts = run.stages["finetune"]["counts"]
    found: dict[str, Any] = {"results": results, "rows": {}, "chart": None}
    found["kept"] = {arm: counts.get(f"{arm}_kept") for arm in results["arms"]}
    if "auroc" not in results:
        rows = {"base": results["base"], **results["arms"]}
        for arm, r in rows.items():
            found["rows"][arm] = {"held-out NLL": Interval(r["validation_nll_nats_per_token"])}
        if all(i.value is not None for row in found["rows"].values() for i in row.values()):
            found["chart"] = charts.intervals(found["rows"], f"held-out NLL, {NATS}")
        return found
    tests = run.json(run.folder("world") / "tests.json")
    for arm, r in results["arms"].items():
        found["rows"][arm] = {
            name.replace("heldout", "held-out"): _share(r[name], len(rows)) for name, rows in tests.items()
        }  # fmt: skip
    found["chart"] = charts.intervals(found["rows"], "exact match, share of questions")
    found["questions"] = {name: len(rows) for name, rows in tests.items()}
    return found


def _share(value: float, count: int) -> Interval:
    """A share of `count` answers with its 95 % interval (Wilson)."""
    ends = binomtest(round(value * count), count).proportion_ci(method="wilson")
    return Interval(value, float(ends.low), float(ends.high))


def _versions(run: RunFiles) -> dict[str, list[str]]:
    """Of every package all versions that a stage ran with."""
    found: dict[str, dict[str, None]] = {}
    for stage in run.stages.values():
        for package, version in stage["manifest"].get("versions", {}).items():
            found.setdefault(package, {})[version] = None
    return {package: list(versions) for package, versions in found.items()}
