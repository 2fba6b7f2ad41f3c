"""`score`, `generate` and `filter` of files: stopped and continued, and equal to what a run does."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath
from tiny_llama import make_tiny_llama

from main_jax.cli import main
from main_jax.filter import with_filter
from main_jax.tools import files, generate, score


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
    monkeypatch.setattr(files, "CHUNK_ROWS", 5)
    module, worker = {"score": (score, "score_rows"), "generate": (generate, "complete")}[verb]
    real, calls, fail_at = getattr(module, worker), [], [None]

    def count(chunk, *rest, **how):
        if len(calls) == fail_at[0]:
            raise KeyboardInterrupt
        calls.append(len(chunk))
        return real(chunk, *rest, **how)

    monkeypatch.setattr(module, worker, count)

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
    real = files.write
    monkeypatch.setattr(files, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    words = [
        "--forward-model",
        model,
        "--data",
        pairs_file,
        "--output",
        str(tmp_path / "o.parquet"),
    ]
    assert main(["score", *words, "--template", "none"]) == 130
    monkeypatch.setattr(files, "write", real)
    assert scored(model, pairs_file, tmp_path / "o.parquet", "--max-length", "60") == whole


def test_a_kill_among_the_last_deletions_loses_no_row(model, pairs_file, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_ROWS", 5)
    whole = scored(model, pairs_file, tmp_path / "whole.parquet")
    posix = type(epath.Path())

    def half(folder):
        for part in ("rows", "scored"):
            next((Path(folder) / part).glob("part-*.parquet")).unlink()
        raise KeyboardInterrupt

    words = ["--forward-model", model, "--data", pairs_file, "--template", "none"]
    with monkeypatch.context() as context:
        context.setattr(posix, "rmtree", half)
        assert main(["score", *words, "--output", str(tmp_path / "o.parquet")]) == 130
    assert len(list((tmp_path / "o.parquet.partial" / "rows").glob("part-*.parquet"))) == 4
    assert scored(model, pairs_file, tmp_path / "o.parquet") == whole


def test_a_stop_is_agreed_and_continues(model, pairs_file, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_ROWS", 5)
    asked = iter([False, True])
    monkeypatch.setattr("main_jax.parts.stop_asked", lambda: next(asked, False))
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


def test_columns_of_other_names(model, pairs_file, tmp_path, capfd):
    """The same scores and completions as under the names that are recognised; the user's own names stay."""
    renamed = tmp_path / "renamed.jsonl"
    with open(pairs_file) as file:
        rows = [json.loads(line) for line in file]
    renamed.write_text("".join(
        json.dumps({"key": r["id"], "task text": r["prompt"], "reply": r["completion"], "response": 7})
        + "\n" for r in rows
    ))  # fmt: skip
    columns = ("--columns", "id=key, instruction=task text,response=reply")
    expected = scored(model, pairs_file, tmp_path / "expected.parquet")
    found = scored(model, str(renamed), tmp_path / "found.parquet", *columns)
    for row, other in zip(found, expected, strict=True):
        reply = other.pop("completion")
        theirs = {"key": other["id"], "task text": other.pop("prompt"), "reply": reply}
        assert row == other | theirs | {"source": str(renamed)} and row["response"] == reply

    def written(prompts, output, *more):
        words = ["--model", model, "--prompts", str(prompts), "--output", str(output), *more]
        assert main(["generate", *words, "--template", "none", "--max-new-tokens", "3"]) == 0
        return [json.loads(line) for line in output.read_text().splitlines()]

    expected = written(pairs_file, tmp_path / "expected.jsonl")
    found = written(renamed, tmp_path / "found.jsonl", "--columns", "instruction=task text,id=key")
    assert list(found[0]) == [
        "key",
        "task text",
        "reply",
        "response",
        "completion",
        "finish_reason",
    ]
    assert [r["completion"] for r in found] != [r["reply"] for r in found]
    for name in ("completion", "finish_reason"):
        assert [r[name] for r in found] == [r[name] for r in expected]

    capfd.readouterr()
    words = ["score", "--forward-model", model, "--data", str(renamed), "--output"]
    words += [str(tmp_path / "wrong.jsonl"), "--template", "none"]
    for mapping, said in (
        (
            "instruktion=task text",
            "--columns: unknown column instruktion; did you mean instruction?",
        ),
        ("key=id", "unknown column key; known: instruction, response, input, messages, id, weight"),
        ("instruction", "--columns: instruction: expected it once, as instruction=THEIRS"),
        ("response=reply,response=x", "--columns: response: expected it once"),
        ("response=reply,instruction=task", "row 1: missing column 'task'"),
    ):
        assert main([*words, "--columns", mapping]) == 2
        err = capfd.readouterr().err
        assert said in err and err.count("\n") == 1, err
    assert main(["score", "config.yaml", "--columns", "id=key"]) == 2
    assert "CONFIG or --columns, not both" in capfd.readouterr().err
    assert not list(tmp_path.glob("wrong*"))


def test_other_columns_begin_anew(model, pairs_file, tmp_path, monkeypatch, capfd):
    real = files.write
    monkeypatch.setattr(files, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    words = ["--forward-model", model, "--data", pairs_file, "--template", "none"]
    assert main(["score", *words, "--output", str(tmp_path / "o.parquet")]) == 130
    monkeypatch.setattr(files, "write", real)
    swapped = ("--columns", "instruction=completion,response=prompt")
    rows = scored(model, pairs_file, tmp_path / "o.parquet", *swapped)
    assert "o.parquet: continues" not in capfd.readouterr().err
    assert rows[0]["instruction"] == "word " and rows[5]["drop_reason"] == "empty_instruction"


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


def test_a_graded_file_can_be_filtered_by_its_grades(model, pairs_file, tmp_path, capfd):
    ask = tmp_path / "ask.txt"
    ask.write_text("{instruction} {response} 1-5")
    rows = scored(
        model, pairs_file, tmp_path / "s.parquet", "--self-curation", "--curation-prompt", str(ask)
    )
    graded = {row["id"]: row["rating"] for row in rows if row["rating"] is not None}
    unparsed = sum(row["rating_parsed"] is False for row in rows)
    said = capfd.readouterr().err
    assert f"for {unparsed} of {len(graded)} pairs no grade is the likeliest answer" in said
    assert 20 < len(graded) <= 22 and all(1 < rating < 5 for rating in graded.values())
    assert len(set(graded.values())) > 15  # the random model says something else of each
    assert all(isinstance(row["rating_parsed"], bool) for row in rows if row["id"] in graded)
    words = ["filter", str(tmp_path / "s.parquet"), "--by", "self_curation", "--select", "top_k"]
    assert main([*words, "--keep", "5", "--output", str(tmp_path / "kept.jsonl")]) == 0
    kept = [json.loads(line)["id"] for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert set(kept) == set(sorted(graded, key=lambda i: (-graded[i], i))[:5])
    scored(model, pairs_file, tmp_path / "plain.parquet")
    capfd.readouterr()
    assert main(["filter", str(tmp_path / "plain.parquet"), *words[2:], "--keep", "5",
                 "--output", str(tmp_path / "none.jsonl")]) == 2  # fmt: skip
    assert "score them with self-curation" in capfd.readouterr().err
