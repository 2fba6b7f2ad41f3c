"""A checkpoint of 2 processes with 4 devices each continues on 8 devices of one process, and on one device.

All three continue from copies of one folder, in processes of their own (`continue_worker.py`).
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from continue_worker import STEPS, STOP
from test_train_resume import left
from tiny_decoder import DECODER

from main_jax.launch import free_port
from main_jax.lm.checkpoint import load_params

WORKER = Path(__file__).with_name("continue_worker.py")
LIMIT_S = 240


def run(folder, *processes):
    """Run the worker once for each list of arguments, all at a time; all must succeed."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)  # may set a device count too
    logs = [folder / f"{i}-of-{len(processes)}.log" for i in range(len(processes))]
    running = []
    try:
        for words, log in zip(processes, logs, strict=True):
            with log.open("w") as file:
                command = [sys.executable, WORKER, folder, *words]
                running.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
        until = time.monotonic() + LIMIT_S
        codes = [None] * len(running)
        # Where one has failed, another may wait for it.
        while None in codes and not any(codes) and time.monotonic() < until:
            time.sleep(0.05)
            codes = [process.poll() for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert codes == [0] * len(codes), "\n\n".join(log.read_text()[-3000:] for log in logs)


@pytest.fixture(
    scope="module", params=["fsdp", pytest.param("data x fsdp", marks=pytest.mark.slow)]
)
def folder(request, tmp_path_factory):
    """What every number of processes has left."""
    path, port = tmp_path_factory.mktemp("continue"), str(free_port())
    run(path, *([request.param, "2x4", str(i), port] for i in range(2)))
    run(path, [request.param, "1x8"], [request.param, "1x1"])
    return path


def logged(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def values(directory: Path, name: str) -> list[float]:
    """A metric, step by step."""
    return [line[name] for line in logged(directory) if name in line]


def final(directory: Path) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(load_params(directory / "checkpoints", DECODER))]


@pytest.mark.parametrize("name", ["1x8", "1x1"])
def test_a_checkpoint_continues_with_another_count(name, folder):
    found, expected = np.load(folder / f"{name}.npz"), np.load(folder / "2x4.npz")
    assert found.files == expected.files and len(found.files) > 30  # parameters and both moments
    for leaf in expected.files:
        assert found[leaf].dtype == expected[leaf].dtype
        np.testing.assert_array_equal(found[leaf], expected[leaf], err_msg=leaf)
    for metric in ("loss_nats_per_token", "validation_nll_nats_per_token"):
        a, b = values(folder / name, metric), values(folder / "2x4", metric)
        assert len(a) == len(b) == STEPS
        assert a[:STOP] == b[:STOP] == values(folder / "stopped", metric)
        np.testing.assert_allclose(a[STOP:], b[STOP:], rtol=0, atol=1e-5)
        assert np.ptp(b[STOP:]) > 0.05
    assert left(folder / name) == {"checkpoints": [STEPS]}
    assert logged(folder / name)[-1]["best_step"] == logged(folder / "2x4")[-1]["best_step"]
    for a, b in zip(final(folder / name), final(folder / "2x4"), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_two_processes_continue_to_the_bit(folder):
    """Also with the best parameters on the way, which are neither the last nor of before the stop."""
    assert left(folder / "stopped") == {"checkpoints": [3, STOP], "best": [3, STOP]}
    assert left(folder / "2x4") == left(folder / "undisturbed") == {"checkpoints": [STEPS]}
    assert STOP < logged(folder / "2x4")[-1]["best_step"] < STEPS
    assert logged(folder / "2x4") == logged(folder / "undisturbed")
    for a, b in zip(final(folder / "2x4"), final(folder / "undisturbed"), strict=True):
        np.testing.assert_array_equal(a, b)
