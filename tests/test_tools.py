"""`score`, `generate` and `filter` of files: stopped and continued, and equal to what a run does."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_llama import make_tiny_llama

from main_jax import tools
from main_jax.cli import main
from main_jax.filter import with_filter


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", seed=3))


@pytest.fixture
def pairs_file(tmp_path):
    rows = [
        {
            "id": f"r{i}",
            "prompt": f"Say {i} {'again ' * (i % 5)}",
            "completion": "word " * (1 + i % 7),
        }
        for i in range(23)
    ]
    rows[5]["completion"] = ""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def scored(model, data, output, *more) -> list[dict]:
    words = [
        "--forward-model",
        model,
        "--data",
        data,
        "--output",
        str(output),
        "--template",
        "none",
    ]
    assert main(["score", *words, *more]) == 0
    return pq.read_table(output).to_pylist()


@pytest.mark.parametrize("verb", ["score", "generate"])
def test_what_is_killed_continues_and_ends_equal(
    verb, model, pairs_file, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(tools, "CHUNK_ROWS", 5)
    worker = {"score": "score_rows", "generate": "complete"}[verb]
    real, calls, fail_at = getattr(tools, worker), [], [None]

    def count(chunk, *rest, **how):
        if len(calls) == fail_at[0]:
            raise KeyboardInterrupt
        calls.append(len(chunk))
        return real(chunk, *rest, **how)

    monkeypatch.setattr(tools, worker, count)

    def run(name):
        words = ["--output", str(tmp_path / name), "--template", "none"]
        if verb == "score":
            words += ["--forward-model", model, "--data", pairs_file]
        else:
            words += ["--model", model, "--prompts", pairs_file, "--max-new-tokens", "4",
                      "--temperature", "0.7"]  # fmt: skip
        return main([verb, *words])

    assert run("whole.jsonl") == 0 and calls == [5, 5, 5, 5, 3]
    calls.clear()
    fail_at[0] = 2
    assert run("again.jsonl") == 130 and calls == [5, 5]
    assert not (tmp_path / "again.jsonl").exists() and (tmp_path / "again.jsonl.partial").is_dir()
    fail_at[0] = None
    capfd.readouterr()
    assert run("again.jsonl") == 0 and calls == [5, 5, 5, 5, 3]
    assert "again.jsonl: continues" in capfd.readouterr().err
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "again.jsonl.partial").exists()


def test_other_settings_begin_anew(model, pairs_file, tmp_path, monkeypatch):
    whole = scored(model, pairs_file, tmp_path / "whole.parquet", "--max-length", "60")
    real = tools._write
    monkeypatch.setattr(tools, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    words = [
        "--forward-model",
        model,
        "--data",
        pairs_file,
        "--output",
        str(tmp_path / "o.parquet"),
    ]
    assert main(["score", *words, "--template", "none"]) == 130
    monkeypatch.setattr(tools, "_write", real)
    assert scored(model, pairs_file, tmp_path / "o.parquet", "--max-length", "60") == whole


def test_a_stop_is_agreed_and_continues(model, pairs_file, tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "CHUNK_ROWS", 5)
    asked = iter([False, True])
    monkeypatch.setattr("main_jax.pairs.stop_asked", lambda: next(asked, False))
    words = [
        "--forward-model",
        model,
        "--data",
        pairs_file,
        "--output",
        str(tmp_path / "o.parquet"),
    ]
    assert main(["score", *words, "--template", "none"]) == 75
    assert len(list((tmp_path / "o.parquet.partial" / "scored").glob("part-*.parquet"))) == 2
    assert scored(model, pairs_file, tmp_path / "o.parquet") == scored(
        model, pairs_file, tmp_path / "whole.parquet"
    )


def test_a_mistake_in_the_data_leaves_nothing_behind(model, tmp_path, capfd):
    data, output = tmp_path / "d.jsonl", tmp_path / "o.jsonl"
    data.write_text('{"prompt": "q", "response": "a"}\n{"prompt": "q", "response": 7}\n')
    words = ["--forward-model", model, "--data", str(data), "--output", str(output)]
    assert main(["score", *words, "--template", "none"]) == 2
    assert capfd.readouterr().err == (
        f"main-jax: {data}, row 2, response: expected text, found int\n"
    )
    assert list(tmp_path.iterdir()) == [data]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_filter_keeps_what_the_stage_would(suffix, model, pairs_file, tmp_path, capfd):
    rows = scored(model, pairs_file, tmp_path / "scored.parquet")
    source = tmp_path / f"scored.{suffix}"
    if suffix == "jsonl":
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for by, keep in (("mutual", 0.25), ("pmi", 0.5), ("random", 0.3)):
        expected = with_filter(pq.read_table(tmp_path / "scored.parquet"), by, "fraction", keep, 0)
        ids = [row["id"] for row in expected.to_pylist() if row["keep"]]
        output = tmp_path / f"{by}.parquet"
        words = ["filter", str(source), "--by", by, "--keep", str(keep), "--output", str(output)]
        assert main(words) == 0
        kept = pq.read_table(output).to_pylist()
        assert [row["id"] for row in kept] == ids and 0 < len(ids) < 22
        assert "prompt" in kept[0]  # the user's own columns stay
        assert main([*words[:-1], str(tmp_path / "every.parquet"), "--every-pair"]) == 0
        every = pq.read_table(tmp_path / "every.parquet").to_pylist()
        assert [row["id"] for row in every] == [row["id"] for row in rows]
        assert {row["drop_reason"] for row in every} == {None, "empty_response", f"filter_{by}"}
        np.testing.assert_array_equal([r["keep"] for r in every], expected["keep"].to_pylist())
    capfd.readouterr()
    for words, said in (
        ((str(source), "--by", "mutul", "--output", "x.parquet"), "did you mean mutual?"),
        (
            (str(source), "--by", "mutual", "--keep", "3", "--output", "x.parquet"),
            "expected a share",
        ),
        ((str(source), "--by", "mutual"), "needs --output"),
        ((pairs_file, "--by", "mutual", "--output", "x.parquet"), "no column forward_nll_sum"),
        ((str(source), "--by", "mutual", "--output", "x.csv"), "ends in .jsonl or .parquet"),
    ):
        assert main(["filter", *words]) == 2
        err = capfd.readouterr().err
        assert said in err and err.count("\n") == 1, err
