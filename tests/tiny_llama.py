"""Make a tiny random model folder in Hugging Face's format, tokenizer included, without torch.

    path = make_tiny_llama(tmp_path / "model", seed=1, num_hidden_layers=2)
    path = make_tiny_llama(tmp_path / "model", seed=1, **FAMILIES["qwen3"])

A LLaMA by itself; `FAMILIES` has what the config.json of every supported family says otherwise.
All dimensions differ (heads * head_dim != hidden != ffn, kv heads != heads), so that no
transposition can hide, and the tokenizer has fewer tokens than the model has rows. Like LLaMA's,
it puts <s> before a text on its own. Names and layouts are written out here once more, on purpose:
nothing of main_jax is used.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPECIAL = ["<pad>", "<s>", "</s>"]
CORPUS = [
    "Write a short answer to the question below.",
    "What is the colour of the sky on a clear day? The sky is blue on a clear day.",
    "List three numbers and add them: 1, 2 and 3 make 6.",
    "Translate the sentence, then explain why the answer is right.",
    "The instruction describes a task; the response completes the task.",
]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # so that it bites within 512 positions
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    # As in the published files: a window that is switched off, and means nothing.
    "use_sliding_window": False,
    "sliding_window": 64,
    "max_window_layers": 2,
}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
FAMILIES: dict[str, dict] = {
    "llama-2": {},
    "llama-3": {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
    "mistral-v0.1": MISTRAL | {"sliding_window": 48},
    "mistral-v0.3": MISTRAL | {"sliding_window": None, "rope_theta": 1e6},
    "qwen2": QWEN2,
    "qwen2-tied": QWEN2 | {"tie_word_embeddings": True},
    "qwen2-window": QWEN2
    | {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 0},
    "qwen3": QWEN3 | {"attention_bias": False, "sliding_window": None, "max_window_layers": 3},
}


ANY_INSTRUCTION = {
    "keep_cut": True, "min_characters": 1, "max_characters": 10**6, "max_loop_share": 1.0,
    "max_repeats": None,
}  # fmt: skip
"""`filter.hygiene` for a model that writes at random."""


def tiny_config(vocab_size: int = 307, **overrides) -> dict:
    """Give the config.json of a tiny LLaMA, or, with one of `FAMILIES`, of another model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
    } | overrides


def tiny_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw the weights of `config`, float32, large enough for logits of a few units."""
    rng = np.random.default_rng(seed)
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    n, k, h = (config[x] for x in ("num_attention_heads", "num_key_value_heads", "head_dim"))

    def matrix(rows, columns):
        return (rng.normal(size=(rows, columns)) * 1.5 / columns**0.5).astype(np.float32)

    def scale():
        return (1 + 0.3 * rng.normal(size=d)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": rng.normal(size=(v, d)).astype(np.float32),
        "model.norm.weight": scale(),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        tensors |= {
            f"{layer}.input_layernorm.weight": scale(),
            f"{layer}.self_attn.q_proj.weight": matrix(n * h, d),
            f"{layer}.self_attn.k_proj.weight": matrix(k * h, d),
            f"{layer}.self_attn.v_proj.weight": matrix(k * h, d),
            f"{layer}.self_attn.o_proj.weight": matrix(d, n * h),
            f"{layer}.post_attention_layernorm.weight": scale(),
            f"{layer}.mlp.gate_proj.weight": matrix(f, d),
            f"{layer}.mlp.up_proj.weight": matrix(f, d),
            f"{layer}.mlp.down_proj.weight": matrix(d, f),
        }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(v, d)
    # What only some families have comes from a generator of its own: the others do not change.
    rng = np.random.default_rng([seed, 1])
    for i in range(config["num_hidden_layers"]):
        attention = f"model.layers.{i}.self_attn"
        if config["model_type"] == "qwen2":
            for name, size in (("q", n * h), ("k", k * h), ("v", k * h)):
                tensors[f"{attention}.{name}_proj.bias"] = rng.normal(size=size).astype(np.float32)
        if config["model_type"] == "qwen3":
            for name in ("q_norm", "k_norm"):
                scale = 1 + 0.3 * rng.normal(size=h)
                tensors[f"{attention}.{name}.weight"] = scale.astype(np.float32)
    return tensors


QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tiny_tokenizer(size: int, model_type: str = "llama") -> Tokenizer:
    """Train a byte-level BPE tokenizer of at most `size` tokens (at least 259).

    That of a Qwen splits texts as its published ones do: in a folder with a Qwen2 model
    Transformers does so whatever the file says.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if model_type in ("qwen2", "qwen3"):
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def make_tiny_llama(path, *, seed: int = 0, vocab_size: int = 307, **config_overrides) -> Path:
    """Write config.json, model.safetensors, generation_config.json and the tokenizer's two files.

    `vocab_size` (at least 266) counts the rows of the embedding; the tokenizer has 7 tokens fewer.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = tiny_config(vocab_size, **config_overrides)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": config["eos_token_id"]})
    )
    tensors = tiny_tensors(config, seed)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer(vocab_size - 7, config["model_type"]).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "<pad>",
                "model_max_length": config["max_position_embeddings"],
                "clean_up_tokenization_spaces": False,
            }
        )
    )
    return path
