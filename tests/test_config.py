"""The configuration: every key from YAML and from the command line, and one clear line for each mistake."""

import dataclasses
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml

from main_jax.config import Config, WorldSettings
from main_jax.errors import UserError
from main_jax.strict_yaml import ALIASES, load_config, parse_overrides

ROOT = Path(__file__).parent.parent
CHOSEN: dict[str, Any] = {  # where a value of the right type is not enough
    "export.max_shard_size": "700MB",
    "filter.by": "pmi",
    "filter.keep": 0.25,
    "filter.select": "quantile",
    "finetune.arms": ["none", "random"],
    "prompt.template": "plain",
    "runtime.report_to": ["tensorboard", "wandb"],
    "clean.decontaminate": ["tests.jsonl"],
    "clean.drop_patterns": ["cookie"],
    "data.seed_columns": {"instruction": "question"},
    "data.responses_columns": {"response": "body"},
    "data.eval_columns": {"response": "gold"},
}


def keys(cls: Any = Config, path: str = "") -> dict[str, tuple[Any, Any]]:
    """dotted key -> (type, default) of every leaf of a config class, `world.` included."""
    found = {}
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        inner = [a for a in get_args(hint) if dataclasses.is_dataclass(a)]
        section = hint if dataclasses.is_dataclass(hint) else next(iter(inner), None)
        if section:
            found |= keys(section, f"{path}{f.name}.")
        else:
            made = f.default_factory if f.default is dataclasses.MISSING else lambda f=f: f.default
            found[f"{path}{f.name}"] = (hint, made())
    return found


KEYS = keys()


def other_value(key: str) -> Any:
    """A legal value that is not the default."""
    if key in CHOSEN:
        return CHOSEN[key]
    if key.endswith(".gradient_accumulation_steps"):
        return 4  # a divisor of train_batch_size
    hint, default = KEYS[key]
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(a for a in get_args(hint) if a is not type(None))
    if get_origin(hint) is Literal:
        return next(a for a in get_args(hint) if a != default)
    if hint is bool:
        return not default
    return {int: 7777, str: "elsewhere", float: 0.125}[hint]


def beside(key: str) -> list[str]:
    """Overrides without which the other value of a key is refused."""
    section, _, name = key.rpartition(".")
    best = [f"--{section}.eval_steps=50"]
    return {
        "load_best_model_at_end": best,
        "early_stopping_patience": [*best, f"--{section}.load_best_model_at_end=true"],
        "checker": ["--data.eval_path=questions.jsonl"],
    }.get(name, [])


