"""A run's directory with a trained arm, without the hours: what a verb that reads a run looks at."""

import json
from pathlib import Path

import yaml
from etils import epath

from main_jax.data.files import digest
from main_jax.lm.checkpoint import Checkpoints
from main_jax.lm.hf import load_checkpoint
from main_jax.pipeline import existing_run

CONFIG = {
    "prompt": {"max_length": 64, "template": "none"},
    "data": {"seed_path": "seed.jsonl", "responses_path": "texts.jsonl"},
    "finetune": {"arms": ["seed_only"]},
}


def start_run(folder: Path, model: str, **config) -> None:
    """Prepared and finetuned, by the manifests, of another configuration: nothing is done for this one."""
    folder.mkdir()
    values = {"model_name_or_path": model} | CONFIG | config
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    for stage in ("prepare", "finetune"):
        run = existing_run(str(folder))
        run.directory(stage).mkdir(parents=True)
        manifest = {"status": "done", "inputs": {"model": digest(epath.Path(model))}}
        (run.directory(stage) / "manifest.json").write_text(json.dumps(manifest))


def finish_run(folder: Path, trained: str) -> None:
    """The arm `mutual` has the parameters of the model folder `trained`."""
    run = existing_run(str(folder))
    for stage in ("prepare", "finetune"):  # in order: a fingerprint has those before in it
        file = run.directory(stage) / "manifest.json"
        manifest = json.loads(file.read_text()) | {"fingerprint": run.fingerprint(stage)}
        file.write_text(json.dumps(manifest))
    with Checkpoints(run.directory("finetune") / "mutual" / "checkpoints") as checkpoints:
        checkpoints.save_params(3, load_checkpoint(trained, "float32")[1])
