"""The report: figures worked out by hand, hostile texts, unfinished runs, its size, and a real browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from pages import HOSTILE, LIMIT, Page, check_in_browser, check_self_contained, open_browser
from test_kill import SHORT

from main_jax.cli import main
from main_jax.errors import UserError
from main_jax.pairs import table_of, write_table
from main_jax.pipeline import existing_run
from main_jax.report import charts, page
from main_jax.report.files import LINE_POINTS, metrics
from main_jax.report.html import clock
from main_jax.report.page import refresh_report, write_report
from main_jax.report.pool import POINTS

ROOT = Path(__file__).parent.parent
TOOL = Path(sys.executable).with_name("main-jax")
STAGES = ("prepare", "align", "augment", "score", "filter", "finetune", "evaluate")
CONFIG = {
    "model_name_or_path": "some/<b>model</b>", "seed": 3, "align": {"rounds": 1},
    "filter": {"by": "mutual", "select": "fraction", "keep": 0.5},
    "finetune": {"arms": ["none", "mutual"]},
}  # fmt: skip


def make_run(folder: Path, rows: list[dict], until: str = "evaluate", config=CONFIG) -> Path:
    """A run directory of one's own files as the stages write it, up to and with `until`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run = existing_run(str(folder))
    for number, stage in enumerate(STAGES[: STAGES.index(until) + 1], start=1):
        directory = folder / "stages" / f"{number:02}-{stage}"
        directory.mkdir(parents=True)
        counts = {"none_kept": 6, "mutual_kept": 3} if stage == "finetune" else {}
        manifest = {
            "status": "done", "fingerprint": run.fingerprint(stage), "counts": counts,
            "seconds": 30.0 * number,
            "config": {"filter": config["filter"]}, "versions": {"jax": f"0.{min(number, 2)}"},
        }  # fmt: skip
        (directory / "manifest.json").write_text(json.dumps(manifest))
        data = directory / "data"
        if stage == "prepare":
            write_table(data / "responses" / "part-00000.parquet", at(rows[:5], stage))
            write_table(data / "responses" / "part-00001.parquet", at(rows[5:], stage))
            seed = [{"id": f"s{i}", "drop_reason": "too_long" if i < 2 else None} for i in range(9)]
            write_table(data / "seed" / "part-00000.parquet", table_of(seed))
            write_table(data / "validation" / "part-00000.parquet", table_of([{"id": "v"}]))
        elif stage in ("augment", "score", "filter"):
            write_table(data / "part-00000.parquet", at(rows, stage))
        elif stage == "align":
            for k, direction in ((k, d) for k in range(2) for d in ("forward", "reverse")):
                log(directory / f"round-{k}" / direction, steps=4, aligned=k > 0)
        elif stage == "finetune":
            for arm in ("none", "mutual"):
                log(directory / arm, steps=5)
        else:
            arms = {
                "none": {"kept_pairs": 6} | held_out(2.25, base=-0.75),
                "mutual": {"kept_pairs": 3} | held_out(1.5, base=-1.5),
            }
            results = {
                "arms": arms, "base": held_out(3.0),
                "pairs": {"seed": 9, "validation": 1, "augmented": len(rows)},
            }  # fmt: skip
            (directory / "results.json").write_text(json.dumps(results))
    return folder


def held_out(nll: float, half: float = 0.25, **minus: float) -> dict:
    """A model's figures as `evaluate` writes them, each with an interval of twice `half`."""
    found = {
        "validation_nll_nats_per_token": nll, "interval_nats_per_token": [nll - half, nll + half]
    }  # fmt: skip
    differences = {
        other: {"nats_per_token": d, "interval_nats_per_token": [d - half / 2, d + half / 2]}
        for other, d in minus.items()
    }
    return found | ({"difference_to": differences} if minus else {})


def log(directory: Path, steps: int, aligned: bool = False) -> None:
    directory.mkdir(parents=True)
    lines = [
        {"step": i + 1, "loss_nats_per_token": 2.0 / (i + 1), "seed_nll_nats_per_token": 2.0 / (i + 1),
         "aligned_nll_nats_per_token": 1.0 / (i + 1) if aligned else None,
         "alpha": 0.6 if aligned else 0.0}
        for i in range(steps)
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text + '{"step": 99, "loss')  # a line half written


