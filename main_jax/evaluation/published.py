"""The two Open LLM Leaderboards' own numbers, from the harness's raw results. All in percent.

v1 (`openllm`): the plain mean of six tasks, MMLU being the plain mean of its subjects.

v2 (`leaderboard`): a score x of a task that guessing gets right in b of all cases counts
max(0, x - b) / (1 - b); tasks with parts are the mean over the parts so rescaled. From
https://huggingface.co/docs/leaderboards/open_llm_leaderboard/normalization.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

OPENLLM = Path(__file__).with_name("openllm.yaml")

V1 = {
    "ARC": ("arc_challenge", "acc_norm,none"),
    "HellaSwag": ("hellaswag", "acc_norm,none"),
    "TruthfulQA": ("truthfulqa_mc2", "acc,none"),
    "Winogrande": ("winogrande", "acc,none"),
    "GSM8K": ("gsm8k", "exact_match,strict-match"),
}

CHOICES = {
    "BBH": {
        "boolean_expressions": 2, "causal_judgement": 2, "date_understanding": 6,
        "disambiguation_qa": 3, "formal_fallacies": 2, "geometric_shapes": 11, "hyperbaton": 2,
        "logical_deduction_five_objects": 5, "logical_deduction_seven_objects": 7,
        "logical_deduction_three_objects": 3, "movie_recommendation": 6, "navigate": 2,
        "object_counting": 19, "penguins_in_a_table": 5, "reasoning_about_colored_objects": 18,
        "ruin_names": 6, "salient_translation_error_detection": 6, "snarks": 2,
        "sports_understanding": 2, "temporal_sequences": 4,
        "tracking_shuffled_objects_five_objects": 5, "tracking_shuffled_objects_seven_objects": 7,
        "tracking_shuffled_objects_three_objects": 3, "web_of_lies": 2,
    },
    "MuSR": {"murder_mysteries": 2, "object_placements": 5, "team_allocation": 3},
}  # fmt: skip
"""Of the parts of v2's multiple-choice tasks, `leaderboard_bbh_...` and `leaderboard_musr_...`."""


def published(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The numbers of each leaderboard that was asked for, its `average` last.

    `found` is what the harness returns: `results` and `group_subtasks` are read.
    """
    groups = {"openllm": _openllm, "leaderboard": _leaderboard}
    numbers = {name: of(found) for name, of in groups.items() if name in found["group_subtasks"]}
    return {name: scores | {"average": _mean(scores.values())} for name, scores in numbers.items()}


def above_guessing(score: float, choices: float) -> float:
    """Percent of the way from guessing among so many choices to always right; 0 below it."""
    guess = 1 / choices
    return 100 * max(0.0, score - guess) / (1 - guess)


def _openllm(found: Mapping[str, Any]) -> dict[str, float]:
    results = found["results"]
    scores = {name: 100 * results[task][metric] for name, (task, metric) in V1.items()}
    subjects = _members("mmlu", found["group_subtasks"])
    return scores | {"MMLU": _mean(100 * results[task]["acc,none"] for task in subjects)}


def _members(name: str, groups: Mapping[str, list[str]]) -> list[str]:
    """The tasks of a group and of the groups in it."""
    if name not in groups:
        return [name]
    return [task for member in groups[name] for task in _members(member, groups)]


def _leaderboard(found: Mapping[str, Any]) -> dict[str, float]:
    def score(task: str, metric: str) -> float:
        return found["results"][f"leaderboard_{task}"][f"{metric},none"]

    levels = ("prompt", "inst")
    return {
        "IFEval": _mean(100 * score("ifeval", f"{level}_level_strict_acc") for level in levels),
        **{
            name: _mean(
                above_guessing(score(f"{name.lower()}_{part}", "acc_norm"), choices)
                for part, choices in parts.items()
            )
            for name, parts in CHOICES.items()
        },
        "MATH": 100 * score("math_hard", "exact_match"),
        "GPQA": above_guessing(score("gpqa", "acc_norm"), 4),
        "MMLU-Pro": above_guessing(score("mmlu_pro", "acc"), 10),
    }  # fmt: skip


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)
