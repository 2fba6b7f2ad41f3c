"""What the benchmarks share: the models, the lengths of texts, timed processes, and the table of ratios.

A variant runs in a worker: a process of its own on its own cores, where it is prepared and run once, untimed.
Then all variants run in turn, again and again, one at a time, so that what disturbs the machine disturbs all;
a ratio is that of two runs of the same turn.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from main_jax.lm.arch import DecoderConfig
from main_jax.lm.runtime import with_huge_pages

SIZES = {
    name: DecoderConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        tie_word_embeddings=True,
    )
    for name, hidden, ffn, layers, heads in (("S", 288, 768, 6, 6), ("M", 768, 2048, 12, 12))
}
"""LLaMA's shape with 15 and 110 million parameters, of which the tied embedding has 9 and 25."""


def draw_pairs(count: int, config: DecoderConfig, seed: int = 0) -> list[tuple[Any, Any]]:
    """(instruction, response) of random tokens, their lengths long-tailed as in instruction data.

    Log-normal: instructions with median 30, at most 256, responses with median 150, at most 768.
    """
    rng = np.random.default_rng(seed)

    def draw(median: int, sigma: float, most: int) -> np.ndarray:
        length = int(np.clip(np.rint(rng.lognormal(np.log(median), sigma)), 4, most))
        return rng.integers(3, config.vocab_size, length, dtype=np.int32)

    return [(draw(30, 0.7, 256), draw(150, 0.8, 768)) for _ in range(count)]


# --------------------------------------------------------------------------------------- processes


def start_jax(path: str, devices: int) -> tuple[DecoderConfig, Any]:
    """In a worker: JAX on so many CPU devices that share the rows of a batch, and a checkpoint on them."""
    import jax

    from main_jax.lm.hf import load_checkpoint
    from main_jax.lm.runtime import initialize
    from main_jax.lm.sharding import MeshShape, make_mesh

    initialize(cpu_devices=devices)
    if devices > 1:
        jax.set_mesh(make_mesh(MeshShape(data=devices, fsdp=1)))  # for as long as the process lives
    return load_checkpoint(path)


Runs = dict[str, Callable[[], Any]]


class Worker:
    """A process on so many cores that runs what `build(*arguments)`, called there, names.

    `build` is a function of a module, since the process imports it. PyTorch and XLA take as many
    threads as there are cores to run on. `ours` have memory in huge pages, as `main-jax` has.
    """

    def __init__(
        self, cores: Sequence[int], build: Callable[..., Runs], *arguments: Any, ours: bool = False
    ):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, tuple(cores), build, arguments), daemon=True
        )
        given = os.environ.get("GLIBC_TUNABLES", "")  # which the new process reads when it starts
        os.environ["GLIBC_TUNABLES"] = with_huge_pages(given) if ours else given
        self._process.start()
        os.environ["GLIBC_TUNABLES"] = given
        theirs.close()

    def start(self, name: str) -> None:
        """Begin a run."""
        self._pipe.send(name)

    def finish(self) -> tuple[float, float, Any]:
        """Wait for it: seconds, CPU-seconds of the whole process, and its result."""
        try:
            return self._pipe.recv()
        except EOFError:
            raise SystemExit("a worker has ended; see its error above") from None

    def stop(self) -> None:
        """End the process."""
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join()


def _serve(pipe: Any, cores: tuple[int, ...], build: Callable[..., Runs], arguments: Any) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    runs = build(*arguments)
    while (name := pipe.recv()) is not None:
        begin, cpu_begin = time.perf_counter(), time.process_time()
        result = runs[name]()
        pipe.send((time.perf_counter() - begin, time.process_time() - cpu_begin, result))


def cores() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def first_cores(count: int) -> list[int]:
    """So many of them. Ends the program where there are fewer."""
    if len(found := cores()[:count]) < count:
        raise SystemExit(f"--cores {count}: there are only {len(found)}")
    return found


# --------------------------------------------------------------------------------------- comparison


@dataclass
class Variant:
    """One way to do the work: the same run of each of its workers, at the same time."""

    label: str
    workers: Sequence[Worker]
    run: str
    ours: bool = False
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    first_seconds: float = 0.0  # with imports, loading and compiling
    result: Any = None  # of a single worker's first run

    def measure(self) -> None:
        """Run once; the first time untimed."""
        begin = time.perf_counter()
        for worker in self.workers:
            worker.start(self.run)
        found = [worker.finish() for worker in self.workers]
        seconds = time.perf_counter() - begin
        if not self.first_seconds:
            self.first_seconds = seconds
            self.result = found[0][2] if len(found) == 1 else None
            return
        self.seconds.append(max(f[0] for f in found))
        self.cpu_seconds.append(sum(f[1] for f in found))


def compare(variants: Sequence[Variant], repeats: int, by: str) -> None:
    """Run all in turn, `repeats` times after the first; `by` is `seconds` or `cpu_seconds`."""
    for repeat in range(repeats + 1):
        for variant in variants:
            variant.measure()
            times = getattr(variant, by)
            took = f"{times[-1]:.2f} s" if repeat else "prepared"
            print(f"  {repeat}/{repeats} {variant.label}: {took}", file=sys.stderr, flush=True)


def table(variants: Sequence[Variant], tokens: int, by: str) -> list[dict[str, Any]]:
    """Print speeds, and each variant's time over that of our last one; give it as rows.

    A ratio is the median over the turns, and their range in brackets.
    """
    ours = getattr([v for v in variants if v.ours][-1], by)
    print(f"\n{'':44} {'tokens/s':>9} {'per CPU-s':>9}  time over ours, by {by}")
    rows = []
    for v in variants:
        ratios = [a / b for a, b in zip(getattr(v, by), ours, strict=True)]
        row: dict[str, Any] = {
            "variant": v.label,
            "tokens_per_second": tokens / statistics.median(v.seconds),
            "tokens_per_cpu_second": tokens / statistics.median(v.cpu_seconds),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "seconds": v.seconds,
            "cpu_seconds": v.cpu_seconds,
            "first_seconds": v.first_seconds,
        }
        rows.append(row)
        low, high = row["ratio_range"]
        print(
            f"{v.label:44} {row['tokens_per_second']:9,.0f} {row['tokens_per_cpu_second']:9,.0f}"
            f"  {row['ratio']:.2f} [{low:.2f}, {high:.2f}]"
        )
    return rows


def about() -> dict[str, Any]:
    """What a number is worth nothing without: date, command, versions, machine and its load."""
    packages = ("jax", "jaxlib", "torch", "transformers", "numpy")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(sys.argv),
        "versions": {"python": platform.python_version(), **versions},
        "machine": {"processor": _processor(), "cores": len(cores())},
        "load": os.getloadavg()[0],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")


def write_json(path: str, results: dict[str, Any]) -> None:
    """Write the results of a run."""
    Path(path).write_text(json.dumps(results, indent=1) + "\n")
