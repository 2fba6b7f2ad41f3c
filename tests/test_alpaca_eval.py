"""Outputs in AlpacaEval's form: exact, in order, continued after a kill, of a folder and of a run."""

import json
from pathlib import Path

import pytest
from chat_stub import stub
from tiny_llama import make_tiny_llama
from tiny_run import finish_run, start_run

from main_jax.cli import main
from main_jax.data.files import Row
from main_jax.errors import UserError
from main_jax.evaluation import alpaca_eval as module
from main_jax.evaluation.alpaca_eval import alpaca_eval
from main_jax.evaluation.judge import open_judge
from main_jax.lm.generate import Sampling
from main_jax.tools.generate import generate_file

SAMPLING = Sampling(5)
HOW = {"sampling": SAMPLING, "template": "none"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(
        make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", seed=3, num_hidden_layers=1)
    )


@pytest.fixture
def questions(tmp_path):
    """AlpacaEval's own form, but for an empty row, a long one, a repeated one, and an input."""
    rows = [
        {"instruction": f"Say {i}{' again' * i}.", "output": "theirs", "generator": "text_davinci_003",
         "dataset": ("koala", "vicuna")[i % 2], "datasplit": "eval"}
        for i in range(9)
    ]  # fmt: skip
    rows[2]["instruction"] = ""
    rows[4]["instruction"] = "long " * 600
    rows[7]["instruction"] = rows[6]["instruction"]
    rows[5] |= {"input": "the sum of 1 and 2", "dataset": None, "datasplit": "test"}
    path = tmp_path / "alpaca_eval.json"
    path.write_text(json.dumps(rows, indent=4))
    return str(path)


def test_the_list_is_what_alpaca_eval_reads(model, questions, tmp_path, capfd):
    output = tmp_path / "out.json"
    assert alpaca_eval(model, questions, str(output), generator="mine", **HOW) is None
    asked, written = json.loads(Path(questions).read_text()), json.loads(output.read_text())
    assert [list(row) for row in written] == [
        ["instruction", "output", "generator", "dataset", "datasplit"]
    ] * 9
    expected = [row["instruction"] for row in asked]
    expected[5] += "\n\nthe sum of 1 and 2"
    assert [row["instruction"] for row in written] == expected
    assert {row["generator"] for row in written} == {"mine"}
    datasets = ["koala", "vicuna"] * 4 + ["koala"]
    datasets[5] = "alpaca_eval"
    assert [row["dataset"] for row in written] == datasets
    assert [row["datasplit"] for row in written] == ["eval"] * 5 + ["test"] + ["eval"] * 3
    # The texts are those of `main-jax generate`.
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"instruction": text}) + "\n" for text in expected))
    generate_file(
        model, str(prompts), str(tmp_path / "g.jsonl"), template="none", sampling=SAMPLING
    )
    generated = [json.loads(line) for line in (tmp_path / "g.jsonl").read_text().splitlines()]
    assert [row["output"] for row in written] == [
        (row["completion"] or "").strip() for row in generated
    ]
    assert [i for i, row in enumerate(written) if not row["output"]] == [2, 4]
    assert len({row["output"] for row in written}) == 7  # and a repeated question, greedily, alike
    err = capfd.readouterr().err
    assert "9 outputs of mine, 2 of them empty (empty_instruction 1, too_long 1)" in err
    cut = sum(row["finish_reason"] == "length" for row in generated)
    assert f"{cut} cut after 5 tokens" in err and cut > 0
    assert not (tmp_path / "out.json.partial").exists()


def test_any_source_serves(model, tmp_path):
    path = tmp_path / "my.questions.jsonl"
    path.write_text('{"prompt": "One?"}\n{"prompt": "Two?", "dataset": "other"}\n')
    alpaca_eval(model, str(path), str(tmp_path / "o.json"), **HOW)
    written = json.loads((tmp_path / "o.json").read_text())
    assert [row["dataset"] for row in written] == ["my.questions", "other"]
    assert [row["datasplit"] for row in written] == ["eval", "eval"]
    assert {row["generator"] for row in written} == {"tiny"}
    raw = Row("hf:org/questions, split eval", 1, {})
    row = module.output_row({"instruction": "i"}, raw, "o", "g")
    assert row["dataset"] == "questions"


