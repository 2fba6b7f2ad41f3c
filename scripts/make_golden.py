"""Write tests/golden/llama_logits.npz: logits of tiny LLaMAs as Transformers on PyTorch has them.

    python scripts/make_golden.py            # needs torch; the tests only read the file

One set of random weights, rounded to float16 so that the file stays small, serves every variant:
plain, stretched RoPE of both kinds, and tied embeddings. Logits are kept at a few of the 320
positions, the last included: short prompts cannot see mistakes in RoPE.
"""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from tiny_llama import tiny_config, tiny_tensors  # noqa: E402  # ty: ignore

LENGTH = 320
POSITIONS = [0, 1, 2, 7, 31, 64, 100, 129, 200, 255, 256, 319]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict] = {
    "plain": {},
    "llama3": {"rope_scaling": LLAMA3},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "tied": {"tie_word_embeddings": True},
}
SIZES = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2}


def main() -> None:
    """Compute the logits of every variant and write the file."""
    tensors = {
        name: tensor.astype(np.float16)
        for name, tensor in tiny_tensors(tiny_config(**SIZES), seed=20).items()
    }
    tokens = np.random.default_rng(21).integers(0, SIZES["vocab_size"], LENGTH)
    golden = {f"tensor/{name}": tensor for name, tensor in tensors.items()}
    golden |= {"tokens": tokens.astype(np.int32), "positions": np.array(POSITIONS, np.int32)}
    for variant, changes in VARIANTS.items():
        config = tiny_config(**SIZES, **changes)
        theirs = copy.deepcopy(config)  # LlamaConfig writes into the tables it is given
        theirs["attn_implementation"] = "eager"
        model = LlamaForCausalLM(LlamaConfig(**theirs)).eval()
        state = {name: torch.tensor(t.astype(np.float32)) for name, t in tensors.items()}
        if config["tie_word_embeddings"]:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state)
        with torch.no_grad():
            logits = model(torch.tensor(tokens)[None]).logits[0].numpy()
        golden[f"config/{variant}"] = np.array(json.dumps(config))
        golden[f"logits/{variant}"] = logits[POSITIONS]
    file = ROOT / "tests" / "golden" / "llama_logits.npz"
    file.parent.mkdir(exist_ok=True)
    np.savez_compressed(file, **golden)
    print(f"{file}: {file.stat().st_size} bytes, {', '.join(VARIANTS)}")


if __name__ == "__main__":
    main()
