"""What a run hands out: one of its models as a folder that Transformers loads.

The folder carries the base model's config and tokenizer, the ids that end a text, and, where the run's
template is not the tokenizer's own, a chat template that says the same, so that
`apply_chat_template` gives what the model was trained on.
"""

from __future__ import annotations

import jax.numpy as jnp
from etils import epath

from main_jax.align import trained_at
from main_jax.checks import check_new
from main_jax.convert import new_folder, write_hf
from main_jax.errors import UserError
from main_jax.finetune import arms, finetuned_at
from main_jax.lm.checkpoint import stored_params
from main_jax.lm.progress import say
from main_jax.lm.tokenizer import PROBE
from main_jax.models import stored_dtype
from main_jax.prompts import REVERSE_REQUEST, Direction
from main_jax.run import Run


def export(run: Run, out: epath.Path) -> dict[str, int]:
    """The stage: the final model in `RUN/hf`."""
    settings = run.config.export
    write_model(run, out, run.config.filter.by, settings.dtype, settings.max_shard_bytes)
    return {"parameters": run.base.decoder.config.num_params()}


def export_model(
    run: Run, destination: str, model: str | None, dtype: str, max_shard_bytes: int | None
) -> None:
    """The verb: any model of the run, in a new folder. Raises UserError."""
    target = check_new(destination, "DST")
    name = model or run.config.filter.by
    known = models(run)
    if name not in known:
        raise UserError(f"--model {name}: this run has {', '.join(known)}")
    stage, _ = known[name]
    if not run.is_done(stage):
        raise UserError(
            f"{run.path}: stage {stage} is not done for this run's config.yaml; `main-jax run` it first"
        )
    run.check_base()
    params = run.base.decoder.config.num_params()
    size = jnp.dtype(stored_dtype(run.base.path) if dtype == "auto" else dtype).itemsize
    with new_folder(target, params * size) as folder:
        write_model(run, folder, name, dtype, max_shard_bytes)
    say(f"{destination}: the model {name} of {run.path}")


def models(run: Run) -> dict[str, tuple[str, epath.Path]]:
    """The models of a run by name: the stage that trains each, and its checkpoints."""
    out, last = run.directory("align"), f"round-{run.config.align.rounds}"
    found = {arm: ("finetune", finetuned_at(run, arm)) for arm in arms(run)}
    return found | {str(d): ("align", trained_at(out, last, d)) for d in Direction}


def write_model(
    run: Run, folder: epath.Path, name: str, dtype: str, max_shard_bytes: int | None
) -> None:
    """Writes the model `name` as a Hugging Face folder; `auto` is the dtype of the base model."""
    base = run.base
    prompt = run.prompt if name in (str(d) for d in Direction) else run.inference_prompt
    direction = Direction.REVERSE if name == Direction.REVERSE else Direction.FORWARD
    chat_template = prompt.chat_template(direction)
    write_hf(
        folder, base.path, base.decoder.config, stored_params(models(run)[name][1]),
        stored_dtype(base.path) if dtype == "auto" else dtype, max_shard_bytes,
        stop_ids=prompt.stop_ids, chat_template=chat_template,
    )  # fmt: skip
    request = PROBE
    if direction is Direction.REVERSE and chat_template is None:
        request = REVERSE_REQUEST.format(PROBE)
    asked = prompt.tokenizer.apply_chat_template(
        [{"role": "user", "content": request}],
        chat_template=chat_template, add_generation_prompt=True, return_dict=True,
    )["input_ids"]  # fmt: skip
    trained = prompt.question(direction, prompt.encode(PROBE), 10**6)
    if trained is not None and list(asked) != trained.tolist():
        # Training joins the ids of the parts; SentencePiece puts a space before each of them.
        say(
            f"{folder}: note: apply_chat_template gives the text that {name} was trained on, but "
            "splits it into other tokens where the template meets the user's text"
        )