DROPPED_BY = {"empty_response": "prepare", "empty_instruction": "augment", "too_long": "score"}


def at(rows: list[dict], stage: str) -> pa.Table:
    """The table as this stage leaves it: later drops and figures are not there yet."""
    order = ("prepare", "augment", "score", "filter")
    done = []
    for row in rows:
        reason = row["drop_reason"]
        since = "filter" if reason and reason.startswith("filter_") else DROPPED_BY.get(reason, "")
        if reason and order.index(since) > order.index(stage):
            row = row | {"drop_reason": None}
        if stage in ("prepare", "augment"):
            row = {k: v for k, v in row.items() if "nll" not in k and "tokens" not in k}
        if stage != "filter":
            row = {k: v for k, v in row.items() if k not in ("mutual", "ifd")}
        done.append(row)
    return table_of(done)


def pair(i: int, mutual: float | None, reason: str | None = None, **more) -> dict:
    """A pair with NLLs of `mutual` nats per token forward and twice that reverse."""
    row = {"id": f"doc/{i}", "instruction": f"ask {i}", "response": f"say {i}", "weight": 1.0,
           "keep": reason is None, "drop_reason": reason, "truncated": i % 2 == 0,
           "finish_reason": "stop"}  # fmt: skip
    if mutual is not None:
        row |= {"forward_nll_sum": 10 * mutual, "forward_tokens": 10, "reverse_nll_sum": 8 * mutual,
                "reverse_tokens": 4, "mutual": mutual, "ifd": 1.125 - mutual}  # fmt: skip
    return row | more


@pytest.fixture
def rows() -> list[dict]:
    """Ten texts: one empty, one without an instruction, two too long, three cut, three kept."""
    return [
        pair(0, 0.25), pair(1, 0.375, response=HOSTILE), pair(2, 0.4375, instruction=HOSTILE),
        pair(3, 0.625, "filter_mutual"), pair(4, 0.75, "filter_mutual"), pair(5, 1.0, "filter_mutual"),
        pair(6, None, "empty_response", response=""), pair(7, None, "empty_instruction"),
        pair(8, None, "too_long"), pair(9, None, "too_long", id="<i>nine</i>"),
    ]  # fmt: skip


def read(run: Path) -> Page:
    return Page(write_report(run).read_text())


def test_figures_are_those_worked_out_by_hand(tmp_path, rows):
    page = read(make_run(tmp_path / "run", rows))
    assert {k: page.texts[k] for k in ("read", "kept", "cut")} == {
        "read": "10", "kept": "3", "cut": "0.4375"
    }  # fmt: skip
    assert page.texts["seconds"] == "14.0 min"  # 30 s · (1 + ... + 7)
    assert [row[:2] + row[3:] for row in page.tables["funnel-table"][1:]] == [
        ["read", "10", ""],
        ["prepare", "9", "empty_response 1"],
        ["augment", "8", "empty_instruction 1"],
        ["score", "6", "too_long 2"],
        ["filter", "3", "filter_mutual 3"],
    ]
    assert page.texts["seed"].startswith(
        "Seed pairs: 10 read, 2 dropped as too_long, 1 held out, 7 for training. "
        "The final set is 10 pairs"
    )
    assert page.tables["arms-table"] == [  # a value with its interval under it
        ["model", "kept pairs", "held-out NLL, nats per token", "minus base"],
        ["base", "–", "3.00002.7500 to 3.2500", "–"],
        ["none", "6", "2.25002.0000 to 2.5000", "-0.7500-0.8750 to -0.6250"],
        ["mutual", "3", "1.50001.2500 to 1.7500", "-1.5000-1.6250 to -1.3750"],
    ]
    assert "6 scored pairs; lower is better, and the 3 on the left" in page.text
    assert "keeps ≤ 0.4375" in page.text
    assert "keeps ≥ 0.6875" in page.text  # the third best ifd: 0.875, 0.75, 0.6875
    assert page.texts["truncated"].startswith("3 of 6 scored pairs were truncated")
    assert ["jax", "0.1, 0.2"] in page.tables[None]
    assert "forward 0.4375 (10 tokens)" in page.text
    assert "reverse 0.875 (4 tokens)" in page.text
    for level in (
        "best kept",
        "first cut",
        "worst",
        "dropped: too_long",
        "dropped: empty_response",
    ):
        assert level in page.text


