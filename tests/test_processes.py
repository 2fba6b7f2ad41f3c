"""Whole stages in several processes: what one process gives, and stops that leave no trace.

A shortened world runs once in one process with 8 devices; every stage then runs from the same inputs in 2
processes with 4 devices each. What is stopped runs in 2 processes with one device each.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from test_kill import SHORT, STAGES, directory, parts

from main_jax.parts import read_parts

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
TOOL = Path(sys.executable).with_name("main-jax")
LIMIT_S = 400
CHUNKS = {"runtime.chunk_rows": 50}  # fewer, since each costs more


# Steps enough that none of the stage's work is over before the signal is noticed, about a second later.
LONG = {"align.max_steps": 60, "align.round_0.max_steps": 60, "finetune.max_steps": 100}


def command(verb: str, run: Path, *options: str, longer: bool = False) -> list:
    settings = SHORT | CHUNKS | (LONG if longer else {})
    words = [
        w
        for k, v in settings.items()
        for w in (f"--{k}", yaml.safe_dump(v, default_flow_style=True))
    ]
    return [verb, CONFIG, "--output_dir", run, *options, *words]


def launch(verb: str, run: Path, cache: Path, processes: int, devices: int) -> subprocess.Popen:
    """The verb in several processes (or one, without the launcher); what is said goes to a file."""
    environment = os.environ | {
        "XDG_CACHE_HOME": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    head = [TOOL, "launch", "--num-processes", str(processes), "--cpu-devices", str(devices), "--"]
    # Two single devices: the runs that are stopped.
    words = [*head, *command(verb, run, longer=devices == 1)]
    if processes == 1:
        words = [TOOL, *command(verb, run, "--cpu-devices", str(devices))]
    with log(run).open("a") as out:
        return subprocess.Popen(words, env=environment, stdout=out, stderr=out)


def log(run: Path) -> Path:
    return run.parent / f"{run.name}.log"


def finish(*how) -> None:
    code = launch(*how).wait(LIMIT_S)
    assert code == 0, log(how[1]).read_text()[-3000:]


def copy_before(stage: str, other: Path, run: Path) -> Path:
    for name in STAGES[: STAGES.index(stage)]:
        shutil.copytree(directory(other, name), directory(run, name))
    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(finished run of one process with 8 devices, compile cache)."""
    folder = tmp_path_factory.mktemp("processes")
    finish("run", folder / "alone", folder / "cache", 1, 8)
    return folder / "alone", folder / "cache"


# ------------------------------------------------------------------------------------ 2 x 4 and 1 x 8


def losses(path: Path) -> list[float]:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss_nats_per_token"] for line in lines]


def test_what_is_measured_and_exported_in_two_processes(alone, tmp_path):
    """From the same trained models: equal answers but for ties, equal figures, the same file of weights."""
    other, cache = alone
    run = copy_before("evaluate", other, tmp_path / "run")
    finish("run", run, cache, 2, 4)
    tables = sorted(p.relative_to(other) for p in directory(other, "evaluate").rglob("data"))
    assert len(tables) == 5  # answers of two arms; instructions of two rounds and of the control
    for name in tables:
        found, expected = (read_parts(r / name).to_pylist() for r in (run, other))
        assert [r["id"] for r in found] == [r["id"] for r in expected]
        text = "instruction" if "reverse-" in str(name) else "response"
        same = [a[text] == b[text] for a, b in zip(found, expected, strict=True)]
        assert len(same) > 50 and np.mean(same) > 0.97, name
    found, expected = (json.loads((r / "results.json").read_text()) for r in (run, other))
    assert found["auroc"] == expected["auroc"]
    for arm, figures in expected["arms"].items():
        assert found["arms"][arm] == pytest.approx(figures, abs=0.05), arm
    a, b = (load_file(directory(r, "export") / "model.safetensors") for r in (run, other))
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("stage", ["align", "augment", "score", "filter", "finetune"])
def test_a_stage_in_two_processes(stage, alone, tmp_path):
    other, cache = alone
    run = copy_before(stage, other, tmp_path / "run")
    finish(stage, run, cache, 2, 4)
    here, there = directory(run, stage), directory(other, stage)
    if stage in ("align", "finetune"):
        names = sorted(p.parent.relative_to(there) for p in there.rglob("metrics.jsonl"))
        assert len(names) == (5 if stage == "align" else 2)
        for name in names:
            found, expected = losses(here / name), losses(there / name)
            assert len(found) == len(expected) > 10
            if name.parts[0] != "round-1":  # which trains on texts that are sampled
                np.testing.assert_allclose(found, expected, atol=1e-3)
            # From one state; later steps carry on what rounding has begun.
            assert abs(found[0] - expected[0]) < 1e-5, name
        return
    found, expected = (read_parts(d / "data").to_pylist() for d in (here, there))
    assert [r["id"] for r in found] == [r["id"] for r in expected]
    if stage == "augment":
        same = [a["instruction"] == b["instruction"] for a, b in zip(found, expected, strict=True)]
        assert len(same) == 200 and np.mean(same) > 0.97  # but for ties of the two best tokens
    if stage == "score":
        for a, b in zip(found, expected, strict=True):
            assert a["forward_tokens"] == b["forward_tokens"]
            for name in ("forward", "reverse"):
                if b[f"{name}_nll_sum"] is not None:
                    difference = abs(a[f"{name}_nll_sum"] - b[f"{name}_nll_sum"])
                    assert difference / b[f"{name}_tokens"] < 1e-5
    if stage == "filter":
        assert found == expected and sum(r["keep"] for r in found) > 20


