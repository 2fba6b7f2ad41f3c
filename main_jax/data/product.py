"""The kept pairs as a data set of their own: Parquet and JSONL, with every score, provenance and a card.

    DST/README.md                    the card: licence, how it was made, the funnel, the cut
    DST/data/train-*.parquet         instruction, input, output, messages, scores, where a row comes from
    DST/jsonl/train-*.jsonl          the same rows
    DST/provenance.json              configuration, versions, counts of every stage

`datasets.load_dataset(DST)` loads it, and a run takes `DST/data/*.parquet` as its seed pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from main_jax.checks import check_new
from main_jax.convert import new_folder
from main_jax.errors import UserError
from main_jax.filter import SCORES
from main_jax.lm.progress import say, track
from main_jax.pairs import COLUMNS, joined_instruction
from main_jax.parts import Rows
from main_jax.report.files import RunFiles
from main_jax.report.funnel import funnel
from main_jax.run import Run, files_below, versions
from main_jax.tools.files import memory

FILE_ROWS = 50_000
"""Rows of one exported file."""
_RENAMED = ("instruction", "input", "response", "keep", "drop_reason")


def export_data(
    run: Run, destination: str, *, every_pair: bool = False, push_to_hub: str | None = None
) -> None:
    """Writes the kept pairs (or every one, with `keep` and `drop_reason`) into a new folder.

    `push_to_hub` names a data set of the hub; one that is not there yet becomes public.
    Raises UserError: the filter has not run, the name is taken, the hub refuses.
    """
    if push_to_hub is not None:
        _check_name(push_to_hub)
    target = check_new(destination, "DST")
    if not run.is_done("filter"):
        raise UserError(
            f"{run.path}: stage filter is not done for this run's config.yaml; `main-jax run` it first"
        )
    source = run.directory("filter") / "data"
    size = sum(file.stat().length for file in files_below(source))
    facts = _facts(run)
    with new_folder(target, 4 * size) as folder:
        facts["rows"] = _write_rows(folder, Rows(source), facts, every_pair)
        (folder / "provenance.json").write_text(
            json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
        )
        (folder / "README.md").write_text(_card(run, facts))
    say(f"{destination}: {facts['rows']:,} pairs, {facts['license']['id']} licence, {memory()}")
    if facts["license"]["undeclared"]:
        keys = " and ".join(facts["license"]["undeclared"])
        say(
            f"{destination}: the card says licence `other`: {keys} not set; declare what you hold "
            "before you publish"
        )
    if push_to_hub is not None:
        _push(target, push_to_hub)


def _facts(run: Run) -> dict[str, Any]:
    """What is the same for all rows."""
    config = run.config
    # Not where it lies: the same configuration in another folder gives the same data.
    named = {k: v for k, v in config.as_dict().items() if k != "output_dir"}
    text = json.dumps(named, sort_keys=True)
    counts = {name: run.manifest(name).get("counts", {}) for name in run.stages}
    return {
        "base_model": "the embedded world" if run.world else config.model_name_or_path,
        "rounds": config.align.rounds,
        "template": run.template,
        "sampling": config.as_dict()["augment"]["sampling"],
        "seed": config.seed,
        "filter": config.as_dict()["filter"],
        "config_hash": hashlib.sha256(text.encode()).hexdigest()[:16],
        "config": config.as_dict(),
        "counts": {name: found for name, found in counts.items() if found},
        "license": _license(run),
        "versions": versions(),
    }


# ------------------------------------------------------------------------------------------- rows


def _write_rows(folder: epath.Path, rows: Rows, facts: dict[str, Any], every_pair: bool) -> int:
    """The number of rows written. A file is held in memory at a time."""
    for name in ("data", "jsonl"):
        (folder / name).mkdir()
    written = 0
    with track("export-data", len(rows), "pairs") as bar:
        for number, chunk in enumerate(_files(_exported(rows, facts, every_pair, bar.advance))):
            with (folder / "data" / f"train-{number:05}.parquet").open("wb") as handle:
                pq.write_table(_table(chunk), handle)
            with (folder / "jsonl" / f"train-{number:05}.jsonl").open("wb") as handle:
                for row in chunk:
                    handle.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            written += len(chunk)
    return written


def _exported(
    rows: Rows, facts: dict[str, Any], every_pair: bool, advance
) -> Iterator[dict[str, Any]]:
    for row in rows:
        advance(1)
        if not (row["keep"] or every_pair):
            continue
        found = {
            "id": row["id"],
            "instruction": row["instruction"],
            "input": row["input"] or "",
            "output": row["response"],
            "messages": [
                {"role": "user", "content": joined_instruction(row)},
                {"role": "assistant", "content": row["response"]},
            ],
        }
        found |= {k: v for k, v in row.items() if k not in found and k not in _RENAMED}
        found |= {"generator": facts["base_model"], "config_hash": facts["config_hash"]}
        if every_pair:
            found |= {"keep": row["keep"], "drop_reason": row["drop_reason"]}
        yield found


def _files(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Lists of at most FILE_ROWS; one that is empty where there are no rows."""
    yield list(islice(rows, FILE_ROWS))
    while chunk := list(islice(rows, FILE_ROWS)):
        yield chunk


