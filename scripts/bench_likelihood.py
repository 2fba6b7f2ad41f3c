"""Scoring and training against what a user would write in PyTorch instead, on CPU cores: see `bench.py`.

Speeds count real tokens, no padding: a scored pair has four texts, a trained one has one. A result differs
where a text's NLL, or a step's loss, is more than `TOLERANCE` nats per token from ours.
"""

from __future__ import annotations

import argparse
import importlib
import resource
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from bench_workers import SIZES, Variant, Worker, compare, draw_pairs, first_cores, start_jax, table

STEPS = 2
LONGEST = 2048
END = 2
LINEAR = (1, 4, 16)
TOLERANCE = 1e-4  # nats per token
TRAINING = {
    "learning_rate": 1e-4, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8,
    "max_grad_norm": 1.0,
}  # fmt: skip


# -------------------------------------------------------------------------------- ours, in a worker


def score_runs(
    path: str, kinds: Sequence[Sequence[Any]], devices: int, attentions: Sequence[str], budget: int
) -> dict[str, Any]:
    """Name the ways to score; each gives the sum of every text, kind after kind."""
    config, params = start_jax(path, devices)

    from main_jax.lm.batches import Example
    from main_jax.lm.model import Decoder
    from main_jax.models import LanguageModel
    from main_jax.score import Side, nll_sums

    texts = [[Example(*text) for text in kind] for kind in kinds]

    def run(attention: str) -> list[float]:
        model = LanguageModel(Decoder(config, attention=attention), params)
        sides = [Side(model, kind, LONGEST) for kind in texts]
        return [x for sums, _ in nll_sums(sides, budget) for x in sums.tolist()]

    return {attention: partial(run, attention) for attention in attentions}


def train_runs(
    path: str, steps: Sequence[Sequence[Any]], devices: int, attentions: Sequence[str], remat: str
) -> dict[str, Any]:
    """Name the ways to train; each gives the loss of every step and goes on where its last run ended."""
    config, params = start_jax(path, devices)

    import jax

    from main_jax.lm.batches import Example, collate, fitting_shape, stack
    from main_jax.lm.model import Decoder
    from main_jax.lm.sharding import place_rows
    from main_jax.lm.step import Optimizer, init_state, train_step
    from main_jax.weighting import Weighting

    rate = np.float32(TRAINING["learning_rate"])
    constants = {name: value for name, value in TRAINING.items() if name != "learning_rate"}
    optimizer = replace(Optimizer(), **constants)
    weighting = Weighting("constant")
    examples = [[Example(*text) for text in step] for step in steps]
    lengths = [[len(e.tokens) for e in step] for step in examples]
    shape = fitting_shape(lengths, max(map(len, examples)), LONGEST, devices)

    def fields(count: int) -> dict[str, Any]:
        return {
            "weight": np.ones(count, np.float32),
            "aligned": np.zeros(count, bool),
            "unit": np.arange(count),
        }

    states: dict[str, Any] = {}

    def run(attention: str) -> list[float]:
        decoder = Decoder(config, attention=attention, remat=remat)
        if attention not in states:
            own = jax.tree.map(lambda x: x + 0, params)  # the step donates them
            states[attention] = init_state(own, config, optimizer, weighting)
        losses = []
        for step in examples:
            batch = place_rows(stack([collate(step, shape, fields(len(step)))]), rows_axis=1)
            states[attention], metrics = train_step(
                states[attention], batch, rate, np.float32(0),
                decoder=decoder, optimizer=optimizer, weighting=weighting,
            )  # fmt: skip
            losses.append(metrics["loss_nats_per_token"])
        return [float(x) for x in jax.device_get(losses)]

    return {attention: partial(run, attention) for attention in attentions}


def linear_runs(path: str, counts: Sequence[int], attention: str, budget: int) -> dict[str, Any]:
    """Name how many pairs to score; each run gives (tokens, peak resident memory of the process in MB)."""
    runs = {}
    for count in counts:
        kinds = scored_texts(draw_pairs(count, SIZES["S"]))
        tokens = sum(len(tokens) for kind in kinds for tokens, _ in kind)
        score_all = score_runs(path, kinds, 1, [attention], budget)[attention]

        def run(tokens: int = tokens, score_all: Any = score_all) -> tuple[int, float]:
            score_all()
            return tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000

        runs[str(count)] = run
    return runs


# -------------------------------------------------------------------------------------- the texts


def scored_texts(pairs: Sequence[tuple[Any, Any]]) -> list[list[Any]]:
    """The texts of the forward and of the reverse model: target given condition, target alone."""
    kinds = []
    for forward in (True, False):
        kind = []
        for instruction, response in pairs:
            a, b = (instruction, response) if forward else (response, instruction)
            kind += [text(a, b), text([], b)]
        kinds.append(kind)
    return kinds


def text(condition: Any, target: Any) -> tuple[np.ndarray, np.ndarray]:
    """Join tokens: the beginning, the condition, the target and its end, both of these marked."""
    tokens = np.asarray([1, *condition, *target, END], np.int32)
    return tokens, np.arange(len(tokens)) > len(condition)


# ------------------------------------------------------------------------------------- comparisons


