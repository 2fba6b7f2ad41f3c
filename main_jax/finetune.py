"""Step 4: the base model is trained on the kept pairs and the seed pairs.

Each *arm* is one final set, trained from the same base with the same number of steps: the configured
filter, and any others that the configuration wants beside it. Equal steps favour small sets, which are seen
more often; an arm `NAME-epochs` is the set of NAME, trained for as many epochs as the configured filter's.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import compress

import numpy as np
from etils import epath

from main_jax.filter import MEASURED, keep_by
from main_jax.lm.batches import UnitStream, shared_shape
from main_jax.lm.checkpoint import load_params
from main_jax.lm.sharding import row_shards
from main_jax.lm.train import fit
from main_jax.models import LanguageModel
from main_jax.parts import Rows, read_parts
from main_jax.prompts import Direction
from main_jax.run import Run, derive_seed
from main_jax.units import TokenPair, pair_units, tokenise
from main_jax.weighting import Weighting


def finetune(run: Run, out: epath.Path) -> dict[str, int]:
    """Trains every arm; the final parameters lie under `out/ARM/checkpoints`."""
    settings, prompt = run.config.finetune, run.prompt
    chunk_rows = run.config.runtime.chunk_rows

    def tokens(part: str) -> list[TokenPair | None]:
        return tokenise(run.rows("prepare", part), out / "tokens" / part, prompt, chunk_rows)

    told = settings.system_prompts
    of_seed, of_augmented = run.prompt_with(told.seed), run.prompt_with(told.augmented)
    seed_units = pair_units(tokens("seed"), Direction.FORWARD, of_seed)
    held_out = pair_units(tokens("validation"), Direction.FORWARD, run.inference_prompt)
    scored = Rows(run.directory("filter") / "data")
    kept = {arm: kept_by_arm(run, arm) for arm in arms(run)}
    wanted = set(compress(scored.column("id"), np.any(list(kept.values()), axis=0)))
    pairs = tokenise(scored, out / "tokens" / "augmented", prompt, chunk_rows, wanted)
    sets, counts = {}, {}
    order_seed = derive_seed(run.config.seed, "finetune")
    for arm, chosen in kept.items():
        units = pair_units(list(compress(pairs, chosen)), Direction.FORWARD, of_augmented)
        sets[arm] = seed_units + units
        counts[f"{arm}_kept"] = int(chosen.sum())
        if len(units) < chosen.sum():  # with what the system says they are longer
            counts[f"{arm}_too_long"] = int(chosen.sum()) - len(units)

    epochs = settings.epochs(len(sets[run.config.filter.by]))
    trainings = {
        arm: replace(settings, num_train_epochs=epochs, max_steps=None)
        if equal_epochs(arm)
        else settings
        for arm in sets
    }

    streams = [
        UnitStream(
            units, units_per_microbatch=trainings[arm].units_per_microbatch,
            microbatches=settings.gradient_accumulation_steps,
            steps=trainings[arm].steps(len(units)), seed=order_seed, limit=prompt.max_length,
            packing=settings.packing, rows_multiple=row_shards(),
        )
        for arm, units in sets.items()
    ]  # fmt: skip
    shared = shared_shape(streams)  # one compiled step for all arms
    for arm, units in sets.items():
        fit(
            run.base.decoder, run.base.load, units, trainings[arm],
            directory=out / arm, weighting=Weighting(strategy="constant"),
            seed=order_seed, label=f"finetune {arm}",
            limit=prompt.max_length, validation=[e for u in held_out for e in u.examples],
            shape=shared, reporting=run.reporting,
        )  # fmt: skip
    return counts


EPOCHS = "-epochs"
"""Suffix of an arm that is trained for as many epochs, not steps."""


def equal_epochs(arm: str) -> bool:
    """Whether it is one of those."""
    return arm.endswith(EPOCHS)


def arms(run: Run) -> list[str]:
    """The arms in order, the configured filter among them."""
    return list(dict.fromkeys([*run.config.finetune.arms, run.config.filter.by]))


def kept_by_arm(run: Run, arm: str) -> np.ndarray:
    """[N] bool over the rows of the filter stage: what this arm trains on beside the seed."""
    settings, directory = run.config.filter, run.directory("filter") / "data"
    arm = arm.removesuffix(EPOCHS)
    if arm == "oracle":
        from main_jax.world.measure import oracle_kept

        return oracle_kept(run, read_parts(directory), settings.keep)
    table = read_parts(directory, [*MEASURED, arm])
    if arm == "seed_only":
        return np.zeros(table.num_rows, bool)
    return keep_by(table, arm, settings.select, settings.keep)


def finetuned(run: Run, arm: str) -> LanguageModel:
    """The final model of an arm."""
    decoder = run.base.decoder
    return LanguageModel(decoder, load_params(finetuned_at(run, arm), decoder, inference=True))


def finetuned_at(run: Run, arm: str) -> epath.Path:
    """Where its checkpoints are."""
    return run.directory("finetune") / arm / "checkpoints"
