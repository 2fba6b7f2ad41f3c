"""Before step 1: the user's files are read, checked and brought into the pair table.

Nothing leaves the table silently: a row that cannot be used keeps its `drop_reason` (`empty_instruction`,
`empty_response`, `too_long`, or one of `data/clean.py`), and above `data.max_drop_share` the run refuses
to go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from etils import epath

from main_jax import pairs, parts
from main_jax.config import Clean
from main_jax.data import clean
from main_jax.data.reading import read_pairs, read_responses, staged
from main_jax.data.sources import open_source
from main_jax.errors import UserError
from main_jax.prompts import Direction, Prompt
from main_jax.run import Run, derive_seed
from main_jax.score import hard_drop


def prepare(run: Run, out: epath.Path) -> dict[str, int]:
    """Writes the tables `seed`, `validation` (held-out seed pairs) and `responses`, and `example.txt`."""
    try:
        counts = _prepare(run, out)
    except UserError:
        # What nobody can use is not to be set aside later. (Other processes may still be writing there.)
        for name in ("read", "data") if jax.process_count() == 1 else ():
            if (out / name).exists():
                (out / name).rmtree()
        raise
    parts.drop_staged(out / "read")
    return counts


def _prepare(run: Run, out: epath.Path) -> dict[str, int]:
    data, chunk_rows = run.config.data, run.config.runtime.chunk_rows
    prompt = run.prompt_with(strict=True)
    contaminated, unwanted = _rules(run.config.clean)
    counts: dict[str, int] = {}

    def read(name: str, rows: Iterator[dict]) -> parts.Rows:
        found, skipped = staged(run.sources[name], rows, out / "read" / name, chunk_rows)
        counts.update({f"{name}_skipped_{reason}": n for reason, n in skipped.items()})
        return found

    def marked_pairs(chunk: Sequence[dict], advance: Callable[[int], None]) -> list[dict]:
        mark(chunk, prompt, list(Direction))
        for row in chunk:
            text = f"{pairs.joined_instruction(row)} {row['response']}"
            if not row["drop_reason"] and contaminated(text):
                row["drop_reason"] = "contaminated"
        return in_columns(chunk, "seed")

    rows = read("seed", read_pairs(run.sources["seed"]))
    seed = list(parts.map_chunks(rows, out / "read" / "marked", chunk_rows, marked_pairs))
    counts |= _check_drops(run, "seed", [row["drop_reason"] for row in seed])
    usable = [row for row in seed if not row["drop_reason"]]
    held_out = _held_out(usable, data.validation_share, run.config.seed)
    first = next((row for row in usable if row["id"] not in held_out), None)
    if first is None:
        raise UserError("data.validation_share leaves no seed pair to train on")

    def marked(chunk: Sequence[dict], advance: Callable[[int], None]) -> list[dict]:
        # Without its instruction a response can only be too long by itself.
        mark(chunk, prompt, (Direction.FORWARD,), asked=False)
        for row in chunk:
            row["drop_reason"] = row["drop_reason"] or unwanted(row["response"])
        advance(len(chunk))
        return in_columns(chunk, "augmented")

    rows = read("responses", _responses(run))
    written = parts.map_chunks(
        rows, out / "data" / "responses", chunk_rows, marked, "prepare responses"
    )
    counts |= _check_drops(run, "responses", written.column("drop_reason"))
    tables = {
        "seed": [row for row in seed if row["id"] not in held_out],
        "validation": [row for row in usable if row["id"] in held_out],
    }
    for name, members in tables.items():
        parts.map_chunks(
            members, out / "data" / name, chunk_rows, lambda chunk, advance: list(chunk)
        )
    shown = [prompt.show(d, pairs.joined_instruction(first), first["response"]) for d in Direction]
    pairs.write_text(out / "example.txt", "\n\n".join(shown) + "\n")
    return counts | {"validation_pairs": len(tables["validation"])}


def _responses(run: Run) -> Iterator[dict]:
    """The unlabelled responses, each with its drop reason where an earlier one says the same."""
    settings, rows = run.config.clean, read_responses(run.sources["responses"])
    if not (settings.duplicates or settings.near_duplicates):
        return rows
    said_before = clean.duplicates(settings.near_duplicates)
    return (row | {"drop_reason": said_before(row["response"] or "")} for row in rows)


def _rules(settings: Clean) -> tuple[Callable[[str], bool], Callable[[str], str | None]]:
    """(whether a text is contaminated, why a response is unwanted). Raises UserError."""
    contaminated = clean.contamination(_test_fingerprints(settings), settings.decontaminate_ngram)
    rules = {"contaminated": contaminated}
    if settings.drop_patterns:
        rules["pattern"] = clean.patterns(settings.drop_patterns, "clean.drop_patterns")
    if settings.language is not None:
        rules["language"] = clean.other_language(settings.language, "clean.language")

    def unwanted(text: str) -> str | None:
        return next((reason for reason, holds in rules.items() if holds(text)), None)

    return contaminated, unwanted


def _test_fingerprints(settings: Clean) -> set[int]:
    """Of the texts of all tests. Raises UserError for a test from which nothing could be found."""
    known: set[int] = set()
    for path in settings.decontaminate:
        test = open_source(path, "clean.decontaminate")
        texts = (text for row in test for text in clean.texts_in(row.values))
        found = clean.fingerprints(texts, settings.decontaminate_ngram)
        if not found:
            raise UserError(
                f"clean.decontaminate: {test}: no text in it has "
                f"{settings.decontaminate_ngram} words (clean.decontaminate_ngram)"
            )
        known |= found
    return known


def in_columns(rows: Sequence[dict], origin: str) -> list[dict]:
    """The rows with the columns of the pair table alone."""
    of_all = {"origin": origin, "round": 0}
    return [{name: row.get(name) for name in pairs.COLUMNS} | of_all for row in rows]


def mark(
    rows: Sequence[dict], prompt: Prompt, directions: Sequence[Direction], asked: bool = True
) -> None:
    """Sets `drop_reason` and `truncated` of every row. Not `asked`: its instruction is yet to be written."""
    instructions = prompt.encode_all([pairs.joined_instruction(r) for r in rows])
    responses = prompt.encode_all([r.get("response") or "" for r in rows])
    for row, instruction, response in zip(rows, instructions, responses, strict=True):
        empty = hard_drop(row if asked else row | {"instruction": "to be written"})
        try:
            rendered = [prompt.render(d, instruction, response) for d in directions]
        except UserError as error:
            raise UserError(f"{row['source']}, row {row['row_number']}: {error}") from None
        reasons = [empty, *(r.drop_reason for r in rendered)]
        row["drop_reason"] = next((r for r in reasons if r), None)
        row["truncated"] = any(r.truncated for r in rendered)


def _check_drops(run: Run, name: str, drop_reasons: Sequence[str | None]) -> dict[str, int]:
    """Counts by reason, from those of all rows. Raises UserError when too much, or all, was dropped."""
    source, limit = run.sources[name], run.config.data.max_drop_share
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
