"""The one table of Hugging Face's tensor names and our parameters, and a tensor's way in both directions.

    for row in weights(config):
        row.names(config), row.path            # model.layers.0..L-1.mlp.up_proj.weight, layers.mlp.up.kernel
        row.read(tensor, index, config)        # theirs -> ours, or the part of it at index
        row.to_theirs(layer, config)           # and back

Reshaping and transposition follow from the letters of both sides' axes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from main_jax.lm.arch import DecoderConfig
from main_jax.lm.weights import Tensor

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
        """Give views of a parameter, or of a part of it, one to each layer: `[L or 1, *self.ours]`."""
        return leaf if self.path[0] == "layers" else leaf[None]

    def their_shape(self, config: DecoderConfig) -> tuple[int, ...]:
        """Give the shape of each of the row's tensors."""
        return tuple(math.prod(config.sizes[a] for a in axes) for axes in self.theirs.split(","))

    def our_shape(self, config: DecoderConfig) -> tuple[int, ...]:
        """Give the shape of the row's parameter."""
        stacked = "L" if self.path[0] == "layers" else ""
        return tuple(config.sizes[axis] for axis in stacked + self.ours)

    def read(self, tensor: Tensor, index: Sequence[slice], config: DecoderConfig) -> np.ndarray:
        """Read one layer of ours, `[*self.ours]`, or the part at `index`, one slice to each axis."""
        at = {a: i.indices(config.sizes[a])[:2] for a, i in zip(self.ours, index, strict=True)}
        # On their side the outermost letter of each dimension is cut while reading, the others after.
        ranges = []
        for axes in self.theirs.split(","):
            inner = math.prod(config.sizes[a] for a in axes[1:])
            ranges.append((at[axes[0]][0] * inner, at[axes[0]][1] * inner))
        axes = self.theirs.replace(",", "")
        outer = [dimension[0] for dimension in self.theirs.split(",")]
        sizes = [at[a][1] - at[a][0] if a in outer else config.sizes[a] for a in axes]
        part = tensor.read(ranges).reshape(sizes)
        part = part[tuple(slice(None) if a in outer else slice(*at[a]) for a in axes)]
        return part.transpose([axes.index(a) for a in self.ours])

    def to_theirs(self, layer: np.ndarray, config: DecoderConfig) -> np.ndarray:
        """Turn one layer of ours into their tensor (a copy where the order changes)."""
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


def nest(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Make the tree whose leaves lie at these paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree
