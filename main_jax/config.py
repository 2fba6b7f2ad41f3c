"""The whole run as frozen dataclasses: every key, its default and what it may be.

Names follow the Hugging Face spelling. `main_jax.strict_yaml` reads them:

    config = load_config(Config, "configs/own_data.yaml", ["--align.rounds", "2"])
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from main_jax.checks import parse_size
from main_jax.filter import SCORES
from main_jax.hygiene import Hygiene
from main_jax.lm.generate import Sampling
from main_jax.lm.sharding import MeshShape
from main_jax.lm.train import TrainingSettings
from main_jax.strict_yaml import nearest
from main_jax.weighting import Weighting

COLUMNS = ("instruction", "response", "input", "messages", "id", "weight")
"""What `seed_columns`, `responses_columns` and `eval_columns` may name."""

LICENSE = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*", re.ASCII)
"""How the hub writes a licence's id; which of them there are, it alone knows."""


@dataclass(frozen=True)
class Data:
    """Where the data is, and how much of it may be unusable.

    seed_path: human-written pairs: a file, a glob or another source (`main_jax/data/sources.py`).
    responses_path: unlabelled responses, likewise.
    eval_path: questions of your own with reference answers, likewise, which nothing is trained on: `evaluate`
        measures the base and every arm on them.
    seed_columns, responses_columns, eval_columns: our columns' names -> theirs, where they are not
        recognised.
    seed_license, responses_license: as the hub names licences (apache-2.0); for the card of the result.
    validation_share: of the seed pairs, held out of every training.
    max_drop_share: of either file, as `prepare` reads it; above it the run refuses to go on.
    """

    seed_path: str | None = None
    responses_path: str | None = None
    eval_path: str | None = None
    seed_columns: dict = field(default_factory=dict)
    responses_columns: dict = field(default_factory=dict)
    eval_columns: dict = field(default_factory=dict)
    seed_license: str | None = None
    responses_license: str | None = None
    validation_share: float = 0.05
    max_drop_share: float = 0.5

    def __post_init__(self):
        for key in ("seed_license", "responses_license"):
            name = getattr(self, key)
            if name is not None and not LICENSE.fullmatch(name):
                as_id = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")
                hint = f"; did you mean {as_id}?" if LICENSE.fullmatch(as_id) else ""
                raise ValueError(
                    f"{key}: expected a licence as the hub names it, such as apache-2.0, found {name!r}{hint}"
                )


@dataclass(frozen=True)
class Clean:
    """What the unlabelled responses are cleaned of (see `main_jax/data/clean.py`).

    duplicates: texts that say, word for word, what an earlier one says.
    near_duplicates: also those of at least this similarity, as 0.8; null: off.
    decontaminate: sources whose texts (questions and answers of a test) no response or seed pair may share
        `decontaminate_ngram` words in a row with.
    drop_patterns: regular expressions that no response may contain.
    language: the only one that is kept, as `en`; null: any. Needs the `language` extra.
    """

    duplicates: bool = True
    near_duplicates: float | None = None
    decontaminate: tuple[str, ...] = ()
    decontaminate_ngram: int = 13
    drop_patterns: tuple[str, ...] = ()
    language: str | None = None

    def __post_init__(self):
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise ValueError(
                f"near_duplicates: expected a similarity in (0, 1], found {self.near_duplicates}"
            )


@dataclass(frozen=True)
class PromptSettings:
    """How a pair becomes tokens.

    template: `auto` (the tokenizer's chat template, else `plain`), `chat`, `plain`, `none`, a path to a
        YAML file, or a mapping {forward: {before, after}, reverse: {before, after}}.
    max_length: longest example, in tokens.
    excess_length_strategy: what happens to a longer one.
    """

    template: str | dict = "auto"
    max_length: int = 2048
    excess_length_strategy: Literal["drop", "truncate", "raise"] = "drop"


@dataclass(frozen=True)
class RoundZero:
    """What round 0 (plain supervised training on the seed) does otherwise than the later rounds."""

    learning_rate: float | None = None
    max_steps: int | None = None
    num_train_epochs: float | None = None


@dataclass(frozen=True)
class Align(TrainingSettings):
    """Step 1. The training keys stand here directly; `round_0` may differ.

    rounds: K. restart: what a round starts from. control: also train a reverse model on the seed only
    for as many steps, to tell alignment from longer training.
    """

    rounds: int = 1
    restart: Literal["previous", "base"] = "previous"
    round_0: RoundZero = field(default_factory=RoundZero)
    weighting: Weighting = field(default_factory=Weighting)
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.7, top_p=0.9))
    control: bool = False


@dataclass(frozen=True)
class Augment:
    """Step 2. Greedy by default."""

    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Score:
    """Step 3a.

    tokens_per_batch: padded tokens of one scoring batch.
    self_curation: also have the forward model grade every pair (`main_jax/self_curation.py`), for the filter
        of that name. curation_prompt: a file in place of ours, with {instruction} and {response} in it.
    """

    tokens_per_batch: int = 8192
    self_curation: bool = False
    curation_prompt: str | None = None