def score(options: argparse.Namespace, path: str, pairs: Any) -> dict[str, Any]:
    """Compare ways to score."""
    kinds = scored_texts(pairs)
    by_length = [sorted(kind, key=lambda text: len(text[0])) for kind in kinds]
    halves = [[kind[i::2] for kind in by_length] for i in (0, 1)]  # of equal work
    tokens = sum(len(t) for kind in kinds for t, _ in kind)
    counts = np.array([marks.sum() for kind in kinds for _, marks in kind])
    names = [f"budget {n}" for n in (1024, 2048, 4096)] + ["batch 1", "sorted", "padded"]

    def ours(count: int) -> tuple[Any, ...]:
        return score_runs, path, kinds, count, options.attention, options.budget * count

    def theirs(part: int | None) -> tuple[Any, ...]:
        return _theirs("score_runs"), path, kinds if part is None else halves[part]

    return _all_cores(options, tokens, ours, theirs, names, partial(_worst, counts))


def train(options: argparse.Namespace, path: str, pairs: Any) -> dict[str, Any]:
    """Compare ways to train."""
    size = len(pairs) // STEPS
    texts = [text(*pair) for pair in pairs]
    steps = [texts[i * size : (i + 1) * size] for i in range(STEPS)]
    tokens = sum(len(t) for step in steps for t, _ in step)
    names = ["packed", "batch 1"] + ["packed, compiled"] * options.compile

    def ours(count: int) -> tuple[Any, ...]:
        return train_runs, path, steps, count, options.attention, options.remat

    def theirs(part: int | None) -> tuple[Any, ...] | None:
        wanted = _theirs("train_runs"), path, steps, LONGEST, TRAINING, options.compile
        return wanted if part is None else None

    return _all_cores(options, tokens, ours, theirs, names, partial(_worst, np.ones(STEPS)))


def linear(options: argparse.Namespace, path: str, pairs: Any) -> dict[str, Any]:
    """Score more and more pairs, once each, on one core: what a token costs should not depend on it."""
    counts = [len(pairs) * factor for factor in LINEAR]
    told = (path, counts, options.attention[0], options.budget)
    worker = Worker(first_cores(1), linear_runs, *told, ours=True)
    print(f"\n{'pairs':>8} {'tokens':>10} {'tokens per CPU-second':>22} {'peak MB':>8}")
    rows = []
    try:
        for count in counts[:1] + counts:  # the first time with compiling
            worker.start(str(count))
            seconds, cpu_seconds, (tokens, peak) = worker.finish()
            rows.append(
                {"pairs": count, "tokens": tokens, "peak_mb": peak, "seconds": seconds,
                 "cpu_seconds": cpu_seconds, "tokens_per_cpu_second": tokens / cpu_seconds}
            )  # fmt: skip
            if len(rows) > 1:
                speed = rows[-1]["tokens_per_cpu_second"]
                print(f"{count:8,} {tokens:10,} {speed:22,.0f} {peak:8,.0f}", flush=True)
    finally:
        worker.stop()
    speeds = [row["tokens_per_cpu_second"] for row in rows[1:]]
    print(f"slowest / fastest: {min(speeds) / max(speeds):.2f}")
    return {"rows": rows[1:]}


def _theirs(name: str) -> Any:
    return getattr(importlib.import_module("bench_torch"), name)


def _worst(counts: np.ndarray, first: Any, second: Any) -> float:
    return float(np.max(np.abs(np.asarray(first) - np.asarray(second)) / counts))


def _all_cores(
    options: argparse.Namespace, tokens: int, ours: Any, theirs: Any, names: Any, differ: Any
) -> dict[str, Any]:
    """Compare on one core, then on two."""
    found: dict[str, Any] = {"tokens": tokens}
    for count in options.cores:
        by = "cpu_seconds" if count == 1 else "seconds"
        title = f"{count} core{'s' * (count > 1)}"
        print(f"\n{title}, {tokens:,} tokens", file=sys.stderr, flush=True)
        workers, variants = _variants(options, count, ours, theirs, names)
        try:
            compare(variants, options.repeats, by)
        finally:
            for worker in workers:
                worker.stop()
        print(f"\n{title}", end="")
        rows = table(variants, tokens, by)
        for variant, row in zip(variants, rows, strict=True):
            if variant.result is not None:
                row["differs_by"] = differ(variant.result, variants[0].result)
        worst = max(row.get("differs_by", 0) for row in rows)
        print(f"results differ by at most {worst:.1e} nats per token")
        found[title] = {"by": by, "variants": rows, "differ": worst > TOLERANCE}
    return found


def _variants(
    options: argparse.Namespace, count: int, ours: Any, theirs: Any, names: Sequence[str]
) -> tuple[list[Worker], list[Variant]]:
    """Start the workers of so many cores; on two, PyTorch's with two threads, and two with one each."""
    where = first_cores(count)
    worker = Worker(where, *ours(count), ours=True)
    workers, variants = [worker], []
    for attention in options.attention:
        label = f"main_jax, {attention}" + f", {count} devices" * (count > 1)
        variants.append(Variant(label, [worker], attention, ours=True))
    if options.against == "torch":
        worker = Worker(where, *theirs(None))
        workers.append(worker)
        if count > 1:
            names = [name for name in names if name not in ("padded", "sorted")]
        variants += [Variant(f"PyTorch, {name}", [worker], name) for name in names]
        if count > 1 and theirs(0):
            two = [Worker([core], *theirs(i)) for i, core in enumerate(where)]
            workers += two
            label = "PyTorch, 2 processes"
            variants += [Variant(f"{label}, {name}", two, name) for name in names]
    return workers, variants
