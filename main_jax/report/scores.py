"""A scored file as one self-contained page beside it, `scored.html`: what `main-jax score` has measured.

    refresh_page("scored.parquet", parts, "my.jsonl", scorers)

Nothing is filtered yet. The colours show what `main-jax filter` would keep with its defaults, and the page
says with which command.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from main_jax.config import Filter
from main_jax.filter import READ, with_filter
from main_jax.lm.progress import say
from main_jax.prompts import Direction, Prompt
from main_jax.report import html
from main_jax.report.files import columns, drops
from main_jax.report.pool import Pool, meanings
from main_jax.run import versions

FACTS = ("mutual", "pmi", "ifd", "self_curation")
"""Shown of every example."""


class Scorer(NamedTuple):
    """What one direction was scored with: model and template as the user has named them."""

    model: str
    template: str
    prompt: Prompt

    @property
    def told(self) -> str:
        """The template by name, and which one `auto` is."""
        if self.template != "auto":
            return self.template
        return f"auto: {'plain' if self.prompt.texts else 'chat'}"


def refresh_page(
    output: epath.PathLike, parts: epath.PathLike, data: str, scorers: Mapping[Direction, Scorer],
    seed: int = 0,
) -> epath.Path | None:  # fmt: skip
    """Writes the page of the scored file `output`; what goes wrong is said in one line, and costs no score.

    Args:
        output: the scored file, as `main-jax filter` will read it.
        parts: the folder of `part-*.parquet` with its rows in the columns of the pair table.
        data: what was scored, as the user has named it.
        scorers: by direction.
        seed: of the score `random`.
    """
    output = epath.Path(output)
    page = output.with_suffix(".html")
    try:
        html.write(page, render(output, epath.Path(parts), data, scorers, seed))
    except Exception as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        say(f"{page}: not written ({told})")
        return None
    return page


def render(
    output: epath.Path, parts: epath.Path, data: str, scorers: Mapping[Direction, Scorer], seed: int
) -> str:
    """The page as HTML."""
    table, dropped, default = columns(parts, (*READ, "truncated")), drops(parts), Filter()
    assert table is not None and dropped is not None
    del dropped[""]
    table = with_filter(table, default.by, default.select, default.keep, seed)
    pool = Pool(parts, table, default.by)
    return html.render(
        "scores.html", name=output.name, data=data, rows=table.num_rows, pool=len(pool),
        dropped=dropped.most_common(), kept=int(pool.kept.sum()), default=default,
        filter_command=_filter_command(output, default), scorers=scorers, versions=versions(),
        examples=pool.examples(FACTS), **_charts(pool),
    )  # fmt: skip


def _charts(pool: Pool) -> dict[str, Any]:
    if not len(pool):
        return {}
    others = pool.scores()
    return {
        "main": others.pop(pool.by), "others": others, "meanings": meanings(), "scatter": pool.scatter(),
        "sampled": len(pool.sampled), "lengths": pool.lengths(),
    }  # fmt: skip


def _filter_command(output: epath.Path, default: Filter) -> str:
    kept = output.with_name(f"{output.stem}-kept{output.suffix}")
    words = ["main-jax", "filter", str(output), "--by", default.by, "--keep", f"{default.keep:g}"]
    return shlex.join([*words, "--output", str(kept)])