def test_arms_beside_the_seed_alone_and_without_intervals(tmp_path, rows):
    run = make_run(tmp_path / "run", rows)
    file = run / "stages/07-evaluate/results.json"
    results = json.loads(file.read_text())
    results["arms"] = {
        "seed_only": {"kept_pairs": 0} | held_out(2.0, base=-1.0),
        "mutual": {"kept_pairs": 3} | held_out(1.5, base=-1.5, seed_only=-0.5),
    }
    file.write_text(json.dumps(results))
    page = read(run)
    assert page.tables["arms-table"][0][3:] == ["minus base", "minus seed_only"]
    assert page.tables["arms-table"][2][3:] == ["-1.0000-1.1250 to -0.8750", "–"]
    assert page.tables["arms-table"][3][4] == "-0.5000-0.6250 to -0.3750"
    assert "Difference to seed_only, pair by pair" in page.text
    assert "mutual, held-out NLL: -0.5" in page.text  # the point, on its axis with 0
    # As older versions wrote them, and where nothing was held out.
    for nll, shown in ((1.5, "1.5000"), (None, "–")):
        old = {"validation_nll_nats_per_token": nll}
        results |= {"base": old, "arms": {"mutual": {"kept_pairs": 3} | old}}
        file.write_text(json.dumps(results))
        page = read(run)
        assert page.tables["arms-table"][1:] == [["base", "–", shown], ["mutual", "3", shown]]
        assert "No spread is recorded" in page.text and "pair by pair" not in page.text


def test_what_was_measured_afterwards_stands_on_the_page(tmp_path, rows):
    run = make_run(tmp_path / "run", rows)
    results = run / "stages" / "07-evaluate" / "results.json"
    found = json.loads(results.read_text())
    figures = {"nll_nats_per_token": 1.5, "interval_nats_per_token": [1.25, 1.75]}
    models = {"base": figures | {"right": 0.25}, "mutual": figures | {"right": 0.75}}
    test = {"questions": {"asked": 20, "too_long": 1}, "checker": "exact", "models": models}
    results.write_text(json.dumps(found | {"test": test}))
    folder = run / "evaluations"
    folder.mkdir()
    (folder / "quick.json").write_text(json.dumps({
        "normalised": {"openllm": {"average": 31.25}},
        "results": {"<b>arc</b>": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.125,
                                   "exact_match,strict": 0.25}},
    }))  # fmt: skip
    (folder / "mine.json").write_text('[{"instruction": "q", "output": "a"}]')
    (folder / "mine.judged.json").write_text(json.dumps({
        "win_rate": 0.625, "interval": [0.5, 0.75], "length_ratio": 1.5, "unparsable_share": 0.0,
        "reference": "theirs.json", "judge": "stub",
    }))  # fmt: skip
    page = read(run)
    check_self_contained(page)
    assert "20 asked, 1 too_long" in page.text
    assert page.tables["test-table"][1:] == [
        ["base", "1.50001.2500 to 1.7500", "0.2500.112 to 0.469"],  # Wilson: 5 of 20, 15 of 20
        ["mutual", "1.50001.2500 to 1.7500", "0.7500.531 to 0.888"],
    ]
    assert page.tables["quick.json"][1:] == [
        ["openllm: average", "as published, %", "31.2500"],
        ["<b>arc</b>", "acc", "0.50000.2550 to 0.7450"],
        ["<b>arc</b>", "exact_match (strict)", "0.2500"],
    ]
    assert page.tables["mine.judged.json"][1] == [
        "against theirs.json, by stub", "win rate", "0.62500.5000 to 0.7500",
    ]  # fmt: skip
    assert "mine.json" not in page.tables


def test_texts_cannot_become_markup(tmp_path, rows):
    html = write_report(make_run(tmp_path / "run", rows)).read_text()
    page = Page(html)
    assert "script" not in page.tags and "img" not in page.tags and "i" in page.tags
    assert page.text.count("<script>alert('x')</script>") == 2  # as text, where it is an example
    assert (
        "<i>nine</i>" not in page.text
    )  # of each drop reason one row is shown, and it is the second
    assert "some/<b>model</b>" in page.text and "b" in page.tags
    assert not [a for _, a, _ in page.attributes if a.startswith("on")]
    assert "\x00" not in html and "\u202e" not in html


