"""What a decoder is: `DecoderConfig`, and the published ones by name.

    config = PRESETS["llama-3.1-8b"]
    config.num_params(), config.sizes["D"], config.rope_frequencies()

How a Hugging Face config.json becomes one is the business of `lm/hf_config.py`.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

RopeKind = Literal["linear", "llama3"]


def positive(name: str, value: Any, kind: type = int) -> Any:
    """Return a positive number of `kind`, or raise a `ValueError` that names it."""
    accepted = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted) or not value > 0:
        noun = "whole number" if kind is int else "number"
        raise ValueError(f"{name}: must be a positive {noun}, found {value!r}")
    return kind(value)


@dataclass(frozen=True)
class RopeScaling:
    """Stretched RoPE: `linear` divides all frequencies, `llama3` only low ones (LLaMA 3.1)."""

    kind: RopeKind
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in get_args(RopeKind):
            known = ", ".join(get_args(RopeKind))
            raise ValueError(f"rope_scaling: type {self.kind!r} is not supported (only {known})")
        for field in fields(self)[1:]:
            kind = int if field.type is int else float
            positive(f"rope_scaling: {field.name}", getattr(self, field.name), kind)
        low, high = self.low_freq_factor, self.high_freq_factor
        if not high > low:
            raise ValueError(
                f"rope_scaling: high_freq_factor {high} must exceed the low one, {low}"
            )


@dataclass(frozen=True)
class DecoderConfig:
    """Shapes and constants of a pre-norm decoder (RMSNorm, RoPE, grouped-query attention, SwiGLU).

    Sizes count features, heads, layers or token ids; `head_dim` is independent of `hidden_size`.
    With `sliding_window` w a query sees the w latest positions, its own included. `qk_norm` is an
    RMSNorm over `head_dim` on queries and keys, before RoPE (Qwen3). `max_position_embeddings` says
    what the model was trained for: nothing is cut at it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name}: must be true or false, found {value!r}")
            if field.type in (int, float) or (field.type == int | None and value is not None):
                positive(field.name, value, float if field.type is float else int)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: {self.num_kv_heads} does not divide {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: RoPE rotates pairs, but {self.head_dim} is odd")

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis, by its letter (see `lm/model.py`)."""
        c = self
        sizes = dict(V=c.vocab_size, D=c.hidden_size, F=c.intermediate_size, L=c.num_layers)
        return sizes | dict(N=c.num_heads, K=c.num_kv_heads, H=c.head_dim)

    def num_params(self) -> int:
        """Count the parameters, exactly."""
        V, D, F, L, N, K, H = self.sizes.values()
        layer = 2 * D * (N + K) * H + 3 * D * F + 2 * D
        layer += (N + 2 * K) * H if self.qkv_bias else 0
        layer += 2 * H if self.qk_norm else 0
        return V * D * (1 if self.tie_word_embeddings else 2) + L * layer + D

    def rope_frequencies(self) -> np.ndarray:
        """Angle per position of each pair of features, in radians: `[H / 2]` float32.

        RoPE: Su et al. 2021, arXiv 2104.09864. `llama3`, as published with LLaMA 3.1: pairs that
        turn fewer than `low_freq_factor` times in the old context slow down by `factor`, those
        that turn more than `high_freq_factor` times stay, and those in between are blended.
        """
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        # NumPy's float32 power is up to 2 ulp off, which thousands of positions multiply.
        frequencies = 1 / (self.rope_theta ** exponents.astype(np.float64)).astype(np.float32)
        scaling = self.rope_scaling
        if scaling is None:
            return frequencies
        factor = np.float32(scaling.factor)
        if scaling.kind == "linear":
            return frequencies / factor
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        # In PyTorch's order, whose rounding is then ours: a number over a tensor is a reciprocal there.
        wavelengths = np.float32(2 * np.pi) * (1 / frequencies)
        turns = np.float32(scaling.original_max_position_embeddings) * (1 / wavelengths)
        keep = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
        return (1 - keep) * frequencies / factor + keep * frequencies


# Architectures as published; sources: config.json of the repositories in `PUBLISHED`.
PRESETS = {
    "llama-2-7b": DecoderConfig(
        32000, 4096, 11008, 32, 32, 32, 128, max_position_embeddings=4096, rms_norm_eps=1e-5
    ),
    "llama-2-13b": DecoderConfig(
        32000, 5120, 13824, 40, 40, 40, 128, max_position_embeddings=4096, rms_norm_eps=1e-5
    ),
    "llama-3.1-8b": DecoderConfig(
        128256, 4096, 14336, 32, 32, 8, 128, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    ),
    "mistral-7b-v0.1": DecoderConfig(
        32000, 4096, 14336, 32, 32, 8, 128, max_position_embeddings=32768, rms_norm_eps=1e-5,
        sliding_window=4096,
    ),
    "mistral-7b-v0.3": DecoderConfig(
        32768, 4096, 14336, 32, 32, 8, 128, max_position_embeddings=32768, rms_norm_eps=1e-5,
        rope_theta=1e6,
    ),
    "qwen2.5-0.5b": DecoderConfig(
        151936, 896, 4864, 24, 14, 2, 64, max_position_embeddings=32768, rope_theta=1e6,
        qkv_bias=True, tie_word_embeddings=True,
    ),
    "qwen2.5-7b": DecoderConfig(
        152064, 3584, 18944, 28, 28, 4, 128, max_position_embeddings=131072, rope_theta=1e6,
        qkv_bias=True,
    ),
    "qwen3-8b": DecoderConfig(
        151936, 4096, 12288, 36, 32, 8, 128, max_position_embeddings=40960, rope_theta=1e6,
        qk_norm=True,
    ),
}  # fmt: skip

# Repositories on the hub -> what they hold.
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": "llama-2-7b",
    "meta-llama/Llama-2-13b-hf": "llama-2-13b",
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
    "mistralai/Mistral-7B-v0.1": "mistral-7b-v0.1",
    "mistralai/Mistral-7B-v0.3": "mistral-7b-v0.3",
    "Qwen/Qwen2.5-0.5B": "qwen2.5-0.5b",
    "Qwen/Qwen2.5-7B": "qwen2.5-7b",
    "Qwen/Qwen3-8B": "qwen3-8b",
}
