"""What a program will need, before anything is rented: memory per device, FLOPs and seconds.

    with planning(topology.chip.platform, shape, topology.devices):
        memory = compiled_memory(training_program(decoder, optimizer, weighting, batches))

The functions traced here are those that `fit`, `nll_sums` and `generate` call, with shapes and places
instead of arrays. The memory is the compiler's; FLOPs and seconds are arithmetic, with what is assumed in
`ASSUMED`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from main_jax.lm.arch import DecoderConfig
from main_jax.lm.attention import target_platform
from main_jax.lm.batches import Batch
from main_jax.lm.decode import abstract_state as rows_state
from main_jax.lm.decode import admit, decode
from main_jax.lm.generate import Sampling, collate, prompts_together
from main_jax.lm.loss import example_nlls
from main_jax.lm.model import Decoder
from main_jax.lm.sharding import MeshShape, abstract_rows, make_mesh
from main_jax.lm.step import ExampleWeights, Optimizer, abstract_params, abstract_state, train_step
from main_jax.lm.topology import GIB, Chip


@contextmanager
def planning(platform: str, shape: MeshShape, devices: Sequence[Any]) -> Generator[None]:
    """What is traced inside is for a mesh of this shape over these devices, of this platform.

    Raises ValueError where the shape does not fit them.
    """
    mesh = make_mesh(shape, devices)
    with target_platform(platform), jax.set_mesh(mesh):
        yield


# ------------------------------------------------------------------------------------------- programs


class Program(NamedTuple):
    """A jitted function with its arguments: shapes with places, no arrays."""

    function: Any
    arguments: dict[str, Any]
    static: dict[str, Any]

    def trace(self) -> Any:
        """To be lowered, under `planning`."""
        return self.function.trace(**self.arguments, **self.static)

    def argument_bytes(self) -> int:
        """Bytes of the arguments on each device: a lower bound of what the program needs."""
        return held_bytes(self.arguments)


def held_bytes(tree: Any) -> int:
    """Bytes on each device of arrays like these, placed or not."""

    def size(x: Any) -> int:
        shape = x.sharding.shard_shape(x.shape) if hasattr(x, "sharding") else x.shape
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def training_program(
    decoder: Decoder, optimizer: Optimizer, weighting: ExampleWeights, batches: Batch
) -> Program:
    """`lm.step.train_step` for stacked microbatches like these host arrays."""
    arguments = dict(
        state=abstract_state(decoder, optimizer, weighting),
        batches=abstract_rows(batches, rows_axis=1),
        learning_rate=np.float32(0),
        progress=np.float32(0),
    )
    static = dict(decoder=decoder, optimizer=optimizer, weighting=weighting)
    return Program(train_step, arguments, static)


def scoring_program(decoder: Decoder, batch: Batch, models: int) -> Program:
    """`lm.loss.example_nlls` for so many models, with a batch like these host arrays for each."""
    params, batch = abstract_params(decoder, inference=True), abstract_rows(batch)
    arguments = dict(params=[params] * models, batches=[batch] * models)
    return Program(example_nlls, arguments, dict(decoders=(decoder,) * models))


def generation_programs(
    decoder: Decoder, batch_size: int, width: int, sampling: Sampling
) -> tuple[Program, Program]:
    """`lm.decode.admit` and `decode`, for so many rows and prompts of up to so many tokens."""
    state = rows_state(decoder, batch_size, width, sampling.max_new_tokens)
    held = dict(params=abstract_params(decoder, inference=True), state=state)
    prompts = prompts_together(batch_size)
    names = ("tokens", "lengths", "keys", "limits", "rows")
    batch = (*collate({}, prompts, width), np.zeros(prompts, np.int32))
    prefill = held | dict(zip(names, abstract_rows(batch), strict=True))
    static: dict[str, Any] = dict(decoder=decoder)
    decoding = static | dict(sampling=sampling, stop_ids=(0,), width=state.cache.width)
    return Program(admit, prefill, static), Program(
        decode, held | dict(until=np.int32(0)), decoding
    )


# ------------------------------------------------------------------------------------------- memory


class Memory(NamedTuple):
    """Bytes per device. `peak` is what must fit: arguments and temporaries overlap where they can.

    Where it does not fit, the compiler does not say what is temporary: None.
    """

    arguments: int
    temporaries: int | None
    peak: int


# "... HLO temporaries (18.47G) exceeds available HBM"; "Used 29.4G of 15.75G hbm"
_REFUSED = re.compile(r"\((\d[\d.]*)([KMGT])\) exceeds|Used (\d[\d.]*)([KMGT])i?B? of")
_UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


def compiled_memory(program: Program) -> Memory:
    """Compile for the devices of `planning`, and ask the compiler."""
    try:
        found = program.trace().lower().compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        refused = _REFUSED.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not refused:
            raise
        number, unit = (x for x in refused.groups() if x)
        arguments, needed = program.argument_bytes(), int(float(number) * _UNITS[unit])
        return Memory(arguments, None, max(arguments, needed))
    used = found.argument_size_in_bytes + found.temp_size_in_bytes
    used += found.output_size_in_bytes - found.alias_size_in_bytes
    # TPU's temporaries count what shares a place with arguments, so that the sum is above the peak.
    peak = getattr(found, "peak_memory_in_bytes", 0) or used
    return Memory(found.argument_size_in_bytes, found.temp_size_in_bytes, peak)


# ------------------------------------------------------------------------------------------- arithmetic

ASSUMED = {"matrix products": 0.4, "memory": 0.6, "links": 0.5}
"""Share of the published peak that is reached. Ours; replace by what you measure."""


def matrix_params(config: DecoderConfig) -> int:
    """Parameters that multiply every token: all but the lookup of embeddings, norms and biases."""
    V, D, F, L, N, K, H = config.sizes.values()
    return L * (2 * D * (N + K) * H + 3 * D * F) + V * D


def forward_flops(
    config: DecoderConfig, tokens: float, context: float, head_tokens: float | None = None
) -> float:
    """Model FLOPs of a forward pass: 2 per parameter and token, and attention over `context` slots.

    The head is applied to `head_tokens` (None: to all). Training takes three times as many.
    """
    head = config.vocab_size * config.hidden_size
    layers = matrix_params(config) - head
    attend = 2 * config.num_layers * config.num_heads * config.head_dim * context
    head_tokens = tokens if head_tokens is None else head_tokens
    return 2 * tokens * (layers + attend) + 2 * head_tokens * head


def seconds(
    chip: Chip, devices: int, *, flops: float = 0, read: float = 0, moved: float = 0
) -> float:
    """The longest of computing, reading memory and moving over links, taken to overlap.

    flops: over all devices. read, moved: bytes of one device.
    """
    return max(
        flops / (devices * chip.flops * ASSUMED["matrix products"]),
        read / (chip.bandwidth * ASSUMED["memory"]),
        moved / (chip.link * ASSUMED["links"]),
    )
