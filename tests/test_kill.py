"""SIGKILL inside a stage, at several random moments, then a re-run: it ends as if nothing had happened.

A shortened world runs once undisturbed; each test copies what came before its stage and kills what follows.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from main_jax.lm.checkpoint import load_params
from main_jax.lm.hf import load_config
from main_jax.lm.model import Decoder
from main_jax.parts import read_parts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TOOL = Path(sys.executable).with_name("main-jax")
STAGES = (
    "world",
    "prepare",
    "align",
    "augment",
    "score",
    "filter",
    "finetune",
    "evaluate",
    "export",
)
KILLS = 3
LIMIT_S = 240
SHORT = {
    "world.documents": 2000,
    "world.hidden_size": 32,
    "world.pretraining.max_steps": 30,
    "world.responses": 200,
    "world.seed_pairs": 60,
    "world.test_questions": 30,
    "align.round_0.max_steps": 12,
    "align.max_steps": 12,
    "align.save_steps": 5,
    "finetune.max_steps": 20,
    "finetune.save_steps": 5,
    "finetune.arms": ["none", "mutual"],
    "runtime.chunk_rows": 10,
    "runtime.generation_batch_size": 16,
}


def directory(run: Path, stage: str) -> Path:
    return run / "hf" if stage == "export" else run / "stages" / f"{STAGES.index(stage):02}-{stage}"


def status(run: Path, stage: str) -> str | None:
    path = directory(run, stage) / "manifest.json"
    return json.loads(path.read_text())["status"] if path.exists() else None


def counts(run: Path, stage: str) -> dict:
    return json.loads((directory(run, stage) / "manifest.json").read_text())["counts"]


def start(config: Path, run: Path, cache: Path) -> subprocess.Popen:
    """The run in a process of its own; its messages go to a file beside it."""
    overrides = [
        w for k, v in SHORT.items() for w in (f"--{k}", yaml.safe_dump(v, default_flow_style=True))
    ]
    # One compile cache for all starts: what is tested is not compiling.
    environment = os.environ | {
        "XDG_CACHE_HOME": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    with (run.parent / f"{run.name}.log").open("a") as log:
        return subprocess.Popen(
            [TOOL, "run", config, "--output_dir", run, *overrides],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip


def finish(config: Path, run: Path, cache: Path) -> None:
    code = start(config, run, cache).wait(LIMIT_S)
    assert code == 0, (run.parent / f"{run.name}.log").read_text()[-3000:]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(config, folder of the finished run, compile cache)."""
    folder = tmp_path_factory.mktemp("kill")
    config = ROOT / "configs" / "demo.yaml"
    finish(config, folder / "run", folder / "cache")
    return config, folder / "run", folder / "cache"


def milestones(path: Path) -> list[Path]:
    """What a stage leaves on its way, in order: parts of tables, and checkpoints, also passing ones."""
    found = {p: p.stat().st_mtime_ns for p in path.rglob("*.parquet")}
    for last in (p.parent for p in path.rglob("checkpoints/*/commit_success.txt")):
        steps = range(SHORT["align.save_steps"], int(last.name), SHORT["align.save_steps"])
        written = (last / "commit_success.txt").stat().st_mtime_ns
        found |= {last.with_name(str(n)): written - int(last.name) + n for n in steps}
        found[last] = written
    return [p.relative_to(path) for p in sorted(found, key=lambda p: (found[p], p))]


def reached(path: Path) -> bool:
    """Whether a milestone lies behind; of checkpoints only the newest stays."""
    if path.parent.name != "checkpoints":
        return path.exists()
    found = [int(p.name) for p in path.parent.glob("*") if p.name.isdigit()]
    return max(found, default=0) >= int(path.name)


def kill_inside(config, run, cache, stage, milestone: Path, delay: float) -> bool:
    """Starts the run and kills it `delay` seconds after the stage has reached a milestone.

    Whether the kill came inside the stage.
    """
    process = start(config, run, cache)
    try:
        until = time.monotonic() + LIMIT_S
        while process.poll() is None and not reached(directory(run, stage) / milestone):
            assert time.monotonic() < until
            time.sleep(0.002)
        time.sleep(delay)
    finally:
        process.kill()
        process.wait()
    return process.returncode == -9 and status(run, stage) == "running"


def parameters(run: Path) -> dict[str, list[np.ndarray]]:
    """Every final parameter of the run, by the folder it lies in."""
    decoder = Decoder(load_config(directory(run, "world") / "base"))
    folders = sorted(
        p for s in ("align", "finetune") for p in directory(run, s).rglob("checkpoints")
    )
    return {
        str(p.relative_to(run)): [np.asarray(x) for x in jax.tree.leaves(load_params(p, decoder))]
        for p in folders
    }


