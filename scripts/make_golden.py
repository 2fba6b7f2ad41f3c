"""Write tests/golden/logits.npz: logits of tiny models as Transformers on PyTorch has them.

    python scripts/make_golden.py            # needs torch; the tests only read the file

One set of random weights, rounded to float16 so that the file stays small, serves every variant:
LLaMA plain, with stretched RoPE of both kinds and with tied embeddings; Mistral with a window;
Qwen2 with biases; Qwen3 with norms of queries and keys. Logits are kept at a few of the 320
positions, the last included: short prompts cannot see mistakes in RoPE.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from tiny_llama import FAMILIES, LLAMA3_ROPE, tiny_config, tiny_tensors  # noqa: E402  # ty: ignore

LENGTH = 320
POSITIONS = [0, 1, 2, 7, 31, 64, 100, 129, 200, 255, 256, 319]
VARIANTS: dict[str, dict] = {
    "plain": {},
    "llama3": {"rope_scaling": LLAMA3_ROPE},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "tied": {"tie_word_embeddings": True},
    "mistral": FAMILIES["mistral-v0.1"],
    "qwen2": FAMILIES["qwen2"],
    "qwen3": FAMILIES["qwen3"],
}
SIZES = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2}


def main() -> None:
    """Compute the logits of every variant and write the file."""
    tokens = np.random.default_rng(21).integers(0, SIZES["vocab_size"], LENGTH)
    golden: dict[str, Any] = {}
    golden |= {"tokens": tokens.astype(np.int32), "positions": np.array(POSITIONS, np.int32)}
    for variant, changes in VARIANTS.items():
        config = tiny_config(**SIZES, **changes)
        drawn = tiny_tensors(config, seed=20).items()
        tensors = {name: tensor.astype(np.float16) for name, tensor in drawn}
        golden |= {f"tensor/{name}": tensor for name, tensor in tensors.items()}
        own = copy.deepcopy(config)  # the class writes into the tables it is given
        theirs = AutoConfig.for_model(**own, attn_implementation="eager")
        model = AutoModelForCausalLM.from_config(theirs).eval()
        state = {name: torch.tensor(t.astype(np.float32)) for name, t in tensors.items()}
        if config["tie_word_embeddings"]:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state)
        with torch.no_grad():
            logits = model(torch.tensor(tokens)[None]).logits[0].numpy()
        golden[f"config/{variant}"] = np.array(json.dumps(config))
        golden[f"logits/{variant}"] = logits[POSITIONS]
    file = ROOT / "tests" / "golden" / "logits.npz"
    file.parent.mkdir(exist_ok=True)
    np.savez_compressed(file, **golden)
    print(f"{file}: {file.stat().st_size} bytes, {', '.join(VARIANTS)}")


if __name__ == "__main__":
    main()
