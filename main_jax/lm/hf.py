"""Hugging Face checkpoints: one table of names both ways, streamed, strict.

    config, params = load_checkpoint("/models/llama")        # config.json + *.safetensors
    save_checkpoint("/runs/mine/hf", config, params)         # loads with LlamaForCausalLM

Reading is strict: a tensor that is missing, unknown, given twice or of another shape is refused by
a `CheckpointError`, one line that names it. Tensors are read one by one into one stacked parameter
at a time. Files are the business of `lm/weights.py`.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from main_jax.lm.arch import DecoderConfig
from main_jax.lm.weights import (
    CheckpointError,
    Path,
    Tensor,
    local_folder,
    open_tensors,
    read_json,
    write_tensors,
)

__all__ = [
    "CheckpointError",
    "check_checkpoint",
    "load_checkpoint",
    "load_config",
    "save_checkpoint",
    "stop_ids",
]

# Buffers that old checkpoints carry although they follow from the config.
IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Place = Callable[[tuple[str, ...], np.ndarray], Any]


# ------------------------------------------------------------------------------------------ table
# name | our path | their axes | our axes | only where. Axes are the letters of `lm/model.py`. On
# their side a comma separates dimensions: "NH,D" is a matrix of N * H rows; on ours each letter is
# a dimension. A name with * stands for L tensors, stacked on a leading axis.
TABLE = """
model.embed_tokens.weight                       embed.embedding                  V,D  VD
model.layers.*.input_layernorm.weight           layers.input_norm.scale          D    D
model.layers.*.self_attn.q_proj.weight          layers.attention.q.kernel        NH,D DNH
model.layers.*.self_attn.k_proj.weight          layers.attention.k.kernel        KH,D DKH
model.layers.*.self_attn.v_proj.weight          layers.attention.v.kernel        KH,D DKH
model.layers.*.self_attn.o_proj.weight          layers.attention.o.kernel        D,NH NHD
model.layers.*.self_attn.q_proj.bias            layers.attention.q.bias          NH   NH  qkv_bias
model.layers.*.self_attn.k_proj.bias            layers.attention.k.bias          KH   KH  qkv_bias
model.layers.*.self_attn.v_proj.bias            layers.attention.v.bias          KH   KH  qkv_bias
model.layers.*.self_attn.q_norm.weight          layers.attention.q_norm.scale    H    H   qk_norm
model.layers.*.self_attn.k_norm.weight          layers.attention.k_norm.scale    H    H   qk_norm
model.layers.*.post_attention_layernorm.weight  layers.post_attention_norm.scale D    D
model.layers.*.mlp.gate_proj.weight             layers.mlp.gate.kernel           F,D  DF
model.layers.*.mlp.up_proj.weight               layers.mlp.up.kernel             F,D  DF
model.layers.*.mlp.down_proj.weight             layers.mlp.down.kernel           D,F  FD
model.norm.weight                               norm.scale                       D    D
lm_head.weight                                  head.kernel                      V,D  DV  untied
"""


class Weight(NamedTuple):
    """One row of the table."""

    name: str
    path: tuple[str, ...]
    theirs: str
    ours: str

    def names(self, config: DecoderConfig) -> list[str]:
        """List the row's tensors, in layer order."""
        layers = config.num_layers if self.path[0] == "layers" else 1
        return [self.name.replace("*", str(layer)) for layer in range(layers)]

    def layers(self, leaf: np.ndarray) -> np.ndarray:
        """Give views of the parameter, one to each of `names`, `[L or 1, *self.ours]`."""
        return leaf.reshape(-1, *leaf.shape[-len(self.ours) :])

    def their_shape(self, config: DecoderConfig) -> tuple[int, ...]:
        """Give the shape of each of the row's tensors."""
        return tuple(math.prod(config.sizes[a] for a in axes) for axes in self.theirs.split(","))

    def our_shape(self, config: DecoderConfig) -> tuple[int, ...]:
        """Give the shape of the row's parameter."""
        stacked = "L" if self.path[0] == "layers" else ""
        return tuple(config.sizes[axis] for axis in stacked + self.ours)

    def to_ours(self, tensor: np.ndarray, config: DecoderConfig) -> np.ndarray:
        """Turn a tensor into one layer of ours, `[*self.ours]` (a view)."""
        axes = self.theirs.replace(",", "")
        tensor = tensor.reshape([config.sizes[axis] for axis in axes])
        return tensor.transpose([axes.index(axis) for axis in self.ours])

    def to_theirs(self, layer: np.ndarray, config: DecoderConfig) -> np.ndarray:
        """Invert `to_ours` (a copy where the order changes)."""
        axes = self.theirs.replace(",", "")
        tensor = layer.transpose([self.ours.index(axis) for axis in axes])
        return np.ascontiguousarray(tensor.reshape(self.their_shape(config)))


