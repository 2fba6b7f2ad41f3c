"""Model folders in their two forms: Hugging Face's safetensors and Orbax, converted tensor by tensor.

    convert("/models/Llama-2-7b-hf", "/models/llama-orbax")      # and back: the direction is detected

Both hold the same config.json, generation_config.json and tokenizer files, so that nothing is lost on the
way there and back. Weights pass through memory-mapped files or one parameter at a time: a model that fits
the disk can be converted.
"""

from __future__ import annotations

import json
import math
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

from main_jax.checks import check_output, check_room
from main_jax.errors import UserError
from main_jax.lm import hf
from main_jax.lm.arch import DecoderConfig
from main_jax.lm.checkpoint import Checkpoints
from main_jax.lm.progress import say
from main_jax.lm.tokenizer import copy_tokenizer
from main_jax.lm.weights import read_json
from main_jax.models import ORBAX, is_orbax, stored, stored_dtype

MAX_SHARD_BYTES = 5_000_000_000


def convert(
    source: str, destination: str, dtype: str | None = None, max_shard_bytes: int | None = None
) -> None:
    """Writes the model folder `source` as `destination` in the other form, in `dtype` (None: as stored).

    Raises UserError or CheckpointError, one line; nothing is left behind then.
    """
    backwards = is_orbax(source)
    if max_shard_bytes and not backwards:
        raise UserError(f"max_shard_size is for Hugging Face's form; {source} becomes Orbax's")
    config = hf.load_config(source) if backwards else hf.check_checkpoint(source)
    per_parameter = jnp.dtype(dtype or stored_dtype(source)).itemsize
    # On the way to Orbax the parameters are staged beside the result.
    needed = config.num_params() * per_parameter * (1 if backwards else 2)
    with new_folder(destination, needed) as folder:
        if backwards:
            write_hf(folder, source, config, stored(source), dtype, max_shard_bytes)
        else:
            _write_orbax(folder, source, dtype)
    form = "Hugging Face" if backwards else "Orbax"
    say(f"{destination}: {config.num_params():,} parameters in {form} form")


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
    fields = read_json(epath.Path(source) / "config.json")
    hf.save_checkpoint(
        folder, config, params, fields=fields, dtype=dtype,
        max_shard_bytes=max_shard_bytes or MAX_SHARD_BYTES,
    )  # fmt: skip
    copy_tokenizer(source, folder, chat_template)
    _write_generation_config(folder, source, stop_ids)


def _write_orbax(folder: epath.Path, source: str, dtype: str | None) -> None:
    """Stages the stacked parameters in memory-mapped files, which Orbax then reads one by one."""
    staging = Path(folder) / "staging"
    staging.mkdir()

    def buffer(shape: list[int], dtype: np.dtype) -> np.ndarray:
        file = staging / str(len(list(staging.iterdir())))
        return np.memmap(file, dtype, mode="w+", shape=tuple(shape))

    host = SingleDeviceSharding(jax.devices("cpu")[0])  # whose arrays are the files, not copies
    _, params = hf.load_checkpoint(source, dtype, shardings=host, buffer=buffer)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    with Checkpoints(folder / ORBAX, concurrent_bytes=largest + 1_000_000) as checkpoints:
        checkpoints.save_params(0, params)
    shutil.rmtree(staging)
    (folder / "config.json").write_text((epath.Path(source) / "config.json").read_text())
    copy_tokenizer(source, folder)
    _write_generation_config(folder, source, ())


def _write_generation_config(
    folder: epath.Path, source: str, stop_ids: tuple[int, ...] = ()
) -> None:
    """The source's, with every id that ends a text: a model that never stops is no use."""
    file = epath.Path(source) / "generation_config.json"
    settings = read_json(file) if file.exists() else {}
    ends = sorted({*hf.stop_ids(source), *stop_ids})
    if ends:
        settings["eos_token_id"] = ends
    settings.pop(
        "_from_model_config", None
    )  # it would let Transformers take the ids of config.json
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")


@contextmanager
def new_folder(destination: str, needed: int) -> Generator[epath.Path]:
    """A folder that gets its name only when all is written. Raises UserError unless the name is free."""
    target = epath.Path(destination).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{destination}: is there already; choose a new name")
    check_output(target.parent, "DST")
    check_room(target.parent, math.ceil(1.1 * needed), "the converted model")
    folder = target.parent / f".{target.name}.tmp"
    if folder.exists():  # what a killed conversion has left
        folder.rmtree()
    folder.mkdir(parents=True)
    try:
        yield folder
        if target.exists():
            target.rmdir()
        folder.rename(target)
    finally:
        if folder.exists():
            folder.rmtree()
