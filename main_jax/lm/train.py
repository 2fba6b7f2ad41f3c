"""The training loop: steps, metrics, checkpoints, validation; resumed bit for bit wherever it stopped.

    fit(decoder, load_base, units, settings, directory=..., weighting=...)

The batch of a step is a pure function of the data, the seed and the step number: these are all that a
checkpoint says of the position in the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from main_jax.lm.batches import Example, Shape, Unit, UnitStream, pack_table
from main_jax.lm.checkpoint import BestParams, Checkpoints
from main_jax.lm.loss import example_nlls
from main_jax.lm.metrics import MetricsLog, Reporting, Sinks
from main_jax.lm.model import Decoder
from main_jax.lm.multihost import Preempted, first, stop_asked
from main_jax.lm.progress import track
from main_jax.lm.sharding import place_rows, row_shards
from main_jax.lm.step import ExampleWeights, Optimizer, abstract_state, init_state, train_step


@dataclass(frozen=True)
class TrainingSettings:
    """Hyperparameters of one training, under the names that the field uses.

    max_steps: optimiser steps; null: from num_train_epochs.
    train_batch_size: units (pairs with their twins) per optimiser step, over all devices: results do not
        depend on how many there are.
    gradient_accumulation_steps: microbatches that a step is computed in.
    min_learning_rate_ratio: where the linear or cosine schedule ends, as a share of learning_rate.
    adam_mu_dtype: of the first moment; bfloat16 saves 2 of 12 bytes per parameter.
    loss_normalization: `example` divides by Σ w_i, `token` by Σ w_i·(target tokens).
    save_steps, logging_steps, eval_steps: in optimiser steps; eval_steps null: only at the end.
    save_total_limit: checkpoints of an unfinished training that are kept, the newest.
    load_best_model_at_end: end with the parameters of the evaluated step whose validation NLL is lowest (the
        first such step); needs eval_steps and validation data.
    early_stopping_patience: the training ends after so many evaluations in a row that were no better; null:
        never before its last step.
    """

    learning_rate: float = 1e-5
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    min_learning_rate_ratio: float = 0.1
    warmup_ratio: float = 0.03
    max_steps: int | None = None
    num_train_epochs: float = 1.0
    train_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    adam_mu_dtype: Literal["float32", "bfloat16"] = "float32"
    max_grad_norm: float = 1.0
    loss_normalization: Literal["example", "token"] = "example"
    packing: bool = True
    save_steps: int = 200
    logging_steps: int = 10
    eval_steps: int | None = None
    save_total_limit: int = 1
    load_best_model_at_end: bool = False
    early_stopping_patience: int | None = None

    def steps(self, num_units: int) -> int:
        """Optimiser steps for a data set of `num_units`."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil(self.num_train_epochs * num_units / self.train_batch_size))

    def no_better_since(self, best: int, step: int) -> bool:
        """Whether a training whose best evaluated step was `best` ends at `step`."""
        if self.early_stopping_patience is None or self.eval_steps is None:
            return False
        return step - best >= self.early_stopping_patience * self.eval_steps

    def epochs(self, num_units: int) -> float:
        """How often a data set of `num_units` is seen."""
        return self.steps(num_units) * self.train_batch_size / num_units

    @property
    def units_per_microbatch(self) -> int:
        """Units that go through the model at once."""
        return self.train_batch_size // self.gradient_accumulation_steps

    def __post_init__(self):
        if self.train_batch_size % max(1, self.gradient_accumulation_steps):
            raise ValueError(
                f"train_batch_size {self.train_batch_size} must be a multiple of "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps}"
            )
        if self.load_best_model_at_end and not self.eval_steps:
            raise ValueError("load_best_model_at_end chooses among evaluations; set eval_steps")
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError("early_stopping_patience: set load_best_model_at_end to true as well")

    def optimizer(self) -> Optimizer:
        """The part that is compiled into the step."""
        return Optimizer(
            beta1=self.adam_beta1,
            beta2=self.adam_beta2,
            epsilon=self.adam_epsilon,
            mu_dtype=self.adam_mu_dtype,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            loss_normalization=self.loss_normalization,
        )

    def schedule(self, steps: int) -> optax.Schedule:
        """Learning rate per step: linear warm-up, then the named decay."""
        warmup, peak = math.ceil(self.warmup_ratio * steps), self.learning_rate
        rest, end = max(1, steps - warmup), self.min_learning_rate_ratio
        decay = {
            "cosine": optax.schedules.cosine_decay_schedule(peak, rest, end),
            "linear": optax.schedules.linear_schedule(peak, peak * end, rest),
            "constant": optax.schedules.constant_schedule(peak),
        }[self.lr_scheduler_type]
        if not warmup:
            return decay
        ramp = optax.schedules.linear_schedule(peak / (warmup + 1), peak, warmup)
        return optax.schedules.join_schedules([ramp, decay], [warmup])


