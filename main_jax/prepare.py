"""Before step 1: the user's files are read, checked and brought into the pair table.

Nothing leaves the table silently: a row that cannot be used keeps its `drop_reason` (`empty_instruction`,
`empty_response`, `too_long`), and above `data.max_drop_share` the run refuses to go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath

from main_jax import pairs
from main_jax.errors import UserError
from main_jax.prompts import Direction, Prompt
from main_jax.run import Run, derive_seed
from main_jax.score import hard_drop


def prepare(run: Run, out: epath.Path) -> dict[str, int]:
    """Writes the tables `seed`, `validation` (held-out seed pairs) and `responses`, and `example.txt`."""
    data = run.config.data
    prompt = run.prompt_with(run.config.prompt.excess_length_strategy)
    seed_path, responses_path = run.input_path("seed"), run.input_path("responses")
    seed = pairs.read_pairs(seed_path)
    responses = pairs.read_responses(responses_path)
    _mark(seed, seed_path, prompt, tuple(Direction))
    limit = data.max_drop_share
    counts = _check_drops("seed", seed_path, [row["drop_reason"] for row in seed], limit)
    usable = [row for row in seed if not row["drop_reason"]]
    held_out = _held_out(usable, data.validation_share, run.config.seed)
    first = next((row for row in usable if row["id"] not in held_out), None)
    if first is None:
        raise UserError("data.validation_share leaves no seed pair to train on")

    def marked(chunk: Sequence[dict], advance: Callable[[int], None]) -> list[dict]:
        # The instruction is yet to be written, so a response can only be too long by itself.
        _mark(chunk, responses_path, prompt, (Direction.FORWARD,))
        return _in_columns(chunk, "augmented")

    chunk_rows = run.config.runtime.chunk_rows
    try:
        written = pairs.map_chunks(responses, out / "data" / "responses", chunk_rows, marked)
        counts |= _check_drops("responses", responses_path, written.column("drop_reason"), limit)
    except UserError:
        # What nobody can use is not to be set aside later. (Other processes may still be writing there.)
        if jax.process_count() == 1 and (out / "data").exists():
            (out / "data").rmtree()
        raise
    tables = {
        "seed": [row for row in seed if row["id"] not in held_out],
        "validation": [row for row in usable if row["id"] in held_out],
    }
    for name, rows in tables.items():
        rows = _in_columns(rows, "seed")
        pairs.map_chunks(rows, out / "data" / name, chunk_rows, lambda chunk, advance: list(chunk))
    shown = [prompt.show(d, pairs.joined_instruction(first), first["response"]) for d in Direction]
    pairs.write_text(out / "example.txt", "\n\n".join(shown) + "\n")
    return counts | {"validation_pairs": len(tables["validation"])}


def _in_columns(rows: Sequence[dict], origin: str) -> list[dict]:
    """The rows with the columns of the pair table alone."""
    of_all = {"origin": origin, "round": 0}
    return [{name: row.get(name) for name in pairs.COLUMNS} | of_all for row in rows]


def _mark(
    rows: Sequence[dict], path: str, prompt: Prompt, directions: tuple[Direction, ...]
) -> None:
    """Sets `drop_reason` and `truncated` of every row."""
    instructions = prompt.encode_all([pairs.joined_instruction(r) for r in rows])
    responses = prompt.encode_all([r.get("response") or "" for r in rows])
    for row, instruction, response in zip(rows, instructions, responses, strict=True):
        both = len(directions) > 1
        empty = hard_drop(row if both else row | {"instruction": "to be written"})
        try:
            rendered = [prompt.render(d, instruction, response) for d in directions]
        except UserError as error:
            raise UserError(f"{path}, row {row['row_number']}: {error}") from None
        reasons = [empty, *(r.drop_reason for r in rendered)]
        row["drop_reason"] = next((r for r in reasons if r), None)
        row["truncated"] = any(r.truncated for r in rendered)


def _check_drops(
    name: str, path: str, drop_reasons: Sequence[str | None], limit: float
) -> dict[str, int]:
    """Counts by reason, from those of all rows. Raises UserError when too much, or all, was dropped."""
    reasons = Counter(reason for reason in drop_reasons if reason)
    listed = ", ".join(f"{reason} {n:,}" for reason, n in sorted(reasons.items()))
    dropped = sum(reasons.values())
    if dropped == len(drop_reasons):
        raise UserError(f"{path}: no usable row is left of {len(drop_reasons):,} ({listed})")
    if dropped > limit * len(drop_reasons):
        raise UserError(
            f"{path}: {dropped:,} of {len(drop_reasons):,} rows cannot be used ({listed}), more than "
            f"data.max_drop_share {limit:g} allows"
        )
    return {name: len(drop_reasons) - dropped} | {
        f"{name}_{r}": n for r, n in sorted(reasons.items())
    }


def _held_out(rows: Sequence[dict], share: float, seed: int) -> set[str]:
    """Ids of about `share` of the rows; all copies of a pair go together, or training would see them."""
    copies: dict[tuple, list[str]] = {}
    for row in rows:
        key = (pairs.joined_instruction(row), row["response"])
        copies.setdefault(key, []).append(row["id"])
    groups = list(copies.values())
    order = np.random.default_rng(derive_seed(seed, "validation")).permutation(len(groups))
    return {row_id for i in order[: int(share * len(groups) + 0.5)] for row_id in groups[i]}
