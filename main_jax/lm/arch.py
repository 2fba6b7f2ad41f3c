"""What a decoder is: `DecoderConfig`, and its translation from and to a Hugging Face config.json.

    config = DecoderConfig.from_hf(json.loads(text))
    config.num_params(), config.sizes["D"], config.rope_frequencies(), config.to_hf()

Reading is strict. A field that would change the result and is not honoured (another activation, an
unknown RoPE type, biases, ...) raises a one-line `ValueError` that names it. Fields that cannot
change it (`use_cache`, `initializer_range`, `pretraining_tp`, dropout, token ids) are ignored.
What differs between model families is data: one row of `FAMILIES` each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

RopeKind = Literal["linear", "llama3"]


@dataclass(frozen=True)
class Family:
    """How checkpoints of one `model_type` read: the class Transformers loads, and its extras."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: bool = False  # whether the config's `sliding_window` is meant


FAMILIES = {"llama": Family("LlamaForCausalLM")}

# Fields of a config.json that change the result, with the only values that are computed here.
HONOURED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "swish", "silu"),
    "attention_bias": (None, False),  # LLaMA's flag also puts a bias on the output projection
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
}


def _number(name: str, value: Any, kind: type = int) -> Any:
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
            _number(f"rope_scaling: {field.name}", getattr(self, field.name), kind)
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
                _number(field.name, value, float if field.type is float else int)
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
        frequencies = 1 / np.float32(self.rope_theta) ** exponents
        scaling = self.rope_scaling
        if scaling is None:
            return frequencies
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
        keep = np.clip((turns - low) / (high - low), 0, 1) if scaling.kind == "llama3" else 0
        return (frequencies * (keep + (1 - keep) / scaling.factor)).astype(np.float32)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "DecoderConfig":
        """Read a parsed config.json; `ValueError` names the field that cannot be honoured."""
        model_type = hf.get("model_type")
        if model_type not in FAMILIES:
            supported = ", ".join(FAMILIES)
            raise ValueError(f"model_type: {model_type!r} is not supported (only {supported})")
        family = FAMILIES[model_type]
        for name, allowed in HONOURED_VALUES.items():
            if hf.get(name) not in allowed:
                raise ValueError(f"{name}: {hf[name]!r} is not supported (only {allowed[-1]!r})")
        window = hf.get("sliding_window")
        if window is not None and not family.sliding_window:
            raise ValueError(f"sliding_window: {window!r} has no meaning in a {model_type} model")

        def get(name: str, default: Any) -> Any:
            return default if hf.get(name) is None else hf[name]

        names = ("vocab_size", "hidden_size", "intermediate_size")
        sizes = {name: _number(name, hf.get(name)) for name in names}
        heads = _number("num_attention_heads", hf.get("num_attention_heads"))
        # What a file leaves out is what Transformers' LlamaConfig assumes.
        positions = _number("max_position_embeddings", get("max_position_embeddings", 2048))
        theta, scaling = _read_rope(hf, positions)
        return cls(
            **sizes,
            num_layers=_number("num_hidden_layers", hf.get("num_hidden_layers")),
            num_heads=heads,
            num_kv_heads=_number("num_key_value_heads", get("num_key_value_heads", heads)),
            head_dim=get("head_dim", sizes["hidden_size"] // heads),
            max_position_embeddings=positions,
            rope_theta=theta,
            rope_scaling=scaling,
            sliding_window=window,
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            tie_word_embeddings=get("tie_word_embeddings", False),
            rms_norm_eps=_number("rms_norm_eps", get("rms_norm_eps", 1e-6), float),
        )

    def to_hf(self) -> dict[str, Any]:
        """Write the fields of a config.json, RoPE in both spellings; the inverse of `from_hf`.

        `ValueError` where no supported family has these features.
        """
        traits = (self.qkv_bias, self.qk_norm, self.sliding_window is not None)
        known = {(f.qkv_bias, f.qk_norm, f.sliding_window): name for name, f in FAMILIES.items()}
        if traits not in known:
            described = dict(zip(("qkv_bias", "qk_norm", "sliding_window"), traits, strict=True))
            raise ValueError(f"no supported model_type ({', '.join(FAMILIES)}) has {described}")
        model_type = known[traits]
        scaling = _write_scaling(self.rope_scaling)
        return {
            "architectures": [FAMILIES[model_type].architecture],
            "model_type": model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": self.rope_theta, **(scaling or _DEFAULT_ROPE)},
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": self.tie_word_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
        }


# --------------------------------------------------------------------- RoPE in its two spellings:
# `rope_parameters` (Transformers 5), or `rope_theta` and `rope_scaling` (before).

_DEFAULT_ROPE = {"rope_type": "default"}
_SCALING_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": tuple(field.name for field in fields(RopeScaling)[1:]),
}


def _read_rope(hf: Mapping[str, Any], positions: int) -> tuple[float, RopeScaling | None]:
    """Read theta and scaling; where they are given twice, they must agree."""
    tables = [(name, hf.get(name)) for name in ("rope_parameters", "rope_scaling") if hf.get(name)]
    thetas, scalings = [hf.get("rope_theta")], []
    for name, table in tables:
        if not isinstance(table, Mapping) or any(isinstance(v, Mapping) for v in table.values()):
            raise ValueError(f"{name}: must be a flat table, found {table!r}")
        if table.get("partial_rotary_factor") not in HONOURED_VALUES["partial_rotary_factor"]:
            factor = table["partial_rotary_factor"]
            raise ValueError(f"{name}: partial_rotary_factor {factor!r} is not supported")
        thetas.append(table.get("rope_theta"))
        scalings.append(_read_scaling(name, table, hf, positions))
    thetas = [theta for theta in thetas if theta is not None] or [10000.0]
    for name, values in (("rope_theta", thetas), ("rope_scaling", scalings or [None])):
        if any(value != values[0] for value in values):
            raise ValueError(f"{name}: given with different values, {values}")
    return _number("rope_theta", thetas[0], float), (scalings[0] if scalings else None)


def _read_scaling(
    where: str, table: Mapping[str, Any], hf: Mapping[str, Any], positions: int
) -> RopeScaling | None:
    kind = table.get("rope_type", table.get("type", "default"))
    if kind not in _SCALING_FIELDS:
        supported = ", ".join(_SCALING_FIELDS)
        raise ValueError(f"{where}: rope_type {kind!r} is not supported (only {supported})")
    values: dict[str, Any] = {name: table.get(name) for name in _SCALING_FIELDS[kind]}
    if kind == "llama3":
        # Transformers prefers the outer field where both exist, older readers the inner one.
        name = "original_max_position_embeddings"
        given = [value for value in (table.get(name), hf.get(name)) if value is not None]
        if any(value != given[0] for value in given):
            raise ValueError(f"{name}: given with different values, {given}")
        values[name] = given[0] if given else positions
    for name, value in values.items():
        _number(f"{where}: {name}", value, int if name.startswith("original") else float)
    return RopeScaling(kind, **values) if values else None


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    names = _SCALING_FIELDS[scaling.kind]
    return {"rope_type": scaling.kind} | {name: getattr(scaling, name) for name in names}
