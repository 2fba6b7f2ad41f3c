"""The options of `main-jax evaluate` of any model, beside the stage `main-jax evaluate CONFIG`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from main_jax import processes
from main_jax.errors import UserError

HARNESS = (
    "model", "tasks", "output", "num_fewshot", "limit", "apply_chat_template",
    "fewshot_as_multiturn", "system_instruction", "include_path", "ifeval_prompts", "max_length",
    "tokens_per_batch", "batch_size", "random_seed", "log_samples", "arm", "inference_mesh",
)  # fmt: skip
SHARED = ("model", "output", "batch_size", "random_seed", "arm", "inference_mesh")
JUDGE = (
    "reference", "judge_url", "judge_model", "judge_key_env", "judge_prompt", "judge_parameters",
    "judge_concurrency",
)  # fmt: skip
ALPACA = (
    "alpaca_eval", "generator", "template", "max_new_tokens", "temperature", "top_p", "top_k", *JUDGE,
)  # fmt: skip
NAMES = (*HARNESS, *ALPACA)
"""None where they are not given: they do not belong to a run's stage."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The group "a model"."""
    parser.usage = (
        f"{parser.usage}\n       {parser.prog} --model DIR|RUN --tasks ifeval,... --output FILE"
    )
    parser.epilog = (
        f"{parser.epilog}\n  {parser.prog} --model runs/own --tasks ifeval --output ifeval.json"
        f"\n  {parser.prog} --model DIR --tasks openllm,mine.yaml --limit 100 --output quick.json"
    )
    group = parser.add_argument_group(
        "a model, by lm-evaluation-harness",
        "Needs pip install 'main-jax[eval]'. What is stopped continues with the same command.",
    )

    def add(name: str, text: str, **how) -> None:
        group.add_argument(name, default=None, help=text, **how)

    add("--model", "model folder or hub name, or a run's directory", metavar="DIR")
    add("--arm", "of a run; default: the configured filter's", metavar="ARM")
    add(
        "--tasks",
        "with commas between: the harness's names, openllm (Open LLM Leaderboard v1), leaderboard (v2), "
        "task files",
        metavar="TASKS",
    )
    add("--output", "JSON: every result, and how it was measured; default for a RUN: in its evaluations/",
        metavar="FILE")  # fmt: skip
    add(
        "--num-fewshot",
        "examples in the prompt; default: the task's",
        type=processes.natural,
        metavar="N",
    )
    add("--limit", "the first N of each task, below 1 a share: to try it", type=_limit, metavar="N")
    add("--apply-chat-template", "prompts are the user's turns of the tokenizer's chat template",
        action="store_true")  # fmt: skip
    add("--fewshot-as-multiturn", "examples are turns of their own; default: with a chat template",
        action=argparse.BooleanOptionalAction)  # fmt: skip
    add("--system-instruction", "of every prompt", metavar="TEXT")
    add("--include-path", "folder of further task files, to be asked for by name", metavar="DIR")
    add("--ifeval-prompts", "JSONL in place of google/IFEval", metavar="FILE")
    add("--max-length", "tokens seen at once; default: the model's positions", type=processes.positive,
        metavar="N")  # fmt: skip
    add(
        "--tokens-per-batch",
        "padded tokens scored at once (8192)",
        type=processes.positive,
        metavar="N",
    )
    add("--batch-size", "texts generated at once (32)", type=processes.positive, metavar="B")
    add("--random-seed", "of few-shot examples and sampling; default: the harness's (0, 1234, 1234)",
        type=processes.natural, metavar="S")  # fmt: skip
    add("--log-samples", "also write every prompt and answer, beside FILE", action="store_true")
    add(
        "--inference-mesh",
        "devices of each process along these axes, one may be -1: the rest; default: the RUN's, else 1,-1,1",
        type=_mesh, metavar="DATA,FSDP,TENSOR",
    )  # fmt: skip


