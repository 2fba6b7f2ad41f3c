"""What a run calls: every program of its stages, how often, and what a call costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np

from main_jax import pairs
from main_jax.align import round_zero
from main_jax.config import Config
from main_jax.data.files import Missing
from main_jax.data.reading import read_pairs, read_responses
from main_jax.data.sources import open_source
from main_jax.errors import UserError
from main_jax.hub import find_config
from main_jax.lm import hf
from main_jax.lm import plan as engine
from main_jax.lm.arch import PRESETS, PUBLISHED, DecoderConfig
from main_jax.lm.batches import Example, Unit, UnitStream, length_bucket, pack_table
from main_jax.lm.generate import Sampling, prompts_together
from main_jax.lm.model import Decoder
from main_jax.lm.sharding import MeshShape, row_shards
from main_jax.lm.topology import Chip, Topology
from main_jax.lm.train import TrainingSettings
from main_jax.weighting import Weighting
from main_jax.world.build import decoder_config

PACKED = 0.9
"""Share of a packed batch's tokens that are not padding, as it is assumed for the hours."""
CHARACTERS = 4
"""Characters per token, where lengths are taken from files."""


class Work(NamedTuple):
    """The data in numbers; the defaults are those of the work that MAIN builds on (arXiv 2308.06259)."""

    seed_pairs: int = 3_200
    responses: int = 502_000
    instruction_tokens: float = 50
    response_tokens: float = 375

    @property
    def pair_tokens(self) -> float:
        """Of a whole pair."""
        return self.instruction_tokens + self.response_tokens


def work_of(config: Config, given: dict[str, int | None]) -> Work:
    """What the options say; else what the configured files hold, where they are here; else the defaults."""
    work, data = Work(), config.data
    if config.world is not None:
        work = Work(config.world.seed_pairs, config.world.responses, 10, 25)
    for path, columns, read in (
        (data.seed_path, data.seed_columns, read_pairs),
        (data.responses_path, data.responses_columns, read_responses),
    ):
        try:
            source = open_source(path, columns=columns) if path else None
            if source is None or source.size_bytes() is None:
                continue  # on the hub
        except Missing:
            continue
        lengths = [
            (len(pairs.joined_instruction(r)), len(r["response"] or "")) for r in read(source)
        ]
        asked, answered = np.mean(lengths, axis=0) / CHARACTERS
        work = work._replace(response_tokens=float(answered))
        if path == data.seed_path:
            work = work._replace(seed_pairs=len(lengths), instruction_tokens=float(asked))
        else:
            work = work._replace(responses=len(lengths))
    return work._replace(**{k: v for k, v in given.items() if v is not None})


def model_of(config: Config) -> DecoderConfig:
    """The architecture alone: of the world, a folder, a published model or a hub repository's config.json.

    Raises UserError, CheckpointError.
    """
    if config.world is not None:
        return decoder_config(config.world)
    name = config.model_name_or_path
    if not name:
        raise UserError("model_name_or_path is not set; give it in the config or as an option")
    if name.partition("@")[0] in PUBLISHED:
        return PRESETS[PUBLISHED[name.partition("@")[0]]]
    return hf.load_config(find_config(name, "model_name_or_path"))


# ------------------------------------------------------------------------------------------- programs


class Call(NamedTuple):
    """A program of a stage, how often it is called, and what a call costs.

    under: the mesh that it is for. flops: of the model, per call, over all devices. shape: of its batch, in
    words. shorter: overrides that need less memory, as axes from the nearest to the furthest.
    """

    stage: str
    name: str
    shape: str
    under: Callable[[], AbstractContextManager]
    program: engine.Program
    calls: float
    flops: float
    seconds: float
    shorter: list[list[list[str]]]