def test_self_contained_and_made_for_a_phone(tmp_path, rows):
    page = read(make_run(tmp_path / "run", rows))
    check_self_contained(page)
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes
    assert "prefers-color-scheme: dark" in page.style
    anchors = {v for _, k, v in page.attributes if k == "id"}
    assert {v[1:] for _, k, v in page.attributes if k == "href" and v[:1] == "#"} <= anchors


@pytest.mark.parametrize("until", STAGES)
def test_after_every_stage(tmp_path, rows, until):
    page = read(make_run(tmp_path / "run", rows, until))
    done = STAGES[: STAGES.index(until) + 1]
    left = [*STAGES[len(done) :], "export"]
    assert f"Not begun: {', '.join(left)}." in page.text
    assert ("The scores of the pairs: not there yet" in page.text) == ("score" not in done)
    assert ("What the training brought: not there yet" in page.text) == ("evaluate" not in done)
    assert page.texts["cut"] == ("0.4375" if "filter" in done else "–")
    assert len(page.tables["funnel-table"]) == 2 + len(
        set(done) & {"prepare", "augment", "score", "filter"}
    )


def test_what_the_rules_of_a_source_refused_comes_first(tmp_path, rows):
    run = make_run(tmp_path / "run", rows, "augment")
    file = run / "stages" / "01-prepare" / "manifest.json"
    counts = {"responses_skipped_length": 25, "responses_skipped_line": 5, "seed_skipped_rank": 3}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"counts": counts}))
    page = read(run)
    assert page.texts["read"] == "40"
    assert [row[:2] + row[3:] for row in page.tables["funnel-table"][1:]] == [
        ["read", "40", ""],
        ["rules of the source", "10", "length 25, line 5"],
        ["prepare", "9", "empty_response 1"],
        ["augment", "8", "empty_instruction 1"],
    ]
    assert page.texts["seed"].startswith(
        "Seed pairs: 13 read, 3 refused by the rule rank, 2 dropped as too_long, 1 held out"
    )


def test_within_a_stage(tmp_path, rows):
    run = make_run(tmp_path / "run", rows, "augment")
    stage = run / "stages" / "03-augment"
    write_table(stage / "data" / "part-00000.parquet", at(rows[:7], "augment"))
    manifest = json.loads((stage / "manifest.json").read_text()) | {"status": "running"}
    (stage / "manifest.json").write_text(json.dumps(manifest))
    page = read(run)
    assert "Unfinished: augment." in page.text
    assert page.tables["funnel-table"][-1][3] == "7 of 10 rows written so far"


def test_results_of_older_settings_are_not_mixed_with_new_ones(tmp_path, rows):
    run = make_run(tmp_path / "run", rows)
    config = run / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG | {"augment": {"sampling": {"max_new_tokens": 9}}}))
    page = read(run)
    old = "augment, score, filter, finetune, evaluate."
    assert f"the run now has, or by another version: {old}" in page.text
    assert page.texts["read"] == "10" and page.texts["kept"] == page.texts["cut"] == "–"
    assert len(page.tables["funnel-table"]) == 3 and "arms-table" not in page.tables
    # All of it by an older version: shown as it is, and said.
    config.write_text(yaml.safe_dump(CONFIG | {"prompt": {"max_length": 9}}))
    page = read(run)
    assert f"or by another version: prepare, align, {old}" in page.text
    assert page.texts["kept"] == "3" and "arms-table" in page.tables
    # Keys that this version does not know.
    config.write_text(yaml.safe_dump(CONFIG | {"once": {"upon": "a time"}}))
    assert read(run).texts["kept"] == "3"


