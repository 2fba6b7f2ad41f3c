"""From rows read to pairs kept: how many each stage has left, and what it dropped for which reason.

The report's and the exported card's are one, so that they agree. What a source's rules refuse (`oasst1:`,
`refinedweb:`) is in no table; `prepare` has counted it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from main_jax.report.files import RunFiles, drops

RULES = "rules of the source"


def funnel(run: RunFiles) -> dict[str, Any]:
    """`read` rows, of which `rows` are in the tables, and the `steps` from there to the kept pairs."""
    steps: list[dict[str, Any]] = []
    refused = _refused(run, "responses")
    before: Counter[str] = Counter()
    read = rows = 0
    for stage, part in (("prepare", "responses"), ("augment", ""), ("score", ""), ("filter", "")):
        found = drops(run.folder(stage) / "data" / part)
        if found is None:
            break
        here = sum(found.values())
        if not steps:
            rows, read = here, here + refused.total()
            if refused:
                steps.append(_step(RULES, rows, read, refused))
        dropped = found - before if here == rows else Counter()
        del dropped[""]
        steps.append(_step(stage, found[""], read, dropped, here if here < rows else None))
        before = found
    return {"read": read, "rows": rows, "steps": steps}


def seed(run: RunFiles) -> dict[str, Any]:
    """The seed pairs: read, dropped by reason, held out, and left for training."""
    train, held_out = (drops(run.folder("prepare") / "data" / t) for t in ("seed", "validation"))
    if train is None:
        return {}
    left, held = train.pop("", 0), sum((held_out or {}).values())
    refused = _refused(run, "seed")
    return {
        "read": left + held + train.total() + refused.total(),
        "refused": sorted(refused.items()), "dropped": sorted(train.items()),
        "held_out": held, "left": left,
    }  # fmt: skip


def _step(
    stage: str, left: int, read: int, dropped: Counter[str], so_far: int | None = None
) -> dict[str, Any]:
    """`so_far`: rows written, where that is not all."""
    share = min(1.0, left / read) if read else 0.0
    return {
        "stage": stage, "left": left, "share": share, "dropped": sorted(dropped.items()), "so_far": so_far
    }  # fmt: skip


def _refused(run: RunFiles, table: str) -> Counter[str]:
    """Rows by the rule of their source that left them out; none are known before `prepare` is done."""
    counts, mark = run.stages["prepare"]["counts"], f"{table}_skipped_"
    return Counter({k.removeprefix(mark): n for k, n in counts.items() if k.startswith(mark)})