def calls(config: Config, model: DecoderConfig, topology: Topology, work: Work) -> Iterator[Call]:
    """Every program of a run, in its order. Raises UserError where a mesh does not fit the machine."""
    decoder = Decoder(
        model,
        dtype={"auto": "bfloat16"}.get(config.runtime.compute_dtype, config.runtime.compute_dtype),
        remat=config.runtime.remat,
        attention=config.runtime.attention,
    )
    planner = _Planner(config, decoder, topology, work)
    align = config.align
    kept = {"top_k": config.filter.keep, "threshold": work.responses}.get(
        config.filter.select, config.filter.keep * work.responses
    )
    rounds = max(1, align.rounds)
    yield planner.training("align", align, align.weighting, members=1 + (align.rounds > 0), trainings={
        (1, round_zero(align).steps(work.seed_pairs)): 2,
        (2, align.steps(work.seed_pairs)): 2 * align.rounds,
        (1, rounds * align.steps(work.seed_pairs)): int(align.control),
    })  # fmt: skip
    if align.rounds:
        asked = (work.instruction_tokens + work.response_tokens) / 2
        yield from planner.generation("align", align.sampling, asked, 2 * rounds * work.seed_pairs)
    yield from planner.generation(
        "augment", config.augment.sampling, work.response_tokens, work.responses
    )
    yield planner.scoring()
    steps = config.finetune.steps(work.seed_pairs + int(kept))
    yield planner.training(
        "finetune", config.finetune, Weighting(strategy="constant"), members=1,
        trainings={(1, steps): len({*config.finetune.arms, config.filter.by})},
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Planner:
    config: Config
    decoder: Decoder
    topology: Topology
    work: Work

    def under(
        self, shape: MeshShape, devices: Sequence, key: str
    ) -> Callable[[], AbstractContextManager]:
        """Enters the mesh of a config section. Raises UserError, also where processes need all devices."""
        try:
            if self.topology.hosts > 1:
                shape.resolve(len(devices))
            with engine.planning(self.chip.platform, shape, devices):
                pass
        except ValueError as error:
            raise UserError(f"{key}: {error} ({self.topology.name})") from None
        return lambda: engine.planning(self.chip.platform, shape, devices)

    @property
    def chip(self) -> Chip:
        return self.topology.chip

    @property
    def model(self) -> DecoderConfig:
        return self.decoder.config

    # ---------------------------------------------------------------------------------- training

    def training(
        self, stage: str, settings: TrainingSettings, weighting: Weighting, members: int,
        trainings: dict[tuple[int, int], int],
    ) -> Call:  # fmt: skip
        """The training step of a stage. trainings: (examples per unit, steps) -> how many of them."""
        limit, micro = self.config.prompt.max_length, settings.gradient_accumulation_steps
        under = self.under(self.config.mesh, self.topology.devices, "mesh")
        with under():
            shards = row_shards()
            stream = UnitStream(
                [Unit((_longest(limit),) * members, ({"weight": 1.0, "aligned": False},) * members)],
                units_per_microbatch=settings.units_per_microbatch, microbatches=micro, steps=1,
                seed=0, limit=limit, packing=settings.packing, rows_multiple=shards,
            )  # fmt: skip
            program = engine.training_program(
                self.decoder, settings.optimizer(), weighting, stream.batch(0)
            )
        shape = stream.shape
        steps = sum(n * number for (_, n), number in trainings.items())
        flops = total = 0.0
        for (examples, n), number in trainings.items():
            rows = shape.rows
            if settings.packing:
                tokens = settings.units_per_microbatch * examples * self.work.pair_tokens
                rows = _rows(tokens, shape.length, shards)
            model = 3 * engine.forward_flops(self.model, micro * rows * shape.length, shape.length)
            flops += n * number * model
            total += n * number * self._step_seconds(model, micro)
        return Call(
            stage, "training step", f"{micro} × {shape.rows} × {shape.length}", under, program,
            steps, flops / max(1, steps), total / max(1, steps),
            self._less_training(stage, settings, members, shards),
        )  # fmt: skip

    def _step_seconds(self, flops: float, micro: int) -> float:
        again = 4 / 3 if self.decoder.remat == "full" else 1
        _, fsdp, tensor = self.config.mesh.resolve(len(self.topology.devices))
        # Gathered for both passes in the compute dtype; gradients are scattered in float32.
        moved = micro * self._gathered(fsdp, tensor) * (2 * self.width + 4)
        return engine.seconds(
            self.chip, len(self.topology.devices), flops=again * flops, moved=moved
        )

    def _gathered(self, fsdp: int, tensor: int) -> float:
        """Parameters that come to a device from others when all are gathered over fsdp."""
        return self.model.num_params() / tensor * (1 - 1 / fsdp)

    @property
    def width(self) -> int:
        """Bytes of a number in the computation."""
        return 4 if self.decoder.dtype == "float32" else 2

    def _less_training(
        self, stage: str, settings: TrainingSettings, members: int, shards: int
    ) -> list[list[list[str]]]:
        batch, now = settings.train_batch_size, settings.gradient_accumulation_steps
        finer, n = [], 2 * now
        while batch % n == 0 and batch // n * members >= shards:
            finer.append([f"--{stage}.gradient_accumulation_steps", str(n)])
            n *= 2
        remat = ["--runtime.remat", "full"]
        cut = ["--mesh.data", "1", "--mesh.fsdp", "-1", "--mesh.tensor", "1"]
        axes = [finer]
        if self.decoder.remat != "full":
            axes.append([remat] + [remat + f for f in finer])
        if self.config.mesh != MeshShape():
            axes.append([cut + remat + (finer[-1] if finer else [])])
        return [axis for axis in axes if axis]

    # ---------------------------------------------------------------------------------- inference

    def scoring(self) -> Call:
        """The scorer: every pair in both directions, with and without its condition."""
        limit, budget = self.config.prompt.max_length, self.config.score.tokens_per_batch
        under = self.under(self.config.inference_mesh, self.topology.host_devices, "inference_mesh")
        with under():
            shards = row_shards()
            most = shards + budget // 32
            _, batch = next(iter(pack_table([_longest(limit)] * most, budget, limit, shards)))
            program = engine.scoring_program(self.decoder, batch, models=2)
        rows, length = batch.tokens.shape
        tokens = self.work.responses * 3 * self.work.pair_tokens
        flops = 2 * engine.forward_flops(self.model, rows * length, length)
        halves = [b for b in _halves(budget) if b >= length * shards]
        return Call(
            "score", "scorer", f"2 × {rows} × {length}", under, program,
            tokens / (2 * PACKED * rows * length), flops, self._batch_seconds(flops) / self.topology.hosts,
            self._less_inference("--score.tokens_per_batch", halves),
        )  # fmt: skip

    def generation(
        self, stage: str, sampling: Sampling, prompt_tokens: float, prompts: float
    ) -> Iterator[Call]:
        """Prefill and decoding of a stage; every row is taken to decode `max_new_tokens`."""
        c, new = self.model, sampling.max_new_tokens
        limit = c.max_position_embeddings - new
        widest = length_bucket(min(self.config.prompt.max_length, limit), limit)
        width = length_bucket(math.ceil(prompt_tokens), limit)
        devices = self.topology.host_devices
        under = self.under(self.config.inference_mesh, devices, "inference_mesh")
        with under():
            shards = row_shards()
            batch = self.config.runtime.generation_batch_size
            batch += -batch % shards
            together = prompts_together(batch)
            prefill, decoding = engine.generation_programs(self.decoder, batch, widest, sampling)
        less = self._less_inference(
            "--runtime.generation_batch_size", [b for b in _halves(batch) if b >= shards]
        )
        flops = engine.forward_flops(c, together * width, width, head_tokens=together)
        yield Call(
            stage, "prefill", f"{together} × {widest}", under, prefill,
            prompts / together, flops, self._batch_seconds(flops) / self.topology.hosts, less,
        )  # fmt: skip
        context = width + new / 2
        cached = 2 * batch / shards * context * c.num_layers * c.num_kv_heads * c.head_dim
        _, _, tensor = self.config.inference_mesh.resolve(len(devices))
        read = self.width * (c.num_params() + cached) / tensor
        token = engine.forward_flops(c, batch, context)
        seconds = new * self._batch_seconds(token, read)
        yield Call(
            stage, "decoding", f"{batch} × {widest} + {new}", under, decoding,
            prompts / batch, new * token, seconds / self.topology.hosts, less,
        )  # fmt: skip

    def _batch_seconds(self, flops: float, read: float = 0) -> float:
        """Of a forward pass on the devices of one process; `read`: bytes of each device's memory."""
        devices = len(self.topology.host_devices)
        _, fsdp, tensor = self.config.inference_mesh.resolve(devices)
        moved = self.width * self._gathered(fsdp, tensor)
        return engine.seconds(self.chip, devices, flops=flops, read=read, moved=moved)

    def _less_inference(self, key: str, sizes: Sequence[int]) -> list[list[list[str]]]:
        smaller = [[key, str(n)] for n in sizes]
        cut = [
            "--inference_mesh.data",
            "1",
            "--inference_mesh.fsdp",
            "-1",
            "--inference_mesh.tensor",
            "1",
        ]
        axes = [smaller]
        if self.config.inference_mesh != MeshShape():
            axes.append([cut] + [cut + s for s in smaller])
        return [axis for axis in axes if axis]


def _longest(limit: int) -> Example:
    return Example(np.zeros(limit, np.int32), np.arange(limit) == limit - 1)


def _rows(tokens: float, length: int, multiple: int) -> int:
    return math.ceil(tokens / (PACKED * length) / multiple) * multiple


def _halves(n: int) -> list[int]:
    return [n >> i for i in range(1, n.bit_length())]
