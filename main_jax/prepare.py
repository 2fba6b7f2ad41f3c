"""Before step 1: the user's files are read, checked and brought into the pair table.

Nothing leaves the table silently: a row that cannot be used keeps its `drop_reason` (`empty_instruction`,
`empty_response`, `too_long`, or one of `data/clean.py`), and above `data.max_drop_share` the run refuses
to go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath

from main_jax import pairs
from main_jax.config import Clean
from main_jax.data import clean
from main_jax.data.reading import read_pairs, read_responses
from main_jax.data.sources import Source, open_source
from main_jax.errors import UserError
from main_jax.prompts import Direction, Prompt
from main_jax.run import Run, derive_seed
from main_jax.score import hard_drop


def prepare(run: Run, out: epath.Path) -> dict[str, int]:
    """Writes the tables `seed`, `validation` (held-out seed pairs) and `responses`, and `example.txt`."""
    data = run.config.data
    prompt = run.prompt_with(run.config.prompt.excess_length_strategy)
    seed = read_pairs(run.sources["seed"])
    responses = read_responses(run.sources["responses"])
    _mark(seed, prompt, tuple(Direction))
    counts = {
        f"{name}_skipped_{reason}": n  # by the rules of an extraction
        for name, source in run.sources.items()
        for reason, n in sorted(source.skipped.items())
    }
    contaminated, unwanted = _rules(run.config.clean)
    for row in seed:
        if not row["drop_reason"] and contaminated(
            f"{pairs.joined_instruction(row)} {row['response']}"
        ):
            row["drop_reason"] = "contaminated"
    limit = data.max_drop_share
    counts |= _check_drops("seed", run.sources["seed"], [row["drop_reason"] for row in seed], limit)
    usable = [row for row in seed if not row["drop_reason"]]
    held_out = _held_out(usable, data.validation_share, run.config.seed)
    first = next((row for row in usable if row["id"] not in held_out), None)
    if first is None:
        raise UserError("data.validation_share leaves no seed pair to train on")

    if run.config.clean.duplicates or run.config.clean.near_duplicates:
        # Which is the first of several takes all of them: every process finds the same.
        texts = (row["response"] or "" for row in responses)
        for place, reason in clean.duplicates(texts, run.config.clean.near_duplicates).items():
            responses[place]["drop_reason"] = reason

    def marked(chunk: Sequence[dict], advance: Callable[[int], None]) -> list[dict]:
        # The instruction is yet to be written, so a response can only be too long by itself.
        _mark(chunk, prompt, (Direction.FORWARD,))
        for row in chunk:
            row["drop_reason"] = row["drop_reason"] or unwanted(row["response"])
        return _in_columns(chunk, "augmented")

    chunk_rows = run.config.runtime.chunk_rows
    try:
        written = pairs.map_chunks(responses, out / "data" / "responses", chunk_rows, marked)
        counts |= _check_drops(
            "responses", run.sources["responses"], written.column("drop_reason"), limit
        )
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


def _rules(settings: Clean) -> tuple[Callable[[str], bool], Callable[[str], str | None]]:
    """(whether a text is contaminated, why a response is unwanted). Raises UserError."""
    key = "clean.decontaminate"
    tests = (
        value
        for path in settings.decontaminate
        for row in open_source(path, key)
        for value in row.values.values()
        if isinstance(value, str)
    )
    contaminated = clean.contamination(tests, settings.decontaminate_ngram)
    rules = {"contaminated": contaminated}
    if settings.drop_patterns:
        rules["pattern"] = clean.patterns(settings.drop_patterns, "clean.drop_patterns")
    if settings.language is not None:
        rules["language"] = clean.other_language(settings.language, "clean.language")

    def unwanted(text: str) -> str | None:
        return next((reason for reason, holds in rules.items() if holds(text)), None)

    return contaminated, unwanted


def _in_columns(rows: Sequence[dict], origin: str) -> list[dict]:
    """The rows with the columns of the pair table alone."""
    of_all = {"origin": origin, "round": 0}
    return [{name: row.get(name) for name in pairs.COLUMNS} | of_all for row in rows]


def _mark(rows: Sequence[dict], prompt: Prompt, directions: tuple[Direction, ...]) -> None:
    """Sets `drop_reason` and `truncated` of every row."""
    instructions = prompt.encode_all([pairs.joined_instruction(r) for r in rows])
    responses = prompt.encode_all([r.get("response") or "" for r in rows])
    for row, instruction, response in zip(rows, instructions, responses, strict=True):
        both = len(directions) > 1
        empty = hard_drop(row if both else row | {"instruction": "to be written"})
        try:
            rendered = [prompt.render(d, instruction, response) for d in directions]
        except UserError as error:
            raise UserError(f"{row['source']}, row {row['row_number']}: {error}") from None
        reasons = [empty, *(r.drop_reason for r in rendered)]
        row["drop_reason"] = next((r for r in reasons if r), None)
        row["truncated"] = any(r.truncated for r in rendered)


def _check_drops(
    name: str, source: Source, drop_reasons: Sequence[str | None], limit: float
) -> dict[str, int]:
    """Counts by reason, from those of all rows. Raises UserError when too much, or all, was dropped."""
    reasons = Counter(reason for reason in drop_reasons if reason)
    listed = ", ".join(f"{reason} {n:,}" for reason, n in sorted(reasons.items()))
    dropped = sum(reasons.values())
    if dropped == len(drop_reasons):
        raise UserError(f"{source}: no usable row is left of {len(drop_reasons):,} ({listed})")
    if dropped > limit * len(drop_reasons):
        raise UserError(
            f"{source}: {dropped:,} of {len(drop_reasons):,} rows cannot be used ({listed}), more than "
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
