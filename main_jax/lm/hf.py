"""Hugging Face checkpoints in and out: streamed and strict, by the table of `lm/hf_table.py`.

    config, params = load_checkpoint("/models/llama")        # config.json + *.safetensors
    save_checkpoint("/runs/mine/hf", config, params)         # loads with LlamaForCausalLM

Reading is strict: a tensor that is missing, unknown, given twice or of another shape is refused by
a `CheckpointError`, one line that names it. Both ways one tensor is held at a time. Files are the
business of `lm/weights.py`.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from main_jax.lm.arch import DecoderConfig
from main_jax.lm.hf_config import from_hf, to_hf
from main_jax.lm.hf_table import Weight, nest, weights
from main_jax.lm.multihost import first, on_host
from main_jax.lm.progress import track
from main_jax.lm.sharding import one_copy, param_shardings
from main_jax.lm.weights import (
    CheckpointError,
    Path,
    Planned,
    Tensor,
    local_folder,
    open_tensors,
    read_json,
    write_tensors,
)

__all__ = [
    "CheckpointError",
    "check_checkpoint",
    "flat_params",
    "load_checkpoint",
    "load_config",
    "save_checkpoint",
    "stop_ids",
]

# Buffers that old checkpoints carry although they follow from the config.
IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
LARGE = 100_000_000  # parameters, from which on loading and writing show their progress
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


# ---------------------------------------------------------------------------------------- reading


def load_config(path: Path) -> DecoderConfig:
    """Read `config.json` in the folder `path`; `CheckpointError` names what is not supported."""
    file = local_folder(path) / "config.json"
    try:
        return from_hf(read_json(file))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None


def check_checkpoint(path: Path) -> DecoderConfig:
    """Do every check of `load_checkpoint` before any weight is loaded: config, names, shapes."""
    folder = local_folder(path)
    config = load_config(folder)
    with ExitStack() as stack:
        _check_tensors(folder, config, open_tensors(folder, stack))
    return config


def load_checkpoint(
    path: Path,
    dtype: str | Callable[[str], str] | None = "float32",
    *,
    shardings: Any = None,
    buffer: Callable[..., np.ndarray] = np.empty,
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Read a model folder into (config, params), the parameters in `dtype`, or (None) as stored.

    `dtype` may be a function of the last name in a parameter's path, like `Decoder.inference_dtype`.
    `shardings` is a tree like params, or one for all; by default they get their places on the mesh,
    or without one are put on the first device.
    Of every tensor only what this process's devices hold is read and cast. Beyond the arrays the
    host holds one device's part of one stacked parameter, made by `buffer(shape, dtype)`, and one
    tensor of the file. Raises `CheckpointError`.
    """
    folder = local_folder(path)
    config = load_config(folder)
    shardings = shardings or param_shardings(config)
    leaves: dict[tuple[str, ...], jax.Array] = {}
    with ExitStack() as stack:
        tensors = open_tensors(folder, stack)
        _check_tensors(folder, config, tensors)
        rows = weights(config)
        total = config.num_params()
        shown = total > LARGE
        bar = stack.enter_context(track("load", total, "parameters", shown=shown))
        for row in rows:
            sharding = _at(shardings, row.path)
            wanted = dtype if dtype is None or isinstance(dtype, str) else dtype(row.path[-1])
            leaves[row.path] = _load_leaf(row, config, tensors, wanted, sharding, buffer)
            bar.advance(math.prod(row.our_shape(config)))
    return config, nest(leaves)


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    """What a tree, or a prefix of one, has for the leaf at `path`."""
    return _at(tree[path[0]], path[1:]) if isinstance(tree, Mapping) else tree