def _table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Of one schema for all files, also where a column is null in one."""
    message = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    known = dict(COLUMNS) | {"output": pa.string(), "messages": message}
    known |= {name: pa.float64() for name in SCORES}
    known |= {"generator": pa.string(), "config_hash": pa.string()}
    return pa.table(
        {
            name: pa.array([row[name] for row in rows], known.get(name))
            for name in (rows[0] if rows else ())
        }
    )


# ------------------------------------------------------------------------------------------- the card


def _license(run: Run) -> dict[str, Any]:
    """What the card may say: the one licence that all inputs declare, else `other` with their list."""
    data = run.config.data
    declared = {
        "data.seed_license": data.seed_license,
        "data.responses_license": data.responses_license,
    }
    if run.world:
        declared = dict.fromkeys(declared, "apache-2.0")  # invented, by this project
    undeclared = [key for key, value in declared.items() if not value]
    names = set(declared.values())
    one = names.pop() if len(names) == 1 and not undeclared else "other"
    return {"id": one, "declared": declared, "undeclared": undeclared}


def _card(run: Run, facts: dict[str, Any]) -> str:
    from huggingface_hub import DatasetCardData

    head = DatasetCardData(
        license=facts["license"]["id"],
        license_name=None if facts["license"]["id"] != "other" else "of-the-inputs",
        license_link=None if facts["license"]["id"] != "other" else "README.md#licence",
        task_categories=["text-generation"],
        tags=["instruction-tuning", "synthetic", "main_jax"],
        size_categories=_size_category(facts["rows"]),
        configs=[{"config_name": "default", "data_files": "data/train-*.parquet"}],
    )
    settings = facts["filter"]
    declared = "\n".join(
        f"- `{key}`: {value or 'not declared'}"
        for key, value in facts["license"]["declared"].items()
    )
    cut = _cut(run)
    return f"""---
{head.to_yaml()}
---

# {facts["rows"]:,} instruction pairs, mutually aligned

Human-written or web texts are the `output` of every pair; its `instruction` was written by a model trained to
ask for it, and the pair was kept because the two explain each other (mutual alignment, MAIN,
arXiv 2504.12913; made with main_jax).

| | |
|---|---|
| base model | {facts["base_model"]} |
| alignment rounds | {facts["rounds"]} |
| instructions sampled with | `{json.dumps(facts["sampling"])}` |
| filter | `{settings["by"]}`, {settings["select"]} {settings["keep"]:g}{cut} |
| seed, configuration | {facts["seed"]}, `{facts["config_hash"]}` (whole in `provenance.json`) |

## From rows read to rows kept

| stage | left | dropped here, by reason |
|---|---:|---|
{_funnel(run)}

## Columns

`instruction`, `input`, `output` (Alpaca) and `messages` say the same. `forward_nll_sum` is the negative
log-likelihood of the output given the instruction, in nats over `forward_tokens` tokens; `reverse_nll_sum` of
the instruction given the output; `response_nll_sum` and `instruction_nll_sum` without their condition. Every
filter score is a column. `weight` is the pair's in a training. `origin`, `source`, `round`,
`generator` and `config_hash` say where it comes from.

## Licence

{declared}

Instructions are a model's output: its licence may say more.
"""


def _funnel(run: Run) -> str:
    """Lines of a table, the report's own figures."""
    found = funnel(RunFiles(run.path))
    lines = [f"| read | {found['read']:,} | |"]
    for step in found["steps"]:
        dropped = ", ".join(f"{reason} {n:,}" for reason, n in step["dropped"])
        lines.append(f"| {step['stage']} | {step['left']:,} | {dropped or '–'} |")
    return "\n".join(lines)


def _cut(run: Run) -> str:
    """The score of the last pair that was kept, in words."""
    name = run.config.filter.by
    if name == "none":
        return ""
    rows = Rows(run.directory("filter") / "data")
    kept = [s for s, k in zip(rows.column(name), rows.column("keep"), strict=True) if k]
    if not kept:
        return ""
    low = SCORES[name].keep == "low"
    return f": {'at most' if low else 'at least'} {max(kept) if low else min(kept):.6g}"


def _size_category(rows: int) -> str:
    """As the hub names sizes."""
    ends = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
    names = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M")
    return names[sum(rows >= end for end in ends)]


def _check_name(name: str) -> None:
    """Raises UserError for what the hub takes as no data set's name: now, and not after the work."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub: {error}") from None


def _push(folder: Any, name: str) -> None:
    """Uploads the folder. Raises UserError, one line."""
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        hub.create_repo(name, repo_type="dataset", exist_ok=True)
        hub.upload_folder(folder_path=str(folder), repo_id=name, repo_type="dataset")
    except Exception as error:  # of the hub, of its HTTP client
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--push-to-hub {name}: {reason}; the folder {folder} is complete: `hf upload {name} {folder} "
            "--repo-type dataset` tries again"
        ) from None
    say(f"{name}: on the hub")
