"""The page of a scored file: figures worked out by hand, its command at work, hostile texts, a browser."""

import json
import re
import shlex
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from bucket import use_bucket
from etils import epath
from pages import HOSTILE, LIMIT, Page, check_in_browser, check_self_contained, open_browser
from tiny_llama import make_tiny_llama

from main_jax.cli import main
from main_jax.filter import SCORES
from main_jax.pairs import table_of, write_table
from main_jax.prompts import Direction
from main_jax.report import scores
from main_jax.report.pool import DRAWN, MEANING, POINTS
from main_jax.report.scores import Scorer, refresh_page

MEMORY = r"[\d,]{3,} MB of host memory at most"


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


def scorers(model: str = "org/model", template: str = "auto", texts=None) -> dict:
    prompt = SimpleNamespace(texts=texts, max_length=2048, strategy="drop")
    return {d: Scorer(model, template, prompt) for d in Direction}


def pair(i: int, forward: float | None, reverse: float | None = None, **more) -> dict:
    """A pair with these NLLs per token; 10 response tokens and 4 of the instruction."""
    row = {"id": f"p{i}", "instruction": f"ask {i}", "response": f"say {i}", "keep": True,
           "truncated": False}  # fmt: skip
    if forward is not None:
        row |= {"forward_nll_sum": 10 * forward, "forward_tokens": 10, "response_nll_sum": 20.0,
                "reverse_nll_sum": 4 * reverse, "reverse_tokens": 4, "instruction_nll_sum": 8.0}  # fmt: skip
    return row | more


@pytest.fixture
def rows() -> list[dict]:
    """Eight rows: two empty, one too long, five scored. `mutual`: 1/5 for p0, then 2/5, ... 5/5 for p4."""
    return [
        pair(0, 0.5, 0.25), pair(5, None, drop_reason="empty_response", response=""),
        pair(2, 1.0, 0.75, response=HOSTILE, truncated=True), pair(1, 0.75, 0.5),
        pair(6, None, drop_reason="empty_response", response=" "), pair(4, 2.5, 1.5, instruction=HOSTILE),
        pair(3, 1.25, 1.25), pair(7, None, drop_reason="too_long"),
    ]  # fmt: skip


def page_of(folder, rows, data="my <b>data</b>.jsonl", **how) -> Page:
    write_table(folder / "parts" / "part-00000.parquet", table_of(rows[:3]))
    write_table(folder / "parts" / "part-00001.parquet", table_of(rows[3:]))
    page = refresh_page(folder / "my scored.jsonl", folder / "parts", data, scorers(**how))
    assert page == epath.Path(folder / "my scored.html")
    return Page(page.read_text())


def test_figures_are_those_worked_out_by_hand(tmp_path, rows):
    page = page_of(tmp_path, rows)
    assert {k: page.texts[k] for k in ("read", "scored", "dropped", "kept")} == {
        "read": "8", "scored": "5", "dropped": "3", "kept": "2"
    }  # fmt: skip
    assert [row[:2] for row in page.tables["rows-table"][1:]] == [
        ["scored", "5"], ["empty_response", "2"], ["too_long", "1"]
    ]  # fmt: skip
    assert "keeps ≤ 0.4" in page.text  # mutual: the second of five
    assert "keeps ≤ 0.75" in page.text  # forward_ce of p1
    assert "keeps ≥ 1.25" in page.text  # pmi of p1: 2 - 0.75
    # Of ifd only four are eligible, exp(2.5 - 2) is not; the highest two are exp(-0.75) and exp(-1).
    assert "keeps ≥ 0.3679" in page.text
    assert page.texts["truncated"].startswith("1 of 5 scored pairs were truncated")
    assert "1 longer ones were dropped" in page.texts["truncated"]
    assert page.texts["filter"] == shlex.join(
        ["main-jax", "filter", str(tmp_path / "my scored.jsonl"), "--by", "mutual", "--keep", "0.4",
         "--output", str(tmp_path / "my scored-kept.jsonl")]
    )  # fmt: skip
    for name in DRAWN:
        if name != "self_curation":  # nobody was asked for grades
            assert f"{name}{MEANING[name]}; the {SCORES[name].keep} end is kept" in page.text
    levels = ["best kept", "first cut", "worst", "dropped: empty_response", "dropped: too_long"]
    assert sorted(levels, key=lambda level: page.text.index(f"\n{level}\n")) == levels
    assert (
        "mutual 0.2 · pmi 1.5 · ifd 0.2231 · forward 0.5 (10 tokens) · reverse 0.25 (4 tokens)"
        in page.text
    )
    assert page.tables["made-table"][1:] == [
        ["model", "org/model", "org/model"], ["template", "auto: chat", "auto: chat"],
        ["longest example", "2,048 tokens", "2,048 tokens"], ["longer ones", "drop", "drop"],
    ]  # fmt: skip


def test_every_score_says_what_it_is():
    assert set(SCORES) == {*DRAWN, "random", "none"} and set(DRAWN) == set(MEANING)


def test_texts_cannot_become_markup_and_nothing_is_loaded(tmp_path, rows):
    page = page_of(
        tmp_path, rows, model="<i>model</i>", template="<u>mine</u>", texts={"forward": {}}
    )
    check_self_contained(page)
    assert not {"script", "img", "u"} & set(page.tags)
    assert page.text.count("<script>alert('x')</script>") == 2
    for text in ("my <b>data</b>.jsonl", "<i>model</i>", "<u>mine</u>"):
        assert text in page.text
    anchors = {v for _, k, v in page.attributes if k == "id"}
    assert {v[1:] for _, k, v in page.attributes if k == "href" and v[:1] == "#"} <= anchors


