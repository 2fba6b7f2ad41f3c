"""What `main-jax score` must give, worked out once more with transformers on PyTorch.

Nothing of main_jax is used: rows are rendered, tokenised and summed here, one at a time, unpacked. The
weights come from integer arithmetic, so that the golden file need not carry them.
"""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tiny_llama import LLAMA3_ROPE, make_tiny_llama, tiny_config, tiny_tensors

SIZES = {"vocab_size": 307, "num_hidden_layers": 2, "max_position_embeddings": 512}
REVERSE = {"tie_word_embeddings": True, "rope_scaling": LLAMA3_ROPE}  # of another make
SUMS = ("forward_nll_sum", "response_nll_sum", "reverse_nll_sum", "instruction_nll_sum")

ROWS = [
    {"id": "short", "instruction": "What is the colour of the sky?", "response": "Blue."},
    {"id": "input", "instruction": "Add the numbers.", "input": "1, 2 and 3", "response": "They make 6."},
    {"id": "unicode", "instruction": "Übersetze: שלום 🙂👍🏽", "response": "naïve cafe\u0301 — 中文字"},
    {"id": "lines", "instruction": "Two\n\nlines\r\n", "response": "\n\tfirst\n\n\nsecond  \n"},
    {"id": "letter", "instruction": "a", "response": "b"},
    {"id": "special", "instruction": "What is </s>?", "response": "<s> and </s> are names"},
    {"id": "long", "instruction": "List three numbers. " * 9, "response": "The answer is right. " * 20},
    {"id": "same", "instruction": "The task completes the task", "response": "The task completes the task"},
]  # fmt: skip

# The fixed texts of the two templates, written out once more.
TEMPLATES = {
    "none": {"forward": ("", ""), "reverse": ("", "")},
    "plain": {
        "forward": ("### Instruction:\n", "\n\n### Response:\n"),
        "reverse": (
            "Write the instruction that the following response answers.\n\n### Response:\n",
            "\n\n### Instruction:\n",
        ),
    },
}


def exact_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of `config` with values that any version of any library reproduces."""
    tensors = {}
    for name, drawn in tiny_tensors(config).items():
        i = np.arange(drawn.size, dtype=np.uint64) + np.uint64(zlib.crc32(f"{seed}{name}".encode()))
        for shift, factor in ((33, 0xFF51AFD7ED558CCD), (29, 0xC4CEB9FE1A85EC53)):
            i = (i ^ (i >> np.uint64(shift))) * np.uint64(factor)
        uniform = ((i >> np.uint64(41)).astype(np.float32) / 2**22 - 1).reshape(drawn.shape)
        scale = 0.6 if "embed" in name else 2.5 / drawn.shape[-1] ** 0.5
        tensors[name] = uniform * np.float32(scale) if drawn.ndim > 1 else 1 + uniform / 3
    return tensors


def make_pair(folder: Path, tokenizer: dict | None = None) -> tuple[Path, Path]:
    """The golden file's two model folders."""
    forward = make_model(folder / "forward", tokenizer, seed=0)
    return forward, make_model(folder / "reverse", tokenizer, seed=1, **REVERSE)


def make_model(path: Path, tokenizer: dict | None = None, seed: int = 0, **overrides) -> Path:
    """A model folder; `tokenizer` replaces the freshly trained tokenizer.json."""
    config = tiny_config(**(SIZES | overrides))
    make_tiny_llama(path, **(SIZES | overrides))
    save_file(exact_tensors(config, seed), path / "model.safetensors", metadata={"format": "pt"})
    if tokenizer is not None:
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


def reference(forward: Path, reverse: Path, template: str, rows: list[dict]) -> list[dict]:
    """Sums in nats and counts of every row, by transformers on PyTorch."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(forward / "tokenizer.json"))
    load = AutoModelForCausalLM.from_pretrained
    models = {
        name: load(path, attn_implementation="eager").double().eval()
        for name, path in (("forward", forward), ("reverse", reverse))
    }

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    def nll(direction: str, condition: str, target: str) -> tuple[float, int]:
        before, after = TEMPLATES[template][direction]
        context = [1, *ids(before), *ids(condition), *ids(after)]
        answer = [*ids(target), 2]
        with torch.no_grad():
            logits = models[direction](torch.tensor([context + answer])).logits[0]
        log_probs = torch.log_softmax(logits, -1)[len(context) - 1 : -1]
        return -float(log_probs[torch.arange(len(answer)), answer].sum()), len(answer)

    results = []
    for row in rows:
        instruction, response = row["instruction"], row["response"]
        if row.get("input"):
            instruction += "\n\n" + row["input"]
        result = {"id": row["id"]}
        result["forward_nll_sum"], result["forward_tokens"] = nll("forward", instruction, response)
        result["response_nll_sum"], _ = nll("forward", "", response)
        result["reverse_nll_sum"], result["reverse_tokens"] = nll("reverse", response, instruction)
        result["instruction_nll_sum"], _ = nll("reverse", "", instruction)
        results.append(result)
    return results


def largest_difference(found: list[dict], expected: list[dict]) -> float:
    """The largest difference in nats per token; the ids, order and counts must be equal."""
    largest = 0.0
    for row, other in zip(found, expected, strict=True):
        for name in ("id", "forward_tokens", "reverse_tokens"):
            assert row[name] == other[name], (name, row, other)
        for name in SUMS:
            tokens = row["forward_tokens" if name in SUMS[:2] else "reverse_tokens"]
            largest = max(largest, abs(row[name] - other[name]) / tokens)
    return largest