@dataclass(frozen=True)
class Filter:
    """Step 3b.

    by: the score. select: what `keep` means: a `fraction` of the pool, a number of pairs (`top_k`), a
    `quantile` of the score or a score (`threshold`). hygiene: which instructions are not in the pool.
    """

    by: str = "mutual"
    select: Literal["fraction", "top_k", "quantile", "threshold"] = "fraction"
    keep: float = 0.4
    hygiene: Hygiene = field(default_factory=Hygiene)


@dataclass(frozen=True)
class SystemPrompts:
    """What the system says before a forward prompt in the final training, by the pair's origin.

    seed, augmented: null: nothing. inference: for the questions of the evaluation and by default in the
    exported chat template; null: the seed's. (Style tags: Humpback, arXiv 2308.06259, section 2.4.)
    """

    seed: str | None = None
    augmented: str | None = None
    inference: str | None = None

    @property
    def at_inference(self) -> str | None:
        """What is said before a question."""
        return self.seed if self.inference is None else self.inference


@dataclass(frozen=True)
class Finetune(TrainingSettings):
    """Step 4.

    arms: further final sets to train for comparison, named by score or `seed_only`, `oracle`; with `-epochs`
    after the name, for as many epochs as the configured filter's instead of as many steps.
    """

    arms: tuple[str, ...] = ()
    system_prompts: SystemPrompts = field(default_factory=SystemPrompts)


@dataclass(frozen=True)
class Evaluate:
    """What is measured at the end.

    sampling: of the answers to questions with a known answer (greedy by default).
    checker: how an answer is compared with the reference of `data.eval_path` (`main_jax/checker.py`); null:
        only the reference's NLL is measured.
    """

    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=64))
    checker: Literal["exact", "contains", "number"] | None = None


@dataclass(frozen=True)
class Export:
    """The final model in Hugging Face's form, `RUN/hf`.

    dtype: `auto` is the base model's. max_shard_size: of one file of weights, as `5GB` or `500MB`.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_shard_size: str = "5GB"

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        return parse_size(self.max_shard_size)

    def __post_init__(self):
        _ = self.max_shard_bytes


@dataclass(frozen=True)
class Runtime:
    """How it is computed; none of this is meant to change results beyond rounding.

    compute_dtype: `auto` is bfloat16 on accelerators, float32 on CPU.
    attention: `auto` is splash on TPUs, cuDNN on GPUs where it applies, blocks on CPUs for long rows, else
        xla.
    remat: activation checkpointing of the layers.
    chunk_rows: rows per committed part file; generation_batch_size: rows decoded together.
    preemption_exit_code: after SIGTERM, when what was done is saved. Job managers take 0 as finished.
    report_to: where the metrics of trainings go besides their `metrics.jsonl`, which `jsonl` stands for:
        `tensorboard`: event files beside it; `wandb`: by W&B's environment variables. Extras of that name.
    """

    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Literal["auto", "xla", "cudnn", "splash", "tokamax", "blocks"] = "auto"
    remat: Literal["none", "dots", "projections", "full"] = "none"
    chunk_rows: int = 1024
    generation_batch_size: int = 32
    compile_cache: bool = True
    preemption_exit_code: int = 75
    report_to: tuple[Literal["jsonl", "tensorboard", "wandb"], ...] = ("jsonl",)


@dataclass(frozen=True)
class WorldSettings:
    """The embedded world in place of a model and data of one's own (see `main_jax.world`)."""

    noise: float = 0.3
    seed_pairs: int = 240
    responses: int = 2400
    test_questions: int = 190
    documents: int = 20_000
    hidden_size: int = 64
    num_layers: int = 3
    pretraining: TrainingSettings = field(default_factory=TrainingSettings)


