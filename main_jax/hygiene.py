"""What generated instructions are checked for before the filter ranks the pairs; each has a `drop_reason`.

    cut_instruction        it reached `max_new_tokens` without an end
    short_instruction      fewer characters than `min_characters`
    long_instruction       more than `max_characters`
    looping_instruction    it repeats itself: see `loop_share`
    repeated_instruction   more than `max_repeats` responses got the same: it says nothing of any of them

The limits in characters are those of Humpback's public re-creation; the other two rules are ours. They stand
with the filter, so that other limits cost seconds and no generation.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from main_jax.data import clean
from main_jax.data.clean import ngrams, words
from main_jax.parts import Rows

LOOP_WORDS = 12
"""A shorter text is not looked at for loops."""


@dataclass(frozen=True)
class Hygiene:
    """Which generated instructions no filter keeps.

    keep_cut: also keep those that `max_new_tokens` has cut. min_characters, max_characters: of the text.
    max_loop_share: of its word triples that were there before. max_repeats: responses that may get the same
    instruction, in words; the first ones stay; null: any number.
    """

    keep_cut: bool = False
    min_characters: int = 10
    max_characters: int = 800
    max_loop_share: float = 0.5
    max_repeats: int | None = 10

    def fault(self, row: dict) -> str | None:
        """The drop reason of a row by its own text, or None."""
        text = row["instruction"] or ""
        faults = {
            "cut_instruction": row["finish_reason"] == "length" and not self.keep_cut,
            "short_instruction": len(text) < self.min_characters,
            "long_instruction": len(text) > self.max_characters,
            "looping_instruction": loop_share(text) > self.max_loop_share,
        }
        return next((reason for reason, holds in faults.items() if holds), None)


def loop_share(text: str) -> float:
    """The share of a text's word triples that were in it before; 0 for one of fewer than 12 words."""
    said = words(text)
    if len(said) < LOOP_WORDS:
        return 0.0
    triples = list(ngrams(said, 3))
    return 1 - len(set(triples)) / len(triples)


def faults(rows: Rows, hygiene: Hygiene) -> list[str | None]:
    """The drop reason of every row of a table, those that it has before those found here.

    Of a table in parts only what is needed is read, a part at a time. Memory: a digest for each
    different instruction.
    """
    seen: Counter[bytes] = Counter()
    reasons: list[str | None] = []
    for part in rows.tables(["instruction", "finish_reason", "drop_reason"]):
        for row in part.to_pylist():
            reason = row["drop_reason"] or hygiene.fault(row)
            if reason is None and hygiene.max_repeats is not None:
                said = clean.digest(words(row["instruction"]))
                seen[said] += 1
                if seen[said] > hygiene.max_repeats:
                    reason = "repeated_instruction"
            reasons.append(reason)
    return reasons