def fit(
    decoder: Decoder,
    load_params: Callable[[], Any],
    units: Sequence[Unit],
    settings: TrainingSettings,
    *,
    directory: epath.PathLike,
    weighting: ExampleWeights,
    seed: int,
    label: str,
    limit: int,
    validation: Sequence[Example] = (),
    shape: Shape | None = None,
    progress: Callable[[int], float] | None = None,
    reporting: Reporting | None = None,
) -> None:
    """Trains and leaves the final parameters under `directory/checkpoints`.

    Args:
        decoder: the model.
        load_params: gives the initial parameters; called only when no checkpoint exists. Donated.
        units: training data.
        settings: hyperparameters.
        directory: gets `checkpoints/` and `metrics.jsonl`, and until the end perhaps `best/`.
        weighting: per-example weights.
        seed: of the data order.
        label: what the progress bar and errors call this training.
        limit: longest row, in tokens.
        validation: held-out examples; their mean NLL per token is logged.
        shape: of a microbatch, where several trainings are to share one compiled step.
        progress: step -> share of the schedule done, for the weighting; default: of this training.
        reporting: where metrics go besides `metrics.jsonl`.

    Raises:
        TrainingDiverged: a loss or gradient was not finite; the last good checkpoint stays.
        Preempted: the program was asked to stop; the step that it stopped at is saved.
        ValueError: no units; no validation to choose by; a checkpoint that was written with other data.
    """
    if settings.load_best_model_at_end and not validation:
        raise ValueError(
            f"{label}: load_best_model_at_end chooses by validation data and there is none; "
            "set data.validation_share"
        )
    directory = epath.Path(directory)
    steps = settings.steps(len(units))
    # The sinks end last: what is being saved is on disk before anybody waits for a network.
    with ExitStack() as last, ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(directory / "checkpoints", keep=settings.save_total_limit)
        )
        start = checkpoints.latest_step or 0
        if start >= steps:
            finish(checkpoints, start, directory / "best")
            return
        data = {"seed": seed, "units": len(units), "units_per_step": settings.train_batch_size}
        position = checkpoints.position(start) if start else {"data": data, "best": None}
        if position["data"] != data:
            raise ValueError(
                f"{label}: the checkpoint of step {start} has seen {position['data']}, not {data}"
            )
        stream = UnitStream(
            units,
            units_per_microbatch=settings.units_per_microbatch,
            microbatches=settings.gradient_accumulation_steps,
            steps=steps,
            seed=seed,
            limit=limit,
            packing=settings.packing,
            shape=shape,
            rows_multiple=row_shards(),
        )
        optimizer = settings.optimizer()
        rates = settings.schedule(steps)(jnp.arange(steps))
        rates = np.broadcast_to(np.asarray(rates, np.float32), steps)
        if start:
            state = checkpoints.restore(start, abstract_state(decoder, optimizer, weighting))
        else:
            state = init_state(load_params(), decoder.config, optimizer, weighting)
        best = None
        if settings.load_best_model_at_end:
            kept = BestParams(directory / "best", checkpoints, position["best"])
            best = stack.enter_context(kept)
        sinks = last.enter_context(Sinks(reporting or Reporting(), directory, label, start))
        log = MetricsLog(directory / "metrics.jsonl", keep_steps=start, sinks=sinks)
        with track(label, steps, "steps", start) as bar:
            for step in range(start, steps):
                batch = place_rows(stream.batch(step), rows_axis=1)
                share = progress(step) if progress else step / steps
                state, metrics = train_step(
                    state, batch, rates[step], np.float32(share),
                    decoder=decoder, optimizer=optimizer, weighting=weighting,
                )  # fmt: skip
                done = step + 1
                log.add(done, metrics | {"learning_rate": rates[step]})
                if validation and (
                    done == steps or (settings.eval_steps and done % settings.eval_steps == 0)
                ):
                    nll = mean_nll(decoder, state.params, validation, limit)
                    log.add(done, {"validation_nll_nats_per_token": nll})
                    if best:
                        best.offer(done, nll, state.params)
                        if settings.no_better_since(best.step, done):
                            log.add(done, {"early_stop": 1})
                            break
                note = ""
                # Before the checkpoint: what is not on disk by then, a resumed run would not log again.
                if done % settings.logging_steps == 0 or done % settings.save_steps == 0:
                    note = f"loss {log.flush(label):.3f}"
                stop = done < steps and stop_asked()
                if stop:
                    log.flush(label)
                if done < steps and (stop or done % settings.save_steps == 0):
                    named = best.named() if best else None
                    checkpoints.save(done, state, {"data": data, "best": named})
                bar.advance(note=note)
                if stop:
                    raise Preempted(f"{label}: stopped at step {done} of {steps}")
        params = state.params
        if best and best.step:
            log.add(steps, {"best_step": best.step, "best_validation_nll_nats_per_token": best.nll})
            params = best.restore(decoder)
        log.flush(label)
        checkpoints.save_params(steps, params)
        finish(checkpoints, steps, directory / "best")


def finish(checkpoints: Checkpoints, step: int, best: epath.Path) -> None:
    """Leaves the final parameters alone, whatever is or was left beside them."""
    checkpoints.keep_only(step)
    if first() and best.exists():
        best.rmtree()


def mean_nll(
    decoder: Decoder, params, examples: Sequence[Example], limit: int, budget: int = 8192
) -> float:
    """Mean NLL in nats per target token over all examples (Σ nll / Σ tokens)."""
    total = count = 0.0
    for _, batch in pack_table(examples, budget, limit, row_shards()):
        ((sums, counts),) = example_nlls((decoder,), (params,), (place_rows(batch),))
        total += float(np.sum(np.asarray(sums), dtype=np.float64))
        count += float(np.sum(np.asarray(counts), dtype=np.float64))
    return total / count if count else float("nan")
