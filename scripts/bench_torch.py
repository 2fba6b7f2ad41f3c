"""What a user would write in PyTorch instead, for `bench.py`: scoring and training, several ways.

Texts are lists of (tokens, is_target). All but the padded script apply the head to targets alone, and, since
padding is on the right, need no mask: PyTorch then takes its fast attention.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers

BUDGETS = (1024, 2048, 4096)
PADDED_BATCH = 8
Text = tuple[np.ndarray, np.ndarray]


def load(path: str) -> Any:
    """Open a checkpoint on the CPU, in float32; PyTorch takes the threads that the process may have."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="sdpa"
    )


# ----------------------------------------------------------------------------------------- scoring


def score_runs(path: str, kinds: Sequence[Sequence[Text]]) -> dict[str, Any]:
    """Name the ways to score; each gives the sum of every text, kind after kind."""
    model = load(path).eval()

    def run(batches: Any, measure: Any) -> list[float]:
        sums: list[float] = []
        with torch.inference_mode():
            for texts in kinds:
                found = np.zeros(len(texts))
                for indices in batches([len(tokens) for tokens, _ in texts]):
                    found[indices] = measure(model, [texts[i] for i in indices])
                sums += found.tolist()
        return sums

    runs = {
        "padded": partial(run, partial(in_order, PADDED_BATCH), all_logits),
        "sorted": partial(run, partial(by_length, PADDED_BATCH), all_logits),
        "batch 1": partial(run, partial(in_order, 1), target_logits),
    }
    for budget in BUDGETS:
        runs[f"budget {budget}"] = partial(run, partial(by_budget, budget), target_logits)
    return runs


def in_order(size: int, lengths: Sequence[int]) -> Iterator[list[int]]:
    """Cut the texts into batches as they come."""
    for i in range(0, len(lengths), size):
        yield list(range(i, min(i + size, len(lengths))))


def by_length(size: int, lengths: Sequence[int]) -> Iterator[list[int]]:
    """Cut the texts into batches, sorted by length."""
    order = np.argsort(lengths, kind="stable")
    for i in range(0, len(lengths), size):
        yield order[i : i + size].tolist()


def by_budget(budget: int, lengths: Sequence[int]) -> Iterator[list[int]]:
    """Cut the texts into batches of at most so many padded tokens, sorted by length."""
    batch: list[int] = []
    for i in np.argsort(lengths, kind="stable").tolist():
        if batch and (len(batch) + 1) * lengths[i] > budget:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def pad(texts: Sequence[Text]) -> tuple[Any, Any, Any]:
    """Stack texts, padded on the right: tokens, which are targets, which are there."""
    length = max(len(tokens) for tokens, _ in texts)
    tokens = torch.zeros((len(texts), length), dtype=torch.long)
    is_target, there = torch.zeros((2, len(texts), length), dtype=torch.bool)
    for row, (ids, marks) in enumerate(texts):
        tokens[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        is_target[row, : len(ids)] = torch.from_numpy(marks)
        there[row, : len(ids)] = True
    return tokens, is_target, there


def all_logits(model: Any, texts: Sequence[Text]) -> np.ndarray:
    """Sum the NLL of each text's targets as scripts do: with a mask, and from all logits."""
    tokens, is_target, there = pad(texts)
    logits = model(tokens, attention_mask=there.long(), use_cache=False).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    return (nll.view(len(texts), -1) * is_target[:, 1:]).sum(1).numpy()


def target_logits(model: Any, texts: Sequence[Text]) -> np.ndarray:
    """Sum the NLL of each text's targets, the head applied to nothing else."""
    tokens, is_target, _ = pad(texts)
    hidden = model.model(tokens, use_cache=False).last_hidden_state
    nll = target_nll(model, hidden, tokens, is_target)
    rows = is_target[:, 1:].nonzero()[:, 0]
    return torch.zeros(len(texts)).index_add_(0, rows, nll).numpy()


def target_nll(model: Any, hidden: Any, tokens: Any, is_target: Any) -> Any:
    """Give the NLL of every target, one after another, from hidden states `[B, T, D]`."""
    counted = is_target[:, 1:]
    logits = model.lm_head(hidden[:, :-1][counted])
    return torch.nn.functional.cross_entropy(logits, tokens[:, 1:][counted], reduction="none")


# ---------------------------------------------------------------------------------------- training


def train_runs(
    path: str, steps: Sequence[Sequence[Text]], row: int, settings: dict[str, float], compiled: bool
) -> dict[str, Any]:
    """Name the ways to train on the texts of some steps; each gives the mean loss of every step.

    Each way has a model and an optimiser of its own, and goes on from where its last run ended.
    """
    runs = {
        "packed": partial(_train, _Training(path, settings), steps, partial(packed, row)),
        "batch 1": partial(_train, _Training(path, settings), steps, one_by_one),
    }
    if compiled:
        training = _Training(path, settings)
        training.model.model.compile(dynamic=True)
        runs["packed, compiled"] = partial(_train, training, steps, partial(packed, row))
    return runs


class _Training:
    """A model with AdamW as ours is: decay on matrices only."""

    def __init__(self, path: str, settings: dict[str, float]):
        self.model = load(path).train()
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim == 1]
        decays = [settings["weight_decay"], 0.0]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": params, "weight_decay": decay}
                for params, decay in zip((matrices, others), decays, strict=True)
            ],
            lr=settings["learning_rate"],
            betas=(settings["beta1"], settings["beta2"]),
            eps=settings["epsilon"],
            fused=True,
        )
        self.max_grad_norm = settings["max_grad_norm"]


def _train(training: _Training, steps: Sequence[Sequence[Text]], losses: Any) -> list[float]:
    found = []
    for texts in steps:
        total = 0.0
        for loss in losses(training.model, texts):
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), training.max_grad_norm)
        training.optimizer.step()
        training.optimizer.zero_grad()
        found.append(total)
    return found


def one_by_one(model: Any, texts: Sequence[Text]) -> Iterator[Any]:
    """Yield each text's share of the mean loss."""
    for text in texts:
        tokens, is_target, _ = pad([text])
        hidden = model.model(tokens, use_cache=False).last_hidden_state
        yield target_nll(model, hidden, tokens, is_target).mean() / len(texts)


def packed(row: int, model: Any, texts: Sequence[Text]) -> Iterator[Any]:
    """Yield the share of each row of texts, one after another, of at most `row` tokens.

    Transformers finds the texts by their positions, and makes a dense mask of them.
    """
    rows: list[list[Text]] = []
    for text in sorted(texts, key=lambda text: -len(text[0])):
        fits = (r for r in rows if sum(len(t) for t, _ in r) + len(text[0]) <= row)
        if (found := next(fits, None)) is None:
            rows.append([text])
        else:
            found.append(text)
    for members in rows:
        marks = [np.concatenate([[False], is_target[1:]]) for _, is_target in members]
        joined = np.concatenate([tokens for tokens, _ in members]), np.concatenate(marks)
        tokens, is_target, _ = pad([joined])
        positions = torch.cat([torch.arange(len(t)) for t, _ in members])[None]
        counts = [int(m.sum()) for m in marks]
        shares = torch.repeat_interleave(1 / torch.tensor(counts), torch.tensor(counts))
        hidden = model.model(tokens, position_ids=positions, use_cache=False).last_hidden_state
        nll = target_nll(model, hidden, tokens, is_target)
        yield (nll * shares).sum() / len(texts)
