"""The steps in order: prepare -> align -> augment -> score -> filter -> finetune -> evaluate -> export.

run = open_run(config)      # checks paths, then the model, then the room on the disk
execute(run)                # or execute(run, "score") for one stage
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import jax
import pyarrow as pa
import yaml
from etils import epath

from main_jax import pairs, parts
from main_jax.align import align, trained
from main_jax.augment import write_chunks
from main_jax.checks import check_output, check_room
from main_jax.config import Config
from main_jax.data.files import files_below
from main_jax.data.reading import read_pairs
from main_jax.errors import UserError
from main_jax.evaluate import evaluate
from main_jax.export import export
from main_jax.filter import READ, with_filter
from main_jax.finetune import arms, finetune
from main_jax.hygiene import faults
from main_jax.lm.metrics import unavailable
from main_jax.lm.multihost import first
from main_jax.lm.sharding import make_mesh, use_mesh
from main_jax.models import LanguageModel
from main_jax.prepare import prepare
from main_jax.prompts import Direction
from main_jax.run import Run, Stage, versions
from main_jax.score import score_rows
from main_jax.self_curation import Curator
from main_jax.strict_yaml import load_config
from main_jax.world import WORLD_POSITIONS

# ------------------------------------------------------------------------------------------- stages


def build_world(run: Run, out: epath.Path) -> dict[str, int]:
    """The embedded world's files, in place of the user's."""
    from main_jax.world.build import build

    return build(run, out)


def augment(run: Run, out: epath.Path) -> dict[str, int]:
    """The aligned reverse model writes an instruction for every unlabelled response."""
    rounds = run.config.align.rounds
    rows = write_chunks(
        run, out, parts.Rows(run.directory("prepare") / "data" / "responses"), Direction.REVERSE,
        lambda: trained(run.directory("align"), f"round-{rounds}", Direction.REVERSE, run.base),
        run.config.augment.sampling, purpose="augment", label="augment",
        finish=lambda rows: [row | {"round": rounds} for row in rows],
    )  # fmt: skip
    return _reasons(rows.column("drop_reason"), "pairs")


def score(run: Run, out: epath.Path) -> dict[str, int]:
    """Both aligned models score every augmented pair."""
    last, stage = f"round-{run.config.align.rounds}", run.directory("align")
    settings = run.config.score
    curator = Curator(run.prompt, run.curation_prompt) if settings.self_curation else None

    @cache
    def model(direction: Direction) -> LanguageModel:
        return trained(stage, last, direction, run.base)

    def score_chunk(chunk: Sequence[dict], advance: Callable[[int], None]) -> list[dict]:
        with use_mesh(run.config.inference_mesh, local=True):
            forward, reverse = ((model(d), run.prompt) for d in Direction)
            scored = score_rows(chunk, forward, reverse, settings.tokens_per_batch, curator)
        advance(len(chunk))
        return scored

    rows = parts.Rows(run.directory("augment") / "data")
    chunk_rows = run.config.runtime.chunk_rows
    rows = parts.map_chunks(rows, out / "data", chunk_rows, score_chunk, "score", "pairs")
    counts = _reasons(rows.column("drop_reason"), "pairs")
    if curator:
        parsed = Counter(rows.column("rating_parsed"))
        counts |= {"rated": parsed[True] + parsed[False], "unparsable_ratings": parsed[False]}
    return counts


def filter_pairs(run: Run, out: epath.Path) -> dict[str, int]:
    """Every score as a column; `keep` and `drop_reason` by the configured one."""
    settings, scored = run.config.filter, run.directory("score") / "data"
    table = parts.read_parts(scored, READ)
    reasons = pa.array(faults(parts.Rows(scored), settings.hygiene), pa.string())
    table = pairs.set_column(table, "drop_reason", reasons)
    table = with_filter(table, settings.by, settings.select, settings.keep, run.config.seed)
    new = [name for name in table.column_names if name not in READ or name == "drop_reason"]
    parts.set_columns(scored, table.select(new), out / "data")
    counts = _reasons(table["drop_reason"].to_pylist(), "pairs")
    if not counts["pairs"]:
        raise UserError(f"filter.{settings.by} keeps no pair; loosen filter.keep or look at {out}")
    return counts


STAGES = (
    Stage("prepare", 1, prepare, ("data", "clean", "prompt")),
    Stage("align", 2, align, ("align",), ("prepare",)),
    Stage("augment", 3, augment, ("augment",), ("prepare", "align")),
    Stage("score", 4, score, ("score",), ("align", "augment")),
    Stage("filter", 5, filter_pairs, ("filter",), ("score",)),
    Stage("finetune", 6, finetune, ("finetune",), ("prepare", "filter")),
    Stage("evaluate", 7, evaluate, ("evaluate",), ("align", "filter", "finetune")),
    Stage("export", 8, export, ("export",), ("finetune",), folder="hf"),
)
WORLD = Stage("world", 0, build_world, ("world",))

# ------------------------------------------------------------------------------------------- running


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The stages of a run, in order; with the world before the others where it takes the user's place."""
    if config.world is None:
        return STAGES
    first, *rest = STAGES
    return (WORLD, Stage(first.name, 1, first.function, first.sections, ("world",)), *rest)