# ------------------------------------------------------------------------------------ stops, 2 x 1


@pytest.fixture(scope="module")
def undisturbed(alone, tmp_path_factory):
    """A run of two processes from the same world, beside which the stopped ones are held."""
    other, cache = alone
    run = copy_before("prepare", other, tmp_path_factory.mktemp("pair") / "run")
    finish("run", run, cache, 2, 1)
    return run, cache


def children(process: subprocess.Popen) -> list[int]:
    """The processes that a launcher has started, process 0 first."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)],
                           capture_output=True, text=True, check=True)  # fmt: skip
    return sorted(int(pid) for pid in found.stdout.split())


def wait_for(path: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + LIMIT_S
    while not path.exists():
        assert process.poll() is None and time.monotonic() < until, log(path.parents[-1])
        time.sleep(0.01)


MILESTONES = {"align": "round-0/reverse/checkpoints/5", "finetune": "none/checkpoints/5"}


@pytest.mark.parametrize("stage", MILESTONES)
def test_sigterm_to_one_stops_both_and_leaves_no_trace(stage, undisturbed, tmp_path):
    other, cache = undisturbed
    run = copy_before(stage, other, tmp_path / "run")
    process = launch("run", run, cache, 2, 1)
    wait_for(directory(run, stage) / MILESTONES[stage], process)
    os.kill(children(process)[1], signal.SIGTERM)
    assert process.wait(LIMIT_S) == 75
    said = log(run).read_text()
    assert re.search(r"stopped (at step|after part).*; the same command continues there", said), (
        said
    )
    assert json.loads((directory(run, stage) / "manifest.json").read_text())["status"] == "running"
    finish("run", run, cache, 2, 1)
    check_equal(run, other)


def test_a_killed_process_ends_the_other_and_leaves_no_trace(undisturbed, tmp_path):
    other, cache = undisturbed
    run = copy_before("finetune", other, tmp_path / "run")
    process = launch("run", run, cache, 2, 1)
    wait_for(directory(run, "finetune") / MILESTONES["finetune"], process)
    os.kill(children(process)[1], signal.SIGKILL)
    assert process.wait(LIMIT_S) == 1
    last = log(run).read_text().splitlines()[-1]
    assert "process 1" in last and "SIGKILL" in last, last
    finish("run", run, cache, 2, 1)
    check_equal(run, other)


def check_equal(run: Path, other: Path) -> None:
    """Tables and the final model, bit for bit."""
    found, expected = parts(run), parts(other)
    assert found.keys() == expected.keys() and len(found) > 20
    assert [name for name in expected if found[name] != expected[name]] == []
    a, b = (load_file(directory(r, "export") / "model.safetensors") for r in (run, other))
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in b)