def parts(run: Path) -> dict[str, bytes]:
    """Every part of every table."""
    return {
        str(p.relative_to(run)): p.read_bytes() for p in sorted(run.glob("stages/**/*.parquet"))
    }


def check_equal(run: Path, other: Path) -> None:
    """Kept ids, tables, results and parameters, bit for bit; times apart."""
    assert [status(run, s) for s in STAGES] == ["done"] * len(STAGES)
    kept, expected = (read_parts(directory(r, "filter") / "data") for r in (run, other))
    assert kept["id"].filter(kept["keep"]).equals(expected["id"].filter(expected["keep"]))
    assert sum(expected["keep"].to_pylist()) > 20
    found, wanted = parts(run), parts(other)
    assert list(found) == list(wanted)
    assert len(found) > 100
    assert [name for name in wanted if found[name] != wanted[name]] == []
    results = [json.loads((r / "results.json").read_text()) for r in (run, other)]
    assert results[0] | {"seconds": None} == results[1] | {"seconds": None}
    assert list(results[0]["seconds"]) == list(results[1]["seconds"]) == list(STAGES)
    assert {s: counts(run, s) for s in STAGES} == {s: counts(other, s) for s in STAGES}
    found, wanted = parameters(run), parameters(other)
    assert list(found) == list(wanted)
    assert len(found) == 2 + 2 + 1 + 2  # rounds 0 and 1, the control, two arms
    for name, leaves in found.items():
        for leaf, same in zip(leaves, wanted[name], strict=True):
            assert leaf.dtype == same.dtype
            assert np.array_equal(leaf, same), name
    exported, wanted = (
        {p.name: p.read_bytes() for p in directory(r, "export").iterdir()} for r in (run, other)
    )
    assert {"model.safetensors", "config.json", "tokenizer.json"} < exported.keys()
    for found in (exported, wanted):
        del found["manifest.json"]
    assert exported == wanted
    for log in sorted(other.glob("stages/*/**/metrics.jsonl")):
        assert (run / log.relative_to(other)).read_text() == log.read_text(), log


def test_an_undisturbed_run_repeats_itself(undisturbed, tmp_path):
    """The ground of the other tests: a second run from the same world gives the same bits."""
    config, other, cache = undisturbed
    run = copy_before("align", other, tmp_path)
    finish(config, run, cache)
    check_equal(run, other)


def copy_before(stage: str, other: Path, folder: Path) -> Path:
    """A run directory in which every stage before `stage` is done."""
    run = folder / "run"
    for name in STAGES[: STAGES.index(stage)]:
        shutil.copytree(directory(other, name), directory(run, name))
    return run


@pytest.mark.parametrize("stage", ["align", "augment", "score", "finetune", "evaluate"])
def test_kills_inside_a_stage_leave_no_trace(stage, undisturbed, tmp_path):
    config, other, cache = undisturbed
    rng = random.Random(f"kill {stage}")
    run = copy_before(stage, other, tmp_path)
    order = milestones(directory(other, stage))
    assert len(order) > 7
    longest_delay = 0.3 if stage in ("align", "finetune") else 0.03
    inside = attempts = 0
    while inside < KILLS:
        attempts += 1
        assert attempts <= 3 * KILLS, f"{stage} was left too quickly {attempts - inside} times"
        ahead = [m for m in order[:-1] if not reached(directory(run, stage) / m)] or order[:1]
        milestone = ahead[rng.randrange((len(ahead) + 1) // 2)]
        if kill_inside(config, run, cache, stage, milestone, rng.uniform(0, longest_delay)):
            inside += 1
        elif status(run, stage) == "done":  # too late: the stage from its beginning once more
            for name in STAGES[STAGES.index(stage) :]:
                shutil.rmtree(directory(run, name), ignore_errors=True)
            inside = 0
    # What a kill in the middle of a write would leave; that moment is too short to be hit at will.
    (directory(run, stage) / ".part-00001.parquet.4711.tmp").write_bytes(b"PAR1 half")
    finish(config, run, cache)
    check_equal(run, other)
    assert list(directory(run, stage).rglob(".*.tmp")) == []


@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_sigterm_saves_stops_and_leaves_no_trace(stage, undisturbed, tmp_path):
    config, other, cache = undisturbed
    run = copy_before(stage, other, tmp_path)
    milestone = milestones(directory(other, stage))[1]
    process = start(config, run, cache)
    while process.poll() is None and not reached(directory(run, stage) / milestone):
        time.sleep(0.002)
    process.terminate()
    assert process.wait(LIMIT_S) == 75
    said = (run.parent / f"{run.name}.log").read_text()
    assert "stopped a" in said and "the same command continues there" in said, said
    assert status(run, stage) == "running"
    finish(config, run, cache)
    check_equal(run, other)
