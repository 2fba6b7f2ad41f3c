"""The published ablation: its tables are its figures, which lie within the bands of the world's design."""

import json
from pathlib import Path

import pytest
from etils import epath
from pages import Page, check_in_browser, check_self_contained, open_browser

from main_jax.ablate import show
from main_jax.config import Config
from main_jax.report.ablation import write_page
from main_jax.strict_yaml import from_mapping

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = json.loads((DOCS / "results.json").read_text())
DEMO = RESULTS["variants"]["rounds-1-pair_ratio"]


def mean(figure: str, arm: str, of=DEMO) -> float:
    return of[figure][arm]["mean"]


def test_the_tables_are_those_of_the_figures():
    assert (DOCS / "results.md").read_text().endswith(show(RESULTS) + "\n")


def test_what_was_run_can_be_run_again():
    config = from_mapping(Config, RESULTS["config"], "docs/results.json")
    assert config.world is not None and config.seed == RESULTS["seeds"][0]


def test_everything_was_run():
    assert RESULTS["seeds"] == [0, 1, 2]
    assert list(RESULTS["variants"]) == ["rounds-0", "rounds-1-constant", "rounds-1-pair_ratio"]
    for figures in RESULTS["variants"].values():
        for arm in ("none", "random", "forward_ce", "ifd", "mutual", "oracle", "none-epochs"):
            assert all(value is not None for value in figures["heldout"][arm]["values"])
        # The configured share is one of the three at which precision is told.
        at = {share: figures[f"precision_at_{share}"]["mutual"] for share in (0.2, 0.4, 0.6)}
        assert at[0.4]["values"] == figures["precision"]["mutual"]["values"]
        assert at[0.2]["mean"] > at[0.4]["mean"] > at[0.6]["mean"]


@pytest.mark.parametrize(
    ("found", "least"),
    [
        (0.05 - mean("heldout", "seed_only"), 0),
        (mean("auroc", "mutual"), 0.85),
        (mean("auroc", "mutual") - max(mean("auroc", f"{d}_ce") for d in ("forward", "reverse")), 0.01),
        (mean("auroc_truncated", "forward_ce") - mean("auroc_truncated", "reverse_ce"), 0.05),
        (mean("auroc_pronoun", "reverse_ce") - mean("auroc_pronoun", "forward_ce"), 0.05),
        (mean("precision", "mutual") - mean("precision", "none"), 0.2),
        (mean("precision", "mutual") - mean("precision", "forward_ce"), 0.02),
        (mean("heldout", "mutual") - mean("heldout", "none"), 0.1),
        (mean("heldout", "mutual") - mean("heldout", "random"), 0.1),
        (mean("reverse_accuracy", "round_1") - mean("reverse_accuracy", "control"), 0.05),
    ],
)  # fmt: skip
def test_the_demos_case_lies_within_the_bands(found, least):
    assert found >= least


@pytest.mark.parametrize("world", range(3))
@pytest.mark.parametrize("variant", RESULTS["variants"])
def test_every_world_lies_within_the_bands_of_one(variant, world):
    def of(figure: str, arm: str) -> float:
        return RESULTS["variants"][variant][figure][arm]["values"][world]

    assert of("heldout", "seed_only") <= 0.05
    assert of("auroc", "mutual") >= 0.85
    single = max(of("auroc", "forward_ce"), of("auroc", "reverse_ce"))
    assert of("auroc", "mutual") > single + 0.01
    assert of("heldout", "mutual") > max(of("heldout", "none"), of("heldout", "random")) + 0.1


def test_its_page_can_be_read_anywhere(tmp_path):
    file = tmp_path / "ablation.html"
    write_page(epath.Path(file), RESULTS, show(RESULTS))
    page = Page(file.read_text())
    check_self_contained(page)
    assert all(f"{name}" in page.text for name in RESULTS["variants"])
    assert page.tags.count("svg") == 6 and show(RESULTS) in page.text
    with open_browser() as browser:
        check_in_browser(browser, file)