@pytest.mark.parametrize("what", ["nothing scored", "nothing kept", "filter none", "no stage"])
def test_runs_at_the_edge(tmp_path, rows, what):
    config = CONFIG
    if what == "nothing scored":
        rows = [pair(i, None, "too_long") for i in range(10)]
    elif what == "nothing kept":
        rows = [pair(i, 0.5, "filter_mutual") for i in range(10)]
    elif what == "filter none":
        config = CONFIG | {"filter": {"by": "none", "select": "fraction", "keep": 1.0}}
        rows = [pair(i, 0.5) for i in range(10)]  # all the same
    run = make_run(tmp_path / "run", rows, config=config)
    if what == "no stage":
        shutil.rmtree(run / "stages")
    page = read(run)
    assert page.texts["cut"] == "–"
    kept = {"nothing kept": "0", "filter none": "10"}
    assert page.texts["kept"] == kept.get(what, "–")
    none = "The scores of the pairs: none; stage score is done."
    assert (none in page.text) == (what == "nothing scored")


def test_no_run_is_a_mistake_of_the_user(tmp_path, capsys):
    with pytest.raises(UserError, match="no run here"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert main(["report", str(tmp_path)]) == 2
    assert "no run here" in capsys.readouterr().err


def test_the_verb(tmp_path, rows, capsys):
    run = make_run(tmp_path / "run", rows)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").exists()


def test_no_device_is_touched(tmp_path, rows):
    """A run may be at work on all of them."""
    run = make_run(tmp_path / "run", rows)
    environment = os.environ | {"JAX_PLATFORMS": "no_such_platform"}
    done = subprocess.run([TOOL, "report", run], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (run / "report.html").exists()


def test_a_failing_report_stops_no_run(tmp_path, rows, capsys):
    run = make_run(tmp_path / "run", rows)
    refresh_report(run)
    assert (run / "report.html").exists()
    (run / "stages/05-filter/data/part-00000.parquet").write_bytes(b"no Parquet\nat all")
    refresh_report(run)
    err = capsys.readouterr().err
    assert err.startswith("report: not written (") and err.count("\n") == 1
    assert not list(run.rglob("*.tmp"))


def test_the_page_is_a_function_of_the_files(tmp_path, rows):
    run = make_run(tmp_path / "run", rows)
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_two_hundred_thousand_rows(tmp_path, rows):
    """The page stays small and says that it shows a sample; the figures still count every row."""
    n, rng = 200_000, np.random.default_rng(0)
    score, length = rng.random(n), rng.integers(5, 700, n)
    kept = score < 0.25
    text = "<b>" + "long " * 400 + "text"
    table = pa.table({
        "id": [f"doc/{i}" for i in range(n)],
        "instruction": pa.array([text]).take(pa.array(np.zeros(n, int))),
        "input": pa.nulls(n, pa.string()),
        "response": [f"{i} done" for i in range(n)],
        "forward_nll_sum": rng.gamma(4, 0.3, n) * length, "forward_tokens": length,
        "reverse_nll_sum": rng.gamma(4, 0.3, n) * length, "reverse_tokens": length,
        "keep": kept, "drop_reason": pa.array(np.where(kept, None, "filter_mutual"), pa.string()),
        "truncated": np.zeros(n, bool), "finish_reason": pa.nulls(n, pa.string()), "mutual": score,
        **{name: rng.standard_normal(n) for name in ("mutual_z", "forward_ce", "reverse_ce", "pmi")},
    })  # fmt: skip
    run = make_run(tmp_path / "run", rows)
    write_table(run / "stages/05-filter/data/part-00000.parquet", table)
    html = write_report(run).read_text()
    page = Page(html)
    assert len(html.encode()) < LIMIT
    assert page.texts["kept"] == f"{kept.sum():,}"
    assert float(page.texts["cut"]) == pytest.approx(score[kept].max(), rel=1e-3)
    assert f"A seeded sample of {POINTS:,} of 200,000 pairs" in page.text
    assert page.tags.count("circle") == POINTS + 3 + 2  # and the models of the result, twice
    best = int(np.argmin(score))
    assert f"{best} done" in page.text and "<b>long long" in page.text


def test_long_curves_are_thinned_to_means(tmp_path):
    lines = [{"step": i + 1, "loss_nats_per_token": float(i % 2)} for i in range(LINE_POINTS * 10)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    steps, values = metrics(tmp_path / "metrics.jsonl")["loss_nats_per_token"]
    assert len(steps) == LINE_POINTS and set(values) == {0.5}
    assert steps[0] == 5.5  # the mean of steps 1 to 10


def test_histograms_count_every_value():
    drawn = charts.histogram({"a": np.arange(10), "b": np.array([3, 3, 400])}, "tokens", cut=4.5)
    counts = re.findall(r"<title>(\w): ([\d,]+) from", drawn)
    assert sum(int(n) for name, n in counts if name == "a") == 10
    assert sum(int(n) for name, n in counts if name == "b") == 3
    odd = {"a": np.array([1.0, np.inf, np.nan]), "b": np.array([])}
    assert len(re.findall("<title>a: 1 from", charts.histogram(odd, "nats"))) == 1
    assert "no values" in charts.histogram({"b": np.array([np.nan])}, "nats")


def test_axes_have_round_ticks_and_hold_what_lies_beyond():
    axis = charts.Axis(0.0, 10.0, 0.0, 100.0)
    assert axis.ticks == [0, 2, 4, 6, 8, 10]
    assert [axis.at(x) for x in (-5, 0, 2.5, 10, 99)] == [0, 0, 25, 100, 100]
    axis = charts.Axis(1.0, 3.0, 0.0, 1.0)
    axis.whole()
    assert axis.ticks == [1, 2, 3]
    assert charts.Axis(7.0, 7.0, 0, 1).at(7.0) == 0.5  # all values the same


def test_numbers_for_people():
    shown = [charts.number(x) for x in (None, float("nan"), 0, 3, 1234567, 0.123456, 0.0000123)]
    assert shown == ["–", "–", "0", "3", "1,234,567", "0.1235", "1.2e-05"]
    assert [clock(s) for s in (0.014, 3.21, 65, 600, 86400)] == [
        "0.014 s", "3.2 s", "65 s", "10.0 min", "24.0 hours"
    ]  # fmt: skip


# ------------------------------------------------------------------------------------- a real browser


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


def test_in_a_browser(tmp_path, rows, browser):
    check_in_browser(browser, write_report(make_run(tmp_path / "run", rows)))


def test_the_browser_test_sees_what_is_loaded(tmp_path, rows, browser):
    page = write_report(make_run(tmp_path / "run", rows))
    page.write_text(page.read_text().replace("</main>", '<img src="gone.png"></main>'))
    with pytest.raises(AssertionError):
        check_in_browser(browser, page)


@pytest.mark.slow
def test_a_real_run(tmp_path, browser):
    """The shortened demo: all stages done, true and flawed pairs, the arms' figures as in results.json."""
    run = tmp_path / "run"
    overrides = [
        w for k, v in SHORT.items() for w in (f"--{k}", yaml.safe_dump(v, default_flow_style=True))
    ]
    command = [TOOL, "run", ROOT / "configs/demo.yaml", "--output_dir", run, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    written = (run / "report.html").read_bytes()  # by the run itself
    page = read(run)
    assert (run / "report.html").read_bytes() == written
    assert "Not all stages are done" not in page.text
    check_self_contained(page)
    results = json.loads((run / "results.json").read_text())
    for row in page.tables["arms-table"][1:]:
        figures = results["arms"][row[0]]
        assert row[2] == f"{figures['precision']:.3f}"
        held_out, interval = row[3][:5], row[3][5:]
        assert held_out == f"{figures['heldout']:.3f}"
        assert re.fullmatch(r"[01]\.\d\d–[01]\.\d\d", interval)
    for text in ("true", "flawed (", "The world's base model", "α (share of aligned pairs)"):
        assert text in page.text
    assert page.texts["read"] == "200" and page.texts["kept"] == "80"
    check_in_browser(browser, run / "report.html")
    # Another cut: what follows the filter no longer belongs to it.
    again = [TOOL, "filter", run / "config.yaml", "--filter.keep", "0.2"]
    subprocess.run(again, check=True, capture_output=True, timeout=120)
    page = read(run)
    assert page.texts["kept"] == "40"
    assert "or by another version: finetune, evaluate, export." in page.text
    assert "What the training brought: not there yet. Stage evaluate is outdated" in page.text


def test_the_templates_are_part_of_the_package():
    folder = Path(page.__file__).parent / "templates"
    expected = {"ablation.html", "base.html", "macros.html", "run.html", "scores.html", "style.css"}
    assert {file.name for file in folder.iterdir()} == expected