def test_killed_it_continues_judging_included(model, questions, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module, "CHUNK_ROWS", 4)
    real, calls, fail_at = module.complete, [], [None]

    def counted(chunk, *rest, **how):
        if len(calls) == fail_at[0]:
            raise KeyboardInterrupt
        calls.append(len(chunk))
        return real(chunk, *rest, **how)

    monkeypatch.setattr(module, "complete", counted)
    how = HOW | {"sampling": Sampling(5, temperature=0.8)}
    alpaca_eval(model, questions, str(tmp_path / "whole.json"), **how)
    assert calls == [4, 4, 1]
    whole, output = (tmp_path / "whole.json").read_bytes(), tmp_path / "out.json"
    reference = tmp_path / "reference.json"
    reference.write_text(json.dumps([row | {"output": "x"} for row in json.loads(whole)]))

    def say(a, b):
        if len(server.asked) == stop_after[0]:
            raise ConnectionAbortedError  # no answer
        return "[[A]]" if b == "x" else "[[B]]"

    stop_after = [None]
    with stub(say) as server:
        judge = open_judge(server.url, "stub", concurrency=1)
        how |= {"judge": judge, "reference": str(reference)}
        calls.clear()
        fail_at[0] = 2
        with pytest.raises(KeyboardInterrupt):
            alpaca_eval(model, questions, str(output), **how)
        assert calls == [4, 4] and not output.exists() and not server.asked
        fail_at[0], stop_after[0] = None, 6
        monkeypatch.setattr("main_jax.evaluation.chat.ATTEMPTS", 1)
        with pytest.raises(UserError, match="1 times in a row"):
            alpaca_eval(model, questions, str(output), **how)
        assert calls == [4, 4, 1] and output.read_bytes() == whole
        assert (tmp_path / "out.json.partial").is_dir() and len(server.asked) == 6
        stop_after[0] = None
        results = alpaca_eval(model, questions, str(output), **how)
        assert calls == [4, 4, 1] and output.read_bytes() == whole  # nothing generated again
    assert "out.json: continues" in capfd.readouterr().err
    assert len(server.asked) == 2 * 9 + 1  # and nothing asked again but what had no answer
    assert results["win_rate"] == 1 and results["questions"] == 9
    assert json.loads((tmp_path / "out.judged.json").read_text())["wins"] == 9
    assert not (tmp_path / "out.json.partial").exists()


def test_a_run_is_its_trained_model(model, questions, tmp_path):
    folder = tmp_path / "run"
    trained = make_tiny_llama(tmp_path / "trained", seed=4, num_hidden_layers=1)
    start_run(folder, model)
    with pytest.raises(UserError, match="stage finetune is not done"):
        alpaca_eval(str(folder), questions, str(tmp_path / "run.json"), sampling=SAMPLING)
    finish_run(folder, str(trained))
    alpaca_eval(str(folder), questions, str(tmp_path / "run.json"), sampling=SAMPLING)
    alpaca_eval(str(trained), questions, str(tmp_path / "dir.json"), **HOW)
    of_run, of_dir = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("run", "dir"))
    assert [row["output"] for row in of_run] == [row["output"] for row in of_dir]
    assert {row["generator"] for row in of_run} == {"run-mutual"}
    assert of_run != of_dir
    with pytest.raises(UserError, match="--arm pmi: this run has seed_only, mutual"):
        alpaca_eval(str(folder), questions, str(tmp_path / "o.json"), sampling=SAMPLING, arm="pmi")


