"""The decoder: the one Flax Linen file. RMSNorm, RoPE, attention, SwiGLU, block, scan and remat.

    decoder = Decoder(config, dtype="bfloat16", remat="dots")
    params = decoder.init(jax.random.key(0))
    hidden, _ = decoder.apply(params, tokens, positions, segment_ids)          # train, score
    hidden, new = decoder.apply(params, tokens, positions, segment_ids, prefill=True)
    hidden, cache = decoder.apply(params, tokens, positions, segment_ids, cache)   # a step of decoding

Parameters are a plain nested dict of float32 arrays, the layers stacked on a leading axis L:

    embed.embedding VD     layers.attention.{q LDNH, k LDKH, v LDKH, o LNHD}.{kernel, bias}
    norm.scale D           layers.attention.{q_norm, k_norm}.scale LH
    head.kernel DV         layers.mlp.{gate LDF, up LDF, down LFD}.kernel
                           layers.{input_norm, post_attention_norm}.scale LD

Letters, in equations and in names:

    B rows                 T query tokens            S key slots          L layers
    D hidden features      F features of the MLP     V vocabulary         H features of a head
    N query heads          K key-value heads         G = N / K

A layer is LLaMA's (Touvron et al. 2023, arXiv 2302.13971):
x += o(attention(rope(q(norm x)), rope(k(norm x)), v(norm x))); x += down(silu(gate(norm x)) *
up(norm x)). RMSNorm, RoPE and the softmax are float32 whatever `dtype` is.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from main_jax.lm.arch import DecoderConfig
from main_jax.lm.attention import attention
from main_jax.lm.row_cache import RowCache
from main_jax.lm.sharding import constrain

# What the backward pass keeps of a layer instead of computing it again; "none": everything.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "projections": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclass(frozen=True)
class Decoder:
    """A decoder as a value: hashable, so that it can be a static argument of a jitted function.

    `dtype` is that of the computation, not of the parameters; `remat` is one of `REMAT_POLICIES`;
    `attention` is a backend of `lm/attention.py`.
    """

    config: DecoderConfig
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self) -> None:
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat: no policy {self.remat!r}, only {', '.join(REMAT_POLICIES)}")

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Draw float32 parameters.

        Normal, with standard deviation 1 for the embedding and 1 / sqrt(inputs) for the rest, which
        keeps activations at unit size; the projections that add to the residual are divided by
        sqrt(2 L), so that their sum keeps it too. A tied embedding is drawn as a head.
        """
        return _init(self, key)

    def apply(
        self,
        params: Mapping[str, Any],
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        cache: RowCache | None = None,
        *,
        prefill: bool = False,
    ) -> tuple[jax.Array, Any]:
        """Run `[B, T]` tokens to `[B, T, D]` hidden states (after the final norm), in `dtype`.

        A token sees the tokens of its segment (0 is padding and sees nothing) up to itself; a
        segment lies in adjacent slots, its positions rising by one. `prefill` gives the keys and
        values for a cache too, `[L, B, T, K, H]` each. With a cache T is 1, a position is its row's
        length, a row of segment 0 stays as it is, and the cache comes back with the new tokens.
        Else the second result is None. A token id outside the vocabulary gives NaN rather than
        another token's result.
        """
        model: Any = _Transformer(self, prefill)
        return model.apply({"params": params}, tokens, positions, segment_ids, cache)

    def unembed(self, params: Mapping[str, Any]) -> jax.Array:
        """Return the `[D, V]` matrix from hidden states to logits, as stored."""
        if self.config.tie_word_embeddings:
            return params["embed"]["embedding"].T
        return params["head"]["kernel"]

    def inference_dtype(self, name: str) -> str:
        """Return the dtype in which a parameter, by the last name of its path, serves inference.

        That to which `apply` and the head cast it first: results are those of float32, bit for bit,
        at half the memory where `dtype` is bfloat16. Norms compute in float32.
        """
        return "float32" if name == "scale" else self.dtype


@functools.partial(jax.jit, static_argnums=0)
def _init(decoder: Decoder, key: jax.Array) -> dict[str, Any]:
    token = jnp.zeros((1, 1), jnp.int32)  # its forward pass is dead code, and compiled away
    model: Any = _Transformer(decoder)
    params = model.init(key, token, token, token)["params"]  # matrices hold standard deviations
    paths, tree = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in paths]
    random = [i for i, (path, _) in enumerate(paths) if path[-1].key in ("kernel", "embedding")]
    ends = np.cumsum([leaves[i].size for i in random])
    if ends[-1] < 2**24:
        # One draw, cut up: each costs a third of a second of compilation.
        draws = jnp.split(jax.random.normal(key, (ends[-1],)), ends[:-1])
    else:
        # One each: the partitioner would hold a cut one whole on every device.
        keys = jax.random.split(key, len(random))
        draws = [jax.random.normal(k, leaves[i].shape) for k, i in zip(keys, random, strict=True)]
    for i, draw in zip(random, draws, strict=True):
        leaves[i] *= draw.reshape(leaves[i].shape)
    return jax.tree.unflatten(tree, leaves)