def nested(key: str, value: Any) -> dict:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def value_at(config: Config, key: str) -> Any:
    value = config
    for name in key.split("."):
        value = getattr(value, name)
    return list(value) if isinstance(value, tuple) else value


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(Config, str(path), overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


# ------------------------------------------------------------------------------------------ every key


def test_the_list_of_keys_reaches_all_sections():
    assert len(KEYS) > 80
    for key in ("seed", "align.round_0.max_steps", "align.weighting.decay", "world.pretraining.packing",
                "evaluate.sampling.top_k", "runtime.chunk_rows", "finetune.arms"):  # fmt: skip
        assert key in KEYS


ALWAYS_REFUSED = tuple(  # nothing of the world is held out
    f"world.pretraining.{name}" for name in ("load_best_model_at_end", "early_stopping_patience")
)


def test_keep_best_needs_held_out_pairs(tmp_path):
    for section in ("align", "finetune"):
        keys = f"{section}: {{load_best_model_at_end: true, eval_steps: 5}}"
        assert load(tmp_path, keys)
        line = refusal(tmp_path, keys, "--data.validation_share", "0")
        assert f"{section}.load_best_model_at_end" in line and "data.validation_share" in line
    line = refusal(tmp_path, "world: {pretraining: {load_best_model_at_end: true, eval_steps: 5}}")
    assert f"{ALWAYS_REFUSED[0]}: nothing" in line


@pytest.mark.parametrize("key", [key for key in KEYS if key not in ALWAYS_REFUSED])
def test_every_key_can_be_set_in_yaml_and_overridden(key, tmp_path):
    value, more = other_value(key), beside(key)
    assert value != KEYS[key][1]
    written = load(tmp_path, yaml.safe_dump(nested(key, value)), *more)
    assert value_at(written, key) == value
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    overridden = load_config(Config, None, [f"--{key}", text, *more])
    assert value_at(overridden, key) == value
    assert overridden == written == load_config(Config, None, [f"--{key}={text}", *more])
    rest = load_config(Config, None, more)
    if key.startswith("world.") and not more:
        rest = dataclasses.replace(rest, world=WorldSettings())
    assert written != rest  # one key was changed ...
    changed = [k for k in KEYS if k.split(".")[0] != "world" or key.startswith("world.")]
    assert [k for k in changed if value_at(written, k) != value_at(rest, k)] == [key]  # ... alone


@pytest.mark.parametrize("key", KEYS)
def test_every_key_refuses_another_type(key, tmp_path):
    line = refusal(tmp_path, yaml.safe_dump(nested(key, [{"a": 1}])))
    assert f"{key}: expected" in line or f"{key}[0]: expected" in line
    assert str(tmp_path / "config.yaml") in line


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Apache 2.0", "; did you mean apache-2.0?"), ("MIT", "; did you mean mit?"),
        ("cc-by_4.0 ", "; did you mean cc-by-4.0?"), ("-", ""), ("", ""),
    ],
)  # fmt: skip
def test_a_licence_is_named_as_the_hub_does(name, hint, tmp_path):
    line = refusal(tmp_path, yaml.safe_dump({"data": {"responses_license": name}}))
    said = (
        "data: responses_license: expected a licence as the hub names it, such as apache-2.0, found"
    )
    assert line.endswith(f"{said} {name!r}{hint}")
    for known in ("apache-2.0", "cc-by-nc-sa-4.0", "odc-by", "bsd-3-clause", "llama3.1", "other"):
        assert load(tmp_path, f"data: {{seed_license: {known}}}").data.seed_license == known


def test_an_override_wins_over_the_file_and_leaves_its_section(tmp_path):
    config = load(tmp_path, "align: {rounds: 3, max_steps: 7}", "--align.rounds", "2")
    assert (config.align.rounds, config.align.max_steps) == (2, 7)
    assert load(tmp_path, "seed: 1", "--seed", "2", "--seed", "3").seed == 3


def test_a_section_given_in_part_keeps_its_own_defaults(tmp_path):
    """`align.sampling` samples by default, `augment.sampling` is greedy: one key changes one key."""
    config = load(
        tmp_path, "align: {sampling: {max_new_tokens: 9}}\naugment: {sampling: {top_k: 9}}"
    )
    assert config.align.sampling == dataclasses.replace(Config().align.sampling, max_new_tokens=9)
    assert config.align.sampling.temperature == 0.7
    assert config.augment.sampling == dataclasses.replace(Config().augment.sampling, top_k=9)


def test_as_dict_goes_through_yaml_and_back(tmp_path):
    text = (ROOT / "configs" / "demo.yaml").read_text()
    for source in ("{}", text, "finetune: {arms: [none, pmi]}\nworld: {noise: 0.0}"):
        config = load(tmp_path, source)
        assert load(tmp_path, yaml.safe_dump(config.as_dict())) == config
    assert load(tmp_path, yaml.safe_dump(Config().as_dict())) == Config()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_loads(path):
    assert load_config(Config, str(path)).output_dir.startswith("runs/")
    assert len(path.read_text().splitlines()) < 60


# ------------------------------------------------------------------------------------------ reading


def test_numbers_without_a_dot_and_empty_files(tmp_path):
    assert load(tmp_path, "align: {learning_rate: 1e-5}").align.learning_rate == 1e-5
    assert (
        load_config(Config, None, ["--finetune.learning_rate", "2E-4"]).finetune.learning_rate
        == 2e-4
    )
    assert load(tmp_path, "align: {learning_rate: 1}").align.learning_rate == 1.0
    for text in ("", "# nothing\n", "---\n", "{}", "align:\nfilter:\n"):
        assert load(tmp_path, text) == Config()
    assert load(tmp_path, "world:").world is None
    assert load(tmp_path, "world: {}").world == WorldSettings()
    assert load(tmp_path, "", "--world.noise", "0").world == WorldSettings(noise=0.0)


