"""What is measured of speed: scoring, generation and training, ours and what a user would pick instead.

    python scripts/bench.py score|generate|train [--size S|M] [--against torch] [--json FILE]
    python scripts/bench.py linear                           # scoring 1, 4 and 16 times as many pairs
    python scripts/bench.py score|generate|train --size 7b         # on an accelerator; toy: on a CPU

On CPU cores (S, M) variants take turns in one run, `bench_workers.py`: on one core ratios are of CPU-seconds;
on two, ours with one device per core, of seconds, which mean nothing on a busy machine. On an accelerator
(7b, and toy to try it) ours stands against the measured peaks of the device, `bench_device.py`. Weights,
texts and their lengths are random, by fixed seeds. Exit code 1 where results disagree.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from typing import Any

import bench_device
import bench_generate
import bench_likelihood
from bench_workers import SIZES, about, draw_pairs, write_json

from main_jax.lm.arch import DecoderConfig

PAIRS = {
    "score": {"S": 96, "M": 48},
    "train": {"S": 32, "M": 32},
    "generate": {"S": 64, "M": 64},
    "linear": {"S": 250, "M": 60},
}  # with fewer the last batch, and the last rows to be generated, weigh too much
RUNS = {
    "score": bench_likelihood.score,
    "train": bench_likelihood.train,
    "generate": bench_generate.generate,
    "linear": bench_likelihood.linear,
}
GAIN = 4.0
"""What the projections onto the residual are multiplied by: a model with a tied head that is only drawn
repeats one token for ever."""


def write_model(folder: str, config: DecoderConfig, gain: float) -> None:
    """Write a checkpoint of random weights, for all to read."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from main_jax.lm.hf import save_checkpoint
    from main_jax.lm.model import Decoder

    params = Decoder(config).init(jax.random.key(0))
    for part, name in (("attention", "o"), ("mlp", "down")):
        params["layers"][part][name]["kernel"] *= gain
    save_checkpoint(folder, config, params)


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=RUNS)
    parser.add_argument("--size", choices=(*SIZES, *bench_device.SIZES), default="S")
    parser.add_argument(
        "--pairs", type=int, help="default: enough that the last batch weighs little"
    )
    parser.add_argument("--repeats", type=int, default=3, help="after a first, untimed run")
    parser.add_argument("--cores", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--against", choices=("torch",), help="compare with PyTorch's ways")
    parser.add_argument("--attention", nargs="+", default=["auto"], help="runtime.attention")
    parser.add_argument("--budget", type=int, default=2048, help="score: a batch's tokens per core")
    parser.add_argument("--rows", type=int, nargs="+", default=[32], help="generate: together")
    parser.add_argument("--remat", default="none", help="train: runtime.remat")
    parser.add_argument("--compile", action="store_true", help="train: also torch.compile")
    parser.add_argument("--json", help="where the results go as well")
    options = parser.parse_args(arguments)
    if options.against and not importlib.util.find_spec("torch"):
        parser.error("--against torch: PyTorch is not installed (make torch)")
    if options.what == "linear" and options.size not in SIZES:
        parser.error("linear is measured on CPU cores: --size S or M")
    if options.what == "linear" and options.against:
        parser.error("linear compares nothing: without --against")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure and print the tables."""
    options = options_of(arguments)
    results: dict[str, Any] = {**about(), "what": options.what, "size": options.size}
    if options.size in bench_device.SIZES:
        results |= bench_device.measure(options)
    else:
        config = SIZES[options.size]
        pairs = draw_pairs(options.pairs or PAIRS[options.what][options.size], config)
        results["pairs"] = len(pairs)
        with tempfile.TemporaryDirectory() as folder:
            write_model(folder, config, GAIN if options.what == "generate" else 1.0)
            results |= RUNS[options.what](options, folder, pairs)
    if options.json:
        write_json(options.json, results)
    return int(any(v.get("differ") for v in results.values() if isinstance(v, dict)))


if __name__ == "__main__":
    sys.exit(main())
