"""Self-curation, the score-based filter: the forward model is asked to grade every pair from 1 to 5.

    rating = Σ_k k · p(k) / Σ_k p(k),   k = 1 ... 5, p(k) of the answer "k" after the prompt

One forward pass per pair answers for all five. An answer is *parsed* if the most likely next token is one of
them: what greedy decoding would write. (Humpback, arXiv 2308.06259, section 2.3, samples a written score; the
expectation and the wording of `self_curation.txt` are ours.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np

from main_jax.errors import UserError
from main_jax.evaluation.likelihood import likelihoods
from main_jax.models import LanguageModel
from main_jax.pairs import joined_instruction
from main_jax.prompts import Direction, Prompt

GRADES = (1, 2, 3, 4, 5)
PLACES = ("instruction", "response")
DEFAULT_PROMPT = Path(__file__).with_suffix(".txt")


def read_prompt(path: str | None) -> str:
    """The text that asks for a grade: the user's or ours. Raises UserError: no file, a place is missing."""
    file = Path(path).expanduser() if path else DEFAULT_PROMPT
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"score.curation_prompt: {path}: cannot be read ({error})") from None
    for place in PLACES:
        if f"{{{place}}}" not in text:
            raise UserError(f"score.curation_prompt: {file}: expected {{{place}}} somewhere in it")
    return text.strip()


class Curator:
    """Asks for grades in a template's words.

    Args:
        prompt: the forward template, which the question stands in as an instruction.
        text: see `read_prompt`.

    Raises:
        UserError: the tokenizer does not tell the five answers apart by one token.
    """

    def __init__(self, prompt: Prompt, text: str):
        self._prompt, self._text = prompt, text
        answers = [prompt.encode(str(grade)) for grade in GRADES]
        # SentencePiece writes a space first: that much is said for the model.
        alike = takewhile(lambda ids: len(set(ids)) == 1, zip(*answers, strict=False))
        self._begin = [ids[0] for ids in alike]
        self._answers = [answer[len(self._begin) :] for answer in answers]
        if any(len(answer) != 1 for answer in self._answers):
            raise UserError(
                "self_curation: this tokenizer does not write the grades 1 to 5 as one token each"
            )

    def rate(
        self, rows: Sequence[dict], model: LanguageModel, budget: int
    ) -> list[tuple[float | None, bool | None]]:
        """(rating in [1, 5], whether the answer was parsed) of every pair; None where it is not asked.

        Not asked are rows with a `drop_reason`, and pairs that are too long with the question around.
        `budget` is the number of padded tokens of a batch.
        """
        limit = model.decoder.config.max_position_embeddings - 1 - len(self._begin)
        texts = [self._question(row) for row in rows]
        asked: dict[int, list[int]] = {}
        for i, (row, ids) in enumerate(zip(rows, self._prompt.encode_all(texts), strict=True)):
            if not row["drop_reason"] and len(ids) <= self._prompt.room(Direction.FORWARD, limit):
                question = self._prompt.question(Direction.FORWARD, ids, limit)
                asked[i] = [*question, *self._begin]  # ty: ignore[not-iterable]
        requests = [(question, answer) for question in asked.values() for answer in self._answers]
        found = likelihoods(model, requests, limit + len(self._begin), budget)
        ratings: list[tuple[float | None, bool | None]] = [(None, None)] * len(rows)
        for i, start in zip(asked, range(0, len(found), len(GRADES)), strict=True):
            five = found[start : start + len(GRADES)]
            logs = np.asarray([f.log_likelihood for f in five])
            shares = np.exp(logs - logs.max())
            expected = float(np.dot(GRADES, shares) / shares.sum())
            ratings[i] = expected, any(f.is_greedy for f in five)
        return ratings

    def _question(self, row: dict) -> str:
        texts = {"instruction": joined_instruction(row), "response": row.get("response") or ""}
        return re.sub(r"{(instruction|response)}", lambda place: texts[place[1]], self._text)