def add_alpaca_options(parser: argparse.ArgumentParser) -> None:
    """The group "AlpacaEval"; it shares `SHARED` with the other."""
    example = f"{parser.prog} --model runs/own --alpaca-eval alpaca_eval.json --output mine.json"
    parser.epilog = f"{parser.epilog}\n  {example}"
    group = parser.add_argument_group(
        "a model, by AlpacaEval",
        "Writes the outputs that judges read; asks a judge only where --judge-url is given, with the key in "
        "OPENAI_API_KEY. What is stopped continues with the same command.",
    )

    def add(name: str, text: str, **how: Any) -> None:
        group.add_argument(name, default=None, help=text, **how)

    add("--alpaca-eval", "instructions: AlpacaEval's JSON list, or any source", metavar="QUESTIONS")
    add(
        "--generator",
        "what the outputs' author is called; default: the model's name",
        metavar="NAME",
    )
    add("--template", "default: the run's, else auto; auto, chat, plain, none or a YAML file")
    add("--max-new-tokens", "of an output (1024)", type=processes.positive, metavar="N")
    add("--temperature", "0, the default, is greedy", type=float)
    add("--top-p", "default: 1", type=float)
    add("--top-k", "default: 0, off", type=int)
    add("--reference", "outputs to the same instructions, to compare with", metavar="FILE")
    add("--judge-url", "an OpenAI-compatible endpoint, https://HOST/v1", metavar="URL")
    add("--judge-model", "a name that it knows", metavar="NAME")
    add("--judge-key-env", "environment variable with the key (OPENAI_API_KEY)", metavar="NAME")
    add("--judge-prompt", "text in place of ours, see docs/alpaca-eval.md", metavar="FILE")
    add("--judge-parameters", 'of every request, over {"temperature": 0}', metavar="JSON")
    add("--judge-concurrency", "requests at once (8)", type=processes.positive, metavar="N")


def _mesh(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if len(sizes) != 3 or not all(re.fullmatch(r"-1|[1-9]\d*", size) for size in sizes):
        raise argparse.ArgumentTypeError(f"expected three numbers like 1,-1,1, not {text!r}")
    return tuple(map(int, sizes))


def _limit(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (0 < value < 1 or (value >= 1 and value == int(value))):
        raise argparse.ArgumentTypeError(f"expected a number, or a share below 1, not {text!r}")
    return value


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `harness.evaluate_model` is called with. Raises UserError for what lacks."""
    given = _given(arguments, HARNESS, ALPACA, "--tasks")
    if "tasks" in given and "model" in given:
        given.setdefault("output", _in_run(given, given["tasks"]))
    for name in ("model", "tasks", "output"):
        if not given.get(name):
            raise UserError(f"evaluate needs CONFIG, or --{name} (see main-jax evaluate --help)")
    given["tasks"] = [name.strip() for name in given["tasks"].split(",") if name.strip()]
    return given


def alpaca_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is given of the AlpacaEval options. Raises UserError for what lacks."""
    given = _given(arguments, (*ALPACA, *SHARED), HARNESS, "--alpaca-eval")
    judging = any(name in JUDGE for name in given)
    if judging and not {"judge_url", "judge_model", "reference"} <= given.keys():
        raise UserError("judging needs --judge-url, --judge-model and --reference")
    if "alpaca_eval" in given and "model" in given:
        given.setdefault("output", _in_run(given, "alpaca_eval"))
    if not given.get("output") or ("alpaca_eval" in given) != ("model" in given):
        raise UserError("AlpacaEval needs --output, and --alpaca-eval together with --model")
    if "alpaca_eval" not in given:
        for name in given:
            if name not in (*JUDGE, "output", "random_seed"):
                raise UserError(
                    f"{processes.option(name)}: does not go with judging outputs that are there "
                    "(--alpaca-eval is not given)"
                )
    return given


def by_alpaca_eval(arguments: argparse.Namespace) -> bool:
    """Whether AlpacaEval is asked for, or the judging of its outputs."""
    return bool(arguments.alpaca_eval or arguments.judge_url or arguments.reference)


def _given(
    arguments: argparse.Namespace, ours: Sequence[str], others: Sequence[str], key: str
) -> dict[str, Any]:
    for name in others:
        if name not in ours and getattr(arguments, name) is not None:
            raise UserError(f"{processes.option(name)}: does not go with {key}")
    return {n: value for n in ours if (value := getattr(arguments, n)) is not None}


def _in_run(given: dict[str, Any], name: str) -> str | None:
    """Where the results of a run's model stand, if it is one."""
    if (run := run_folder(given["model"])) is None:
        return None
    stems = [Path(word.strip()).stem for word in name.split(",") if word.strip()]
    stems += [given["arm"]] if "arm" in given else []
    return str(run / "evaluations" / f"{'-'.join(stems)}.json")


def run_folder(model: str) -> epath.Path | None:
    """The directory of a run, where `--model` names one."""
    folder = epath.Path(model).expanduser()
    return folder if (folder / "config.yaml").exists() else None
