"""One run directory: where each stage's files are, and what a stage may ask for.

    RUN/{config.yaml, manifest.json, results.json, hf/}
    RUN/stages/NN-name/{data/part-*.parquet, ..., manifest.json}

A stage is a function `(run, out) -> counts` from files to files. Its manifest records the fingerprint of
everything it depends on: same fingerprint and done -> skipped; same and unfinished -> continued; another ->
the old folder is set aside under a new name, never deleted.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from etils import epath

from main_jax import __version__
from main_jax.config import Config
from main_jax.data.files import digest, files_below
from main_jax.data.sources import Source, open_source
from main_jax.errors import UserError
from main_jax.lm.metrics import Reporting
from main_jax.lm.multihost import barrier, first
from main_jax.lm.progress import say
from main_jax.lm.runtime import forget_peak_memory, peak_memory_bytes
from main_jax.pairs import write_json
from main_jax.parts import read_parts

if TYPE_CHECKING:
    from main_jax.models import Checkpoint
    from main_jax.prompts import Prompt


ANY_RESULT = ("compile_cache", "preemption_exit_code", "report_to")
"""Keys of `runtime` that no result depends on."""
DATA = ("seed", "responses")
"""The sources of every run; a user's may also have `eval`."""


@dataclass(frozen=True)
class Stage:
    """A stage: its function, the config sections that change it, and the stages that it reads.

    `folder` is where it writes in the run's directory, by default `stages/NN-name`.
    """

    name: str
    number: int
    function: Callable[[Run, epath.Path], dict[str, int]]
    sections: tuple[str, ...]
    needs: tuple[str, ...] = ()
    folder: str | None = None


