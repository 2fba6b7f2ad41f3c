"""Model folders in their two forms: Hugging Face's safetensors and Orbax, converted tensor by tensor.

    convert("/models/Llama-2-7b-hf", "/models/llama-orbax")      # and back: the direction is detected

Both hold the same config.json, generation_config.json and tokenizer files, so that a folder that comes back
says what it said. Weights pass through memory-mapped files or one parameter at a time: a model that fits the
disk can be converted.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import SingleDeviceSharding

from main_jax.checks import check_new, check_room
from main_jax.errors import UserError
from main_jax.hub import find_model
from main_jax.lm import hf
from main_jax.lm.arch import DecoderConfig
from main_jax.lm.checkpoint import Checkpoints
from main_jax.lm.multihost import first
from main_jax.lm.progress import say
from main_jax.lm.tokenizer import copy_tokenizer
from main_jax.lm.weights import read_json
from main_jax.models import ORBAX, is_orbax, stored

MAX_SHARD_BYTES = 5_000_000_000


def convert(
    source: str, destination: str, dtype: str | None = None, max_shard_bytes: int | None = None
) -> None:
    """Writes the model `source` as the new folder `destination` in the other form.

    `dtype` None keeps every tensor's. Raises UserError or CheckpointError, one line; nothing is left behind.
    """
    target = check_new(destination, "DST")
    source = find_model(source, "SRC")
    if Path(source).resolve() in target.parents:
        raise UserError(f"DST: {destination}: is inside SRC; choose a folder beside it")
    if is_orbax(source):
        config = hf.load_config(source)
        params = stored(source, config)
        sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)]
        with new_folder(target, _bytes(config, dtype, sum(sizes))) as folder:
            write_hf(folder, source, config, params, dtype, max_shard_bytes)
    else:
        if max_shard_bytes:
            raise UserError(f"max_shard_size is for Hugging Face's form; {source} becomes Orbax's")
        config = hf.check_checkpoint(source)
        size = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
        # The parameters are staged beside the result.
        with new_folder(target, 2 * _bytes(config, dtype, size)) as folder:
            _write_orbax(folder, source, dtype)
    form = "Orbax" if (target / ORBAX).exists() else "Hugging Face"
    say(f"{destination}: {config.num_params():,} parameters in {form} form")


def _bytes(config: DecoderConfig, dtype: str | None, stored_bytes: int) -> int:
    return config.num_params() * jnp.dtype(dtype).itemsize if dtype else stored_bytes


def write_hf(
    folder: epath.Path,
    source: str,
    config: DecoderConfig,
    params: Mapping[str, Any],
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    *,
    stop_ids: tuple[int, ...] = (),
    chat_template: str | None = None,
) -> None:
    """Writes `params` with the config and tokenizer of the model folder `source`.

    generation_config.json lists the ids that end a text: those of the source and `stop_ids`.
    `chat_template` takes the place of the tokenizer's own.
    """
    fields = _write_companions(folder, source, stop_ids, chat_template)
    limit = max_shard_bytes or MAX_SHARD_BYTES
    hf.save_checkpoint(folder, config, params, fields=fields, dtype=dtype, max_shard_bytes=limit)


def _write_orbax(folder: epath.Path, source: str, dtype: str | None) -> None:
    """Stages the stacked parameters in memory-mapped files, which Orbax then reads one by one."""
    fields = _write_companions(folder, source)
    if dtype:
        fields["torch_dtype" if "torch_dtype" in fields else "dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    staging = Path(folder) / "staging"
    staging.mkdir()
    names = itertools.count()

    def buffer(shape: list[int], dtype: np.dtype) -> np.ndarray:
        with (staging / str(next(names))).open("w+b") as file:
            # A file with holes would end the process with SIGBUS where the disk is full.
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * dtype.itemsize)
            return np.memmap(file, dtype, mode="r+", shape=tuple(shape))

    host = SingleDeviceSharding(jax.devices("cpu")[0])  # whose arrays are the files, not copies
    _, params = hf.load_checkpoint(source, dtype, shardings=host, buffer=buffer)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    try:
        with Checkpoints(folder / ORBAX, concurrent_bytes=largest + 1_000_000) as checkpoints:
            checkpoints.save_params(0, params)
    except Exception as error:
        if "No space left on device" not in str(error):
            raise
        raise UserError(f"{folder.parent}: the disk is full; nothing was converted") from None
    shutil.rmtree(staging)


def _write_companions(
    folder: epath.Path,
    source: str,
    stop_ids: tuple[int, ...] = (),
    chat_template: str | None = None,
) -> dict[str, Any]:
    """Everything but config.json and weights, before these: faults are found early. Returns the config."""
    file = epath.Path(source) / "generation_config.json"
    settings = read_json(file) if file.exists() else {}
    ends = list(dict.fromkeys([*hf.stop_ids(source), *stop_ids]))
    if ends:  # a model that never stops is no use
        settings["eos_token_id"] = ends
    # It would let Transformers take the ids of config.json instead.
    settings.pop("_from_model_config", None)
    if first():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        copy_tokenizer(source, folder, chat_template)
    return read_json(epath.Path(source) / "config.json")


@contextmanager
def new_folder(target: Path, needed: int) -> Generator[epath.Path]:
    """A folder that gets its name only when all is written. Raises UserError without room for it."""
    folder = epath.Path(target.parent / f".{target.name}.tmp")
    if folder.exists():  # what a killed conversion has left
        folder.rmtree()
    check_room(target.parent, math.ceil(1.1 * needed), "the converted model")
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(target)
    finally:
        if folder.exists():
            folder.rmtree()