def _load_leaf(
    row: Weight,
    config: DecoderConfig,
    tensors: Mapping[str, Tensor],
    dtype: str | None,
    sharding: Any,
    buffer: Callable[..., np.ndarray],
) -> jax.Array:
    """Read one row of the table into one array, each part of it once however many devices hold it."""
    shape, stored = row.our_shape(config), {tensors[name].dtype for name in row.names(config)}
    target = jnp.dtype(dtype or functools.reduce(jnp.promote_types, stored))
    holders: dict[Any, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        ranges = tuple(i.indices(n)[:2] for i, n in zip(index, shape, strict=True))
        holders.setdefault(ranges, []).append(device)
    placed = []
    for ranges, devices in holders.items():
        part = buffer([stop - start for start, stop in ranges], target)
        _fill(part, row, config, tensors, ranges)
        # Waiting keeps the next part from being read before this one's buffer is free.
        placed += jax.block_until_ready([jax.device_put(part, device) for device in devices])
        del part
    return one_copy(jax.make_array_from_single_device_arrays(shape, sharding, placed))


def _fill(
    part: np.ndarray,
    row: Weight,
    config: DecoderConfig,
    tensors: Mapping[str, Tensor],
    ranges: Sequence[tuple[int, int]],
) -> None:
    """Read the part of a parameter that lies within `ranges`, cast and transposed on the way."""
    names, index = row.names(config), [slice(*r) for r in ranges]
    if len(ranges) > len(row.ours):
        names, index = names[index[0]], index[1:]
    for out, name in zip(row.layers(part), names, strict=True):
        layer = _cast(row.read(tensors[name], index, config), part.dtype, name)
        for start in range(
            0, layer.shape[-1], 256
        ):  # one transposition at once takes 3 times as long
            tile = slice(start, start + 256)
            out[..., tile] = layer[..., tile]


def _cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Cast, refusing what float16 cannot hold; the other dtypes have one range."""
    with np.errstate(over="ignore"):
        cast = array.astype(dtype, copy=False)
    if dtype == np.float16 != array.dtype and np.isinf(cast).sum() > np.isinf(array).sum():
        raise CheckpointError(f"tensor {name} has values beyond float16; choose bfloat16")
    return cast


def _check_tensors(
    folder: epath.Path, config: DecoderConfig, tensors: Mapping[str, Tensor]
) -> None:
    """Refuse tensors that are missing, unknown or of another shape or dtype."""
    _check_names(folder, config, tensors)
    for row in weights(config):
        for name in row.names(config):
            tensors[name].check(row.their_shape(config))
    if not (config.tie_word_embeddings and HEAD in tensors):
        return
    tensors[HEAD].check((config.vocab_size, config.hidden_size))
    for start in range(0, config.vocab_size, 4096):
        rows = ((start, min(start + 4096, config.vocab_size)), (0, config.hidden_size))
        if not np.array_equal(tensors[HEAD].read(rows), tensors[EMBEDDING].read(rows)):
            raise CheckpointError(
                f"{tensors[HEAD].file}: tensor {HEAD} differs from {EMBEDDING}, though"
                " config.json says tie_word_embeddings"
            )


def _check_names(folder: epath.Path, config: DecoderConfig, tensors: Mapping[str, Tensor]) -> None:
    """Refuse missing and unknown tensors."""
    expected = {name for row in weights(config) for name in row.names(config)}
    known = expected | {HEAD}  # where the embedding is tied, a copy is looked at later
    missing = sorted(expected - tensors.keys())
    unknown = sorted(name for name in tensors.keys() - known if not IGNORED.fullmatch(name))
    for what, names in (("missing", missing), ("unknown: this config has no such tensor", unknown)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            hint = "; is tie_word_embeddings in config.json wrong?" if HEAD in names else ""
            raise CheckpointError(f"{folder}: tensor {names[0]}{more} is {what}{hint}")


def stop_ids(path: Path) -> tuple[int, ...]:
    """Read the ids that end a text: `eos_token_id` of generation_config.json, else of config.json.

    Either may give a number, a list or nothing; the result may be empty.
    """
    folder = local_folder(path)
    for file in (folder / "generation_config.json", folder / "config.json"):
        value = read_json(file).get("eos_token_id") if file.exists() else None
        if value is None or value == []:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise CheckpointError(f"{file}: eos_token_id must be an id or a list, found {value!r}")
        return tuple(dict.fromkeys(ids))
    return ()


# ---------------------------------------------------------------------------------------- writing


def save_checkpoint(
    path: Path,
    config: DecoderConfig,
    params: Mapping[str, Any],
    *,
    fields: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `config.json` and safetensors that Transformers loads, replacing weights at `path`.

    Tensors are cast to `dtype` (None: kept), one at a time; what gives a leaf its data is `leaf[i]`
    for layer i of a stacked one and `leaf[...]` for the others. Weights over `max_shard_bytes` become
    several files with an index. `fields` are a whole config.json to be kept where it says the same
    as `config`, or further fields such as `eos_token_id`. `CheckpointError` where they disagree.
    """
    leaves = flat_params(config, params)
    written = _config_json(path, config, dict(fields or {}))
    dtypes = {str(jnp.dtype(dtype or leaf.dtype)) for leaf in leaves.values()}
    key = "torch_dtype" if "torch_dtype" in written else "dtype"  # the older and the newer name
    written[key] = dtypes.pop() if len(dtypes) == 1 else "float32"
    folder = epath.Path(path)
    total = config.num_params()
    with track("write", total, "parameters", shown=total > LARGE) as bar:
        write_tensors(folder, _planned(config, leaves, dtype), max_shard_bytes, bar.advance)
    if first():
        (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")


def _config_json(path: Path, config: DecoderConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """Fill in what `fields` leaves out of a config.json; refuse what contradicts `config`."""
    try:
        if "model_type" not in fields:
            # Said even where unknown: Transformers would otherwise assume LLaMA 2's ids.
            fields = to_hf(config) | {"bos_token_id": None, "eos_token_id": None} | fields
        if from_hf(fields) != config:
            raise ValueError("config.json describes another model than these parameters")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return fields


def flat_params(config: DecoderConfig, params: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """Flatten params to path -> array: exactly those that the config has, each of its shape.

    `CheckpointError` names the first that is missing, unknown or of another shape.
    """
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    leaves = {tuple(str(key.key) for key in path): leaf for path, leaf in flat}
    expected = {row.path: row.our_shape(config) for row in weights(config)}
    for path in [*expected, *leaves]:
        found = tuple(leaves[path].shape) if path in leaves else None
        if found != expected.get(path):
            raise CheckpointError(
                f"params: {'.'.join(path)} has shape {found}, expected {expected.get(path)}"
            )
    return leaves


def _planned(
    config: DecoderConfig, leaves: Mapping[tuple[str, ...], Any], dtype: str | None
) -> Iterator[Planned]:
    """Yield every tensor of the table, to be made when it is written."""
    for row in weights(config):
        leaf, names = leaves[row.path], row.names(config)
        target = jnp.dtype(dtype or leaf.dtype)
        stacked = len(leaf.shape) > len(row.ours)
        for i, name in enumerate(names):

            def read(row=row, leaf=leaf, name=name, layer=i if stacked else None, target=target):
                return _cast(row.to_theirs(_layer(leaf, layer), config), target, name)

            yield Planned(name, target, row.their_shape(config), read)


def _layer(leaf: Any, layer: int | None) -> np.ndarray:
    """Copy one layer, or all where there are none. Of `leaf` itself JAX would keep the host's copy."""
    if isinstance(leaf, jax.Array):
        return on_host(jnp.copy(leaf) if layer is None else leaf[layer])
    return np.asarray(leaf[... if layer is None else layer])