class Run:
    """A configuration and its directory. `stages` are those of `pipeline.STAGES` that apply.

    `from_manifest`: a run that is only read. The user's files, which may be gone, are then taken to be
    those that were prepared. `RUN/shared.json` names stages that are another run's and where that one is.
    """

    def __init__(self, config: Config, stages: tuple[Stage, ...], from_manifest: bool = False):
        self.config, self.from_manifest = config, from_manifest
        self.path = epath.Path(config.output_dir).expanduser()
        self.stages = {stage.name: stage for stage in stages}

    # -------------------------------------------------------------------------------- what stages use

    def directory(self, stage: str) -> epath.Path:
        """Where a stage writes."""
        return stage_folder(self.path, self.stages[stage])

    def rows(self, stage: str, part: str = "") -> list[dict]:
        """The rows that a stage has written (of its table `part`, where it has several)."""
        return read_parts(self.directory(stage) / "data" / part).to_pylist()

    @property
    def world(self) -> bool:
        """Whether model and data are the embedded world's."""
        return self.config.world is not None

    @cached_property
    def sources(self) -> dict[str, Source]:
        """Where the rows come from: the world's files, else the user's. Raises UserError."""
        if self.world:
            files = {name: self.directory("world") / f"{name}.jsonl" for name in DATA}
            return {name: open_source(str(file)) for name, file in files.items()}
        given = vars(self.config.data)
        return {
            name: open_source(given[f"{name}_path"], f"data.{name}_path", given[f"{name}_columns"])
            for name in (*DATA, "eval")
            if name in DATA or given["eval_path"]
        }

    @cached_property
    def model_path(self) -> str:
        """The world's model or the user's, fetched first where it is a name on the hub. Raises UserError."""
        from main_jax.hub import find_model

        if self.world:
            return str(self.directory("world") / "base")
        return find_model(self.config.model_name_or_path or "", "model_name_or_path")

    @cached_property
    def base(self) -> Checkpoint:
        """The base model's checkpoint."""
        from main_jax.models import open_checkpoint

        return open_checkpoint(self.model_path, self.config.runtime)

    @cached_property
    def prompt(self) -> Prompt:
        """The one template of the run.

        `excess_length_strategy: raise` is for the user's rows, which `prepare` checks; a generated text
        nobody can mend, so a pair that it makes too long is dropped.
        """
        return self.prompt_with()

    def prompt_with(self, system: str | None = None, *, strict: bool = False) -> Prompt:
        """The template with what the system says first; `strict`: with the user's `raise`."""
        settings = self.config.prompt
        strategy = settings.excess_length_strategy
        if strategy == "raise" and not strict:
            strategy = "drop"
        return self.base.prompt(self.template, settings.max_length, strategy, system)

    @cached_property
    def inference_prompt(self) -> Prompt:
        """The template as the finetuned models are asked, with what the system then says."""
        told = self.config.finetune.system_prompts.at_inference
        return self.prompt_with(told) if told else self.prompt

    @cached_property
    def template(self) -> str | dict:
        """The configured template, read from its file where it is a path."""
        from main_jax.prompts import resolve_template

        return resolve_template(self.config.prompt.template)

    @property
    def reporting(self) -> Reporting:
        """Where metrics go besides `metrics.jsonl`."""
        return Reporting(self.config.runtime.report_to, group=self.path.name)

    @cached_property
    def curation_prompt(self) -> str:
        """What asks the forward model for a grade."""
        from main_jax.self_curation import read_prompt

        return read_prompt(self.config.score.curation_prompt)

    # -------------------------------------------------------------------------------- running stages

    def execute(self, name: str) -> bool:
        """Runs one stage, or says that it is done; whether it ran.

        Raises UserError when an earlier one is missing.
        """
        self.check_needs(name)
        stage, directory = self.stages[name], self.directory(name)
        fingerprint, old = self.fingerprint(name), self.manifest(name)
        left = files_below(directory)
        barrier(f"{name}: seen")  # by all alike, before the first process changes anything
        if old and old["fingerprint"] != fingerprint:
            if first() and any(file.name != "manifest.json" for file in left):
                aside = _free_name(directory)
                directory.rename(aside)
                say(f"{name}: configuration or inputs changed; the old results are kept in {aside}")
            old, left = {}, []
        if old.get("status") == "done":
            say(f"{name}: done before, kept")
            return False
        if len(left) > 1:  # more than a manifest
            say(f"{name}: continues")
        for file in left:  # what a killed run was just writing
            if first() and file.name.startswith(".") and file.name.endswith(".tmp"):
                file.unlink()
        manifest: dict[str, Any] = {
            "stage": name,
            "status": "running",
            "fingerprint": fingerprint,
            "config": self._sections(stage),
            "inputs": self._inputs(stage),
            "versions": versions(),
            "seconds": old.get("seconds", 0.0),
            "peak_host_memory_mb": old.get("peak_host_memory_mb", 0),
        }
        write_json(directory / "manifest.json", manifest)
        barrier(f"{name}: begins")
        forget_peak_memory()
        start = time.monotonic()
        try:
            counts = stage.function(self, directory)
        except Exception as error:
            vars(error)["stage"] = name  # for the line that says what went wrong
            raise
        seconds = round(manifest["seconds"] + time.monotonic() - start, 2)
        manifest |= {"status": "done", "counts": counts, "seconds": seconds}
        peak = max(manifest["peak_host_memory_mb"], round(peak_memory_bytes() / 1e6))
        manifest["peak_host_memory_mb"] = peak
        write_json(directory / "manifest.json", manifest)
        barrier(f"{name}: done")
        shown = ", ".join(f"{n:,} {key.replace('_', ' ')}" for key, n in counts.items())
        at_most = f"{peak:,} MB of host memory at most"
        say(f"{name}: done in {seconds:.0f} s, {at_most}{': ' if shown else ''}{shown}")
        return True

    def check_needs(self, name: str) -> None:
        """Raises UserError when a stage that this one reads is not done for this configuration."""
        for needed in self.stages[name].needs:
            if not self.is_done(needed):
                raise UserError(
                    f"stage {name} needs stage {needed}, which is not done for this configuration; "
                    f"run `main-jax {needed} CONFIG` or `main-jax run CONFIG` first"
                )

    def is_current(self, name: str) -> bool:
        """Whether what is there of a stage, finished or not, belongs to this configuration."""
        return self.manifest(name).get("fingerprint") == self.fingerprint(name)

    def is_done(self, name: str) -> bool:
        """Whether a stage is finished for this configuration."""
        return self.is_current(name) and self.manifest(name)["status"] == "done"

    def check_base(self) -> None:
        """Raises UserError where the base model is not the one that the run was made from."""
        if self.world:
            return
        if digest(epath.Path(self.model_path)) != self._file_digests["model"]:
            raise UserError(
                f"model_name_or_path: {self.base.path} has changed since this run was made from it"
            )

    def seconds(self) -> dict[str, float]:
        """Seconds of every stage that is done."""
        done = {name: self.manifest(name) for name in self.stages}
        return {name: m["seconds"] for name, m in done.items() if m.get("status") == "done"}

    def fingerprint(self, name: str) -> str:
        """A digest of everything that the stage's result depends on, upstream included."""
        stage = self.stages[name]
        parts = {
            "stage": name,
            "config": self._sections(stage),
            "files": self._files(stage),
            "needs": {needed: self.fingerprint(needed) for needed in stage.needs},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _sections(self, stage: Stage) -> dict[str, Any]:
        values = self.config.as_dict()
        runtime = {k: v for k, v in values["runtime"].items() if k not in ANY_RESULT}
        sections = {name: values[name] for name in stage.sections}
        if "data" in sections:  # the files count by their content, not by their names
            sections["data"] = {
                k: v
                for k, v in sections["data"].items()
                if not k.endswith(("_path", "_license")) and not k.startswith("eval_")
            }
        if "evaluate" in sections and self.config.data.eval_path:
            columns = {"eval_columns": self.config.data.eval_columns}
            sections["evaluate"] = sections["evaluate"] | columns
        if "prompt" in sections:  # so does a template file
            sections["prompt"] = sections["prompt"] | {"template": self.template}
        if "score" in sections and self.config.score.self_curation:
            sections["score"] = sections["score"] | {"curation_prompt": self.curation_prompt}
        return sections | {"seed": self.config.seed, "runtime": runtime}

    def _files(self, stage: Stage) -> dict[str, str]:
        """Digests of the user's own files: what is trained on, and for `evaluate` the questions."""
        if stage.name == "evaluate" and self.config.data.eval_path:
            return {"eval": self._eval_digest}
        return {} if self.world or stage.name != "prepare" else self._file_digests

    @cached_property
    def _file_digests(self) -> dict[str, str]:
        if self.from_manifest:
            return self.manifest("prepare").get("inputs", {})
        found = {name: self.sources[name].fingerprint() for name in DATA}
        for path in self.config.clean.decontaminate:
            found[f"clean {path}"] = open_source(path, "clean.decontaminate").fingerprint()
        return {"model": digest(epath.Path(self.model_path))} | found

    @cached_property
    def _eval_digest(self) -> str:
        if self.from_manifest:
            return self.manifest("evaluate").get("inputs", {}).get("eval", "")
        return self.sources["eval"].fingerprint()

    def _inputs(self, stage: Stage) -> dict[str, str]:
        """Digests of what the stage reads: the user's files, and the tables of the stages before."""
        tables = {needed: self.directory(needed) / "data" for needed in stage.needs}
        return self._files(stage) | {n: digest(t) for n, t in tables.items() if t.exists()}

    def manifest(self, name: str) -> dict[str, Any]:
        """What a stage has recorded of itself; empty before it has begun."""
        path = self.directory(name) / "manifest.json"
        return json.loads(path.read_text()) if path.exists() else {}


SHARED = "shared.json"


def share(path: epath.Path, stages: Sequence[str], folder: str) -> None:
    """Makes stages of the run in `folder`, seen from the run in `path`, its own."""
    write_json(path / SHARED, dict.fromkeys(stages, folder))
    barrier(f"{path}: shared")  # before others look for those stages


def stage_folder(path: epath.Path, stage: Stage) -> epath.Path:
    """Where a stage of the run in `path` writes, be it that run's own or shared."""
    file = path / SHARED
    shared = json.loads(file.read_text()) if file.exists() else {}
    root = path / shared[stage.name] if stage.name in shared else path
    return root / (stage.folder or f"stages/{stage.number:02}-{stage.name}")


def derive_seed(seed: int, purpose: str) -> int:
    """A 32-bit seed of its own for every purpose."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{purpose}".encode()).digest()[:4], "big")


def versions() -> dict[str, str]:
    """Versions of what computes the results."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    found = {package: version(package) for package in packages}
    return {"main_jax": __version__, "python": platform.python_version()} | found


def _free_name(directory: epath.Path) -> epath.Path:
    n = 1
    while (name := directory.parent / f"{directory.name}.old-{n}").exists():
        n += 1
    return name
