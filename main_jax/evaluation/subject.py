"""Which model is measured: a model folder, a name on the hub, or a run's directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from etils import epath

from main_jax.config import Runtime
from main_jax.data.files import digest
from main_jax.errors import UserError
from main_jax.hub import find_model
from main_jax.lm.checkpoint import load_params
from main_jax.lm.sharding import MeshShape, make_mesh
from main_jax.models import Checkpoint, open_checkpoint
from main_jax.prompts import resolve_template


class Subject(NamedTuple):
    """A model to measure, no weights read yet.

    template: what it was trained with, where that is known, else `auto`. digest: changes with the weights.
    mesh: of a run's inference. chat_template, stop_ids: what an export of a run's arm would add to the
        tokenizer and to the ids that end a text.
    """

    name: str
    checkpoint: Checkpoint
    template: str | dict
    digest: str
    mesh: MeshShape = MeshShape()
    chat_template: str | None = None
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trained(Checkpoint):
    """The base model's folder with the parameters that a run has trained."""

    params: epath.Path

    def load(self, *, inference: bool = False) -> Any:
        """The parameters, as `Checkpoint.load` gives those of the folder."""
        return load_params(self.params, self.decoder, inference=inference)


def open_subject(model: str, template: str | None = None, arm: str | None = None) -> Subject:
    """The model that a user names.

    Args:
        model: DIR, org/name or RUN.
        template: in place of the run's own, or of `auto`.
        arm: of a run; by default the one trained on the configured filter's pairs.

    Raises:
        UserError: there is no such model, or the run has not trained it.
        CheckpointError: its folder is damaged.
    """
    chosen = None if template is None else resolve_template(template)
    if not (epath.Path(model).expanduser() / "config.yaml").exists():
        if arm is not None:
            raise UserError(f"--arm {arm}: {model} is no run")
        checkpoint = open_checkpoint(find_model(model, "--model"), Runtime())
        name = epath.Path(model.rstrip("/")).name
        return Subject(name, checkpoint, chosen or "auto", digest(epath.Path(checkpoint.path)))
    from main_jax.finetune import arms, finetuned_at
    from main_jax.pipeline import existing_run

    run = existing_run(model)
    arm = arm or run.config.filter.by
    if arm not in arms(run):
        raise UserError(f"--arm {arm}: this run has {', '.join(arms(run))}")
    if not run.is_done("finetune"):
        raise UserError(f"--model: {model}: stage finetune is not done; `main-jax run` it first")
    run.check_base()
    checkpoint = Trained(run.base.path, run.base.decoder, finetuned_at(run, arm))
    trained, prompt = f"{run.fingerprint('finetune')} {arm}", run.inference_prompt
    return Subject(
        f"{run.path.name}-{arm}", checkpoint, chosen or run.template, trained,
        run.config.inference_mesh, prompt.chat_template(), prompt.stop_ids,
    )  # fmt: skip


def open_exported(model: str, arm: str | None = None) -> Subject:
    """As `open_subject`; but of a run, without an `arm`, the folder that it has exported, if it has."""
    folder = epath.Path(model).expanduser()
    if arm or not ((folder / "config.yaml").exists() and (folder / "hf" / "config.json").exists()):
        return open_subject(model, arm=arm)
    from main_jax.pipeline import existing_run

    return open_subject(str(folder / "hf"))._replace(mesh=existing_run(model).config.inference_mesh)


def mesh_of(subject: Subject, asked: Sequence[int] | None) -> MeshShape:
    """The sizes that were asked for, else the subject's. Raises UserError where they do not fit here."""
    try:
        shape = MeshShape(*asked) if asked else subject.mesh
        make_mesh(shape, jax.local_devices())
    except ValueError as error:
        raise UserError(f"--inference-mesh: {error}") from None
    return shape
