"""A model's outputs for AlpacaEval's questions or a user's own, in the form that the field's judges read.

    alpaca_eval("DIR or RUN", "alpaca_eval.json", "outputs.json", sampling=Sampling(1024))

OUTPUT is a JSON list of `{instruction, output, generator, dataset, datasplit}`, one object a question, in
their order. Chunks are committed in OUTPUT.partial until all is done, judging included: what is killed
continues with the same command.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from etils import epath

from main_jax import pairs, parts
from main_jax.augment import complete
from main_jax.checks import check_output
from main_jax.data.files import Row
from main_jax.data.reading import read_instructions
from main_jax.errors import UserError
from main_jax.evaluation.judge import Judge, judge_outputs
from main_jax.evaluation.outputs import match, open_list
from main_jax.evaluation.subject import mesh_of, open_subject
from main_jax.lm.generate import Sampling
from main_jax.lm.progress import say
from main_jax.lm.sharding import use_mesh
from main_jax.prompts import Direction
from main_jax.tools.files import partial_folder

CHUNK_ROWS = 256


def alpaca_eval(
    model: str,
    questions: str,
    output: str,
    *,
    sampling: Sampling,
    generator: str | None = None,
    template: str | None = None,
    arm: str | None = None,
    inference_mesh: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 32,
    judge: Judge | None = None,
    reference: str | None = None,
) -> dict[str, Any] | None:
    """Writes the outputs and, with a `judge`, compares them with those of `reference`.

    A question that is empty or leaves no room for `max_new_tokens` gets the empty output, and is counted
    in a line that is said. Gives the judge's results, on the first process, else None.

    Args:
        model: see `open_subject`.
        questions: AlpacaEval's JSON list or any source with instructions; `dataset` and `datasplit` are
            taken from its rows, by default its name and "eval".
        output: a .json file.
        sampling: how tokens are drawn.
        generator: what the outputs' author is called; by default the model's name.
        template: see `open_subject`.
        arm: see `open_subject`.
        inference_mesh: sizes of its axes, over each process's own devices; by default the run's.
        seed: of the sampling, and of the judge's bootstrap.
        batch_size: questions at once.
        judge: see `open_judge`; without it no call is made to anybody.
        reference: a file of outputs to the same questions; belongs to `judge`.

    Raises:
        UserError: a mistake in any of these; one line.
        Preempted: the program was asked to stop.
    """
    if (judge is None) != (reference is None):
        raise UserError("--judge-url and --reference belong together")
    output = str(epath.Path(output).expanduser())
    if Path(output).suffix != ".json" or Path(output).is_dir():
        raise UserError(f"--output: {output}: expected a file whose name ends in .json")
    check_output(Path(output).parent, "--output")
    source = open_list(questions, "--alpaca-eval")
    rows = list(read_instructions(source))
    if reference is not None:  # better now than after the work
        match([pairs.joined_instruction(row) for row in rows], reference)
    subject = open_subject(model, template, arm)
    checkpoint, mesh = subject.checkpoint, mesh_of(subject, inference_mesh)
    positions = checkpoint.decoder.config.max_position_embeddings
    if sampling.max_new_tokens >= positions:
        raise UserError(
            f"--max-new-tokens: {sampling.max_new_tokens} leaves no room for a question; "
            f"the model has {positions} positions"
        )
    prompt = checkpoint.prompt(subject.template, positions)
    load, name = cache(checkpoint.model), generator or subject.name

    def write_chunk(chunk: Sequence[dict], advance: Callable[[int], None]) -> list[dict]:
        with use_mesh(mesh, local=True):
            completions = complete(
                chunk, Direction.FORWARD, load(), prompt, sampling,
                seed=seed, batch_size=batch_size, on_done=advance,
            )  # fmt: skip
        return [
            {"response": (c.text or "").strip(), "finish_reason": c.finish_reason}
            for c in completions
        ]

    settings = {
        "model": subject.digest, "questions": source.fingerprint(),
        "template": subject.template,
        "sampling": dataclasses.asdict(sampling), "seed": seed, "batch_size": batch_size,
    }  # fmt: skip
    with partial_folder(output, settings) as folder:
        done = list(parts.map_chunks(rows, folder, CHUNK_ROWS, write_chunk, "answer", "questions"))
        pairs.write_json(output, [
            output_row(row, raw, new["response"], name)
            for row, raw, new in zip(rows, source, done, strict=True)
        ])  # fmt: skip
        say(_told(output, name, done, sampling.max_new_tokens))
        return judge_outputs(output, reference, judge, seed) if judge and reference else None


def output_row(row: dict, raw: Row, output: str, generator: str) -> dict[str, str]:
    """One object of the list, its keys in AlpacaEval's order; `raw` is the row as its source has it."""
    name = re.sub(r"^\w+:|, split .*$", "", raw.file)  # of a data set on the hub, of TFDS
    stem = re.sub(r"(\.(jsonl?|parquet|csv))?(\.(gz|zst))?$", "", epath.Path(name).name)
    return {
        "instruction": pairs.joined_instruction(row),
        "output": output,
        "generator": generator,
        "dataset": str(raw.values.get("dataset") or stem),
        "datasplit": str(raw.values.get("datasplit") or "eval"),
    }


def _told(output: str, name: str, done: Sequence[dict], max_new_tokens: int) -> str:
    """The line about what was written, with every output that is empty or cut."""
    reasons = Counter(
        "said nothing" if row["finish_reason"] in ("stop", "length") else row["finish_reason"]
        for row in done
        if not row["response"]
    )
    empty = ", ".join(f"{reason} {n:,}" for reason, n in sorted(reasons.items()))
    cut = sum(row["finish_reason"] == "length" for row in done)
    return (
        f"{output}: {len(done):,} outputs of {name}, {reasons.total():,} of them empty"
        f"{f' ({empty})' if empty else ''}, {cut:,} cut after {max_new_tokens:,} tokens"
    )
