"""Sharded loading equals unsharded loading: on 8 devices of one process, and on 2 processes with 4 each.

Each test runs `sharded_load_worker.py` in processes of its own, which check what they hold and read.
"""

import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sharded_load_worker import CASES, LEAVES, SIZES, flattened, same_bits
from tiny_llama import make_tiny_llama

from main_jax.lm.hf import load_checkpoint, save_checkpoint

WORKER = Path(__file__).with_name("sharded_load_worker.py")
LIMIT_S = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in several files."""
    path = tmp_path_factory.mktemp("sharded")
    single = make_tiny_llama(
        path / "single",
        seed=5,
        vocab_size=SIZES["V"],
        hidden_size=SIZES["D"],
        intermediate_size=SIZES["F"],
        num_hidden_layers=SIZES["L"],
        num_attention_heads=SIZES["N"],
        num_key_value_heads=SIZES["K"],
        head_dim=SIZES["H"],
    )
    config, params = load_checkpoint(single)
    save_checkpoint(path / "model", config, params, max_shard_bytes=150_000)
    assert len(list((path / "model").glob("*.safetensors"))) > 4
    return path / "model"


def run(tmp_path, *processes):
    """Run the worker once for each list of arguments, all at a time; all must succeed."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)  # may set a device count too
    logs = [tmp_path / f"{i}.log" for i in range(len(processes))]
    running = []
    try:
        for arguments, log in zip(processes, logs, strict=True):
            with log.open("w") as file:
                command = [sys.executable, WORKER, *arguments]
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


def test_eight_devices(folder, tmp_path):
    run(tmp_path, ["load", folder])


def test_two_processes_with_four_devices_each(folder, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    outs = [tmp_path / f"{i}.pickle" for i in range(2)]
    run(tmp_path, *(["load_distributed", folder, out, str(i), port] for i, out in enumerate(outs)))
    results = [pickle.loads(out.read_bytes()) for out in outs]
    for name, case in CASES.items():
        _, params = load_checkpoint(folder, case.dtype)
        for path, leaf in flattened(params).items():
            expected = np.asarray(leaf)
            whole, seen = np.zeros_like(expected), np.zeros(expected.shape, bool)
            for result in results:
                for index, part in result[name]["parts"][path]:
                    whole[index], seen[index] = part, True
            assert seen.all(), (name, path)
            assert same_bits(whole, expected), (name, path)
            if (share := share_read(name, path)) is not None:
                read = [result[name]["read"][path] / expected.size for result in results]
                assert read == [share, share], (name, path)


def share_read(name, path) -> float | None:
    """How much of a leaf each process must read: it has one half of the mesh's first axis over 1."""
    letters = LEAVES[path][0]
    if name in ("fsdp", "bfloat16", "tensor"):  # fsdp is halved
        return 1 if path.endswith("scale") else 0.5
    if name in ("all three", "replicated"):  # data is halved, and each half has everything
        return 1
    if name in ("layers", "bfloat16 layers"):  # data is halved, and each half has 3 layers
        return 0.5 if "L" in letters else 1
    return None


def test_an_uneven_split_is_refused(folder, tmp_path):
    run(tmp_path, ["uneven", folder])


def test_sharded_parameters_are_exported_unchanged(folder, tmp_path):
    run(tmp_path, ["export", folder, tmp_path])
