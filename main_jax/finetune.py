"""Step 4: the base model is trained on the kept pairs and the seed pairs.

Each *arm* is one final set, trained from the same base with the same number of steps: the configured
filter, and any others that the configuration wants beside it.
"""

from __future__ import annotations

from functools import reduce

import numpy as np
from etils import epath

from main_jax.align import pair_units
from main_jax.filter import keep_by
from main_jax.lm.batches import Shape, Unit, UnitStream
from main_jax.lm.checkpoint import load_params
from main_jax.lm.train import fit
from main_jax.models import LanguageModel
from main_jax.pairs import read_parts
from main_jax.prompts import Direction
from main_jax.run import Run, derive_seed
from main_jax.weighting import Weighting


def finetune(run: Run, out: epath.Path) -> dict[str, int]:
    """Trains every arm; the final parameters lie under `out/ARM/checkpoints`."""
    settings, prompt = run.config.finetune, run.prompt
    seed_units = pair_units(run.rows("prepare", "seed"), Direction.FORWARD, prompt)
    held_out = pair_units(run.rows("prepare", "validation"), Direction.FORWARD, prompt)
    scored = run.rows("filter")
    sets, counts = {}, {}
    order_seed = derive_seed(run.config.seed, "finetune")
    for arm in arms(run):
        kept = kept_by_arm(run, arm)
        rows = [row | {"drop_reason": None} for row, k in zip(scored, kept, strict=True) if k]
        sets[arm] = seed_units + pair_units(rows, Direction.FORWARD, prompt)
        counts[f"{arm}_kept"] = len(rows)

    def shape(units: list[Unit]) -> Shape:
        return UnitStream(
            units, units_per_microbatch=settings.units_per_microbatch,
            microbatches=settings.gradient_accumulation_steps, steps=settings.steps(len(units)),
            seed=order_seed, limit=prompt.max_length, packing=settings.packing,
        ).shape  # fmt: skip

    shared = reduce(Shape.union, map(shape, sets.values()))  # one compiled step for all arms
    for arm, units in sets.items():
        fit(
            run.base.decoder, run.base.load, units, settings,
            directory=out / arm, weighting=Weighting(strategy="constant"),
            seed=order_seed, label=f"finetune {arm}",
            limit=prompt.max_length, validation=[e for u in held_out for e in u.examples],
            shape=shared,
        )  # fmt: skip
    return counts


def arms(run: Run) -> list[str]:
    """The arms in order, the configured filter among them."""
    return list(dict.fromkeys([*run.config.finetune.arms, run.config.filter.by]))


def kept_by_arm(run: Run, arm: str) -> np.ndarray:
    """[N] bool over the rows of the filter stage: what this arm trains on beside the seed."""
    table = read_parts(run.directory("filter") / "data")
    settings = run.config.filter
    if arm == "seed_only":
        return np.zeros(table.num_rows, bool)
    if arm == "oracle":
        from main_jax.world.measure import oracle_kept

        return oracle_kept(run, table, settings.keep)
    return keep_by(table, arm, settings.select, settings.keep)


def finetuned(run: Run, arm: str) -> LanguageModel:
    """The final model of an arm."""
    decoder = run.base.decoder
    return LanguageModel(decoder, load_params(finetuned_at(run, arm), decoder, inference=True))


def finetuned_at(run: Run, arm: str) -> epath.Path:
    """Where its checkpoints are."""
    return run.directory("finetune") / arm / "checkpoints"