def test_null_where_it_is_allowed(tmp_path):
    assert load(tmp_path, "align: {max_steps: null}").align.max_steps is None
    assert (
        load(tmp_path, "align: {max_steps: 4}", "--align.max_steps", "null").align.max_steps is None
    )
    assert "align.rounds: expected a whole number" in refusal(tmp_path, "align: {rounds: null}")


def test_keys_that_mean_something_else_elsewhere(tmp_path):
    for key in ("per_device_train_batch_size", "micro_batch_size"):
        line = refusal(tmp_path, f"finetune: {{{key}: 4}}")
        assert f"finetune.{key}" in line and "train_batch_size" in line.split(":", 2)[2]


def test_aliases(tmp_path):
    config = load(tmp_path, "base_model: m\ndata: {dataset: s}\nprompt: {cutoff_len: 77}\n")
    assert config.model_name_or_path == "m"
    assert config.data.seed_path == "s"
    assert config.prompt.max_length == 77
    for alias in ("sequence_len", "max_seq_length"):
        assert load_config(Config, None, [f"--prompt.{alias}", "9"]).prompt.max_length == 9
    names = {key.rsplit(".")[-1] for key in KEYS}
    assert set(ALIASES.values()) <= names
    assert not set(ALIASES) & names


def test_a_value_may_be_a_mapping_where_the_key_takes_one(tmp_path):
    template = {d: {"before": f"<{d}>", "after": ": "} for d in ("forward", "reverse")}
    config = load(tmp_path, yaml.safe_dump({"prompt": {"template": template}}))
    assert config.prompt.template == template
    changed = load(
        tmp_path, yaml.safe_dump(config.as_dict()), "--prompt.template.forward.before", "x"
    )
    assert changed.prompt.template["forward"] == {"before": "x", "after": ": "}
    assert parse_overrides(["--a.b", "1", "--c=x=y", "--d", "[1, z]", "--e="]) == [
        ("a.b", 1), ("c", "x=y"), ("d", [1, "z"]), ("e", None),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sed: 1", "unknown key sed; did you mean seed?"),
        ("align: {leraning_rate: 1}", "unknown key align.leraning_rate; did you mean align.learning_rate?"),
        ("align: {weighting: {stratgy: constant}}",
         "unknown key align.weighting.stratgy; did you mean align.weighting.strategy?"),
        ("align: {round_0: {max_step: 1}}", "did you mean align.round_0.max_steps?"),
        ("world: {pretraining: {max_stepz: 1}}", "did you mean world.pretraining.max_steps?"),
        ("zzzzzz: 1", "unknown key zzzzzz; known: output_dir, seed"),
        ("7: 1", "unknown key 7"),
        ("align: 3", "align: expected a section with keys, found 3"),
        ("align: [1]", "align: expected a section with keys, found [1]"),
        ("world: true", "world: expected a section with keys, found True"),
        ("align: {weighting: pair_ratio}", "align.weighting: expected a section with keys"),
        ("align: {rounds: 1.5}", "align.rounds: expected a whole number, found 1.5"),
        ("align: {rounds: true}", "align.rounds: expected a whole number, found True"),
        ("align: {rounds: two}", "align.rounds: expected a whole number, found 'two'"),
        ("align: {learning_rate: fast}", "align.learning_rate: expected a number, found 'fast'"),
        ("align: {learning_rate: true}", "align.learning_rate: expected a number, found True"),
        ("align: {control: 1}", "align.control: expected true or false, found 1"),
        ("output_dir: 3", "output_dir: expected text, found 3"),
        ("prompt: {template: 5}", "prompt.template: expected"),
        ("finetune: {arms: none}", "finetune.arms: expected a list, found 'none'"),
        ("finetune: {arms: [1]}", "finetune.arms[0]: expected text, found 1"),
        ("align: {restart: prevous}",
         "align.restart: expected one of previous, base; found 'prevous'; did you mean previous?"),
        ("filter: {select: best}", "filter.select: expected one of fraction, top_k, quantile, threshold"),
        ("filter: {by: mutal}", "filter.by: unknown score 'mutal'; did you mean mutual?"),
        ("filter: {by: oracle}", "filter.by: unknown score 'oracle'"),
        ("finetune: {arms: [oracle]}", "finetune.arms: `oracle` needs the truth"),
        ("finetune: {arms: [seed_onyl]}", "did you mean seed_only?"),
        ("filter: {keep: 0}", "filter.keep: expected a share"),
        ("filter: {keep: 1.2}", "filter.keep: expected a share"),
        ("data: {max_drop_share: 2}", "data.max_drop_share: expected a share between 0 and 1, found 2"),
        ("data: {validation_share: -0.1}", "data.validation_share: expected a share"),
        ("world: {noise: 3}", "world.noise: expected a share"),
        ("align: {max_steps: 0}", "align.max_steps: expected a positive number, found 0"),
        ("align: {learning_rate: -1e-5}", "align.learning_rate: expected a positive number"),
        ("align: {learning_rate: .nan}", "align.learning_rate: expected a positive number, found nan"),
        ("align: {learning_rate: .inf}", "align.learning_rate: expected a positive number, found inf"),
        ("world: {pretraining: {max_steps: 0}}", "world.pretraining.max_steps: expected a positive"),
        ("runtime: {chunk_rows: 0}", "runtime.chunk_rows: expected a positive number"),
        ("align: {weighting: {alpha: 2}}", "weighting.alpha must be in [0, 1], found 2"),
        ("align: {weighting: {temperature: 0.01}}", "temperature must be at least 0.1"),
        ("augment: {sampling: {top_p: 0}}", "augment.sampling: "),
        ("augment: {sampling: {max_new_tokens: 0}}", "max_new_tokens must be at least 1"),
        ("prompt: {max_length: 5, cutoff_len: 6}", "prompt.cutoff_len is given twice"),
        ("- a\n- b", "expected a mapping of keys, found list"),
        ("just text", "expected a mapping of keys, found str"),
        ("a: [1", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("\ta: 1", "not valid YAML"),
    ],
)  # fmt: skip
def test_mistakes_are_named_in_one_line(text, expected, tmp_path):
    line = refusal(tmp_path, text)
    assert expected in line
    assert line.startswith(f"{tmp_path}/config.yaml: ")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--align.rounds"], "--align.rounds needs a value"),
        (["align.rounds", "2"], "unexpected argument 'align.rounds'"),
        (["--", "2"], "unexpected argument '--'"),
        (["--align.rounds", "[2"], "--align.rounds: cannot read the value '[2'"),
        (["--align.rounds", "x"], "command line: align.rounds: expected a whole number"),
        (["--align.roundz", "2"], "did you mean align.rounds?"),
        (["--seed.a", "2", "--seed.b.c", "2"], "seed: expected a whole number, found {'a': 2"),
        (["--align", "2", "--align.rounds", "2"], "--align.rounds: align is not a section"),
    ],
)
def test_mistakes_in_overrides(overrides, expected):
    with pytest.raises(UserError) as caught:
        load_config(Config, None, overrides)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_config_files(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match="no such config file"):
            load_config(Config, str(path))
    (tmp_path / "latin.yaml").write_bytes("output_dir: caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(Config, str(tmp_path / "latin.yaml"))


def test_a_threshold_may_be_any_score_but_counts_are_whole(tmp_path):
    low = load(tmp_path, "filter: {by: mutual_z, select: threshold, keep: -0.5}")
    assert low.filter.keep == -0.5
    assert load(tmp_path, "filter: {select: top_k, keep: 12}").filter.keep == 12
    for keep in ("0.4", "0", "-3", "2.5"):
        line = refusal(tmp_path, f"filter: {{select: top_k, keep: {keep}}}")
        assert "filter.keep: expected a whole number" in line
