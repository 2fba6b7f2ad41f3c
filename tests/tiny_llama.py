"""Make a tiny random LLaMA folder in Hugging Face's format, tokenizer included, without torch.

    path = make_tiny_llama(tmp_path / "model", seed=1, num_hidden_layers=2)

All dimensions differ (heads * head_dim != hidden != ffn, kv heads != heads), so that no
transposition can hide, and the tokenizer has fewer tokens than the model has rows. Like LLaMA's,
it puts <s> before a text on its own. Names and layouts are written out here once more, on purpose:
nothing of main_jax is used.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ["<pad>", "<s>", "</s>"]
CORPUS = [
    "Write a short answer to the question below.",
    "What is the colour of the sky on a clear day? The sky is blue on a clear day.",
    "List three numbers and add them: 1, 2 and 3 make 6.",
    "Translate the sentence, then explain why the answer is right.",
    "The instruction describes a task; the response completes the task.",
]


def tiny_config(vocab_size: int = 307, **overrides) -> dict:
    """Give the config.json of a tiny LLaMA."""
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
    return tensors


def tiny_tokenizer(size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of at most `size` tokens (at least 259)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
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
    tiny_tokenizer(vocab_size - 7).save(str(path / "tokenizer.json"))
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