class Einsum(nn.Module):
    """A projection named by its einsum, e.g. "BTD,DNH->BTNH": axes, fan-in and bias follow from it.

    `gain` multiplies the initial standard deviation, 1 / sqrt(fan-in).
    """

    equation: str
    decoder: Decoder
    use_bias: bool = False
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Contract the last axes of `x` with the first ones of the kernel."""
        dtype, sizes = self.decoder.dtype, self.decoder.config.sizes
        kernel_axes, out_axes = self.equation.split(",")[1].split("->")
        shape = tuple(sizes[axis] for axis in kernel_axes)
        out_shape = tuple(sizes[axis] for axis in kernel_axes if axis in out_axes)
        fan_in = math.prod(shape) // math.prod(out_shape)
        kernel = self.param("kernel", nn.initializers.constant(self.gain * fan_in**-0.5), shape)
        # In two dimensions: with [B, T, D] the CPU's weight gradients miss the fast matrix product.
        y = x.reshape(-1, fan_in) @ kernel.reshape(fan_in, -1).astype(dtype)
        y = y.reshape(*x.shape[:2], *out_shape)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, out_shape).astype(dtype)
        return constrain(y, self.equation.split("->")[1])


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32; keeps the dtype of x."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise `[..., D]`."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Apply RoPE to `[B, T, N, H]`; a pair is (i, i + H / 2), Hugging Face's convention."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class _Context(NamedTuple):
    """What all layers share."""

    cos: jax.Array  # [B, T, 1, H / 2]
    sin: jax.Array
    segment_ids: jax.Array  # [B, T]
    cache: RowCache | None


class Attention(nn.Module):
    """Grouped-query self-attention, over the T tokens or over a cache and the one after it."""

    decoder: Decoder

    @nn.compact
    def __call__(self, x: jax.Array, context: _Context, layer: jax.Array) -> tuple[jax.Array, Any]:
        """Map `[B, T, D]` to `[B, T, D]`, with the tokens' keys and values."""
        c = self.decoder.config
        project = functools.partial(Einsum, decoder=self.decoder, use_bias=c.qkv_bias)
        q = project("BTD,DNH->BTNH", name="q")(x)
        k = project("BTD,DKH->BTKH", name="k")(x)
        v = project("BTD,DKH->BTKH", name="v")(x)
        if c.qk_norm:
            q = RMSNorm(c.rms_norm_eps, name="q_norm")(q)
            k = RMSNorm(c.rms_norm_eps, name="k_norm")(k)
        with jax.named_scope("rope"):
            q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        with jax.named_scope("attend"):
            if context.cache is not None:
                y = context.cache.attend(layer, q, k, v, c.sliding_window)
            else:
                backend = self.decoder.attention
                y = attention(q, k, v, context.segment_ids, c.sliding_window, backend)
        gain = (2 * c.num_layers) ** -0.5
        return Einsum("BTNH,NHD->BTD", self.decoder, gain=gain, name="o")(y), (k, v)


class MLP(nn.Module):
    """SwiGLU: Shazeer 2020, arXiv 2002.05202."""

    decoder: Decoder

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[B, T, D]` to `[B, T, D]`."""
        gate = Einsum("BTD,DF->BTF", self.decoder, name="gate")(x)
        up = Einsum("BTD,DF->BTF", self.decoder, name="up")(x)
        gain = (2 * self.decoder.config.num_layers) ** -0.5
        return Einsum("BTF,FD->BTD", self.decoder, gain=gain, name="down")(nn.silu(gate) * up)


class Block(nn.Module):
    """One layer, as the body of a scan: the carry is x, `[B, T, D]`."""

    decoder: Decoder
    keep: bool

    @nn.compact
    def __call__(self, x: jax.Array, layer: jax.Array, context: _Context) -> tuple[jax.Array, Any]:
        """Return x after the layer and, to `keep`, the tokens' keys and values."""
        norm = functools.partial(RMSNorm, self.decoder.config.rms_norm_eps)
        y = norm(name="input_norm")(x)
        y, new = Attention(self.decoder, name="attention")(y, context, layer)
        x += y
        x += MLP(self.decoder, name="mlp")(norm(name="post_attention_norm")(x))
        return x, new if self.keep else None


class _Transformer(nn.Module):
    """Embedding, the scanned stack and the final norm; the head is declared, not applied."""

    decoder: Decoder
    prefill: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        cache: RowCache | None = None,
    ) -> tuple[jax.Array, Any]:
        """See `Decoder.apply`."""
        c = self.decoder.config
        shape, std = (c.vocab_size, c.hidden_size), c.hidden_size**-0.5
        embed_std = std if c.tie_word_embeddings else 1.0
        embed = self.param("embed", lambda key: {"embedding": jnp.full(shape, embed_std)})
        if not c.tie_word_embeddings:
            self.param("head", lambda key: {"kernel": jnp.full(shape[::-1], std)})

        with jax.named_scope("embed"):
            # Gathered over fsdp first: a lookup whose features are cut up is moved to rows at a high price.
            table = constrain(embed["embedding"], "VD")
            x = constrain(jnp.take(table, tokens, axis=0).astype(self.decoder.dtype), "BTD")
        with jax.named_scope("rope_angles"):
            angles = positions[:, :, None, None].astype(jnp.float32) * c.rope_frequencies()
            cos, sin = jnp.cos(angles), jnp.sin(angles)
        block: Any = Block
        if self.decoder.remat != "none":
            policy = REMAT_POLICIES[self.decoder.remat]
            block = nn.remat(Block, policy=policy, prevent_cse=False)  # a scan needs no barrier
        stack: Any = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.num_layers,
        )
        keep = self.prefill or cache is not None
        x, new = stack(self.decoder, keep, name="layers")(
            x, jnp.arange(c.num_layers), _Context(cos, sin, segment_ids, cache)
        )
        x = RMSNorm(c.rms_norm_eps, name="norm")(x)
        # Layers return only what is new: a donated cache is then written in place, once.
        return x, new if cache is None else cache.append(*new, segment_ids[:, 0])
