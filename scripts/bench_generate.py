"""Generation against Hugging Face's `generate`, on CPU cores: see `bench.py`.

Greedy, from random weights and random prompts. A random model does not stop by itself, so each row has a
limit of its own, here and there: lengths of prompts are those of instructions, limits those of responses.
Speeds count new tokens, those of rows that are not done. A result differs where tokens part before a step
whose two best logits are within `MARGIN`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from bench_workers import Variant, Worker, compare, first_cores, start_jax, table

HF_BATCH = 16
NEW = 768
MARGIN = 1e-4


# ------------------------------------------------------------------------------------- in a worker


def our_runs(
    path: str,
    prompts: Sequence[np.ndarray],
    limits: Sequence[int],
    devices: int,
    rows: Sequence[int],
) -> dict[str, Any]:
    """Name the ways to generate; each gives the tokens of every prompt, and its share of live rows."""
    from main_jax.lm.generate import Sampling, Statistics, generate
    from main_jax.lm.model import Decoder

    config, params = start_jax(path, devices)
    ids = [str(i) for i in range(len(prompts))]

    def run(batch: int) -> tuple[list[list[int]], float]:
        statistics = Statistics()
        found = generate(
            Decoder(config), params, prompts, ids, Sampling(NEW), stop_ids=(), seed=0,
            batch_size=batch, limits=limits, statistics=statistics,
        )  # fmt: skip
        return [row.tokens.tolist() for row in found], statistics.utilisation

    return {f"{n} rows": partial(run, n) for n in rows}


def hf_runs(path: str, prompts: Sequence[np.ndarray], limits: Sequence[int]) -> dict[str, Any]:
    """Hugging Face's `generate`, prompts sorted by length and padded on the left."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.logging.set_verbosity_error()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="sdpa"
    )
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")

    class Limits(transformers.StoppingCriteria):
        """A row is done at its limit; a batch when all rows are."""

        def __init__(self, start: int, limits: Sequence[int]):
            self.ends = start + torch.tensor(limits)

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return input_ids.shape[1] >= self.ends

    def run() -> tuple[list[list[int]], float]:
        tokens: list[Any] = [None] * len(prompts)
        row_steps = 0
        for begin in range(0, len(order), HF_BATCH):
            members = order[begin : begin + HF_BATCH].tolist()
            width = max(len(prompts[i]) for i in members)
            ids, there = torch.zeros((2, len(members), width), dtype=torch.long)
            for row, i in enumerate(members):
                ids[row, width - len(prompts[i]) :] = torch.from_numpy(prompts[i])
                there[row, width - len(prompts[i]) :] = 1
            asked = Limits(width, [limits[i] for i in members])
            with torch.inference_mode():
                found = model.generate(
                    ids, attention_mask=there, do_sample=False, max_new_tokens=NEW,
                    pad_token_id=0, eos_token_id=None, stopping_criteria=[asked],
                )  # fmt: skip
            row_steps += found[:, width:].numel()
            for row, i in enumerate(members):
                tokens[i] = found[row, width : width + limits[i]].tolist()
        return tokens, sum(limits) / row_steps

    return {"sorted": run}


# ------------------------------------------------------------------------------------- comparisons


def compared(
    path: str, prompts: Sequence[np.ndarray], first: Any, second: Any
) -> tuple[int, list[float]]:
    """Of two results, how many rows are equal, and of the others the margin where they part."""
    import jax.numpy as jnp

    from main_jax.lm.hf import load_checkpoint
    from main_jax.lm.model import Decoder

    pairs = [(p, a, b) for p, a, b in zip(prompts, first, second, strict=True) if a != b]
    if not pairs:
        return len(first), []
    margins = []
    config, params = load_checkpoint(path)
    for prompt, a, b in pairs:
        if len(a) != len(b):
            margins.append(float("inf"))
            continue
        same = int(np.argmin(np.equal(a, b)))
        tokens = jnp.asarray([[*prompt, *a[:same]]])
        decoder = Decoder(config)
        hidden, _ = decoder.apply(
            params, tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens)
        )
        best = np.sort(np.asarray(hidden[0, -1] @ decoder.unembed(params)))[-2:]
        margins.append(float(best[1] - best[0]))
    return len(first) - len(margins), margins


def on_cores(
    options: argparse.Namespace, path: str, prompts: Any, limits: list[int], count: int
) -> dict[str, Any]:
    """Compare on so many cores."""
    where = first_cores(count)
    by = "cpu_seconds" if count == 1 else "seconds"
    title = f"{count} core{'s' * (count > 1)}"
    total = sum(limits)
    print(f"\n{title}, {len(prompts)} prompts, {total:,} new tokens", file=sys.stderr, flush=True)
    workers = [Worker(where, our_runs, path, prompts, limits, count, options.rows, ours=True)]
    label = "main_jax" + f", {count} devices" * (count > 1)
    variants = [
        Variant(f"{label}, {n} rows", workers, f"{n} rows", ours=True) for n in options.rows
    ]
    if options.against == "torch":
        workers = [*workers, Worker(where, hf_runs, path, prompts, limits)]
        variants.append(Variant(f"Hugging Face, sorted, batch {HF_BATCH}", workers[1:], "sorted"))
    try:
        compare(variants, options.repeats, by)
    finally:
        for worker in workers:
            worker.stop()
    print(f"\n{title}", end="")
    rows = table(variants, total, by)
    reference = [v for v in variants if v.ours][-1].result[0]
    differ = False
    for variant, row in zip(variants, rows, strict=True):
        tokens, live = variant.result
        equal, margins = compared(path, prompts, reference, tokens)
        row |= {"live_rows": live, "rows_equal": equal, "margins_where_not": margins}
        differ |= max(margins, default=0) > MARGIN
        share = "" if live is None else f", {live:.0%} of row steps live"
        print(f"{variant.label:44} {equal} of {len(prompts)} rows equal{share}")
    return {"new_tokens": total, "by": by, "variants": rows, "differ": differ}


def generate(options: argparse.Namespace, path: str, pairs: Any) -> dict[str, Any]:
    """Compare ways to generate: each prompt is asked for as many tokens as its response has."""
    prompts, limits = [a for a, _ in pairs], [len(b) for _, b in pairs]
    found = {}
    for count in options.cores:
        found[f"{count} cores"] = on_cores(options, path, prompts, limits, count)
    return found
