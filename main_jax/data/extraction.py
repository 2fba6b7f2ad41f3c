"""Seed pairs and unlabelled texts out of two public data sets, by the rules of the works MAIN builds on.

The numbers are those of Humpback (arXiv 2308.06259) and of its public re-creation; every one is an option.
Nothing is left out silently: `skipped` counts the rows by the first rule that refused them.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Literal

from main_jax.data.files import Row
from main_jax.errors import UserError

# ------------------------------------------------------------------------------------------- OASST1


@dataclass(frozen=True)
class Oasst1:
    """(prompt, reply) pairs of OpenAssistant's trees: those that people rated best.

    turns: `first` (a tree's first prompt and the replies to it, as in Humpback) or `every` (every prompt,
        without what was said before, as in the re-creation).
    lone_replies: keep replies without siblings. Only siblings are ranked, so that rank 0 alone would drop
        them. Of siblings the one of rank 0 is kept.
    language: of both sides; null: any.
    min_quality: both sides' quality label (0 to 1) must be above it.
    min_words: both sides must have more words.
    order: `quality` (the sum over both sides, highest first) or `file`.
    limit: pairs, after ordering; null: all.
    """

    turns: Literal["first", "every"] = "first"
    lone_replies: bool = True
    language: str | None = "en"
    min_quality: float = 0.6
    min_words: int = 5
    order: Literal["quality", "file"] = "quality"
    limit: int | None = 3200

    def __post_init__(self):
        _check_limit(self.limit)

    def extract(self, rows: Iterable[Row], skipped: Counter[str]) -> Iterator[Row]:
        """Rows with id, instruction, response and quality, from messages (Parquet, JSONL) or trees.

        A pair's row number is that of its reply, or of its tree. Raises UserError, one line.
        """
        pairs = (pair for tree in _trees(rows) for pair in self._pairs(tree, skipped))
        if self.order == "file":
            yield from islice(pairs, self.limit)
            return
        passed = 0

        def counted() -> Iterator[Row]:
            nonlocal passed
            for passed, pair in enumerate(pairs, start=1):  # noqa: B007
                yield pair

        limit, quality = self.limit, lambda pair: pair.values["quality"]
        if limit is None:
            best = sorted(counted(), key=quality, reverse=True)
        else:  # the same order, but only `limit` pairs are held
            best = heapq.nlargest(limit, counted(), key=quality)
        if beyond := passed - len(best):
            skipped["limit"] += beyond
        yield from best

    def _pairs(self, tree: list[Row], skipped: Counter[str]) -> Iterator[Row]:
        messages = {row.values["message_id"]: row.values for row in tree}
        replies = Counter(message["parent_id"] for message in messages.values())
        for row in tree:
            reply = row.values
            prompt = messages.get(reply["parent_id"])
            if reply["role"] != "assistant":
                continue  # one side of the other pairs
            if prompt is None:
                skipped["no_prompt"] += 1
                continue
            quality = [_quality(message) for message in (prompt, reply)]
            if reason := self._refusal(prompt, reply, quality, replies[reply["parent_id"]] == 1):
                skipped[reason] += 1
                continue
            values = {
                "id": reply["message_id"],
                "instruction": prompt["text"],
                "response": reply["text"],
            }
            yield Row(row.file, row.number, values | {"quality": sum(quality)})

    def _refusal(self, prompt: dict, reply: dict, quality: list[float], lone: bool) -> str | None:
        both = (prompt, reply)
        if self.turns == "first" and prompt["parent_id"] is not None:
            return "later_turn"
        if self.language is not None and any(m.get("lang") != self.language for m in both):
            return "language"
        if any(message.get("deleted") for message in both):
            return "deleted"
        rank = reply.get("rank")
        if rank is None and lone:
            if not self.lone_replies:
                return "lone_reply"
        elif rank != 0:
            return "rank"
        if min(quality) <= self.min_quality:
            return "quality"
        if any(len(message["text"].split()) <= self.min_words for message in both):
            return "words"
        return None


def _trees(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The messages of one tree after the other; a table holds each tree's messages together."""
    seen = set()
    for tree, messages in groupby(_messages(rows), lambda row: row.values["message_tree_id"]):
        together = list(messages)
        if tree in seen:
            raise UserError(
                f"{together[0]}: tree {tree} was interrupted by another; sort by message_tree_id"
            )
        seen.add(tree)
        yield together


