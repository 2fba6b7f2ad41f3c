"""Step 3a: the bidirectional scorer. Every pair gets four sums and two counts.

    forward_nll_sum       of R given I, by the forward model      } over forward_tokens
    response_nll_sum      of R alone,   by the forward model      }
    reverse_nll_sum       of I given R, by the reverse model      } over reverse_tokens
    instruction_nll_sum   of I alone,   by the reverse model      }

All sums are nats over the target and its end token. Examples with and without their condition are packed
into batches of one shape, and a batch of each direction goes through one jitted function,
`lm.loss.example_nlls`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from main_jax.errors import UserError
from main_jax.lm.batches import Example, pack_table
from main_jax.lm.loss import example_nlls
from main_jax.lm.sharding import place_rows, row_shards
from main_jax.models import LanguageModel
from main_jax.pairs import joined_instruction
from main_jax.prompts import Direction, Prompt

if TYPE_CHECKING:
    from main_jax.self_curation import Curator


class Side(NamedTuple):
    """A model and the examples that it scores, of at most `limit` tokens."""

    model: LanguageModel
    examples: Sequence[Example]
    limit: int


def nll_sums(sides: Sequence[Side], budget: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """([N] float64 sums in nats, [N] int counts) of the N examples of each side, in their order.

    A program takes a batch of `budget` tokens, padding included, of each side. While the devices are at one,
    the host packs the next.
    """
    found = [(np.zeros(len(s.examples)), np.zeros(len(s.examples), int)) for s in sides]
    running: list = []

    def collect() -> None:
        for (sums, counts), indices, result in running:
            batch_sums, batch_counts = jax.device_get(result)
            sums[indices] = batch_sums[: len(indices)]
            counts[indices] = batch_counts[: len(indices)]

    streams = (pack_table(s.examples, budget, s.limit, row_shards()) for s in sides)
    for batches in zip_longest(*streams):
        here = [i for i, batch in enumerate(batches) if batch]
        results = example_nlls(
            tuple(sides[i].model.decoder for i in here),
            [sides[i].model.params for i in here],
            [place_rows(batches[i][1]) for i in here],
        )
        collect()
        running = [(found[i], batches[i][0], r) for i, r in zip(here, results, strict=True)]
    collect()
    return found


def hard_drop(row: dict) -> str | None:
    """Why a row cannot be scored whatever the model, or None."""
    if row.get("drop_reason"):
        return row["drop_reason"]
    if not joined_instruction(row).strip():
        return "empty_instruction"
    return None if (row.get("response") or "").strip() else "empty_response"


def score_rows(
    rows: Sequence[dict],
    forward: tuple[LanguageModel, Prompt],
    reverse: tuple[LanguageModel, Prompt],
    budget: int,
    curator: Curator | None = None,
) -> list[dict]:
    """The rows with their NLLs, counts, `keep`, `drop_reason` and `truncated`; same order.

    With a `curator` also with the forward model's `rating` and whether it was parsed.

    A row that is empty or does not fit in both directions keeps null NLLs, `keep = false` and its
    reason.
    """
    scored = [row | {"drop_reason": hard_drop(row)} for row in rows]
    sides = {Direction.FORWARD: forward, Direction.REVERSE: reverse}
    examples: dict[Direction, list] = {d: [] for d in Direction}
    members = []
    texts = [text for row in rows for text in (joined_instruction(row), row.get("response") or "")]
    tokens = {d: prompt.encode_all(texts) for d, (_, prompt) in sides.items()}
    for i, row in enumerate(scored):
        if row["drop_reason"]:
            continue
        try:
            rendered = {
                d: prompt.render(d, tokens[d][2 * i], tokens[d][2 * i + 1])
                for d, (_, prompt) in sides.items()
            }
        except UserError as error:  # excess_length_strategy: raise
            place = f"row {row['row_number']}" if "row_number" in row else f"pair {row['id']}"
            raise UserError(f"{row.get('source')}, {place}: {error}") from None
        row["drop_reason"] = next((r.drop_reason for r in rendered.values() if r.drop_reason), None)
        if row["drop_reason"]:
            continue
        row["truncated"] = any([row.get("truncated"), *(r.truncated for r in rendered.values())])
        members.append(row)
        for d, r in rendered.items():
            examples[d] += [r.example, r.unconditional]
    models = [Side(model, examples[d], prompt.max_length) for d, (model, prompt) in sides.items()]
    for d, (sums, counts) in zip(sides, nll_sums(models, budget), strict=True):
        _, alone = d.sides("instruction", "response")
        for j, row in enumerate(members):
            row[f"{d}_nll_sum"], row[f"{d}_tokens"] = float(sums[2 * j]), int(counts[2 * j])
            row[f"{alone}_nll_sum"] = float(sums[2 * j + 1])
    if curator is not None:
        ratings = curator.rate(scored, forward[0], budget)
        for row, (rating, parsed) in zip(scored, ratings, strict=True):
            row |= {"rating": rating, "rating_parsed": parsed}
    for row in scored:
        row["keep"] = row["drop_reason"] is None
        row["truncated"] = bool(row.get("truncated"))
    return scored
