"""A Hugging Face config.json as a `DecoderConfig`, and back: `from_hf(mapping)`, `to_hf(config)`.

Reading is strict. What a file leaves out is what Transformers assumes for that family. A field that
would change the result is either honoured or, where its value asks for something else, refused by a
one-line `ValueError` that names it. `IGNORED_FIELDS` lists the rest that Transformers knows, with
the reason why it cannot change the result; what Transformers does not know either is ignored too.
What differs between model families is data: one row of `FAMILIES` each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from main_jax.lm.arch import DecoderConfig, RopeScaling, positive


@dataclass(frozen=True)
class Family:
    """How checkpoints of one `model_type` read.

    architecture: the class that Transformers loads.
    window: whether a `sliding_window` counts: never, always, or where `use_sliding_window` is set.
    defaults: what an absent field means, where families differ.
    """

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    window: Literal["never", "always", "switched"] = "never"
    defaults: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = {
    "llama": Family("LlamaForCausalLM", defaults={"max_position_embeddings": 2048}),
    "mistral": Family(
        "MistralForCausalLM",
        window="always",
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        qkv_bias=True,
        window="switched",
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
        },
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qk_norm=True,
        window="switched",
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
        },
    ),
}

# Fields that change the result, with the only values that are computed here, the usual one last.
HONOURED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "swish", "silu"),
    "attention_bias": (None, False),  # it would also put a bias on the output projection
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
    "is_encoder_decoder": (None, False),
    "is_causal": (None, True),
    "per_layer_config": (None,),
    "fusion_config": (None,),
    "transformers_weights": (None, "model.safetensors"),
}

IGNORED_FIELDS = {
    "attention_dropout": "only trains; we train without dropout",
    "bos_token_id": "text, not computation: the tokenizer's own is used",
    "chunk_size_feed_forward": "no class of these families reads it",
    "dtype": "the tensors say it themselves (as is torch_dtype)",
    "eos_token_id": "ends a generated text (`hf.stop_ids`), enters no logit",
    "id2label": "names of a classifier's outputs",
    "initializer_range": "only draws new weights",
    "label2id": "names of a classifier's outputs",
    "output_attentions": "what Transformers returns, not what it computes",
    "output_hidden_states": "what Transformers returns, not what it computes",
    "pad_token_id": "padding is known by its length; its row of the embedding is read by no token",
    "pretraining_tp": "how LLaMA's authors split a matrix product; not read any more",
    "problem_type": "a classifier's loss",
    "return_dict": "what Transformers returns, not what it computes",
    "transformers_version": "who wrote the file",
    "use_cache": "speed",
    "_name_or_path": "where the file came from",
}


def from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Read a parsed config.json; `ValueError` names the field that cannot be honoured."""
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise ValueError(f"model_type: {model_type!r} is not supported (only {supported})")
    family = FAMILIES[model_type]
    architectures = hf.get("architectures") or [family.architecture]
    if not isinstance(architectures, list) or family.architecture not in architectures:
        raise ValueError(
            f"architectures: {architectures!r} is not supported (only {family.architecture})"
        )
    if "AutoModelForCausalLM" in str(hf.get("auto_map")):
        raise ValueError("auto_map: the model brings its own code, which is never run")
    for name, allowed in HONOURED_VALUES.items():
        if hf.get(name) not in allowed:
            raise ValueError(f"{name}: {hf[name]!r} is not supported (only {allowed[-1]!r})")

    def get(name: str, default: Any) -> Any:
        """Absent: the family's default, else `default`; null: `default`."""
        value = hf.get(name, family.defaults.get(name))
        return default if value is None else value

    names = ("vocab_size", "hidden_size", "intermediate_size")
    sizes = {name: positive(name, hf.get(name)) for name in names}
    heads = positive("num_attention_heads", hf.get("num_attention_heads"))
    layers = positive("num_hidden_layers", hf.get("num_hidden_layers"))
    positions = positive("max_position_embeddings", get("max_position_embeddings", None))
    theta, scaling = _read_rope(hf, positions)
    return DecoderConfig(
        **sizes,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=positive("num_key_value_heads", get("num_key_value_heads", heads)),
        head_dim=get("head_dim", sizes["hidden_size"] // heads),
        max_position_embeddings=positions,
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=_read_window(hf, family, layers),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tie_word_embeddings=get("tie_word_embeddings", False),
        rms_norm_eps=positive("rms_norm_eps", get("rms_norm_eps", 1e-6), float),
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write the fields of a config.json, RoPE in both spellings; the inverse of `from_hf`.

    The family is the first that has these features (Mistral without a window is a LLaMA).
    `ValueError` where there is none.
    """
    window = config.sliding_window
    features = (config.qkv_bias, config.qk_norm)
    fitting = (
        (model_type, family)
        for model_type, family in FAMILIES.items()
        if features == (family.qkv_bias, family.qk_norm)
        and (window is None or family.window != "never")
    )
    model_type, family = next(fitting, (None, None))
    if family is None:
        described = f"qkv_bias={config.qkv_bias} and qk_norm={config.qk_norm}"
        raise ValueError(f"no supported model_type ({', '.join(FAMILIES)}) has {described}")
    scaling = _write_scaling(config.rope_scaling)
    windows: dict[str, Any] = {}
    if family.window == "always":
        windows = {"sliding_window": window}
    elif family.window == "switched":
        # From layer 0 on all layers have a window, or none has one.
        windows = {"use_sliding_window": window is not None, "sliding_window": window}
        windows["max_window_layers"] = 0 if window else config.num_layers
    return {
        "architectures": [family.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or _DEFAULT_ROPE)},
        **windows,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
    }


_LAYER_TYPES = ("full_attention", "sliding_attention")


def _read_window(hf: Mapping[str, Any], family: Family, layers: int) -> int | None:
    """Read the window of all layers; one in some layers only is refused."""
    window = hf.get("sliding_window", family.defaults.get("sliding_window"))
    if family.window == "never" and window is not None:
        raise ValueError(f"sliding_window: {window!r} has no meaning in a {hf['model_type']} model")
    first = 0
    if family.window == "switched":
        switch, first = hf.get("use_sliding_window"), hf.get("max_window_layers", 28)
        if switch not in (None, True, False):
            raise ValueError(f"use_sliding_window: must be true or false, found {switch!r}")
        if not isinstance(first, int):
            raise ValueError(f"max_window_layers: must be a whole number, found {first!r}")
        window = window if switch else None
    derived = [window is not None and layer >= first for layer in range(layers)]
    kinds = hf.get("layer_types") or [_LAYER_TYPES[d] for d in derived]
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in _LAYER_TYPES for kind in kinds)
    ):
        raise ValueError(f"layer_types: expected {layers} of {', '.join(_LAYER_TYPES)}")
    if len(set(kinds)) > 1:
        raise ValueError(
            "layer_types, max_window_layers: a window in some layers only is not supported"
        )
    if kinds[0] == "full_attention":
        if family.window == "always" and window is not None:
            raise ValueError(f"layer_types: {kinds[0]} contradicts sliding_window {window!r}")
        return None
    if window is None:
        raise ValueError(f"layer_types: {kinds[0]} needs a sliding_window")
    return positive("sliding_window", window)


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
    return positive("rope_theta", thetas[0], float), (scalings[0] if scalings else None)


def _read_scaling(
    where: str, table: Mapping[str, Any], hf: Mapping[str, Any], positions: int
) -> RopeScaling | None:
    kind = table.get("rope_type", table.get("type", "default"))
    if not isinstance(kind, str) or kind not in _SCALING_FIELDS:
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
        positive(f"{where}: {name}", value, int if name.startswith("original") else float)
    return RopeScaling(kind, **values) if values else None


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    names = _SCALING_FIELDS[scaling.kind]
    return {"rope_type": scaling.kind} | {name: getattr(scaling, name) for name in names}
