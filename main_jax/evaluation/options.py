"""The options of `main-jax evaluate` of any model, beside the stage `main-jax evaluate CONFIG`."""

from __future__ import annotations

import argparse
from typing import Any

from main_jax import processes
from main_jax.errors import UserError

NAMES = (
    "model", "tasks", "output", "num_fewshot", "limit", "apply_chat_template",
    "fewshot_as_multiturn", "system_instruction", "include_path", "ifeval_prompts", "max_length",
    "tokens_per_batch", "batch_size", "random_seed", "log_samples",
)  # fmt: skip
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
    add(
        "--tasks",
        "with commas between: the harness's names, openllm (Open LLM Leaderboard v1), leaderboard (v2), "
        "task files",
        metavar="TASKS",
    )
    add("--output", "JSON: every result, and how it was measured", metavar="FILE")
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
    given = {name: getattr(arguments, name) for name in NAMES}
    for name in ("model", "tasks", "output"):
        if not given[name]:
            raise UserError(f"evaluate needs CONFIG, or --{name} (see main-jax evaluate --help)")
    given["tasks"] = [name.strip() for name in given["tasks"].split(",") if name.strip()]
    return {name: value for name, value in given.items() if value is not None}