@dataclass(frozen=True)
class Config:
    """A run.

    mesh: all devices, for training; `fsdp` by default, but `data` on the CPU devices of one process (there
    `fsdp: N` is the one that saves memory). inference_mesh: the devices of each process, for generation and
    scoring, which each does alone. `fsdp` fits the most but gathers every layer at every token;
    `{data: -1, fsdp: 1}` keeps a whole copy of the model on each device and is the fastest where that fits;
    `tensor` lies between.
    """

    output_dir: str = "runs/main"
    seed: int = 0
    model_name_or_path: str | None = None
    data: Data = field(default_factory=Data)
    clean: Clean = field(default_factory=Clean)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    align: Align = field(default_factory=Align)
    augment: Augment = field(default_factory=Augment)
    score: Score = field(default_factory=Score)
    filter: Filter = field(default_factory=Filter)
    finetune: Finetune = field(default_factory=Finetune)
    evaluate: Evaluate = field(default_factory=Evaluate)
    export: Export = field(default_factory=Export)
    mesh: MeshShape = field(default_factory=MeshShape)
    inference_mesh: MeshShape = field(default_factory=MeshShape)
    runtime: Runtime = field(default_factory=Runtime)
    world: WorldSettings | None = None

    def __post_init__(self):
        known = [*SCORES, "seed_only", "oracle"]
        known += [f"{arm}-epochs" for arm in known]
        for key, arms in (("filter.by", (self.filter.by,)), ("finetune.arms", self.finetune.arms)):
            for arm in arms:
                names = list(SCORES) if key == "filter.by" else known
                if arm not in names:
                    raise ValueError(f"{key}: unknown score {arm!r}{nearest(arm, names)}")
        sets = {arm.removesuffix("-epochs") for arm in self.finetune.arms}
        if self.world is None and "oracle" in sets:
            raise ValueError("finetune.arms: `oracle` needs the truth, which only the world has")
        if self.filter.select != "fraction" and "oracle" in sets:
            raise ValueError("finetune.arms: `oracle` takes a share; set filter.select to fraction")
        if "self_curation" in {*sets, self.filter.by} and not self.score.self_curation:
            raise ValueError("self_curation needs grades: set score.self_curation to true")
        if self.filter.select == "threshold" and sets - {self.filter.by, "seed_only"}:
            raise ValueError(
                "finetune.arms: one threshold cannot serve several scores; use a fraction"
            )
        own = {"model_name_or_path": self.model_name_or_path}
        own |= {
            f"data.{k}": v for k, v in vars(self.data).items() if k.endswith(("_path", "_columns"))
        }
        for key in ("data.seed_columns", "data.responses_columns", "data.eval_columns"):
            for ours, theirs in getattr(self.data, key.removeprefix("data.")).items():
                if ours not in COLUMNS:
                    raise ValueError(f"{key}: unknown column {ours}{nearest(str(ours), COLUMNS)}")
                if not isinstance(theirs, str):
                    raise ValueError(f"{key}.{ours}: expected a column's name, found {theirs!r}")
        for key, value in own.items():
            if self.world is not None and value:
                raise ValueError(
                    f"{key}: `world` takes the place of one's own files; set one of them"
                )
        if self.evaluate.checker and self.world is None and not self.data.eval_path:
            raise ValueError("evaluate.checker compares with references: set data.eval_path")
        for key in ("align", "finetune"):
            if getattr(self, key).load_best_model_at_end and not self.data.validation_share:
                raise ValueError(
                    f"{key}.load_best_model_at_end needs held-out pairs: set data.validation_share"
                )
        if self.world is not None and self.world.pretraining.load_best_model_at_end:
            raise ValueError("world.pretraining.load_best_model_at_end: nothing is held out of it")
        keep, select = self.filter.keep, self.filter.select
        if select in ("fraction", "quantile") and not 0 < keep <= 1:
            raise ValueError(f"filter.keep: expected a share in (0, 1], found {keep}")
        if select == "top_k" and (keep < 1 or keep % 1):
            raise ValueError(f"filter.keep: expected a whole number of pairs, found {keep}")
        _check_positive(self)

    def trainings(self) -> dict[str, TrainingSettings]:
        """The settings of every training, by their keys."""
        found: dict[str, TrainingSettings] = {"align": self.align, "finetune": self.finetune}
        return found | ({"world.pretraining": self.world.pretraining} if self.world else {})

    def as_dict(self) -> dict:
        """Plain values, as they would stand in the YAML file."""
        return _plain(dataclasses.asdict(self))


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML knows."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _check_positive(config: Any, path: str = "") -> None:
    """Counts must be positive, shares must lie in [0, 1]; the field's name says which it is."""
    may_be_zero = {
        "seed",
        "rounds",
        "warmup_ratio",
        "min_learning_rate_ratio",
        "weight_decay",
    }
    for f in dataclasses.fields(config):
        value, key = getattr(config, f.name), f"{path}{f.name}"
        if isinstance(value, bool) or value is None or key == "filter.keep":
            continue  # what `filter.keep` may be depends on `filter.select`
        if dataclasses.is_dataclass(value) and not isinstance(
            value, (Weighting, Sampling, MeshShape)
        ):
            _check_positive(value, f"{key}.")
        elif isinstance(value, (int, float)):
            share = f.name.endswith(("_share", "_ratio", "noise"))
            if share and not 0 <= value <= 1:
                raise ValueError(f"{key}: expected a share between 0 and 1, found {value}")
            if f.name.startswith("adam_beta") and not 0 <= value < 1:
                raise ValueError(f"{key}: expected a number in [0, 1), found {value}")
            zero = share or f.name in may_be_zero
            if not 0 <= value < math.inf or (value == 0 and not zero):
                raise ValueError(f"{key}: expected a positive number, found {value}")
