"""Ours on one accelerator, against what the device was measured to do: see `bench.py`.

Weights are random and live on the device alone, in the shapes of a published model, bfloat16 in the
computation. Matrix products count as 6 FLOPs per parameter and token in training, 2 in scoring (of all
parameters but the lookup of embeddings; recomputation and attention count as nothing), against a measured
peak: the fastest of some large products. A step of decoding reads every parameter and the cache once, against
a measured copy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from main_jax.lm.arch import PRESETS, DecoderConfig

TOY = DecoderConfig(
    vocab_size=512, hidden_size=64, intermediate_size=160, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16,
)  # fmt: skip
SIZES = {"7b": PRESETS["llama-2-7b"], "toy": TOY}
TOKENS = 2048
"""Of a row."""
ROWS = {"train": (1, 2, 4), "score": (4, 8), "generate": (64,)}
PROMPT, NEW = 256, 256


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the device's peaks, then one of `score`, `train`, `generate` at several batch sizes."""
    from main_jax.lm.runtime import initialize

    initialize(compile_cache=False)
    import jax

    device = jax.devices()[0]
    config = SIZES[options.size]
    found: dict[str, Any] = {"device": device.device_kind, "platform": device.platform}
    with jax.default_device(device):
        found["peak_flops_per_second"] = matmul_peak(8192 if options.size == "7b" else 256)
        found["peak_bytes_per_second"] = copy_peak(2**31 if options.size == "7b" else 2**22)
        print(f"{device.device_kind}: {found['peak_flops_per_second'] / 1e12:.1f} TFLOP/s of "
              f"products in bfloat16, {found['peak_bytes_per_second'] / 1e12:.3f} TB/s of copies, "
              "measured")  # fmt: skip
        run = {"train": train, "score": score, "generate": generate}[options.what]
        found["rows"] = []
        for rows in ROWS[options.what]:
            try:
                row = run(config, rows, options)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                print(f"{rows} rows: out of memory")
                found["rows"].append({"rows": rows, "out_of_memory": True})
                continue
            if "flops" in row:
                row["of_peak"] = row["flops"] / row["seconds"] / found["peak_flops_per_second"]
            else:
                row["of_peak"] = row["bytes"] / row["seconds"] / found["peak_bytes_per_second"]
            held = (device.memory_stats() or {}).get("peak_bytes_in_use")
            row["peak_memory_bytes"] = held
            print(
                f"{options.what}, {rows} rows: {row['seconds'] * 1e3:,.1f} ms, "
                f"{row['tokens'] / row['seconds']:,.0f} tokens/s, {row['of_peak']:.0%} of the measured "
                f"peak" + (f", {held / 2**30:.1f} GiB at most so far" if held else "")
            )
            found["rows"].append({"rows": rows, **row})
    return found


def timed(run: Callable[[], Any], repeats: int) -> list[float]:
    """Give the seconds of each of some runs, after a first one that compiles."""
    import jax

    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def matmul_peak(largest: int) -> float:
    """FLOP/s of the fastest of some square bfloat16 products, each part of a chain."""
    import jax
    import jax.numpy as jnp

    best = 0.0
    for n in (largest // 2, largest):
        a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16) / n**0.5
        chain = jax.jit(lambda a: jax.lax.fori_loop(0, 16, lambda _, b: b @ a, a))
        best = max(best, 16 * 2 * n**3 / min(timed(partial(chain, a), 5)))
    return best