def open_run(config: Config) -> Run:
    """Checks paths, then the model, then the disk; raises UserError for the first fault."""
    run = Run(config, stages_of(config))
    if not run.world:
        keys = {
            "model_name_or_path": config.model_name_or_path,
            "data.seed_path": config.data.seed_path,
            "data.responses_path": config.data.responses_path,
        }
        for key, value in keys.items():
            if not value:
                raise UserError(f"{key} is not set; give it in the config or as --{key} PATH")
        _ = run.sources
    _ = run.template
    if config.score.self_curation:
        if run.world:
            raise UserError("score.self_curation: the world's words have no grades; give a model")
        _ = run.curation_prompt
    check_output(run.path, "output_dir")
    for name in config.runtime.report_to:
        if reason := unavailable(name):
            raise UserError(f"runtime.report_to: {name}: {reason}")
    for key, shape, devices in (
        ("mesh", config.mesh, None),
        ("inference_mesh", config.inference_mesh, jax.local_devices()),
    ):
        try:
            make_mesh(shape, devices)
        except ValueError as error:
            raise UserError(f"{key}: {error}") from None
    if run.world:
        check_lengths(config, WORLD_POSITIONS)
    else:
        _ = run.model_path  # found, or fetched, once everything else is as it should be
        check_lengths(config, run.base.decoder.config.max_position_embeddings)
        _ = run.prompt  # opens and checks the tokenizer
        if config.score.self_curation:
            Curator(run.prompt, run.curation_prompt)  # which has to tell the grades apart
        if config.data.eval_path:  # which is read at the end: a mistake in it is to be known now
            for _ in read_pairs(run.sources["eval"]):
                pass
        for said in dict.fromkeys(vars(config.finetune.system_prompts).values()):
            run.prompt_with(said)
    _check_room(run)
    return run


def existing_run(path: str) -> Run:
    """The run in a directory, wherever it was made. Raises UserError where there is none."""
    file = epath.Path(path).expanduser() / "config.yaml"
    if not file.exists():
        raise UserError(f"{path}: no run here (no config.yaml); give a run's output_dir")
    config = dataclasses.replace(load_config(Config, str(file)), output_dir=path)
    return Run(config, stages_of(config), from_manifest=True)


def execute(run: Run, stage: str | None = None, show_example: bool = False) -> None:
    """Runs all stages, or one; after the last, writes the results.

    `show_example` prints the first pair as tokens as soon as it is prepared.
    """
    from main_jax.report.page import refresh_report  # which opens runs by this module

    if stage == "prepare" and run.world:
        execute(run, "world")
    if stage is not None:
        run.check_needs(stage)
    text = yaml.safe_dump(run.config.as_dict(), sort_keys=False, allow_unicode=True)
    pairs.write_text(run.path / "config.yaml", text)
    for name in run.stages if stage is None else [stage]:
        with use_mesh(run.config.mesh):
            ran = run.execute(name)
        manifest = {"versions": versions(), "stages": list(run.stages), "seconds": run.seconds()}
        pairs.write_json(run.path / "manifest.json", manifest)
        if ran or not (run.path / "report.html").exists():
            refresh_report(run.path)
        if show_example and first() and name in ("prepare", stage):
            print((run.directory("prepare") / "example.txt").read_text(encoding="utf-8"))
    if stage in (None, "evaluate"):
        results = json.loads((run.directory("evaluate") / "results.json").read_text())
        pairs.write_json(run.path / "results.json", results | {"seconds": run.seconds()})


def check_lengths(config: Config, positions: int) -> None:
    """Raises UserError when examples or generated texts are longer than the model has positions."""
    if config.prompt.max_length > positions:
        raise UserError(
            f"prompt.max_length {config.prompt.max_length} is more than the model's "
            f"max_position_embeddings {positions}; set it to at most {positions}"
        )
    for key in ("align", "augment", "evaluate"):
        new = getattr(config, key).sampling.max_new_tokens
        if new >= positions:
            raise UserError(
                f"{key}.sampling.max_new_tokens {new} leaves no room for a prompt; "
                f"the model has {positions} positions"
            )


def _check_room(run: Run) -> None:
    """Final parameters of every training, two full states while one is saved, and the tables."""
    config = run.config
    finals = 2 * (config.align.rounds + 1) + int(config.align.control) + len(arms(run))
    finals += 1  # the exported one
    if config.world is None:
        parameters = run.base.decoder.config.num_params()
        files = sum(source.size_bytes() or 0 for source in run.sources.values())
    else:
        from main_jax.world.build import decoder_config

        finals += 2  # the base model: its checkpoint and its Hugging Face form
        parameters = decoder_config(config.world).num_params()
        files = 2_000_000
    current = [run.directory(name) for name in run.stages if run.is_current(name)]
    written = sum(file.stat().length for folder in current for file in files_below(folder))
    # While one more is saved: whole states, and with keep-best a copy of the parameters each.
    unfinished = max(
        (t.save_total_limit + 1) * (4 if t.load_best_model_at_end else 3)
        for t in config.trainings().values()
    )
    needed = 4 * parameters * (finals + unfinished) + 6 * files + 20_000_000
    check_room(run.path, max(0, needed - written), "the run")


# ------------------------------------------------------------------------------------------- helpers


def _reasons(drop_reasons: Sequence[str | None], name: str) -> dict[str, int]:
    reasons = Counter(reason for reason in drop_reasons if reason)
    kept = len(drop_reasons) - sum(reasons.values())
    return {name: kept} | {reason: n for reason, n in sorted(reasons.items())}
