"""The demo's claims on three worlds: the bands that its design states, and the form of results.json.

The assertions are plain functions of loaded results; quick tests show that each of them can fail. Worlds
that have already been computed can be looked at with `python tests/test_demo_bands.py RUN/results.json ...`.
"""

import copy
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOL = Path(sys.executable).with_name("main-jax")
WORLDS = (0, 1, 2)
LIMIT_S = 900  # of one run; the demo takes a few minutes on two idle cores

ARMS = ["seed_only", "none", "random", "ifd", "forward_ce", "mutual", "oracle"]
FIGURES = {"precision", "heldout", "paraphrase", "seen"}
SCORES = {"forward_ce", "reverse_ce", "mutual", "mutual_z", "mutual_sum", "dual_ce", "pmi",
          "ifd", "ifd_ratio", "reverse_ifd", "length"}  # fmt: skip
KINDS = {"truncated", "no_fact", "pronoun", "boilerplate", "mixed"}
STAGES = [
    "world",
    "prepare",
    "align",
    "augment",
    "score",
    "filter",
    "finetune",
    "evaluate",
    "export",
]


# ------------------------------------------------------------------------------------------ the form


def check_form(results: dict) -> None:
    """The keys that others rely on; more may stand beside them."""
    assert {"arms", "auroc", "auroc_by_kind", "reverse_accuracy", "seconds"} <= set(results)
    assert list(results["arms"]) == ARMS
    for arm, figures in results["arms"].items():
        assert set(figures) == FIGURES
        assert (figures["precision"] is None) == (arm == "seed_only")
        assert all(0 <= v <= 1 for v in figures.values() if v is not None)
    assert set(results["auroc"]) >= SCORES
    assert not {"none", "random"} & set(results["auroc"])
    assert set(results["auroc_by_kind"]) == KINDS
    for table in (results["auroc"], *results["auroc_by_kind"].values()):
        assert set(table) == set(results["auroc"])
        assert all(0 <= v <= 1 for v in table.values())
    assert set(results["reverse_accuracy"]) == {"round_0", "round_1", "control"}
    assert all(0 <= v <= 1 for v in results["reverse_accuracy"].values())
    assert list(results["seconds"]) == STAGES
    assert all(v >= 0 for v in results["seconds"].values())
    assert results["arms"]["oracle"]["precision"] == 1


# ------------------------------------------------------------------------------------------ the bands


def mean(results: list[dict]) -> dict:
    """The mean of several worlds, figure by figure; null where every world has null."""
    first = results[0]
    if isinstance(first, dict):
        return {key: mean([r[key] for r in results]) for key in first}
    return None if first is None else sum(results) / len(results)


def one_world_bands(r: dict) -> dict[str, bool]:
    """What every world must show."""
    heldout = {arm: figures["heldout"] for arm, figures in r["arms"].items()}
    auroc = r["auroc"]
    return {
        "seed-only held-out <= .05": heldout["seed_only"] <= 0.05,
        "mutual AUROC >= .85": auroc["mutual"] >= 0.85,
        "mutual AUROC > the better single direction + .01":
            auroc["mutual"] > max(auroc["forward_ce"], auroc["reverse_ce"]) + 0.01,
        "held-out: mutual - none > .10": heldout["mutual"] - heldout["none"] > 0.10,
        "held-out: mutual - random > .10": heldout["mutual"] - heldout["random"] > 0.10,
    }  # fmt: skip


