"""Which of two outputs is better? A judge's verdict on every pair, in both orders, and the win rate.

    judge = open_judge("https://api.openai.com/v1", "MODEL")
    results = judge_outputs("outputs.json", "reference.json", judge)
    print(show(results))

Each pair is asked twice, with the positions swapped, and a question's score is the mean of the two: 1 for
the candidate, 0 for the reference, ½ for a tie. So a judge that always takes the first gives ½. A question
counts where both answers can be read; outputs that are the same tie without being asked.

OUTPUTS.judged.json gets the results with every answer, OUTPUTS.judged.cache each answer as it comes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from main_jax.data.files import brief, hashed
from main_jax.errors import UserError
from main_jax.evaluation.chat import PARAMETERS, Endpoint, ask_all, open_endpoint
from main_jax.evaluation.outputs import match, read_outputs
from main_jax.lm.multihost import barrier, first
from main_jax.lm.progress import say
from main_jax.pairs import write_json

PROMPT = Path(__file__).with_name("judge_prompt.txt")
PLACES = ("instruction", "output_a", "output_b")
PLACE = re.compile("{(" + "|".join(PLACES) + ")}")
VERDICT = re.compile(r"\[\[([ABC])\]\]")
POINTS = {"A": 1.0, "B": 0.0, "C": 0.5}
"""Of the output that stands first."""
SAME = (("A", "B"), ("B", "A"), ("C", "C"))
"""Verdicts that name the same output in both orders."""
CONFIDENCE, RESAMPLES = 0.95, 10_000
FAIR_LENGTHS = (0.8, 1.25)
"""Length ratios within which a win rate is taken for a matter of content (ours)."""

# ------------------------------------------------------------------------------------------- the judge


@dataclass(frozen=True)
class Judge:
    """Who is asked, with which words, and how many messages at once."""

    endpoint: Endpoint
    prompt: str
    concurrency: int = 8

    def message(self, instruction: str, a: str, b: str) -> str:
        """The prompt with its places filled; braces in the texts mean nothing."""
        texts = dict(zip(PLACES, (instruction, a, b), strict=True))
        return PLACE.sub(lambda place: texts[place[1]], self.prompt)


def open_judge(
    url: str,
    model: str,
    *,
    key_env: str | None = None,
    prompt: str | None = None,
    parameters: str | None = None,
    concurrency: int = 8,
) -> Judge:
    """A judge, nothing asked yet.

    Args:
        url: of an OpenAI-compatible API, up to `/v1`.
        model: a name that it knows.
        key_env: the environment variable with the key; default: OPENAI_API_KEY, where it is set.
        prompt: a file in place of ours, with {instruction}, {output_a} and {output_b} in it.
        parameters: a JSON object for every request, over `{"temperature": 0}`; null leaves one out.
        concurrency: messages at once.

    Raises:
        UserError: one of these will not do.
    """
    try:
        given = json.loads(parameters or "{}")
    except ValueError as error:
        raise UserError(f"--judge-parameters: not valid JSON ({brief(error)})") from None
    if not isinstance(given, dict):
        raise UserError("--judge-parameters: expected an object like {...}")
    endpoint = open_endpoint(url, model, key_env, {**PARAMETERS, **given})
    return Judge(endpoint, read_prompt(prompt), concurrency)


def read_prompt(file: str | None = None) -> str:
    """A user's judge prompt, or ours. Raises UserError where it lacks one of `PLACES`."""
    try:
        text = epath.Path(file or PROMPT).expanduser().read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--judge-prompt: {file}: cannot be read ({brief(error)})") from None
    for place in PLACES:
        if f"{{{place}}}" not in text:
            raise UserError(f"--judge-prompt: {file}: lacks {{{place}}}")
    return text


def verdict(answer: str) -> str | None:
    """A, B or C (a tie): the last [[A]], [[B]] or [[C]], or the letter alone; else None."""
    if found := VERDICT.findall(answer):
        return found[-1]
    alone = re.fullmatch(r"\W*([ABC])\W*", answer)
    return alone[1] if alone else None


# ------------------------------------------------------------------------------------------- a comparison


class Question(NamedTuple):
    """An instruction with the two outputs that are compared."""

    instruction: str
    candidate: str
    reference: str


def judge_outputs(
    output: str, reference: str, judge: Judge, seed: int = 0
) -> dict[str, Any] | None:
    """Compares two files of outputs; writes OUTPUT.judged.json and gives what stands there.

    Of several processes the first one asks and gets the results; the others wait and get None.

    Args:
        output: the candidate's, a .json file.
        reference: any file of pairs with the same instructions, in any order.
        judge: who is asked.
        seed: of the bootstrap.

    Raises:
        UserError: the reference lacks a question, the endpoint fails, or no answer can be read.
        Preempted: the program was asked to stop.
    """
    results = _judged(output, reference, judge, seed) if first() else None
    barrier(f"{output}: judged")
    return results