def weights(config: DecoderConfig) -> list[Weight]:
    """List the rows of the table that a config has."""
    has = {
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "untied": not config.tie_word_embeddings,
    }
    rows = []
    for line in TABLE.strip().splitlines():
        name, path, theirs, ours, *needs = line.split()
        if all(has[need] for need in needs):
            rows.append(Weight(name, tuple(path.split(".")), theirs, ours))
    return rows


# ---------------------------------------------------------------------------------------- reading


def load_config(path: Path) -> DecoderConfig:
    """Read `config.json` in the folder `path`; `CheckpointError` names what is not supported."""
    file = local_folder(path) / "config.json"
    try:
        return DecoderConfig.from_hf(read_json(file))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None


def check_checkpoint(path: Path) -> DecoderConfig:
    """Do every check of `load_checkpoint` that needs no weights read: config, names, shapes."""
    folder = local_folder(path)
    config = load_config(folder)
    with ExitStack() as stack:
        tensors = open_tensors(folder, stack)
        _check_names(folder, config, tensors)
        for row in weights(config):
            for name in row.names(config):
                tensors[name].check(row.their_shape(config))
        if HEAD in tensors:
            tensors[HEAD].check((config.vocab_size, config.hidden_size))
    return config


def load_checkpoint(
    path: Path, dtype: str = "float32", *, place: Place = lambda path, array: jnp.asarray(array)
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Read a model folder into (config, params), the parameters in `dtype`.

    `place(path, array)` puts one stacked host array, as soon as it is complete, where it belongs
    (`path` is like ("layers", "mlp", "up", "kernel")); by default on the first device. The host
    holds one stacked parameter and one tensor at a time. Raises `CheckpointError`.
    """
    folder = local_folder(path)
    config = load_config(folder)
    params: dict[str, Any] = {}
    with ExitStack() as stack:
        tensors = open_tensors(folder, stack)
        _check_names(folder, config, tensors)
        for row in weights(config):
            leaf = np.empty(row.our_shape(config), jnp.dtype(dtype))
            for layer, name in zip(row.layers(leaf), row.names(config), strict=True):
                layer[...] = row.to_ours(tensors[name].read(row.their_shape(config)), config)
            node = params
            for key in row.path[:-1]:
                node = node.setdefault(key, {})
            node[row.path[-1]] = place(row.path, leaf)
        if config.tie_word_embeddings and HEAD in tensors:
            shape = (config.vocab_size, config.hidden_size)
            if not np.array_equal(tensors[HEAD].read(shape), tensors[EMBEDDING].read(shape)):
                raise CheckpointError(
                    f"{tensors[HEAD].file}: tensor {HEAD} differs from {EMBEDDING}, though"
                    " config.json says tie_word_embeddings"
                )
    return config, params


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
        if value is None:
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
    extra: Mapping[str, Any] | None = None,
    shard_bytes: int = 2_000_000_000,
) -> None:
    """Write `config.json` and safetensors that Transformers loads, replacing weights at `path`.

    Tensors keep the dtypes of `params`, which must be whole on this process. Weights over
    `shard_bytes` become several files with an index. `extra` are further fields of config.json,
    such as `eos_token_id`. `CheckpointError` where params and config disagree.
    """
    leaves = _leaves(config, params)
    try:
        fields = config.to_hf()
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    dtypes = {str(leaf.dtype) for leaf in leaves.values()}
    fields["dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
    # Said even where unknown: Transformers would otherwise assume LLaMA 2's ids.
    fields |= {"bos_token_id": None, "eos_token_id": None} | dict(extra or {})
    folder = epath.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, _shards(config, leaves, shard_bytes))
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def _leaves(config: DecoderConfig, params: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """Flatten params to path -> array: exactly those that the config has, each of its shape."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    leaves = {tuple(str(key.key) for key in path): leaf for path, leaf in flat}
    expected = {row.path: row.our_shape(config) for row in weights(config)}
    for path in [*expected, *leaves]:
        found = leaves[path].shape if path in leaves else None
        if found != expected.get(path):
            raise CheckpointError(
                f"params: {'.'.join(path)} has shape {found}, expected {expected.get(path)}"
            )
    return leaves


def _shards(
    config: DecoderConfig, leaves: Mapping[tuple[str, ...], Any], shard_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yield tensors by name in groups of at most `shard_bytes`, or of one tensor."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for row in weights(config):
        leaf = np.asarray(leaves[row.path])
        for layer, name in zip(row.layers(leaf), row.names(config), strict=True):
            tensor = row.to_theirs(layer, config)
            if shard and size + tensor.nbytes > shard_bytes:
                yield shard
                shard, size = {}, 0
            shard[name] = tensor
            size += tensor.nbytes
    yield shard
