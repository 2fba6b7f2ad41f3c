"""The command line: help, `score` and `generate` on files, and one line with exit code 2 for every mistake.

Subprocesses only where the time, or the streams and the exit code of a real process, are the point.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from score_reference import ROWS, TEMPLATES, largest_difference, make_pair, reference
from tiny_llama import ANY_INSTRUCTION, make_tiny_llama

from main_jax.cli import main
from main_jax.data.sources import open_source
from main_jax.filter import SCORES
from main_jax.lm.hf import load_checkpoint
from main_jax.lm.model import Decoder
from main_jax.pairs import COLUMNS

try:
    import torch
except ImportError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="compares with Transformers on PyTorch")

GOLDEN = json.loads((Path(__file__).parent / "golden" / "score.json").read_text())
TOOL = Path(sys.executable).with_name("main-jax")
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A model folder of 512 positions; tests copy it before they change anything."""
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", seed=1)


@pytest.fixture(scope="session")
def golden_models(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("golden"), GOLDEN["tokenizer"])


def write(path: Path, rows) -> Path:
    if path.suffix == ".parquet":
        names = dict.fromkeys(name for row in rows for name in row)
        pq.write_table(pa.Table.from_pylist([{n: r.get(n) for n in names} for r in rows]), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [row.values for row in open_source(str(path))]


def call(capsys, *arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `main-jax ARGUMENTS` in this process."""
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *arguments) -> str:
    """The one line of a user's mistake."""
    code, out, err = call(capsys, *arguments)
    assert code == 2, err
    assert out == ""
    assert err.endswith("\n")
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("main-jax: ")
    return lines[0].removeprefix("main-jax: ")


def score(capsys, model, data, output, *more) -> list[dict]:
    code, _, err = call(
        capsys, "score", "--forward-model", model, "--data", data, "--output", output, *more
    )
    assert code == 0, err
    return read(output)


def generate(capsys, model, prompts, output, *more) -> list[dict]:
    code, _, err = call(
        capsys, "generate", "--model", model, "--prompts", prompts, "--output", output, *more
    )
    assert code == 0, err
    return read(output)


# ------------------------------------------------------------------------------------------ help


def run_tool(*arguments, **how) -> subprocess.CompletedProcess:
    return subprocess.run(
        [TOOL, *arguments], capture_output=True, text=True, timeout=120, check=False, **how
    )


def test_help_is_quick_and_shows_examples():
    times = []
    for _ in range(3):
        start = time.monotonic()
        done = run_tool("--help")
        times.append(time.monotonic() - start)
    assert done.returncode == 0
    assert min(times) < 0.5
    assert "examples:" in done.stdout
    for line in ("main-jax run configs/demo.yaml", "main-jax score --forward-model DIR",
                 "main-jax generate --model DIR", "main-jax run configs/own_data.yaml"):  # fmt: skip
        assert line in done.stdout


def test_every_verb_has_help_with_an_example(capsys):
    assert call(capsys)[0] == 0
    verbs = ["run", "prepare", "align", "augment", "score", "filter", "finetune", "evaluate"]
    for verb in [*verbs, "generate"]:
        with pytest.raises(SystemExit) as done:
            main([verb, "--help"])
        assert done.value.code == 0
        shown = capsys.readouterr().out
        assert f"main-jax {verb} " in shown.split("examples:")[1]


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from main_jax.cli import build_parser; build_parser().format_help();"
        "print([m for m in ('jax', 'numpy', 'pyarrow', 'yaml', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_mistake_in_a_real_process_is_one_unwrapped_line(tmp_path):
    """A narrow terminal must not break the line, and nothing may come before it."""
    name = "a-rather-long-name-for-a-file-that-is-not-there" * 3
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model_name_or_path: {tmp_path}\ndata: {{seed_path: {name}, responses_path: {name}}}\n"
    )
    done = run_tool("run", config, env=os.environ | {"COLUMNS": "40"}, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"main-jax: data.seed_path: {name}: no such file\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
@pytest.mark.parametrize(
    ("given", "starts", "then"),
    [
        (None, 2, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=0", 2, "glibc.malloc.check=0:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", 1, "glibc.malloc.hugetlb=0"),
    ],
)
def test_the_program_starts_itself_anew_once_with_huge_pages(given, starts, then):
    """As the same process with the same words; what the user has set wins."""
    code = (
        "import os, sys; print('start', os.getpid(), flush=True);"
        "from main_jax.lm.runtime import start_with_huge_pages; start_with_huge_pages();"
        "print(os.environ['GLIBC_TUNABLES'], *sys.argv[1:], sep='|')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    if given is not None:
        environment["GLIBC_TUNABLES"] = given
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "two words"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    *begun, words = done.stdout.splitlines()
    assert words == f"{then}|run|two words"
    assert len(begun) == starts and len(set(begun)) == 1


# ------------------------------------------------------------------------------------------ score


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_score_equals_the_golden_file(template, suffix, golden_models, tmp_path, capsys):
    """Transformers on PyTorch wrote it; packed here, one by one there. Nats per token, to 1e-4."""
    forward, reverse = golden_models
    data = write(tmp_path / f"pairs.{suffix}", GOLDEN["rows"])
    rows = score(capsys, forward, data, tmp_path / f"out.{suffix}",
                 "--reverse-model", reverse, "--template", template)  # fmt: skip
    assert largest_difference(rows, GOLDEN["expected"][template]) < 1e-4


@needs_torch
def test_score_equals_transformers_live(golden_models, tmp_path, capsys):
    forward, reverse = golden_models
    words = ["the", "sky", "is", "blue", "on", "a", "clear day", "1", "2", "שמיים", "🙂", "Übung"]
    rng = np.random.default_rng(5)

    def text(low, high):
        return " ".join(rng.choice(words, rng.integers(low, high)))

    rows = [{"id": str(i), "instruction": text(1, 20), "response": text(1, 60)} for i in range(12)]
    rows.append({"id": "long", "instruction": text(40, 41), "response": text(90, 91)})
    data = write(tmp_path / "pairs.jsonl", rows)
    found = score(capsys, forward, data, tmp_path / "out.jsonl", "--reverse-model", reverse,
                  "--template", "none", "--tokens-per-batch", 1024)  # fmt: skip
    expected = reference(forward, reverse, "none", rows)
    assert max(r["forward_tokens"] for r in expected) > 200
    assert largest_difference(found, expected) < 1e-4


@needs_torch
def test_the_golden_file_is_what_transformers_gives(golden_models):
    assert GOLDEN["rows"] == ROWS
    for template, expected in GOLDEN["expected"].items():
        assert largest_difference(reference(*golden_models, template, ROWS), expected) < 1e-6


def test_score_keeps_rows_order_and_columns(tiny, tmp_path, capsys):
    """JSONL and Parquet, in and out, give the same table: every row, ineligible ones with a reason."""
    rows = [
        {"id": "b", "instruction": "one", "response": "two 🙂"},
        {"id": "empty-i", "instruction": "", "response": "an answer"},
        {"id": "a", "instruction": "three", "input": "with input", "response": "four\nfive"},
        {"id": "blank-r", "instruction": "q", "response": " \n\t"},
        {"id": "null-i", "instruction": None, "response": "an answer"},
        {"id": "long", "instruction": "q", "response": "word " * 400},
        {"id": "only-input", "instruction": "", "input": "the input", "response": "r"},
        {"id": "0", "instruction": "one", "response": "two 🙂"},
    ]
    names = ("id", "instruction", "input", "response")
    rows = [{name: row.get(name) for name in names} for row in rows]
    tables = []
    for suffix in ("jsonl", "parquet"):
        data = write(tmp_path / f"in.{suffix}", rows)
        for out in ("jsonl", "parquet"):
            found = score(capsys, tiny, data, tmp_path / f"{suffix}.{out}", "--max-length", 300)
            tables.append([{k: v for k, v in r.items() if k != "source"} for r in found])
            assert {r["source"] for r in found} == {str(data)}
    assert tables[0] == tables[1] == tables[2] == tables[3]
    found = tables[0]
    assert [{name: r[name] for name in names} for r in found] == rows
    columns = [c for c in COLUMNS if c != "source"] + [
        s for s in SCORES if s not in ("none", "self_curation")
    ]
    assert all(list(r) == columns for r in found)
    reasons = {r["id"]: r["drop_reason"] for r in found if not r["keep"]}
    assert reasons == {"empty-i": "empty_instruction", "blank-r": "empty_response",
                       "null-i": "empty_instruction", "long": "too_long"}  # fmt: skip
    scored = [c for c in columns if c.endswith(("_nll_sum", "_tokens")) or c in SCORES]
    for row in found:
        assert all((row[c] is None) == (not row["keep"]) for c in scored), row
        assert row["keep"] == (row["drop_reason"] is None)
        assert row["truncated"] is False
    by_id = {r["id"]: r for r in found}
    assert by_id["b"]["forward_ce"] == by_id["0"]["forward_ce"]
    kept = [r for r in found if r["keep"]]
    assert len({r["random"] for r in kept}) == len(kept)
    for row in kept:
        assert row["forward_ce"] == row["forward_nll_sum"] / row["forward_tokens"]
        assert row["pmi"] == pytest.approx(
            (row["response_nll_sum"] - row["forward_nll_sum"]) / row["forward_tokens"]
        )


def test_one_model_serves_both_directions(tiny, tmp_path, capsys):
    data = write(tmp_path / "in.jsonl", ROWS)
    alone = score(capsys, tiny, data, tmp_path / "alone.jsonl")
    twice = score(capsys, tiny, data, tmp_path / "twice.jsonl", "--reverse-model", tiny)
    assert alone == twice
    other = make_tiny_llama(tmp_path / "other", seed=9)
    mixed = score(capsys, tiny, data, tmp_path / "mixed.jsonl", "--reverse-model", other)
    assert all(
        a["forward_nll_sum"] == b["forward_nll_sum"] for a, b in zip(alone, mixed, strict=True)
    )
    assert all(
        a["reverse_nll_sum"] != b["reverse_nll_sum"] for a, b in zip(alone, mixed, strict=True)
    )


def test_truncate_keeps_the_row_and_the_target(tiny, tmp_path, capsys):
    rows = [
        {"id": "condition", "instruction": "word " * 300, "response": "short"},
        {"id": "target", "instruction": "q", "response": "word " * 300},
        {"id": "fits", "instruction": "q", "response": "short"},
    ]
    data = write(tmp_path / "in.jsonl", rows)
    how = ("--max-length", 64, "--template", "none", "--excess-length-strategy")
    kept = score(capsys, tiny, data, tmp_path / "out.jsonl", *how, "truncate")
    assert [r["truncated"] for r in kept] == [True, True, False]
    assert all(r["keep"] and r["forward_nll_sum"] > 0 for r in kept)
    short = kept[2]["forward_tokens"]
    # 64 = bos + condition + target + eos: the condition goes first, then the target, never eos.
    assert [r["forward_tokens"] for r in kept] == [short, 63, short]
    dropped = score(capsys, tiny, data, tmp_path / "drop.jsonl", *how, "drop")
    assert [r["drop_reason"] for r in dropped] == ["too_long", "too_long", None]
    for name in ("forward_nll_sum", "reverse_nll_sum", "response_nll_sum", "instruction_nll_sum"):
        assert kept[2][name] == pytest.approx(dropped[2][name], rel=1e-5)  # packed otherwise
    line = refused(capsys, "score", "--forward-model", tiny, "--data", data,
                   "--output", tmp_path / "raise.jsonl", *how, "raise")  # fmt: skip
    assert line.startswith(f"{data}, row 1: a pair has ")
    assert not (tmp_path / "raise.jsonl").exists()


def test_nothing_to_score_is_said_and_still_gives_every_row(tiny, tmp_path, capsys):
    data = write(tmp_path / "in.jsonl", [{"instruction": "", "response": "a", "mine": [1, "b"]}])
    output = tmp_path / "out.jsonl"
    code, _, err = call(
        capsys, "score", "--forward-model", tiny, "--data", data, "--output", output
    )
    assert code == 2
    assert f"{data}: no row could be scored" in err.splitlines()[-1]
    (row,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert row["mine"] == [1, "b"]
    assert (row["keep"], row["drop_reason"], row["mutual"]) == (False, "empty_instruction", None)


# ------------------------------------------------------------------------------------------ generate


def tokenizer_of(model: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def greedy(model: Path, prompt: list[int], new: int) -> tuple[list[int], str]:
    """Without a cache: the whole text through the model once more for every token."""
    config, params = load_checkpoint(model)
    decoder = Decoder(config)
    width = len(prompt) + new
    positions = jnp.arange(width)[None]

    @jax.jit
    def logits_at(tokens, last):
        segments = (positions <= last).astype(jnp.int32)
        hidden, _ = decoder.apply(params, tokens[None], positions, segments)
        return hidden[0, last] @ decoder.unembed(params)

    tokens = list(prompt)
    for _ in range(new):
        padded = np.zeros(width, np.int32)
        padded[: len(tokens)] = tokens
        logits = np.asarray(logits_at(jnp.asarray(padded), len(tokens) - 1))
        ordered = np.sort(logits)
        assert ordered[-1] - ordered[-2] > 1e-4, "a near tie says nothing; take another seed"
        best = int(logits.argmax())
        if best == 2:
            return tokens[len(prompt) :], "stop"
        tokens.append(best)
    return tokens[len(prompt) :], "length"


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_generate_equals_an_uncached_loop(direction, tiny, tmp_path, capsys):
    column = {"forward": "instruction", "reverse": "response"}[direction]
    texts = ["What is the colour of the sky?", "1, 2", "ÜÄ שלום 🙂", "Translate " * 12, "a"]
    rows = [{column: t, "mine": {"n": i}, "tags": ["x"] * i} for i, t in enumerate(texts)]
    data = write(tmp_path / "in.jsonl", rows)
    found = generate(capsys, tiny, data, tmp_path / "out.jsonl", "--template", "plain",
                     "--direction", direction, "--max-new-tokens", 12)  # fmt: skip
    assert [{k: r[k] for k in rows[0]} for r in found] == rows
    assert all(set(r) == {*rows[0], "completion", "finish_reason"} for r in found)
    tokenizer = tokenizer_of(tiny)
    before, after = TEMPLATES["plain"][direction]
    for row in found:
        parts = [
            tokenizer(p, add_special_tokens=False)["input_ids"]
            for p in (before, row[column], after)
        ]
        ids, reason = greedy(tiny, [1, *parts[0], *parts[1], *parts[2]], 12)
        known = [i for i in ids if i < len(tokenizer)]
        assert row["completion"] == tokenizer.decode(known, skip_special_tokens=True)
        assert row["finish_reason"] == reason
    assert len({r["completion"] for r in found}) == len(found)


def test_generate_parquet_and_sampling(tiny, tmp_path, capsys):
    rows = [{"prompt": f"question {i}", "id": i, "score": i / 2} for i in range(5)]
    data = write(tmp_path / "in.parquet", rows)
    how = ("--max-new-tokens", 6, "--template", "none", "--temperature", 1.0)

    def sampled(name, *more):
        return generate(capsys, tiny, data, tmp_path / name, *how, *more)

    first = sampled("a.parquet")
    assert [{k: r[k] for k in rows[0]} for r in first] == rows
    assert sampled("b.jsonl", "--batch-size", 2) == first  # neighbours do not matter
    assert sampled("c.parquet", "--seed", 1) != first
    assert sampled("d.parquet", "--top-k", 1) == generate(
        capsys, tiny, data, tmp_path / "e.parquet", "--max-new-tokens", 6, "--template", "none"
    )
    write(data, rows[::-1])
    assert sampled("f.parquet") == first[::-1]


def test_a_prompt_may_fill_all_positions_but_the_new_tokens(tiny, tmp_path, capsys):
    tokenizer = tokenizer_of(tiny)
    text = "a b c d e f g h " * 300
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    room = 512 - 9 - 1  # positions, new tokens, <s>
    texts = []
    for n in (room, room + 1):
        texts.append(tokenizer.decode(ids[:n]))
        assert len(tokenizer(texts[-1], add_special_tokens=False)["input_ids"]) == n
    rows = [{"instruction": t} for t in (texts[0], texts[1], "", "short")]
    data = write(tmp_path / "in.jsonl", rows)
    found = generate(capsys, tiny, data, tmp_path / "out.jsonl", "--template", "none",
                     "--max-new-tokens", 9)  # fmt: skip
    assert [r["finish_reason"] for r in found][1:3] == ["too_long", "empty_instruction"]
    assert [r["completion"] for r in found][1:3] == [None, None]
    known, reason = greedy(tiny, [1, *ids[:room]], 9)
    assert found[0]["completion"] == tokenizer.decode([i for i in known if i < len(tokenizer)])
    assert found[0]["finish_reason"] == reason
    assert isinstance(found[3]["completion"], str)


def test_columns_of_the_users_own_come_through(tiny, tmp_path, capsys):
    """JSONL holds anything; what Parquet cannot hold is said before the work."""
    odd = [
        {"instruction": "a", "x": 1, "meta": {"k": 1}, "none": {}},
        {"instruction": "b", "x": "one", "meta": {"other": [1, "z"]}, "half": "\ud83d"},
    ]
    data = tmp_path / "in.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in odd))
    how = ("--max-new-tokens", 2, "--template", "none")
    found = generate(capsys, tiny, data, tmp_path / "out.jsonl", *how)
    assert [{k: r[k] for k in row} for row, r in zip(odd, found, strict=True)] == odd
    line = refused(capsys, "generate", "--model", tiny, "--prompts", data,
                   "--output", tmp_path / "out.parquet", *how)  # fmt: skip
    assert line.startswith(
        f"{tmp_path / 'out.parquet'}: the other columns do not fit a Parquet table"
    )
    pq.write_table(pa.table({"prompt": ["q"], "when": pa.array([0], pa.timestamp("s"))}),
                   tmp_path / "dates.parquet")  # fmt: skip
    (row,) = generate(capsys, tiny, tmp_path / "dates.parquet", tmp_path / "dates.jsonl", *how)
    assert row["when"] == "1970-01-01 00:00:00"


def test_a_path_may_start_with_a_tilde(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tiny, tmp_path / "model")
    write(tmp_path / "in.jsonl", [{"instruction": "q", "response": "a"}])
    code, _, err = call(capsys, "score", "--forward-model=~/model", "--data=~/in.jsonl",
                        "--output=~/out/scored.jsonl")  # fmt: skip
    assert code == 0, err
    assert len(read(tmp_path / "out" / "scored.jsonl")) == 1
    code, _, err = call(capsys, "generate", "--model=~/model", "--prompts=~/in.jsonl",
                        "--output=~/made.jsonl", "--max-new-tokens", 2)  # fmt: skip
    assert code == 0, err
    assert len(read(tmp_path / "made.jsonl")) == 1


# ------------------------------------------------------------------------------------------ mistakes


@pytest.fixture
def own(tiny, tmp_path):
    """A configuration for own files, all good: (path of the YAML, its values, the folder)."""
    write(
        tmp_path / "seed.jsonl", [{"instruction": f"q {i}", "response": f"a {i}"} for i in range(6)]
    )
    write(tmp_path / "responses.parquet", [{"text": f"text {i}"} for i in range(6)])
    values = {
        "output_dir": str(tmp_path / "run"),
        "model_name_or_path": str(tiny),
        "data": {
            "seed_path": str(tmp_path / "seed.jsonl"),
            "responses_path": str(tmp_path / "responses.parquet"),
        },
        "prompt": {"max_length": 128},
        "align": {"sampling": {"max_new_tokens": 8}},
        "augment": {"sampling": {"max_new_tokens": 8}},
        "filter": {"hygiene": ANY_INSTRUCTION},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path, values, tmp_path


def test_mistakes_in_the_arguments(own, tiny, tmp_path, capsys):
    config, _, _ = own
    data, out = tmp_path / "seed.jsonl", tmp_path / "o.jsonl"
    good = ("--forward-model", tiny, "--data", data, "--output", out)
    prompts = ("--model", tiny, "--prompts", data, "--output", out)
    for arguments, expected in [
        (("frobnicate",), "invalid choice: 'frobnicate'"),
        (("run",), "the following arguments are required: CONFIG"),
        (("run", tmp_path / "none.yaml"), f"{tmp_path}/none.yaml: no such config file"),
        (("run", config, "--sed", 1), "unknown key sed; did you mean seed?"),
        (("run", config, "--align.rounds"), "--align.rounds needs a value"),
        (("run", config, "--align.rounds", "x"), f"{config}: align.rounds: expected a whole number"),
        (("run", config, "stray"), "unexpected argument 'stray'"),
        (("score",), "score needs CONFIG, or --forward-model"),
        (("score", "--forward-model", tiny, "--data", data), "score needs CONFIG, or --output"),
        (("score", *good, "--tempalte", "none"), "unknown argument --tempalte"),
        (("score", *good, "--max-length", 0), "--max-length: expected a positive number"),
        (("score", *good, "--max-length", "many"), "argument --max-length: invalid int value: 'many'"),
        (("score", *good, "--max-length", 600), "max_position_embeddings 512"),
        (("score", *good, "--tokens-per-batch", 0), "--tokens-per-batch: expected a positive number"),
        (("score", *good, "--excess-length-strategy", "cut"), "invalid choice: 'cut'"),
        (("score", *good, "--template", "fancy"), "template 'fancy': expected auto, chat, plain, none"),
        (("score", *good, "--template", "./none.yaml"), "./none.yaml: no such template file"),
        (("score", *good, "--template", config), f"{config}: a template needs the text forward.before"),
        (("score", *good, "--template", "chat"), "the tokenizer has no chat template"),
        (("score", config, *good), "score takes CONFIG or --forward-model, not both"),
        (("score", config, "--template", "none"), "score takes CONFIG or --template, not both"),
        (("generate", "--model", tiny, "--prompts", data), "required: --output"),
        (("generate", *prompts, "--direction", "up"), "invalid choice: 'up'"),
        (("generate", *prompts, "--temperature", -1), "temperature"),
        (("generate", *prompts, "--top-p", 2), "top_p"),
        (("generate", *prompts, "--max-new-tokens", 0), "max_new_tokens must be at least 1"),
        (("generate", *prompts, "--max-new-tokens", 512), "leaves no room for a prompt"),
        (("generate", *prompts, "--batch-size", 0), "--batch-size: expected a positive number"),
    ]:  # fmt: skip
        assert expected in refused(capsys, *arguments)
    assert not out.exists()
    assert not (tmp_path / "run").exists()


def test_mistakes_in_paths(own, tiny, tmp_path, capsys):
    config, _, _ = own
    data, out, gone = tmp_path / "seed.jsonl", tmp_path / "o.jsonl", tmp_path / "gone"

    def scoring(**changes):
        given = {"forward-model": tiny, "data": data, "output": out} | changes
        return ("score", *(x for k, v in given.items() for x in (f"--{k}", v)))

    afile = tmp_path / "seed.jsonl"
    for arguments, expected in [
        (("run", config, "--model_name_or_path", gone), f"model_name_or_path: {gone}: no such directory"),
        (("run", config, "--model_name_or_path", afile), f"model_name_or_path: {afile}: is a file"),
        (("run", config, "--model_name_or_path", "null"), "model_name_or_path is not set"),
        (("run", config, "--data.seed_path", gone), f"data.seed_path: {gone}: no such file"),
        (("run", config, "--data.responses_path", gone), f"data.responses_path: {gone}: no such file"),
        (("run", config, "--data.seed_path", tmp_path), f"data.seed_path: {tmp_path}: is a directory"),
        (("run", config, "--data.responses_path", "null"), "data.responses_path is not set"),
        (("run", config, "--output_dir", afile), f"output_dir: {afile} is a file, expected a directory"),
        (("run", config, "--output_dir", afile / "below"), f"output_dir: {afile} is a file"),
        (scoring(**{"forward-model": gone}), f"--forward-model: {gone}: no such directory"),
        (scoring(**{"reverse-model": gone}), f"--reverse-model: {gone}: no such directory"),
        (scoring(data=gone), f"--data: {gone}: no such file"),
        (scoring(data=tmp_path), f"--data: {tmp_path}: is a directory"),
        (scoring(output=tmp_path), f"--output: {tmp_path}: is a directory"),
        (scoring(output=tmp_path / "o.csv"), "expected a name that ends in .jsonl or .parquet"),
        (scoring(output=afile / "o.jsonl"), f"--output: {afile} is a file, expected a directory"),
        (("generate", "--model", gone, "--prompts", data, "--output", out), f"--model: {gone}: no such"),
        (("generate", "--model", tiny, "--prompts", gone, "--output", out), f"--prompts: {gone}: no such"),
    ]:  # fmt: skip
        assert expected in refused(capsys, *arguments)
    assert not out.exists()
    assert not (tmp_path / "run").exists()


def broken_model(tiny: Path, folder: Path, change) -> Path:
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_broken_models_are_found_before_the_data_is_read(own, tiny, tmp_path, capsys):
    """The data is broken as well: the model comes first."""
    config, _, _ = own
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{oops\n")

    def shape(tensors):
        tensors[Q] = tensors[Q][:-1].copy()

    missing = broken_model(tiny, tmp_path / "missing", lambda t: t.pop(Q))
    misshaped = broken_model(tiny, tmp_path / "misshaped", shape)
    unknown = broken_model(
        tiny, tmp_path / "unknown", lambda t: t.update(extra=np.zeros(3, np.float32))
    )
    cut = shutil.copytree(tiny, tmp_path / "cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    bare = shutil.copytree(tiny, tmp_path / "bare")
    (bare / "config.json").unlink()
    untokenised = shutil.copytree(tiny, tmp_path / "untokenised")
    (untokenised / "tokenizer.json").unlink()
    for model, expected in [
        (missing, f"tensor {Q} is missing"),
        (misshaped, f"tensor {Q} has shape [39, 48], expected [40, 48]"),
        (unknown, "tensor extra is unknown"),
        (cut, "model.safetensors"),
        (bare, "config.json: not found"),
        (untokenised, "no tokenizer"),
    ]:
        lines = [
            refused(capsys, "run", config, "--model_name_or_path", model, "--data.seed_path", bad),
            refused(capsys, "score", "--forward-model", model, "--data", bad,
                    "--output", tmp_path / "o.jsonl"),
            refused(capsys, "score", "--forward-model", tiny, "--reverse-model", model, "--data", bad,
                    "--output", tmp_path / "o.jsonl"),
            refused(capsys, "generate", "--model", model, "--prompts", bad, "--output", tmp_path / "o.jsonl",
                    "--max-new-tokens", 8),
        ]  # fmt: skip
        for line in lines:
            assert expected in line
            assert str(model) in line
    line = refused(capsys, "run", config, "--prompt.max_length", 513, "--data.seed_path", bad)
    assert "max_length 513 is more than the model's max_position_embeddings 512" in line
    for key in ("align", "augment"):
        line = refused(capsys, "run", config, f"--{key}.sampling.max_new_tokens", 512,
                       "--data.seed_path", bad)  # fmt: skip
        assert f"{key}.sampling.max_new_tokens" in line
    assert not (tmp_path / "run").exists()


def test_mistakes_in_the_data(own, tiny, tmp_path, capsys):
    config, _, _ = own
    path = tmp_path / "bad.jsonl"
    good = '{"instruction": "q", "response": "a"}\n'
    for content, expected in [
        (good + "{oops\n", f"{path}, row 2: not valid JSON"),
        (good + '{"instruction": "q"}\n', f"{path}, row 2: missing column 'response'"),
        ('{"question": "q", "answer": "a"}\n', f"{path}, row 1: missing column: expected instruction"),
        (good + '{"instruction": 7, "response": "a"}\n', f"{path}, row 2, instruction: expected text"),
        ("", f"{path}: no rows in it"),
    ]:  # fmt: skip
        path.write_text(content)
        out = tmp_path / "o.jsonl"
        lines = [
            refused(capsys, "score", "--forward-model", tiny, "--data", path, "--output", out),
            _last_line(capsys, "run", config, "--data.seed_path", path),
        ]
        for line in lines:
            assert expected in line
        assert not out.exists()
    parquet = tmp_path / "bad.parquet"
    parquet.write_bytes(b"PAR1 not really")
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), empty)
    for file, expected in [
        (parquet, f"{parquet}: not a readable Parquet file"),
        (empty, f"{empty}: no rows in it"),
        (write(tmp_path / "columns.jsonl", [{"words": "w"}]), "row 1: missing column: expected response or"),
        (write(tmp_path / "blank.jsonl", [{"text": ""}] * 3),
         "blank.jsonl: no usable row is left of 3 (empty_response 3)"),
        (write(tmp_path / "most.jsonl", [{"text": ""}] * 3 + [{"text": t} for t in "xy"]),
         "most.jsonl: 3 of 5 rows cannot be used (empty_response 3), more than data.max_drop_share 0.5"),
    ]:  # fmt: skip
        assert expected in _last_line(capsys, "run", config, "--data.responses_path", file)
    for command in ("score", "generate"):
        names = {"score": ("--forward-model", "--data"), "generate": ("--model", "--prompts")}[
            command
        ]
        line = refused(capsys, command, names[0], tiny, names[1], parquet, "--output", tmp_path / "o.jsonl",
                       *(("--max-new-tokens", 8) if command == "generate" else ()))  # fmt: skip
        assert "not a readable Parquet file" in line
    assert "missing column: expected response or text" in refused(
        capsys, "generate", "--model", tiny, "--prompts", write(tmp_path / "p.jsonl", [{"prompt": "q"}]),
        "--output", tmp_path / "o.jsonl", "--direction", "reverse", "--max-new-tokens", 8,
    )  # fmt: skip


def _last_line(capsys, *arguments) -> str:
    """Of a run, which may have said how far it came; nothing else but the mistake's line follows."""
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert [line for line in lines if line.startswith("main-jax: ")] == lines[-1:]
    assert "Traceback" not in err
    known = r"prepare: continues|prepare responses: \d.*"
    assert all(re.fullmatch(known, line) for line in lines[:-1]), err
    return lines[-1]


def test_the_first_of_several_faults_is_reported(own, tiny, tmp_path, capsys):
    """Config, paths, model, data."""
    config, values, _ = own
    bad_data = tmp_path / "bad.jsonl"
    bad_data.write_text("{oops\n")
    bad_model = broken_model(tiny, tmp_path / "broken", lambda t: t.pop(Q))
    faults = [
        ({"filter": {"by": "mutal"}}, "did you mean mutual?"),
        ({"output_dir": str(bad_data)}, "output_dir"),
        ({"model_name_or_path": str(bad_model)}, f"tensor {Q} is missing"),
        ({"data": values["data"] | {"seed_path": str(bad_data)}}, "row 1: not valid JSON"),
    ]
    for first in range(len(faults)):
        given = dict(values)
        for change, _ in faults[first:]:
            given |= change
        config.write_text(yaml.safe_dump(given))
        assert faults[first][1] in _last_line(capsys, "run", config)
    assert bad_data.read_text() == "{oops\n"


def test_a_disk_without_room(own, tiny, tmp_path, capsys, monkeypatch):
    config, _, _ = own
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=500_000))
    line = refused(capsys, "run", config)
    assert str(tmp_path / "run") in line
    assert re.search(r"the run needs about \d+ MB, only 0 MB are free", line) or "only 1 MB" in line
    assert not (tmp_path / "run" / "stages").exists()
    data, out = tmp_path / "seed.jsonl", tmp_path / "o.jsonl"
    out.write_text("what was there")
    assert "the output needs about" in refused(
        capsys, "score", "--forward-model", tiny, "--data", data, "--output", out
    )
    assert "the output needs about" in refused(
        capsys,
        "generate",
        "--model",
        tiny,
        "--prompts",
        data,
        "--output",
        out,
        "--max-new-tokens",
        8,
    )
    assert out.read_text() == "what was there"


def test_a_disk_that_fills_up_on_the_way(tiny, tmp_path, capsys, monkeypatch):
    """Nothing already written is lost, and it is one line as well."""
    data = write(tmp_path / "in.jsonl", [{"instruction": "q", "response": "a"}])
    out = tmp_path / "out.parquet"
    before = score(capsys, tiny, data, out)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    code, _, err = call(capsys, "score", "--forward-model", tiny, "--data", data, "--output", out)
    assert code == 2
    assert "No space left on device" in err.splitlines()[-1]
    assert read(out) == before


def test_a_stage_run_too_early_is_refused_in_one_line(own, capsys):
    config, _, _ = own
    for stage, needed in [("align", "prepare"), ("augment", "prepare"), ("score", "align"),
                          ("filter", "score"), ("finetune", "prepare"), ("evaluate", "align")]:  # fmt: skip
        line = refused(capsys, stage, config)
        assert line.startswith(f"stage {stage} needs stage {needed}, which is not done")
        assert f"main-jax {needed} " in line