def _judged(output: str, reference: str, judge: Judge, seed: int) -> dict[str, Any]:
    base = str(epath.Path(output).expanduser().with_suffix(".judged"))
    rows = read_outputs(output, "--output")
    others = match([instruction for instruction, _ in rows], reference)
    questions = [Question(*row, other) for row, other in zip(rows, others, strict=True)]
    asked = [_messages(judge, question) for question in questions]
    answers = ask_all(
        judge.endpoint, [m for pair in asked for m in pair], f"{base}.cache", judge.concurrency
    )
    compared = [
        _compared(question, [answers[message] for message in pair])
        for question, pair in zip(questions, asked, strict=True)
    ]
    results = {
        "output": str(output), "reference": str(reference), "judge": judge.endpoint.model,
        "judge_prompt": hashed(judge.prompt), "judge_parameters": dict(judge.endpoint.parameters),
    } | summary(compared, seed)  # fmt: skip
    write_json(f"{base}.json", results | {"comparisons": compared})
    say(f"{base}.json: {len(rows):,} questions, judged by {judge.endpoint}")
    if results["win_rate"] is None:
        example = brief(compared[0]["answers"][0])
        raise UserError(
            f"{base}.json: no question with two readable answers; the first is {example!r}"
        )
    return results


def _messages(judge: Judge, question: Question) -> tuple[str, ...]:
    """What is asked: the candidate first, then second; nothing where the outputs are the same."""
    instruction, mine, other = question
    if mine == other:
        return ()
    return judge.message(instruction, mine, other), judge.message(instruction, other, mine)


def _compared(question: Question, answers: Sequence[str]) -> dict[str, Any]:
    verdicts = [verdict(answer) for answer in answers]
    return {
        "instruction": question.instruction,
        "score": score(*verdicts) if verdicts else 0.5,
        "verdicts": verdicts,
        "answers": list(answers),
        "characters": [len(question.candidate), len(question.reference)],
    }


def score(as_first: str | None, as_second: str | None) -> float | None:
    """The candidate's share, by the verdicts where it stood first and second; None where one is None."""
    if as_first is None or as_second is None:
        return None
    return (POINTS[as_first] + 1 - POINTS[as_second]) / 2


# ------------------------------------------------------------------------------------------- the figures


def summary(compared: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """What all comparisons come to.

    Lengths are compared by their means: a mean of ratios would be ruled by the shortest references.
    """
    scores = [c["score"] for c in compared if c["score"] is not None]
    verdicts = [v for c in compared for v in c["verdicts"]]
    pairs = [tuple(c["verdicts"]) for c in compared if c["verdicts"] and c["score"] is not None]
    unreadable = verdicts.count(None)
    mine, other = (float(np.mean([c["characters"][i] for c in compared])) for i in (0, 1))
    return {
        "win_rate": float(np.mean(scores)) if scores else None,
        "interval": bootstrap_interval(scores, seed) if scores else None,
        "bootstrap": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": seed},
        "questions": len(compared),
        "counted": len(scores),
        "wins": sum(s > 0.5 for s in scores),
        "ties": sum(s == 0.5 for s in scores),
        "losses": sum(s < 0.5 for s in scores),
        "identical": sum(not c["verdicts"] for c in compared),
        "agreement": float(np.mean([pair in SAME for pair in pairs])) if pairs else None,
        "unparsable": unreadable,
        "unparsable_share": unreadable / len(verdicts) if verdicts else 0.0,
        "mean_characters": [mine, other],
        "length_ratio": mine / other if other else None,
    }


def bootstrap_interval(
    values: Sequence[float], seed: int, confidence: float = CONFIDENCE, resamples: int = RESAMPLES
) -> list[float]:
    """[low, high]: percentiles of the mean of as many values, drawn with replacement."""
    distinct, counts = np.unique(values, return_counts=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(values), counts / len(values), size=resamples)
    means = drawn @ distinct / len(values)
    tail = (1 - confidence) / 2
    return [float(q) for q in np.quantile(means, [tail, 1 - tail])]


def show(results: dict[str, Any]) -> str:
    """The figures as a table for people."""

    def percent(share: float | None) -> str:
        return "–" if share is None else f"{share:.1%}"

    ratio, (mine, other) = results["length_ratio"], results["mean_characters"]
    low, high = results["interval"] or (None, None)
    sure = f"{results['bootstrap']['confidence']:.0%}: {percent(low)} to {percent(high)}"
    lines = [
        f"{results['output']} against {results['reference']}, judged by {results['judge']}",
        f"win rate            {percent(results['win_rate']):>8}   ({sure})",
        f"questions           {results['questions']:>8,}   ({results['counted']:,} counted)",
        f"wins, ties, losses  {results['wins']:>8,}, {results['ties']:,}, {results['losses']:,}",
        f"same in both orders {percent(results['agreement']):>8}",
        f"unparsable answers  {percent(results['unparsable_share']):>8}   ({results['unparsable']:,})",
        f"length ratio        {'–' if ratio is None else f'{ratio:.2f}':>8}"
        f"   (mean characters: {mine:,.0f} / {other:,.0f})",
    ]
    shortest, longest = FAIR_LENGTHS
    if ratio is not None and not shortest <= ratio <= longest:
        lines.append(
            f"caution: not length-matched, the outputs are {ratio:.2f} times as long as the reference's; "
            "judges tend to prefer the longer one, so part of the win rate may be length"
        )
    return "\n".join(lines)
