"""The run as one self-contained page: `RUN/report.html`, from the files of the run alone.

    write_report("runs/demo")       # after any stage; what is not there yet is named

Of the tables only the columns of the charts are read, and the texts of the examples that are shown.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from etils import epath

from main_jax.filter import SCORES
from main_jax.lm.multihost import first
from main_jax.lm.progress import say
from main_jax.report import html
from main_jax.report.arms import arms
from main_jax.report.evaluations import evaluations
from main_jax.report.files import LINE_POINTS, RunFiles, columns
from main_jax.report.funnel import funnel, seed
from main_jax.report.pool import READ, Pool
from main_jax.report.training import training


def write_report(path: epath.PathLike) -> epath.Path:
    """Writes `report.html` of the run directory `path`; touches no device, so also beside a run at work.

    Raises UserError where there is no run.
    """
    page = epath.Path(path).expanduser() / "report.html"
    html.write(page, render(RunFiles(page.parent)))
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
    return html.render(
        "run.html", name=run.path.name, world=run.world, config=run.config,
        config_text=run.config_text, stages=run.stages, versions=_versions(run), funnel=funnel(run),
        seed=seed(run), arms=arms(run), evaluations=evaluations(run), training=training(run),
        line_points=LINE_POINTS, **_scores(run),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- scores


def _scores(run: RunFiles) -> dict[str, Any]:
    """Charts and examples of the scored pairs; of the filtered ones where they are there."""
    nothing = {"scores": None, "lengths": None, "examples": []}
    stages = (run.folder(stage) / "data" for stage in ("filter", "score"))
    directory = next((data for data in stages if any(data.glob("part-*.parquet"))), None)
    table = None if directory is None else columns(directory, READ)
    if directory is None or table is None:
        return nothing
    filtered = directory == run.folder("filter") / "data"
    manifest = run.stages["filter"]["manifest"] if filtered else {}
    settings = manifest.get("config", {}).get("filter", {})
    by = settings.get("by", "none") if filtered else ""
    true, notes = _truth(run, directory) or (None, None)
    pool = Pool(directory, table, by, true, notes)
    if not len(pool):
        return nothing
    others = pool.scores() if filtered else {}
    main = others.pop(by, None)
    scores = {
        "filtered": filtered, "pool": len(pool), "kept": int(pool.kept.sum()),
        "truth": true is not None, "sampled": len(pool.sampled), "scatter": pool.scatter(),
        "by": settings.get("by"), "select": settings.get("select"), "keep": settings.get("keep"),
        "main": main, "cut": pool.cut(by) if main else None,
        "ends": SCORES[by].keep if main else None, "others": others,
    }  # fmt: skip
    finished = table["finish_reason"].value_counts().to_pylist()
    finish = sorted((c["values"] or "–", c["counts"]) for c in finished)
    return {
        "scores": scores, "lengths": pool.lengths() | {"finish": finish},
        "examples": pool.examples([by]),
    }  # fmt: skip


def _truth(run: RunFiles, directory: epath.Path) -> tuple[np.ndarray, list[str]] | None:
    """([N] bool whether the pair is true, [N] what to say of it), on the embedded world alone."""
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
    notes = [
        "true" if t else f"flawed ({kind} response)" for t, kind in zip(true, kinds, strict=True)
    ]
    return np.asarray(true, bool), notes


def _versions(run: RunFiles) -> dict[str, list[str]]:
    """Of every package all versions that a stage ran with."""
    found: dict[str, dict[str, None]] = {}
    for stage in run.stages.values():
        for package, version in stage["manifest"].get("versions", {}).items():
            found.setdefault(package, {})[version] = None
    return {package: list(versions) for package, versions in found.items()}