def copy_peak(size: int) -> float:
    """Bytes per second, read and written, of a sum with one."""
    import jax
    import jax.numpy as jnp

    x = jnp.zeros(size // 2, jnp.bfloat16)
    return 2 * size / min(timed(partial(jax.jit(lambda x: x + 1), x), 10))


def _decoder(config: DecoderConfig, options: argparse.Namespace, remat: str = "none") -> Any:
    from main_jax.lm.model import Decoder

    return Decoder(config, dtype="bfloat16", remat=remat, attention=options.attention[0])


def _texts(config: DecoderConfig, rows: int) -> Any:
    """One long example in each row."""
    from main_jax.lm.batches import Example, Shape, collate

    rng = np.random.default_rng(0)
    texts = [
        Example(rng.integers(3, config.vocab_size, TOKENS, dtype=np.int32), np.arange(TOKENS) > 64)
        for _ in range(rows)
    ]
    fields = {
        "weight": np.ones(rows, np.float32),
        "aligned": np.zeros(rows, bool),
        "unit": np.arange(rows),
    }
    return collate(texts, Shape(rows, TOKENS, rows), fields)


def _inference_params(decoder: Any) -> Any:
    """Draw parameters in the dtype in which they serve inference, one at a time."""
    import jax
    import jax.numpy as jnp

    from main_jax.lm.step import abstract_params

    shapes = abstract_params(decoder, inference=True)
    leaves, tree = jax.tree.flatten(shapes)
    drawn = []
    for i, leaf in enumerate(leaves):
        draw = jax.jit(partial(jax.random.normal, shape=leaf.shape, dtype=leaf.dtype))
        wide = leaf.ndim > 2 or leaf.shape[-1] == decoder.config.vocab_size
        scale = 0.02 if wide or leaf.dtype == jnp.bfloat16 else 1.0
        drawn.append(scale * draw(jax.random.key(i)))
    return jax.tree.unflatten(tree, drawn)


def _products(
    run: Callable[[], Any], config: DecoderConfig, rows: int, options: argparse.Namespace, each: int
) -> dict[str, Any]:
    """Time a run on full rows that takes so many FLOPs per parameter and token."""
    from main_jax.lm.plan import matrix_params

    tokens = rows * TOKENS
    return {
        "seconds": statistics.median(timed(run, options.repeats)),
        "tokens": tokens,
        "flops": each * matrix_params(config) * tokens,
    }


def score(config: DecoderConfig, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a batch in one direction."""
    import jax

    from main_jax.lm.loss import example_nlls

    decoder = _decoder(config, options)
    params, batch = _inference_params(decoder), jax.device_put(_texts(config, rows))
    run = partial(example_nlls, (decoder,), [params], [batch])
    return _products(run, config, rows, options, 2)


def train(config: DecoderConfig, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step: float32 parameters and moments, AdamW, everything recomputed by default."""
    import jax

    from main_jax.lm.batches import stack
    from main_jax.lm.step import Optimizer, init_state, train_step
    from main_jax.weighting import Weighting

    decoder = _decoder(config, options, "full" if options.remat == "none" else options.remat)
    optimizer, weighting = replace(Optimizer(), weight_decay=0.1), Weighting("constant")
    params = decoder.init(jax.random.key(0))
    state = [init_state(params, config, optimizer, weighting)]
    del params
    batch = jax.device_put(stack([_texts(config, rows)]))

    def run() -> Any:
        state[0], metrics = train_step(
            state[0], batch, np.float32(1e-5), np.float32(0),
            decoder=decoder, optimizer=optimizer, weighting=weighting,
        )  # fmt: skip
        return metrics

    return _products(run, config, rows, options, 6)


def generate(config: DecoderConfig, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of decoding: what more tokens take, prompts and start apart."""
    import jax

    from main_jax.lm.generate import Sampling, generate

    decoder = _decoder(config, options)
    params = _inference_params(decoder)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, config.vocab_size, PROMPT, dtype=np.int32) for _ in range(rows)]

    def run(new: int) -> Any:
        return generate(
            decoder, params, prompts, [str(i) for i in range(rows)], Sampling(NEW), stop_ids=(),
            seed=0, batch_size=rows, limits=[new] * rows,
        )  # fmt: skip

    some, all_ = (min(timed(partial(run, n), options.repeats)) for n in (NEW // 4, NEW))
    c = config
    cached = 2 * 2 * rows * (PROMPT + NEW * 5 / 8) * c.num_layers * c.num_kv_heads * c.head_dim
    embedding = 2 * c.vocab_size * c.hidden_size * (not c.tie_word_embeddings)
    return {
        "seconds": (all_ - some) / (NEW - NEW // 4),
        "tokens": rows,
        "bytes": sum(x.nbytes for x in jax.tree.leaves(params)) - embedding + cached,
    }