def test_nothing_scored_and_all_the_same(tmp_path, rows):
    page = page_of(tmp_path / "none", [r for r in rows if r.get("drop_reason")])
    assert page.texts["scored"] == page.texts["kept"] == "0" and page.texts["read"] == "3"
    assert "No row could be scored" in page.text and "dropped: too_long" in page.text
    assert "filter" not in page.texts
    page = page_of(tmp_path / "same", [pair(i, 1.0, 1.0) for i in range(5)])
    assert page.texts["kept"] == "2"
    assert page_of(tmp_path / "one", [pair(0, 1.0, 1.0)]).texts["scored"] == "1"


def test_a_failing_page_costs_no_score(tmp_path, rows, monkeypatch, capsys):
    monkeypatch.setattr(scores, "versions", lambda: 1 / 0)
    write_table(tmp_path / "part-00000.parquet", table_of(rows))
    assert refresh_page(tmp_path / "s.jsonl", tmp_path, "d", scorers()) is None
    err = capsys.readouterr().err
    assert f"{tmp_path / 's.html'}: not written (ZeroDivisionError" in err and err.count("\n") == 1


def test_a_hundred_thousand_rows(tmp_path):
    n, rng = 100_000, np.random.default_rng(0)
    length, text = rng.integers(5, 700, n), "<b>" + "long " * 400
    nlls = {
        f"{side}_nll_sum": rng.gamma(4, 0.3, n) * length
        for side in ("forward", "reverse", "response", "instruction")
    }
    write_table(tmp_path / "parts" / "part-00000.parquet", pa.table({
        "id": [f"doc/{i}" for i in range(n)], "response": [f"{i} done" for i in range(n)],
        "instruction": pa.array([text]).take(pa.array(np.zeros(n, int))), "input": pa.nulls(n, pa.string()),
        "forward_tokens": length, "reverse_tokens": length, "truncated": np.zeros(n, bool),
        "drop_reason": pa.nulls(n, pa.string()), **nlls,
    }))  # fmt: skip
    html = refresh_page(tmp_path / "s.parquet", tmp_path / "parts", "d", scorers()).read_text()
    page = Page(html)
    assert len(html.encode()) < LIMIT and page.texts["kept"] == "40,000"
    assert f"A seeded sample of {POINTS:,} of 100,000 pairs" in page.text
    assert page.tags.count("circle") == POINTS
    again = refresh_page(tmp_path / "s.parquet", tmp_path / "parts", "d", scorers()).read_text()
    assert again == html


# ------------------------------------------------------------------------------------ of a real file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", seed=3))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": f"Say {i}", "response": "word " * (1 + i % 7)} for i in range(23)]
    rows[5]["response"], rows[6]["prompt"], rows[7]["response"] = "", "", "too long " * 300
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(model, data, output, *more):
    return ["score", "--forward-model", model, "--data", data, "--output", str(output), *more]


def test_the_page_of_a_file_and_its_command(model, data, tmp_path, capfd, browser):
    output = tmp_path / "scored.parquet"
    assert main(words(model, data, output, "--template", "none", "--max-length", "100")) == 0
    said = (
        f"3 of them without scores \\(drop_reason\\), {MEMORY}; see {output.with_suffix('.html')}\n"
    )
    assert re.search(said, capfd.readouterr().err)
    page = Page(output.with_suffix(".html").read_text())
    check_self_contained(page)
    assert page.texts["read"] == "23" and page.texts["scored"] == "20"
    assert [row[:2] for row in page.tables["rows-table"][1:]] == [
        ["scored", "20"], ["empty_response", "1"], ["empty_instruction", "1"], ["too_long", "1"]
    ]  # fmt: skip
    assert page.tables["made-table"][1:3] == [["model", model, model], ["template", "none", "none"]]
    assert page.tables["made-table"][3][1] == "100 tokens"
    command = shlex.split(page.texts["filter"])
    assert command[0] == "main-jax" and main(command[1:]) == 0
    said = f"mutual keeps {page.texts['kept']} of 23 rows, {MEMORY}\n"
    assert re.search(said, capfd.readouterr().err)
    assert page.texts["kept"] == "8"
    check_in_browser(browser, output.with_suffix(".html"))


def test_the_page_says_why_nothing_was_scored(model, data, tmp_path, capfd):
    output = tmp_path / "scored.jsonl"
    assert main(words(model, data, output, "--template", "none", "--max-length", "2")) == 2
    assert "no row could be scored" in capfd.readouterr().err
    assert "No row could be scored" in output.with_suffix(".html").read_text()


def test_output_in_a_bucket(model, data, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    use_bucket(monkeypatch)
    assert main(words(model, data, "gs://bucket/deep/scored.jsonl", "--template", "none")) == 0
    folder = epath.Path("gs://bucket/deep")
    assert sorted(path.name for path in folder.iterdir()) == ["scored.html", "scored.jsonl"]
    page = Page((folder / "scored.html").read_text())
    assert page.texts["scored"] == "20"
    assert page.texts["filter"].startswith("main-jax filter gs://bucket/deep/scored.jsonl --by")
    assert not list(tmp_path.iterdir())