def mean_bands(r: dict) -> dict[str, bool]:
    """What holds for the mean of three worlds."""
    precision = {arm: figures["precision"] for arm, figures in r["arms"].items()}
    truncated, pronoun = r["auroc_by_kind"]["truncated"], r["auroc_by_kind"]["pronoun"]
    return one_world_bands(r) | {
        "forward beats reverse by >= .05 AUROC on truncated":
            truncated["forward_ce"] - truncated["reverse_ce"] >= 0.05,
        "reverse beats forward by >= .05 AUROC on pronoun":
            pronoun["reverse_ce"] - pronoun["forward_ce"] >= 0.05,
        "precision: mutual - none > .2": precision["mutual"] - precision["none"] > 0.2,
        "precision: mutual - forward > .02": precision["mutual"] - precision["forward_ce"] > 0.02,
        "reverse accuracy: pair_ratio - control > .05":
            r["reverse_accuracy"]["round_1"] - r["reverse_accuracy"]["control"] > 0.05,
    }  # fmt: skip


def missed(bands: dict[str, bool]) -> list[str]:
    return [band for band, holds in bands.items() if not holds]


# ------------------------------------------------------------------------------------------ the runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[tuple[dict, Counter, Counter]]:
    """Of the demo as it is shipped, one world after another: results.json, how many programs of each name
    JAX compiled, and how many different ones a compile cache holds that was empty."""
    folder = tmp_path_factory.mktemp("worlds")
    found = []
    for seed in WORLDS:
        run, cache = folder / f"world-{seed}", folder / f"cache-{seed}"
        settings = {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_LOG_COMPILES": "1",
        }
        done = subprocess.run(
            [TOOL, "run", ROOT / "configs" / "demo.yaml", "--cpu-devices", "1", "--seed", str(seed),
             "--output_dir", run],
            capture_output=True, text=True, timeout=LIMIT_S, check=False, env=os.environ | settings,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        compiled = re.findall(r"Compiling jit\((\w+)\)", done.stderr)
        cached = re.findall(r"^jit_(\w+)-\w+-cache$", "\n".join(os.listdir(cache)), re.MULTILINE)
        results = json.loads((run / "results.json").read_text())
        found.append((results, Counter(compiled), Counter(cached)))
        for arm in ARMS:
            assert f"\n{arm} " in f"\n{done.stdout}"
    return found


@pytest.fixture(scope="module")
def worlds(runs) -> list[dict]:
    return [results for results, *_ in runs]


@pytest.mark.slow
def test_three_worlds_lie_inside_the_bands(worlds):
    for results in worlds:
        check_form(results)
    found = {
        f"world {seed}": missed(one_world_bands(r)) for seed, r in zip(WORLDS, worlds, strict=True)
    }
    found["mean"] = missed(mean_bands(mean(worlds)))
    assert found == {key: [] for key in found}, json.dumps(mean(worlds), indent=1)


@pytest.mark.slow
def test_worlds_differ(worlds):
    assert len({json.dumps(r["arms"]) for r in worlds}) == len(WORLDS)


@pytest.mark.slow
def test_each_program_is_compiled_once(runs):
    """A program that is compiled again has its place in the cache already."""
    for _, compiled, cached in runs:
        assert compiled == cached
        assert 20 < compiled.total() < 120
        assert compiled["train_step"] == 4  # the world's, align's two sizes of batches, the arms'
        assert compiled["decode"] == 2  # it samples in align and augment, and is greedy in evaluate
        assert compiled["example_nlls"] == compiled["init_fn"] == 1


# ------------------------------------------------------------------------------------------ can they fail?

HELDOUT = {"seed_only": 0.0, "none": 0.25, "random": 0.26, "ifd": 0.2, "forward_ce": 0.47, "mutual": 0.5,
           "oracle": 0.6}  # fmt: skip
PRECISION = {"seed_only": None, "none": 0.43, "random": 0.43, "ifd": 0.3, "forward_ce": 0.8, "mutual": 0.9,
             "oracle": 1.0}  # fmt: skip
GOOD = {
    "arms": {
        arm: {"precision": PRECISION[arm], "heldout": HELDOUT[arm], "paraphrase": 0.1, "seen": 0.2}
        for arm in ARMS
    },
    "auroc": dict.fromkeys(SCORES, 0.9) | {"mutual": 0.95},
    "auroc_by_kind": {
        kind: dict.fromkeys(SCORES, 0.9)
        | {"truncated": {"reverse_ce": 0.8}, "pronoun": {"forward_ce": 0.8}}.get(kind, {})
        for kind in KINDS
    },
    "reverse_accuracy": {"round_0": 0.8, "round_1": 0.9, "control": 0.8},
    "seconds": dict.fromkeys(STAGES, 1.0),
}


def changed(path: str, value) -> dict:
    results = copy.deepcopy(GOOD)
    *sections, last = path.split("/")
    at = results
    for section in sections:
        at = at[section]
    at[last] = value
    return results


def test_good_results_pass():
    check_form(GOOD)
    assert missed(mean_bands(GOOD)) == []
    assert missed(mean_bands(mean([GOOD, GOOD]))) == []


@pytest.mark.parametrize(
    ("path", "value", "bands"),
    [
        ("arms/seed_only/heldout", 0.06, ["seed-only held-out <= .05"]),
        ("auroc/mutual", 0.905, ["mutual AUROC > the better single direction + .01"]),
        ("auroc/reverse_ce", 0.96, ["mutual AUROC > the better single direction + .01"]),
        ("auroc/mutual", 0.84, ["mutual AUROC >= .85", "mutual AUROC > the better single direction + .01"]),
        ("arms/none/heldout", 0.41, ["held-out: mutual - none > .10"]),
        ("arms/random/heldout", 0.41, ["held-out: mutual - random > .10"]),
        ("arms/mutual/heldout", 0.3, ["held-out: mutual - none > .10", "held-out: mutual - random > .10"]),
        ("auroc_by_kind/truncated/reverse_ce", 0.86, ["forward beats reverse by >= .05 AUROC on truncated"]),
        ("auroc_by_kind/pronoun/forward_ce", 0.86, ["reverse beats forward by >= .05 AUROC on pronoun"]),
        ("arms/none/precision", 0.75, ["precision: mutual - none > .2"]),
        ("arms/forward_ce/precision", 0.89, ["precision: mutual - forward > .02"]),
        ("reverse_accuracy/control", 0.86, ["reverse accuracy: pair_ratio - control > .05"]),
        ("reverse_accuracy/round_1", 0.81, ["reverse accuracy: pair_ratio - control > .05"]),
    ],
)  # fmt: skip
def test_every_band_can_fail(path, value, bands):
    check_form(changed(path, value))
    assert missed(mean_bands(changed(path, value))) == bands
    # The mean decides: one world outside, six well inside.
    assert (
        missed(mean_bands(mean([changed(path, value), GOOD, GOOD, GOOD, GOOD, GOOD, GOOD]))) == []
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("arms/seed_only/precision", 0.4), ("arms/none/precision", None), ("arms/none/heldout", 1.2),
        ("arms/extra", {}), ("auroc/random", 0.5), ("auroc/mutual", None), ("auroc_by_kind/clean", {}),
        ("auroc_by_kind/mixed", {}), ("reverse_accuracy/round_2", 0.9), ("reverse_accuracy/control", None),
        ("seconds", {}), ("arms/oracle/precision", 0.99),
    ],
)  # fmt: skip
def test_every_part_of_the_form_is_checked(path, value):
    with pytest.raises((AssertionError, TypeError)):
        check_form(changed(path, value))


def test_the_mean_is_over_worlds_figure_by_figure():
    other = changed("arms/none/heldout", 0.35)
    assert mean([GOOD, other])["arms"]["none"]["heldout"] == pytest.approx(0.3)
    assert mean([GOOD, other])["arms"]["seed_only"]["precision"] is None


if __name__ == "__main__":
    given = [json.loads(Path(p).read_text()) for p in sys.argv[1:]]
    for path, found in zip(sys.argv[1:], given, strict=True):
        check_form(found)
        print(f"{path}: misses {missed(one_world_bands(found)) or 'nothing'}")
    print(f"mean: misses {missed(mean_bands(mean(given))) or 'nothing'}")
