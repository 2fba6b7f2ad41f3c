"""Scored pairs on a page, a run's or a file's: their charts, and single ones at several levels of a score.

    pool = Pool(directory, table, by="mutual")
    pool.scatter(), pool.scores(), pool.lengths(), pool.examples()

Of the table only the columns of the charts are needed (`READ`); texts are read for the examples alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath
from markupsafe import Markup

from main_jax.filter import CUT, SCORES, pool_of
from main_jax.pairs import joined_instruction
from main_jax.report import charts
from main_jax.report.charts import NATS
from main_jax.report.files import rows_at

POINTS = 3000
"""Points of the scatter; a seeded sample where there are more pairs."""
TEXT = 1500
"""Characters shown of a text."""
MEANING = {
    "forward_ce": "L(R|I): NLL of the response given the instruction",
    "reverse_ce": "L(I|R): NLL of the instruction given the response",
    "mutual": "the worse rank of the two directions",
    "mutual_z": "sum of the two directions, each standardised",
    "mutual_sum": "L(R|I) + L(I|R)",
    "dual_ce": "both directions low, and alike",
    "pmi": "L(R) − L(R|I): what the instruction tells of the response",
    "ifd": "exp(L(R|I) − L(R)): the responses that stay hard; none from 1 on",
    "ifd_ratio": "L(R|I) / L(R): the responses that stay hard; none above 1",
    "reverse_ifd": "exp(L(I|R) − L(I))",
    "self_curation": "the grade from 1 to 5 that the forward model gives the pair",
    "length": "response tokens",
}
DRAWN = [name for name in SCORES if name not in ("random", "none")]
"""The scores that have a histogram: `random` is even by its making, `none` has no values."""
READ = (
    "drop_reason", "keep", "truncated", "finish_reason", "forward_nll_sum", "forward_tokens",
    "reverse_nll_sum", "reverse_tokens", *DRAWN,
)  # fmt: skip


def meanings() -> dict[str, str]:
    """What each score is, and which end of it is kept."""
    return {n: f"{MEANING[n]}; the {SCORES[n].keep} end is kept" for n in DRAWN}


class Pool:
    """The pairs of a table that were scored and not dropped for another reason than a filter's cut.

    Args:
        directory: of the table's parts.
        table: [N] of its columns those of `READ` that are there.
        by: the score whose choice is in `keep`; "": nothing was chosen yet.
        truth: [N] bool whether a pair is true, where that is known; the colours of all charts, else what was
            kept and cut.
        notes: [N] what to say of an example first.
    """

    def __init__(
        self,
        directory: epath.Path,
        table: pa.Table,
        by: str,
        truth: np.ndarray | None = None,
        notes: Sequence[str] | None = None,
    ):
        self.directory, self.table, self.by, self.notes = directory, table, by, notes
        self.members = np.flatnonzero(pool_of(table))  # [P] places in the table
        self.kept = np.asarray(table["keep"].to_numpy(zero_copy_only=False), bool)[self.members]
        self._masks = {"scored": np.ones(len(self.members), bool)}
        if by:
            self._masks = {"kept": self.kept, "cut": ~self.kept}
        if truth is not None:
            true = np.asarray(truth, bool)[self.members]
            self._masks = {"true": true, "flawed": ~true}

    def __len__(self) -> int:
        return len(self.members)

    def values(self, name: str) -> np.ndarray:
        """[P] float64 of a column."""
        return np.asarray(self.table[name].to_numpy(zero_copy_only=False), float)[self.members]

    def _grouped(self, x: np.ndarray) -> dict[str, np.ndarray]:
        return {name: x[mask] for name, mask in self._masks.items()}

    # --------------------------------------------------------------------------------------- charts

    @cached_property
    def sampled(self) -> np.ndarray:
        """[S] the pairs of the scatter."""
        every = np.arange(len(self))
        if len(every) <= POINTS:
            return every
        return np.sort(np.random.default_rng(0).choice(every, POINTS, replace=False))

    def scatter(self) -> Markup:
        """Forward against reverse NLL; filled: kept."""
        forward, reverse = (
            self.values(f"{d}_nll_sum") / self.values(f"{d}_tokens") for d in ("forward", "reverse")
        )
        chosen = {name: self.sampled[mask[self.sampled]] for name, mask in self._masks.items()}
        return charts.scatter(
            {name: (forward[i], reverse[i], self.kept[i]) for name, i in chosen.items()},
            f"forward: −log p(R|I), {NATS}", f"reverse: −log p(I|R), {NATS}",
        )  # fmt: skip

    def cut(self, name: str) -> float | None:
        """The last value that a score keeps: as it was cut, or where it would be to keep as many."""
        if not self.kept.any():
            return None
        score, column = SCORES[name], self.values(name)
        sign = 1.0 if score.keep == "low" else -1.0
        if name == self.by:
            return sign * float((sign * column[self.kept]).max())
        ranked = np.sort(
            sign * (column if score.eligible is None else column[score.eligible(column)])
        )
        return sign * float(ranked[: self.kept.sum()][-1]) if len(ranked) else None

    def scores(self) -> dict[str, Markup]:
        """The histogram of every score that is there, with its cut."""
        drawn = {}
        for name in (n for n in DRAWN if n in self.table.column_names):
            cut, side = self.cut(name), {"low": "≤", "high": "≥"}[SCORES[name].keep]
            drawn[name] = charts.histogram(
                self._grouped(self.values(name)), name, cut=cut,
                cut_text=f"keeps {side} {charts.number(cut)}",
            )  # fmt: skip
        return drawn

    def lengths(self) -> dict[str, Any]:
        """Histograms of lengths in tokens, and how many pairs were truncated."""
        response = self.values("forward_tokens")
        truncated = np.asarray(self.table["truncated"].fill_null(False))[self.members]
        return {
            "response": charts.histogram(self._grouped(response), "response tokens"),
            "instruction": charts.histogram(
                self._grouped(self.values("reverse_tokens")), "instruction tokens"
            ),
            "truncated": int(truncated.sum()),
            "truncation": charts.histogram(
                {"whole": response[~truncated], "truncated": response[truncated]}, "response tokens"
            ),
        }

    # ------------------------------------------------------------------------------------- examples

    def examples(self, facts: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Pairs at several levels of the score that chose, and one for each other drop reason.

        `facts` are the columns to show with each; the NLLs of both directions always are.
        """
        reasons = self.table["drop_reason"].to_pylist()
        levels = self._levels() if self.by else {}
        for i, reason in enumerate(reasons):
            if reason and not reason.startswith(CUT):
                levels.setdefault(f"dropped: {reason}", [i])
        wanted = [i for found in levels.values() for i in found]
        texts = rows_at(self.directory, wanted, ["id", "instruction", "input", "response"])

        def example(i: int) -> dict[str, Any]:
            row, text = self.table.slice(i, 1).to_pylist()[0], texts[i]
            said = [] if self.notes is None else [self.notes[i]]
            said += [f"{f} {charts.number(row[f])}" for f in facts if row.get(f) is not None]
            for direction in ("forward", "reverse"):
                if tokens := row[f"{direction}_tokens"]:
                    nll = row[f"{direction}_nll_sum"] / tokens
                    said.append(f"{direction} {charts.number(nll)} ({tokens} tokens)")
            return {
                "id": text["id"], "keep": bool(self.by and row["keep"]), "reason": reasons[i], "facts": said,
                "instruction": _shorten(joined_instruction(text)),
                "response": _shorten(text["response"] or ""),
            }  # fmt: skip

        return [
            {"title": title, "pairs": [example(i) for i in found]}
            for title, found in levels.items()
            if found
        ]

    def _levels(self) -> dict[str, list[int]]:
        """Best, middle and last of what is kept, first, middle and worst of what is cut, two of each."""
        name = self.by if self.by in self.table.column_names else "mutual"
        sign = 1.0 if SCORES[name].keep == "low" else -1.0
        column, levels = sign * self.values(name), {}
        for titles, mask in (
            (("best kept", "middle of the kept", "last kept"), self.kept),
            (("first cut", "middle of the cut", "worst"), ~self.kept),
        ):
            chosen = np.flatnonzero(mask)
            order = self.members[chosen[np.argsort(column[chosen], kind="stable")]].tolist()
            middle, ends = len(order) // 2, (order[:2], order[2:][-2:])
            between = [i for i in order[middle : middle + 2] if i not in (*ends[0], *ends[1])]
            levels |= zip(titles, (ends[0], between, ends[1]), strict=True)
        return levels


def _shorten(text: str) -> str:
    """What a page can show: without control characters, and cut when it is long."""
    text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text[: TEXT + 1])
    return text if len(text) <= TEXT else f"{text[:TEXT]} …"
