"""Step 1: mutual alignment, the EM-like rounds (MAIN, arXiv 2504.12913).

    round 0:  M_f and M_r are trained on the seed pairs, from the base model
    round k:  Î ~ M_r(· | R) for every seed response;      M_f learns from Î -> R beside I -> R
              R̂ ~ M_f(· | I) for every seed instruction;   M_r learns from R̂ -> I beside R -> I

The target is always human text; only conditions are generated. How much an aligned pair counts against its
seed twin is `weighting`. That the second half mirrors the first, and that a round continues from the last
one's parameters with a fresh optimiser, is ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from main_jax.augment import write_chunks
from main_jax.config import Align
from main_jax.lm.batches import Unit
from main_jax.lm.checkpoint import load_params
from main_jax.lm.train import TrainingSettings, fit
from main_jax.models import Checkpoint, LanguageModel
from main_jax.pairs import joined_instruction
from main_jax.prompts import Direction, Prompt, Rendered
from main_jax.run import Run, derive_seed

OTHER = {Direction.FORWARD: Direction.REVERSE, Direction.REVERSE: Direction.FORWARD}


def align(run: Run, out: epath.Path) -> dict[str, int]:
    """Trains both directions; the final ones lie under `out/round-K/{forward,reverse}/checkpoints`."""
    settings, base, prompt = run.config.align, run.base, run.prompt
    seed_rows = run.rows("prepare", "seed")
    validation = run.rows("prepare", "validation")

    def train(path: str, direction: Direction, units: list[Unit], start: Callable[[], Any],
              training: TrainingSettings, number: int = 0) -> None:  # fmt: skip
        held_out = [e for u in pair_units(validation, direction, prompt) for e in u.examples]
        steps, rounds = training.steps(len(units)), max(1, settings.rounds)
        fit(
            base.decoder, start, units, training,
            directory=out / path, weighting=settings.weighting,
            seed=derive_seed(run.config.seed, path), label=f"align {path}",
            limit=prompt.max_length, validation=held_out,
            progress=lambda step: ((number - 1) * steps + step) / (rounds * steps) if number else 0.0,
        )  # fmt: skip

    def ended(part: str, direction: Direction) -> Any:
        return load_params(trained_at(out, part, direction), base.decoder)

    counts = {"seed_pairs": len(seed_rows)}
    for direction in Direction:
        units = pair_units(seed_rows, direction, prompt)
        train(f"round-0/{direction}", direction, units, base.load, round_zero(settings))
    for k in range(1, settings.rounds + 1):
        for direction in Direction:
            # The forward model has already been updated when it writes for the reverse one.
            writer_round = k - 1 if direction is Direction.FORWARD else k
            twins = write_conditions(run, out, k, direction, writer_round, seed_rows)
            units = pair_units(seed_rows, direction, prompt, twins)
            counts[f"round_{k}_{direction}_twins"] = sum(len(u.examples) - 1 for u in units)
            start = (
                base.load
                if settings.restart == "base"
                else lambda k=k, d=direction: ended(f"round-{k - 1}", d)
            )
            train(f"round-{k}/{direction}", direction, units, start, settings, k)
    if settings.control:
        # As many further steps on the seed alone: what longer training gives without any alignment.
        units = pair_units(seed_rows, Direction.REVERSE, prompt)
        steps = settings.rounds * settings.steps(len(units))
        train("control/reverse", Direction.REVERSE, units,
              lambda: ended("round-0", Direction.REVERSE),
              dataclasses.replace(settings, max_steps=max(1, steps)))  # fmt: skip
    return counts


def trained(out: epath.Path, part: str, direction: Direction, base: Checkpoint) -> LanguageModel:
    """The model of one direction at the end of a part of the stage: `round-0`, ..., or `control`."""
    directory = trained_at(out, part, direction)
    return LanguageModel(base.decoder, load_params(directory, base.decoder, inference=True))


def trained_at(out: epath.Path, part: str, direction: Direction) -> epath.Path:
    """Where its checkpoints are."""
    return out / part / direction / "checkpoints"


def round_zero(settings: Align) -> TrainingSettings:
    """The training settings of round 0: those of the stage, with what `round_0` sets."""
    own = {k: v for k, v in dataclasses.asdict(settings.round_0).items() if v is not None}
    if "num_train_epochs" in own:
        own.setdefault("max_steps", None)  # or the stage's own number of steps would win
    return dataclasses.replace(settings, **own)


def write_conditions(
    run: Run, out: epath.Path, k: int, direction: Direction, writer_round: int, rows: Sequence[dict]
) -> list[dict]:
    """The aligned rows of round k: every seed row with the condition of `direction` generated."""
    writes = OTHER[direction]
    _, side = writes.sides("instructions", "responses")
    name = f"round-{k}/{side}"

    def drop_unfit(written: list[dict]) -> list[dict]:
        for row, rendered in zip(written, render_rows(written, direction, run.prompt), strict=True):
            row["drop_reason"] = rendered.drop_reason
        return written

    return list(write_chunks(
        run, out / name, [row | {"origin": "aligned", "round": k} for row in rows], writes,
        lambda: trained(out, f"round-{writer_round}", writes, run.base), run.config.align.sampling,
        purpose=f"align/{name}", label=f"align {name}", finish=drop_unfit,
    ))  # fmt: skip


def pair_units(
    rows: Sequence[dict], direction: Direction, prompt: Prompt, twins: Sequence[dict] = ()
) -> list[Unit]:
    """One unit per seed row: its example and, where it has one, its aligned twin's (same target)."""
    seeds = [r.example for r in render_rows(rows, direction, prompt)]
    aligned = [r.example for r in render_rows(twins, direction, prompt)] or [None] * len(rows)
    units = []
    for row, seed, twin in zip(rows, seeds, aligned, strict=True):
        if seed is None:
            continue
        members = [(seed, False)] + ([(twin, True)] if twin is not None else [])
        fields = tuple({"weight": row["weight"], "aligned": a} for _, a in members)
        units.append(Unit(tuple(e for e, _ in members), fields))
    return units


def render_rows(rows: Sequence[dict], direction: Direction, prompt: Prompt) -> list[Rendered]:
    """Every row in one direction; what was dropped before stays dropped, with its reason."""
    texts = [text for r in rows for text in (joined_instruction(r), r["response"] or "")]
    ids = prompt.encode_all(texts)
    return [
        Rendered(None, None, False, row["drop_reason"])
        if row["drop_reason"]
        else prompt.render(direction, *ids[2 * i : 2 * i + 2])
        for i, row in enumerate(rows)
    ]