def _messages(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        if isinstance(row.values.get("prompt"), dict):
            tree = row.values.get("message_tree_id") or row.values["prompt"].get("message_id")
            ahead = [(None, row.values["prompt"])]
            while ahead:  # depth first, siblings in their order
                parent, message = ahead.pop()
                if not isinstance(message, dict):
                    raise UserError(f"{row}, replies: expected messages, found {message!r:.60}")
                message = _checked(row, message | {"parent_id": parent, "message_tree_id": tree})
                replies = message.get("replies") or []
                if not isinstance(replies, list):
                    raise UserError(f"{row}, replies: expected messages, found {replies!r:.60}")
                ahead += [(message["message_id"], reply) for reply in reversed(replies)]
                yield Row(row.file, row.number, message)
        else:
            yield Row(row.file, row.number, _checked(row, row.values))


def _checked(row: Row, message: dict) -> dict:
    for name in ("message_id", "parent_id", "message_tree_id", "text", "role"):
        if name not in message:
            raise UserError(f"{row}: missing column {name!r}; expected OASST1's messages or trees")
        value = message[name]
        if not isinstance(value, str) and not (name == "parent_id" and value is None):
            raise UserError(f"{row}, {name}: expected text, found {type(value).__name__}")
    return message


def _quality(message: dict) -> float:
    """The label `quality`: from lists of names and values (Parquet), or from a mapping (JSONL)."""
    match message.get("labels"):
        case {"name": [*names], "value": [*values]}:
            pairs = zip(names, values, strict=False)
            found = next((value for name, value in pairs if name == "quality"), None)
        case {"quality": {"value": found}}:
            pass
        case _:
            found = None
    return float(found) if isinstance(found, (int, float)) and found == found else -1.0


# ------------------------------------------------------------------------------------------- RefinedWeb


@dataclass(frozen=True)
class RefinedWeb:
    """Texts of a length that a model can answer with, of whole lines: the re-creation's rule.

    min_characters, max_characters: of the text, both included.
    min_line_characters: every line has as many at least; an empty line has none. 0: any line.
    limit: the first so many texts that pass; null: all.
    """

    min_characters: int = 1000
    max_characters: int = 2200
    min_line_characters: int = 5
    limit: int | None = 502_000

    def __post_init__(self):
        _check_limit(self.limit)

    def extract(self, rows: Iterable[Row], skipped: Counter[str]) -> Iterator[Row]:
        """Rows with response, from the column `content` (or text, response), and the others as they are.

        Reading ends with the last row that is wanted. Raises UserError, one line.
        """
        yield from islice(self._passing(rows, skipped), self.limit)

    def _passing(self, rows: Iterable[Row], skipped: Counter[str]) -> Iterator[Row]:
        for row in rows:
            name = next((n for n in ("content", "text", "response") if n in row.values), None)
            if name is None:
                raise UserError(f"{row}: missing column 'content'; found {', '.join(row.values)}")
            text = row.values[name]
            if not isinstance(text, str):
                raise UserError(f"{row}, {name}: expected text, found {type(text).__name__}")
            if reason := self._refusal(text):
                skipped[reason] += 1
            else:
                others = {k: v for k, v in row.values.items() if k != name}
                yield Row(row.file, row.number, others | {"response": text})

    def _refusal(self, text: str) -> str | None:
        if len(text) < self.min_characters:
            return "too_few_characters"
        if len(text) > self.max_characters:
            return "too_many_characters"
        if min(map(len, text.split("\n"))) < self.min_line_characters:
            return "short_line"
        return None


RULES = {"oasst1": Oasst1, "refinedweb": RefinedWeb}


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected a positive number, or null for all, found {limit}")
