"""A plan as a table for people, and as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from main_jax.lm import plan as engine
from main_jax.lm.topology import GIB
from main_jax.plan.calls import PACKED
from main_jax.plan.search import Plan

COLUMNS = (
    "stage", "program", "batch", "arguments", "temporaries", "peak", "of memory",
    "TFLOP/call", "calls", "hours",
)  # fmt: skip


def show(plan: Plan) -> str:
    """The table, in Markdown, and what it rests on."""
    chip, work, lines = plan.topology.chip, plan.work, []
    for row in plan.rows:
        m, c = row.memory, row.call
        gib = ["?" if x is None else f"{x / GIB:.2f}" for x in (m.arguments, m.temporaries, m.peak)]
        share = f"{m.peak / chip.memory:.0%}" + ("" if row.fits else " TOO MUCH")
        lines.append((c.stage, c.name, c.shape, *gib, share, f"{c.flops / 1e12:,.0f}",
                      f"{math.ceil(c.calls):,}", f"{row.hours:.1f}"))  # fmt: skip
    devices = len(plan.topology.devices)
    hosts = f"{plan.topology.hosts} host{'s' if plan.topology.hosts > 1 else ''}"
    head = (
        f"{plan.topology.name}: {devices} devices on {hosts}, each with "
        f"{chip.memory / GIB:.1f} GiB; GiB are per device"
    )
    assumed = ", ".join(f"{share:.0%} for {what}" for what, share in engine.ASSUMED.items())
    notes = [
        f"all stages: {sum(row.hours for row in plan.rows):.1f} hours",
        f"Memory: every example as long as prompt.max_length. Hours: {work.seed_pairs:,} seed pairs and "
        f"{work.responses:,} responses of {work.instruction_tokens:.0f} + {work.response_tokens:.0f} tokens; "
        f"of the published peaks {assumed}, overlapping; {PACKED:.0%} of packed tokens real; generation to "
        "max_new_tokens; without compiling, loading, saving, evaluation and export.",
    ]
    return "\n".join([head, "", *_markdown(COLUMNS, lines), "", *notes, *plan.advice])


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    left = 3  # columns of words

    def line(cells: Sequence[str]) -> str:
        padded = [
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w if i < left else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
    return [line(head), line(rule), *map(line, rows)]


def as_dict(plan: Plan) -> dict:
    """Plain values, for a JSON file."""
    return {
        "topology": plan.topology.name,
        "devices": len(plan.topology.devices),
        "bytes_per_device": plan.topology.chip.memory,
        "work": plan.work._asdict(),
        "assumed": engine.ASSUMED,
        "fits": plan.fits,
        "advice": plan.advice,
        "programs": [
            {"stage": r.call.stage, "program": r.call.name, "batch": r.call.shape, **r.memory._asdict(),
             "fits": r.fits, "calls": r.call.calls,
             "model_flops_per_call": r.call.flops, "hours": r.hours}
            for r in plan.rows
        ],
    }  # fmt: skip