def test_mistakes_are_said_before_the_work(model, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "complete", None)
    judge, output = open_judge("http://localhost:9/v1", "stub"), str(tmp_path / "o.json")
    short = tmp_path / "short.json"
    short.write_text(json.dumps(json.loads(Path(questions).read_text())[:3]))
    (tmp_path / "broken.json").write_text('[{"instruction": "a"}, 3]')
    (tmp_path / "empty.json").write_text("[]")
    for arguments, how, line in (
        ((model, questions, output), {"judge": judge}, "--judge-url and --reference belong together"),
        ((model, questions, output), {"reference": str(short)}, "belong together"),
        (
            (model, questions, output),
            {"judge": judge, "reference": str(short)},
            "short.json: no output for question 4, 'Say 3 again again again.'",
        ),
        ((model, questions, str(tmp_path / "o.jsonl")), {}, "name ends in .json"),
        ((model, str(tmp_path / "none.json"), output), {}, "--alpaca-eval: .*no such file"),
        ((model, str(tmp_path / "broken.json"), output), {}, "row 2: expected an object"),
        ((model, str(tmp_path / "empty.json"), output), {}, "no rows in it"),
        ((model, questions, output), {"sampling": Sampling(512)}, "512 positions"),
        ((model, questions, output), {"template": "no.yaml"}, "expected auto, chat, plain"),
        ((model, questions, output), {"arm": "mutual"}, "--arm mutual: .* is no run"),
        ((str(tmp_path / "nobody"), questions, output), {}, "no such directory"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=line) as error:
            alpaca_eval(*arguments, **HOW | how)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "o.json").exists()


def test_the_verb_writes_judges_and_judges_again(model, questions, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    output, reference = tmp_path / "mine.json", tmp_path / "theirs.json"
    words = ["evaluate", "--model", model, "--template", "none", "--max-new-tokens", "5"]
    assert main([*words, "--alpaca-eval", questions, "--output", str(output)]) == 0
    alpaca_eval(model, questions, str(tmp_path / "same.json"), generator="tiny", **HOW)
    assert json.loads(output.read_text()) == json.loads((tmp_path / "same.json").read_text())
    rows = json.loads(output.read_text())
    reference.write_text(json.dumps([row | {"output": "a longer one"} for row in rows]))
    with stub(lambda a, b: "[[A]]" if a == "a longer one" else "[[B]]") as server:
        judged = ["--judge-url", server.url, "--judge-model", "stub", "--reference", str(reference)]
        assert main(["evaluate", "--output", str(output), *judged]) == 0
        asked = len(server.asked)
        assert main(["evaluate", "--output", str(output), *judged]) == 0
        assert asked == len(server.asked) > 0
        assert {key for _, key, _ in server.seen} == {"Bearer sk-secret"}
    out, err = capfd.readouterr()
    assert json.loads(output.with_suffix(".judged.json").read_text())["win_rate"] == 0
    assert "win rate" in out and "sk-secret" not in out + err


JUDGED = ("--output", "o.json", "--reference", "r.json",
          "--judge-url", "http://x", "--judge-model", "j")  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--alpaca-eval", "q.json", "--model", "m", "--output", "o.json", "--tasks", "ifeval"),
         "--tasks: does not go with --alpaca-eval"),
        (("--model", "m", "--tasks", "ifeval", "--output", "o.json", "--generator", "me"),
         "--generator: does not go with --tasks"),
        (("--output", "o.json", "--judge-url", "http://x"), "--judge-model and --reference"),
        (("--alpaca-eval", "q.json", "--output", "o.json"), "together with --model"),
        (("--alpaca-eval", "q.json", "--model", "m"), "needs --output"),
        (("--model", "m", "--tasks", "ifeval"), "or --output"),
        ((*JUDGED, "--arm", "mutual"), "--arm: does not go with judging outputs that are there"),
        ((*JUDGED, "--temperature", "0.7"), "--temperature: does not go with judging outputs"),
        ((*JUDGED, "--inference-mesh", "1,1,1"), "--inference-mesh: does not go with judging"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(words, said, capsys):
    assert main(["evaluate", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
