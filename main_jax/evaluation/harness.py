"""`main-jax evaluate --model ... --tasks ...`: lm-evaluation-harness on our engine, without torch.

    evaluate_model("runs/own", ["ifeval", "openllm"], "results.json")

The tasks, their prompts, few-shot examples and metrics are the harness's; likelihoods and texts are ours
(`adapter.py`). Of several processes the first one runs the harness, and all share the requests.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from main_jax import pairs
from main_jax.checks import check_output
from main_jax.errors import UserError
from main_jax.evaluation import tasks as task_files
from main_jax.evaluation.published import published
from main_jax.evaluation.subject import mesh_of, open_exported
from main_jax.lm.multihost import first
from main_jax.lm.progress import say
from main_jax.run import versions
from main_jax.tools.files import partial_folder

OLDEST = (0, 4, 13)
BOOTSTRAPS = 1000
SEEDS = {"random": 0, "numpy": 1234, "fewshot": 1234, "sampling": 0}
"""The harness's own, which decide the few-shot examples of published numbers; sampling's is ours."""


def evaluate_model(
    model: str,
    tasks: Sequence[str],
    output: str,
    *,
    arm: str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool | None = None,
    system_instruction: str | None = None,
    include_path: str | None = None,
    ifeval_prompts: str | None = None,
    max_length: int | None = None,
    tokens_per_batch: int = 8192,
    batch_size: int = 32,
    random_seed: int | None = None,
    log_samples: bool = False,
    inference_mesh: Sequence[int] | None = None,
) -> None:
    """Writes `output`, and on the first process prints the results as tables.

    Raises UserError, one line; before anything is computed where that can be.
    """
    apart = ("model", "output", "log_samples", "inference_mesh")
    settings = {name: value for name, value in locals().items() if name not in apart}
    _check_harness()
    task_files.check_names(tasks, ifeval_prompts)
    output = str(epath.Path(output).expanduser())
    if not output.endswith(".json") or Path(output).is_dir():
        raise UserError(f"--output: {output}: expected a file whose name ends in .json")
    check_output(Path(output).parent, "--output")
    subject = open_exported(model, arm)
    checkpoint, mesh = subject.checkpoint, mesh_of(subject, inference_mesh)
    max_length = max_length or checkpoint.decoder.config.max_position_embeddings
    tokenizer = checkpoint.prompt("none", max_length).tokenizer  # and that it belongs to the model
    tokenizer.chat_template = subject.chat_template or tokenizer.chat_template
    if apply_chat_template and not tokenizer.chat_template:
        raise UserError("--apply-chat-template: the model's tokenizer has no chat template")
    seeds = SEEDS if random_seed is None else dict.fromkeys(SEEDS, random_seed)

    from main_jax.evaluation.adapter import HarnessModel

    facts = settings | {"model": subject.digest}
    with partial_folder(output, facts) as folder:
        lm = HarnessModel(
            checkpoint, tokenizer, folder, max_length=max_length,
            tokens_per_batch=tokens_per_batch, batch_size=batch_size, seed=seeds["sampling"],
            mesh=mesh, stop_ids=subject.stop_ids,
        )  # fmt: skip

        def run() -> dict[str, Any]:
            _seed(seeds)
            say(f"loading {', '.join(tasks)}")
            loaded = task_files.load_tasks(tasks, include_path, ifeval_prompts)
            for name, task in loaded["tasks"].items():
                _set_examples(name, task, num_fewshot, seeds["fewshot"])
                if task.OUTPUT_TYPE == "generate_until":
                    lm.plan(json.dumps(task.config.generation_kwargs, sort_keys=True))
            multiturn = (
                apply_chat_template if fewshot_as_multiturn is None else fewshot_as_multiturn
            )
            return _evaluate(
                lm, loaded, limit=limit, log_samples=log_samples, system_instruction=system_instruction,
                apply_chat_template=apply_chat_template, fewshot_as_multiturn=multiturn,
            )  # fmt: skip

        if not first():
            lm.calls.serve()
            return
        found = lm.calls.lead(run)
        how = settings | {"model": model, "max_length": max_length, "seeds": seeds}
        how |= {"inference_mesh": dataclasses.asdict(mesh)}
        _write(output, found, how)
    print(show(found))
    say(f"{output}: written")


def _check_harness() -> None:
    try:
        found = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or tuple(int(n) for n in found.split(".")[:3] if n.isdigit()) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        what = f"found lm_eval {found}, need {oldest}" if found else "needs lm-evaluation-harness"
        raise UserError(f"evaluate --tasks: {what}; pip install 'main-jax[eval]'")


def _seed(seeds: dict[str, int]) -> None:
    random.seed(seeds["random"])
    np.random.seed(seeds["numpy"])  # tasks draw from the global generators


def _set_examples(name: str, task: Any, num_fewshot: int | None, seed: int) -> None:
    """As the harness's own command line: a task that says 0 keeps it."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    elif own == 0 and num_fewshot:
        say(f"{name}: has no examples in its prompt, whatever --num-fewshot says")
    task.set_fewshot_seed(seed=seed)


def _evaluate(lm: Any, loaded: dict[str, Any], **how: Any) -> dict[str, Any]:
    # Forking after JAX has started can deadlock: the harness is not to bootstrap in child processes.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    from lm_eval.evaluator import evaluate

    found = evaluate(lm, loaded, bootstrap_iters=BOOTSTRAPS, **how)
    assert found is not None, "this is the harness's only process"
    return dict(found)


def _write(output: str, found: dict[str, Any], how: dict[str, Any]) -> None:
    from lm_eval.utils import handle_non_serializable

    samples = found.pop("samples", None)
    if samples is not None:
        rows = [{"task": name} | sample for name, those in samples.items() for sample in those]
        rows = json.loads(json.dumps(rows, default=handle_non_serializable))
        pairs.write_jsonl(output.removesuffix(".json") + ".samples.jsonl", rows)
    packages = ("lm_eval", "datasets", "tokenizers")
    software = versions() | {name: importlib.metadata.version(name) for name in packages}
    everything = {"normalised": published(found)} | found | {"how": how, "software": software}
    pairs.write_json(output, json.loads(json.dumps(everything, default=handle_non_serializable)))


def show(found: dict[str, Any]) -> str:
    """The results as tables: the harness's, and the leaderboards' own numbers."""
    from lm_eval.utils import make_table

    parts = [make_table(found).rstrip()]
    for name, scores in published(found).items():
        rows = [f"{task:<12}{score:>8.2f}" for task, score in scores.items()]
        parts.append("\n".join([f"{name}, as published (%)", *rows]))
    return "\n\n".join(parts)
