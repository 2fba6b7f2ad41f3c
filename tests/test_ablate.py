"""The ablation: what varies and what is shared, its arithmetic, and that a killed one ends as any other."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_llama import ANY_INSTRUCTION, make_tiny_llama

from main_jax.ablate import Variant, _over_seeds, show, variants
from main_jax.cli import build_parser, main

ROOT = Path(__file__).parent.parent
SHORT = {
    "world.documents": 1000, "world.hidden_size": 32, "world.pretraining.max_steps": 20,
    "world.responses": 120, "world.seed_pairs": 40, "world.test_questions": 12,
    "align.round_0.max_steps": 8, "align.max_steps": 8, "align.save_steps": 4,
    "finetune.max_steps": 12, "finetune.save_steps": 5, "runtime.chunk_rows": 40,
}  # fmt: skip
ASKED = ("--filters", "none,mutual,oracle,random", "--rounds", "0,1", "--seeds", "1",
         "--weighting", "constant,pair_ratio")  # fmt: skip


def test_without_a_round_nothing_is_weighted():
    assert variants([0, 1, 2], ["constant", "pair_ratio"]) == [
        Variant(0, None),
        Variant(1, "constant"), Variant(1, "pair_ratio"),
        Variant(2, "constant"), Variant(2, "pair_ratio"),
    ]  # fmt: skip
    assert [str(v) for v in variants([0, 1], ["softmax"])] == ["rounds-0", "rounds-1-softmax"]


def test_mean_and_spread_by_hand():
    found = _over_seeds({
        0: {"heldout": {"none": 0.1, "mutual": 0.5}},
        1: {"heldout": {"none": 0.2, "mutual": None}},
        2: {"heldout": {"none": 0.6, "mutual": 0.7}},
    })["heldout"]  # fmt: skip
    assert found["none"]["mean"] == pytest.approx(0.3)
    assert found["none"]["sd"] == pytest.approx((0.14 / 2) ** 0.5)  # .04 + .01 + .09, by n - 1
    assert found["mutual"]["mean"] == pytest.approx(0.6)
    assert found["mutual"]["values"] == [0.5, None, 0.7]
    variants = {"rounds-0": {"heldout": found, "precision_at_0.2": {"mutual": found["none"]}}}
    text = show({"seeds": [0, 1, 2], "variants": variants})
    assert text.endswith("Precision of the best 20%: `mutual` 0.300 ± 0.265.")
    assert "| none | 0.300 ± 0.265 |" in text and "| mutual | 0.600 ± 0.141 |" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--filters", "none,mutul"),
            "--filters: finetune.arms: unknown score 'mutul'; did you mean",
        ),
        (("--weighting", "pair"), "--weighting: unknown strategy pair"),
        (
            ("--equal-epochs", "mutal"),
            "--equal-epochs: mutal is none of --filters; did you mean mutual",
        ),
        (
            ("--filters", "mutual", "--equal-epochs", "none"),
            "--equal-epochs: none is none of --filters",
        ),
        (("--rounds", "0,x"), "expected a whole number"),
        (("--seeds", "0"), "expected a positive number"),
    ],
)
def test_mistakes_are_one_line_before_any_work(words, said, tmp_path, capsys):
    config = str(ROOT / "configs" / "demo.yaml")
    assert main(["ablate", config, "--output_dir", str(tmp_path / "out"), *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_baseline_is_asked_by_default():
    asked = build_parser().parse_args(["ablate", "config.yaml"])
    assert {"seed_only", "none", "random"} <= set(asked.filters) and asked.equal_epochs is None


def test_on_data_of_ones_own(tmp_path):
    """Held-out pairs and the user's questions, of the base too; means are those of the runs' results."""
    make_tiny_llama(tmp_path / "model", seed=2, num_hidden_layers=1)
    files = {
        "seed": [{"instruction": f"Add {i} and 2.", "response": str(i + 2)} for i in range(12)],
        "responses": [{"text": f"The sum of {i} and 1 is {i + 1}."} for i in range(12)],
        "eval": [{"instruction": f"Is {i} even?", "response": "a"} for i in range(5)],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = {"max_steps": 2, "train_batch_size": 4, "learning_rate": 1e-3}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({
        "output_dir": str(tmp_path / "out"), "model_name_or_path": str(tmp_path / "model"),
        "data": {f"{name}_path": str(tmp_path / f"{name}.jsonl") for name in files}
        | {"validation_share": 0.25},
        "prompt": {"max_length": 64, "template": "none"}, "filter": {"hygiene": ANY_INSTRUCTION},
        "align": short | {"round_0": {"max_steps": 2}, "sampling": {"max_new_tokens": 4}},
        "augment": {"sampling": {"max_new_tokens": 4}}, "finetune": short,
        "evaluate": {"checker": "contains", "sampling": {"max_new_tokens": 8}},
    }))  # fmt: skip
    words = ("--filters", "seed_only,mutual", "--rounds", "0", "--seeds", "2")
    assert main(["ablate", str(config), *words]) == 0
    figures = results(tmp_path / "out")["variants"]["rounds-0"]
    models = ["base", "seed_only", "mutual"]
    of_runs = [
        json.loads((tmp_path / f"out/seed-{n}/rounds-0/results.json").read_text()) for n in (0, 1)
    ]
    for name in ("right", "nll_nats_per_token"):
        assert list(figures[name]) == models
        for model, found in figures[name].items():
            assert found["values"] == [r["test"]["models"][model][name] for r in of_runs]
    assert list(figures["validation_nll_nats_per_token"]) == models
    assert list(figures["kept_pairs"]) == models[1:]
    nll = figures["nll_nats_per_token"]
    assert nll["base"]["sd"] == 0  # one base, one set of questions
    assert nll["mutual"]["mean"] != nll["base"]["mean"]
    table = (tmp_path / "out" / "ablation.md").read_text()
    assert "| arm | kept pairs | held-out NLL (nats/token) | right | your references' NLL" in table
    assert "| base | – |" in table and "| seed_only | 0.000 ± 0.000 |" in table


def start(
    folder: Path, cache: Path, *before: str, asked: tuple[str, ...] = ASKED
) -> subprocess.Popen:
    words = [w for key, value in SHORT.items() for w in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "main_jax.cli", *before, "ablate", str(ROOT / "configs/demo.yaml"),
               "--output_dir", str(folder), *asked, *words]  # fmt: skip
    log = folder.with_suffix(".log").open("a")
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def results(folder: Path) -> dict:
    found = json.loads((folder / "ablation.json").read_text())
    del found["config"]["output_dir"]
    return found


@pytest.mark.slow
def test_killed_it_continues_and_shares_what_it_can(tmp_path):
    cache, whole, killed = tmp_path / "cache", tmp_path / "whole", tmp_path / "killed"
    begin = time.monotonic()
    assert start(whole, cache).wait(600) == 0, whole.with_suffix(".log").read_text()[-2000:]
    took = time.monotonic() - begin
    draw = random.Random(5)
    for _ in range(3):  # before the end, also where all that was compiled is there by now
        process = start(killed, cache)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0.08, 0.15) * took)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (killed / "ablation.json").exists() and list(killed.rglob("manifest.json"))
    assert start(killed, cache).wait(600) == 0, killed.with_suffix(".log").read_text()[-2000:]
    assert results(killed) == results(whole)
    assert (killed / "ablation.md").read_text() == (whole / "ablation.md").read_text()

    folder = whole / "seed-0"
    assert sorted(p.name for p in folder.iterdir()) == [
        "rounds-0", "rounds-1-constant", "rounds-1-pair_ratio",
    ]  # fmt: skip
    assert [p.parent.parent.name for p in folder.glob("*/stages/0[01]-*")] == ["rounds-0"] * 2
    found = results(whole)["variants"]
    arms = ["none", "mutual", "oracle", "random", "none-epochs"]
    assert all(list(v["heldout"]) == arms for v in found.values())
    # As many epochs as `mutual`, whose set is smaller: more steps, by the numbers of pairs.
    for run in folder.iterdir():
        counts = json.loads((run / "stages/06-finetune/manifest.json").read_text())["counts"]
        seeds = json.loads((folder / "rounds-0/stages/01-prepare/manifest.json").read_text())
        seeds = seeds["counts"]["seed"] - seeds["counts"]["validation_pairs"]
        steps = {
            arm: max(
                json.loads(line)["step"]
                for line in (run / f"stages/06-finetune/{arm}/metrics.jsonl")
                .read_text()
                .splitlines()
            )
            for arm in ("none", "mutual", "none-epochs")
        }
        assert steps["none"] == steps["mutual"] == SHORT["finetune.max_steps"]
        share = (seeds + counts["none_kept"]) / (seeds + counts["mutual_kept"])
        assert abs(steps["none-epochs"] - share * steps["mutual"]) <= 1 and share > 1.3


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    asked = (
        "--filters",
        "none,mutual",
        "--rounds",
        "0,1",
        "--weighting",
        "pair_ratio",
        "--seeds",
        "1",
    )
    cache, one, two = tmp_path / "cache", tmp_path / "one", tmp_path / "two"
    launch = ("launch", "--num-processes", "2", "--cpu-devices", "1", "--")
    assert start(one, cache, asked=asked).wait(600) == 0
    assert start(two, cache, *launch, asked=asked).wait(600) == 0, two.with_suffix(
        ".log"
    ).read_text()
    assert two.with_suffix(".log").read_text().count("Mean ± standard deviation") == 1  # one speaks
    found, expected = results(two), results(one)
    assert found.keys() == expected.keys() and list(found["variants"]) == [
        "rounds-0", "rounds-1-pair_ratio",
    ]  # fmt: skip
    for name, figures in expected["variants"].items():
        assert found["variants"][name].keys() == figures.keys()
        for key, arms in figures.items():
            # Greedy answers of short trainings: rounding over another mesh may turn some of them.
            for arm, wanted in arms.items():
                assert found["variants"][name][key][arm]["mean"] == pytest.approx(
                    wanted["mean"], abs=0.1
                )
    assert not (two / "seed-0" / "rounds-1-pair_ratio" / "stages" / "00-world").exists()
