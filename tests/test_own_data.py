"""The whole pipeline on a user's own files: a small random LLaMA, and texts as awkward as they come.

Each test is one story told in order, because what comes later depends on what came before.
"""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from etils import epath
from tiny_llama import ANY_INSTRUCTION, make_tiny_llama

from main_jax import finetune as finetune_module
from main_jax.checker import contains
from main_jax.cli import main
from main_jax.config import Config, SystemPrompts
from main_jax.lm.checkpoint import load_params
from main_jax.lm.hf import load_checkpoint, stop_ids
from main_jax.lm.model import Decoder
from main_jax.lm.tokenizer import load_tokenizer
from main_jax.parts import read_parts
from main_jax.pipeline import open_run
from main_jax.prompts import Direction
from main_jax.strict_yaml import load_config

STAGES = ("prepare", "align", "augment", "score", "filter", "finetune", "evaluate")
OF_A_RUN = (*STAGES, "export")  # whose verb is about a run as a whole
AWKWARD = [
    "Schöne Grüße aus Köln",
    "שלום עולם, مرحبا",  # right to left
    "cafe\u0301 n\u0303 \u1100\u1161",  # combining marks
    "👩‍👩‍👧 🙂 👍🏽",
    "line one\nline two\r\n\n\tindented",
    "null \x00 byte, \u2028 separator, \ufeff mark, \u202e override",
    "</s> <s> <pad> are names of tokens",
    "{\"json\": [1, '2']} % $HOME `x` \\n",
    "中文字，日本語、한국어",
    "a",
    "   outer white space   ",
]


def seed_rows() -> list[dict]:
    """40 rows: 34 usable, 3 empty, 1 too long, the rest duplicates; ids from their content."""
    rows = [
        {"instruction": f"Explain {t}", "input": None, "response": f"It is {t}."} for t in AWKWARD
    ]
    rows += [
        {"instruction": f"Add {i} and 2.", "input": "now", "response": str(i + 2)}
        for i in range(22)
    ]
    rows += [rows[0], rows[0], rows[20]]
    rows += [
        {"instruction": "", "input": "", "response": "nobody asked"},
        {"instruction": "no answer", "input": None, "response": ""},
        {"instruction": None, "input": None, "response": "null"},
        {"instruction": "long", "input": None, "response": "very " * 400},
    ]
    return rows


def response_rows() -> list[dict]:
    """60 rows with ids of their own."""
    texts = AWKWARD + [f"The sum of {i} and 1 is {i + 1}." for i in range(44)]
    texts += [texts[3], "", " \n ", None, "endless " * 500]
    return [{"id": f"doc/{i}", "content": t, "url": "u"} for i, t in enumerate(texts)]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """(configuration values, the folder) for a model and files of one's own."""
    folder = tmp_path_factory.mktemp("own")
    make_tiny_llama(folder / "model", seed=2, num_hidden_layers=2)
    lines = [json.dumps(row, ensure_ascii=False) for row in seed_rows()]
    (folder / "seed.jsonl").write_text("\n".join(lines), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(response_rows()), folder / "responses.parquet")
    training = {
        "max_steps": 3,
        "train_batch_size": 4,
        "save_steps": 2,
        "learning_rate": 1e-3,
    }
    sampling = {"max_new_tokens": 8}
    values = {
        "model_name_or_path": str(folder / "model"),
        "data": {
            "seed_path": str(folder / "seed.jsonl"),
            "responses_path": str(folder / "responses.parquet"),
            "validation_share": 0.1,
        },
        "prompt": {"max_length": 160, "template": "none"},
        "align": {**training, "round_0": {"max_steps": 4}, "sampling": {**sampling, "temperature": 0.7}},
        "augment": {"sampling": sampling},
        "filter": {"hygiene": ANY_INSTRUCTION},
        "score": {"tokens_per_batch": 2048},
        "finetune": {**training, "arms": ["seed_only"]},
        "runtime": {"chunk_rows": 25, "generation_batch_size": 16},
    }  # fmt: skip
    return values, folder


def config_file(path: Path, values: dict, **changes) -> Path:
    """A YAML file; `changes` are merged into the sections."""
    for key, change in changes.items():
        old = values.get(key)
        values = values | {key: old | change if isinstance(change, dict) and old else change}
    path.write_text(yaml.safe_dump(values))
    return path


def call(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def stage_dir(run: Path, stage: str) -> Path:
    if stage == "export":
        return run / "hf"
    return run / "stages" / f"{STAGES.index(stage) + 1:02}-{stage}"


def manifest(run: Path, stage: str) -> dict:
    return json.loads((stage_dir(run, stage) / "manifest.json").read_text())


def rows_of(folder: Path) -> list[dict]:
    return read_parts(folder).to_pylist()


def rows(run: Path, stage: str, part: str = "") -> list[dict]:
    return read_parts(stage_dir(run, stage) / "data" / part).to_pylist()


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and time of writing."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def check_funnel(run: Path, responses: list[dict]) -> None:
    """Rows in = kept + dropped by reason, in every stage; no id is lost, none is new, order stays."""
    ids = [r["id"] for r in responses]
    for stage in ("augment", "score", "filter"):
        table = rows(run, stage)
        assert [r["id"] for r in table] == ids, stage
        assert [r["response"] for r in table] == [r["content"] for r in responses]
        counts = dict(manifest(run, stage)["counts"])
        assert sum(counts.values()) == len(ids), stage
        assert counts.pop("pairs") == sum(r["drop_reason"] is None for r in table)
        reasons = [r["drop_reason"] for r in table if r["drop_reason"]]
        assert counts == {reason: reasons.count(reason) for reason in set(reasons)}
    counts = manifest(run, "prepare")["counts"]
    for name, read, validation in (("seed", len(seed_rows()), counts["validation_pairs"]),
                                   ("responses", len(ids), 0)):  # fmt: skip
        mine = {k: n for k, n in counts.items() if k == name or k.startswith(f"{name}_")}
        assert sum(mine.values()) == read
        table = rows(run, "prepare", name)
        assert len(table) == read - validation
        assert sum(r["drop_reason"] is None for r in table) == mine[name] - validation
    scored, filtered = rows(run, "score"), rows(run, "filter")
    for before, after in zip(scored, filtered, strict=True):
        assert (before["forward_nll_sum"] is None) == (not before["keep"])
        assert (after["mutual"] is None) == (not before["keep"])
        if not before["keep"]:  # a hard drop keeps its reason
            assert after["drop_reason"] == before["drop_reason"]
        assert after["keep"] == (after["drop_reason"] is None)
        assert {k: after[k] for k in before if k not in ("keep", "drop_reason")} == {
            k: v for k, v in before.items() if k not in ("keep", "drop_reason")
        }


def check_manifests(run: Path, stages: tuple[str, ...]) -> None:
    whole = json.loads((run / "manifest.json").read_text())
    results = json.loads((run / "results.json").read_text())
    assert whole["stages"] == list(OF_A_RUN)
    assert list(results["seconds"]) == list(stages)
    assert whole["seconds"] == results["seconds"]
    for stage in stages:
        found = manifest(run, stage)
        assert found["stage"] == stage
        assert found["status"] == "done"
        assert re.fullmatch(r"[0-9a-f]{64}", found["fingerprint"])
        assert found["seconds"] == results["seconds"][stage] >= 0
        assert 50 < found["peak_host_memory_mb"] < 20_000
        assert {"main_jax", "jax", "python"} <= set(found["versions"])
        assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in found["inputs"].values())
    assert set(manifest(run, "prepare")["inputs"]) == {"model", "seed", "responses"}
    assert "augment" in manifest(run, "score")["inputs"]
    assert "learning_rate" in manifest(run, "align")["config"]["align"]


# ------------------------------------------------------------------------------------------ the stories


def test_the_whole_pipeline(own, tmp_path, capsys):
    values, folder = own
    run = tmp_path / "run"
    config = config_file(tmp_path / "config.yaml", values, output_dir=str(run))
    code, out, err = call(capsys, "run", config)
    assert code == 0, err
    check_funnel(run, response_rows())
    check_manifests(run, OF_A_RUN)

    # Drops: each with its reason, in the table and in one line for people.
    seed = rows(run, "prepare", "seed")
    dropped = {r["response"][:6]: r["drop_reason"] for r in seed if r["drop_reason"]}
    assert dropped == {"nobody": "empty_instruction", "": "empty_response",
                       "null": "empty_instruction", "very v": "too_long"}  # fmt: skip
    assert "36 seed, 2 seed empty instruction, 1 seed empty response, 1 seed too long" in err
    reasons = {r["id"]: r["drop_reason"] for r in rows(run, "score") if r["drop_reason"]}
    given = {r["id"]: r["content"] for r in response_rows()}
    assert reasons.pop("doc/55") == "duplicate"  # of doc/3
    for i, reason in reasons.items():
        text = given[i]
        assert reason == "empty_instruction" or (
            reason == ("too_long" if text and text.startswith("endless") else "empty_response")
        )
    assert {given[i] for i, r in reasons.items() if r == "empty_response"} == {"", " \n ", None}

    # Ids: given ones stay; content hashes count repeats; held-out pairs are seed pairs, and gone there.
    validation = rows(run, "prepare", "validation")
    ids = [r["id"] for r in seed + validation]
    assert len(set(ids)) == len(ids) == 40
    repeats = [i for i in ids if re.fullmatch(r"[0-9a-f]{16}-[12]", i)]
    assert len(repeats) == 3
    # A tenth of the 33 different usable pairs, each with all of its copies: training sees none of them.
    held_out = {(r["instruction"], r["response"]) for r in validation}
    assert len(held_out) == 3
    assert not held_out & {(r["instruction"], r["response"]) for r in seed}
    assert {r["origin"] for r in seed + validation} == {"seed"}

    # Texts go through unharmed.
    texts = {r["response"] for r in seed + validation}
    assert {f"It is {t}." for t in AWKWARD} <= texts
    assert set(AWKWARD) <= {r["response"] for r in rows(run, "augment")}

    # Alignment: every usable seed row was given both conditions, the target is human text.
    usable = {r["id"]: r for r in seed if not r["drop_reason"]}
    for side, human in (("instructions", "response"), ("responses", "instruction")):
        twins = read_parts(stage_dir(run, "align") / "round-1" / side / "data").to_pylist()
        assert [r["id"] for r in twins] == [r["id"] for r in seed]
        assert {(r["origin"], r["round"]) for r in twins} == {("aligned", 1)}
        assert all(r[human] == usable[r["id"]][human] for r in twins if r["id"] in usable)

    # The filter keeps 40 % of its pool, the best by the mutual score.
    filtered = rows(run, "filter")
    pool = [r for r in filtered if r["mutual"] is not None]
    kept = [r["mutual"] for r in filtered if r["keep"]]
    cut = [r["mutual"] for r in pool if not r["keep"]]
    assert len(kept) == int(0.4 * len(pool) + 0.5) > 10
    assert max(kept) <= min(cut)
    assert {r["drop_reason"] for r in pool} == {None, "filter_mutual"}

    # Step 4: both arms left a model that has learnt something, from the same base.
    config_of_model, base = load_checkpoint(folder / "model")
    models = {}
    for arm in ("seed_only", "mutual"):
        at = stage_dir(run, "finetune") / arm
        models[arm] = load_params(at / "checkpoints", Decoder(config_of_model))
        assert jax.tree.structure(models[arm]) == jax.tree.structure(base)
        assert max_difference(models[arm], base) > 1e-4
        log = [json.loads(line) for line in (at / "metrics.jsonl").read_text().splitlines()]
        assert sorted({line["step"] for line in log}) == [1, 2, 3]
        assert all(np.isfinite(v) for line in log for v in line.values() if v is not None)
        assert "validation_nll_nats_per_token" in log[-1]
    assert max_difference(models["seed_only"], models["mutual"]) > 1e-5

    # The final model is exported: the same bits, and a tokenizer that asks as the training did.
    exported_config, exported = load_checkpoint(run / "hf")
    assert exported_config == config_of_model
    assert max_difference(exported, models["mutual"]) == 0
    tokenizer = load_tokenizer(run / "hf")
    asked = [{"role": "user", "content": "Explain Köln"}]
    assert tokenizer.apply_chat_template(asked, tokenize=False) == "<s>Explain Köln"
    assert stop_ids(run / "hf") == (2,)

    # What people are told.
    results = json.loads((run / "results.json").read_text())
    assert set(results) == {"arms", "base", "pairs", "seconds"}
    assert list(results["arms"]) == ["seed_only", "mutual"]
    assert results["arms"]["mutual"]["kept_pairs"] == len(kept)
    assert results["arms"]["seed_only"]["kept_pairs"] == 0
    assert (
        results["pairs"]["augmented"] == sum(results["pairs"]["augmented_by_reason"].values()) == 60
    )
    assert results["pairs"]["augmented_by_reason"]["kept"] == len(kept)
    for r in (results["base"], *results["arms"].values()):
        assert 1 < r["validation_nll_nats_per_token"] < 20
    trained = results["arms"]["mutual"]["validation_nll_nats_per_token"]
    assert trained < results["base"]["validation_nll_nats_per_token"]
    assert f"{trained:.4f}" in out
    assert str(run / "results.json") in out
    for line in (
        "score: done in",
        "score: done in",
        "augment: 60/60 rows",
        "align round-0/forward: 4/4 steps",
    ):
        assert line in err
    assert not list(run.rglob("*.tmp"))

    # An export that was killed while it wrote: nothing half is left.
    before = snapshot(run / "hf")
    state = manifest(run, "export")
    (run / "hf" / "manifest.json").write_text(json.dumps(state | {"status": "running"}))
    (run / "hf" / "config.json").unlink()
    (run / "hf" / "model.safetensors").rename(run / "hf" / "tmp-0.safetensors")
    code, _, err = call(capsys, "run", config)
    assert code == 0 and "export: continues" in err
    after = snapshot(run / "hf")
    assert {k: v[0] for k, v in after.items() if k != "manifest.json"} == {
        k: v[0] for k, v in before.items() if k != "manifest.json"
    }

    # Any model of the run in a folder of its own; the reverse one asks for an instruction.
    code, _, err = call(capsys, "export", run, tmp_path / "reverse", "--model", "reverse",
                        "--dtype", "bfloat16")  # fmt: skip
    assert code == 0 and err.endswith(f"the model reverse of {run}\n")
    aligned = load_params(
        stage_dir(run, "align") / "round-1" / "reverse" / "checkpoints", Decoder(config_of_model)
    )
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), aligned)
    assert max_difference(load_checkpoint(tmp_path / "reverse")[1], rounded) == 0
    for arguments, part in (
        ((run, tmp_path / "reverse"), "is there already"),
        ((run, tmp_path / "new", "--model", "best"), "seed_only, mutual, forward, reverse"),
        ((folder, tmp_path / "new"), "no run here"),
        ((run, run), "is there already"),
    ):
        code, _, err = call(capsys, "export", *arguments)
        assert code == 2 and part in err and len(err.splitlines()) == 1
    assert not (tmp_path / "new").exists()

    # Only what belongs to the run's configuration is handed out, and only when it is finished.
    written = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(written.replace("template: none", "template: plain"))
    code, _, err = call(capsys, "export", run, tmp_path / "new")
    assert code == 2 and "finetune is not done" in err
    (run / "config.yaml").write_text(written)
    unfinished = stage_dir(run, "finetune") / "manifest.json"
    state = unfinished.read_text()
    unfinished.write_text(state.replace('"done"', '"running"'))
    code, _, err = call(capsys, "export", run, tmp_path / "new")
    assert code == 2 and "finetune is not done" in err
    unfinished.write_text(state)
    # The user's data may be gone by then, the base model may not have changed.
    seed_file = folder / "seed.jsonl"
    seed_file.rename(folder / "gone.jsonl")
    assert call(capsys, "export", run, tmp_path / "later")[0] == 0
    (folder / "gone.jsonl").rename(seed_file)
    settings = (folder / "model" / "generation_config.json").read_text()
    (folder / "model" / "generation_config.json").write_text("{}")
    code, _, err = call(capsys, "export", run, tmp_path / "new")
    assert code == 2 and "has changed" in err
    (folder / "model" / "generation_config.json").write_text(settings)

    # Again: nothing is done, no byte changes.
    before = snapshot(run)
    code, out_again, err = call(capsys, "run", config)
    assert code == 0
    assert out_again == out
    assert err.splitlines() == [f"{stage}: done before, kept" for stage in OF_A_RUN]
    after = snapshot(run)
    assert {k: v[0] for k, v in after.items()} == {k: v[0] for k, v in before.items()}
    kept_files = ("stages/", "hf/")
    assert {k: v for k, v in after.items() if k.startswith(kept_files)} == {
        k: v for k, v in before.items() if k.startswith(kept_files)
    }

    # Another share: only the filter and what follows; the old results are set aside, whole.
    code, _, err = call(capsys, "run", config, "--filter.keep", "0.2")
    assert code == 0, err
    lines = err.splitlines()
    assert lines[:4] == [f"{stage}: done before, kept" for stage in STAGES[:4]]
    changed = snapshot(run)
    for stage in OF_A_RUN:
        name = str(stage_dir(run, stage).relative_to(run))
        old = {k: v for k, v in before.items() if k.startswith(f"{name}/")}
        aside = {
            k.replace(".old-1/", "/"): v
            for k, v in changed.items()
            if k.startswith(f"{name}.old-1/")
        }
        if stage in OF_A_RUN[4:]:
            assert any(line.startswith(f"{stage}: done in") for line in lines)
            assert aside == old
        else:
            assert {k: v for k, v in changed.items() if k.startswith(f"{name}/")} == old
            assert not aside
    filtered = rows(run, "filter")
    assert sum(r["keep"] for r in filtered) == int(0.2 * len(pool) + 0.5)
    assert len(filtered) == 60
    results_small = json.loads((run / "results.json").read_text())
    # The arms share one shape of batches, which follows the kept pairs: the same up to rounding.
    for arm, same in (("seed_only", True), ("mutual", False)):
        (small, tree), (first, tree_of_first) = (
            jax.tree.flatten(r["arms"][arm]) for r in (results_small, results)
        )
        assert tree == tree_of_first
        assert (small == pytest.approx(first, abs=1e-5)) == same

    # And back: the same result as the first time.
    code, _, err = call(capsys, "run", config)
    assert code == 0, err
    assert json.loads((run / "results.json").read_text()) | {"seconds": 0} == results | {
        "seconds": 0
    }
    assert stage_dir(run, "filter").with_name("05-filter.old-2").exists()


def max_difference(a, b) -> float:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in leaves)


def test_stage_by_stage_with_everything_set_otherwise(own, tmp_path, capsys):
    """Two rounds from the base, truncation, token normalisation, accumulation, weights, other formats."""
    values, folder = own
    run = tmp_path / "run"
    seed = tmp_path / "weighted.parquet"
    messages = [
        {
            "messages": [
                {"role": "user", "content": r["instruction"] or ""},
                {"role": "assistant", "content": r["response"]},
            ],
            "weight": 0.5 + i % 3,
        }
        for i, r in enumerate(seed_rows())
    ]
    pq.write_table(pa.Table.from_pylist(messages), seed)
    training = {"loss_normalization": "token", "gradient_accumulation_steps": 2, "packing": True,
                "train_batch_size": 2, "max_steps": 2}  # fmt: skip
    config = config_file(
        tmp_path / "config.yaml",
        values,
        output_dir=str(run),
        data={"seed_path": str(seed), "validation_share": 0.0},
        prompt={"template": "plain", "excess_length_strategy": "truncate"},
        align={**training, "rounds": 2, "restart": "base", "control": True,
               "weighting": {"strategy": "softmax"}},
        finetune={**training, "arms": ["none", "random"], "system_prompts": TOLD},
        filter={"by": "mutual_z", "select": "top_k", "keep": 7},
        clean={"duplicates": False},
    )  # fmt: skip
    for stage in STAGES:
        later = STAGES[STAGES.index(stage) + 1 :]
        if later:  # a stage too early
            code, out, err = call(capsys, later[0], config)
            assert (code, out) == (2, "")
            (line,) = err.splitlines()
            assert line.startswith(f"main-jax: stage {later[0]} needs stage ")
            assert "which is not done" in line
        arguments = ("--show-example",) if stage == "prepare" else ()
        code, out, err = call(capsys, stage, config, *arguments)
        assert code == 0, err
        assert manifest(run, stage)["status"] == "done"
        if stage == "prepare":
            assert re.search(r"forward: \d+ tokens, \d+ of them targets", out)
            assert re.search(r"reverse: \d+ tokens, \d+ of them targets", out)
            assert out.count("target ") > 4
        again = call(capsys, stage, config)
        assert again[0] == 0
        assert again[2].splitlines() == [f"{stage}: done before, kept"]
    check_manifests(run, STAGES)

    table = {r["id"]: r for r in rows(run, "filter")}
    long = next(r for r in table.values() if (r["response"] or "").startswith("endless"))
    assert long["truncated"]
    assert long["drop_reason"] in (None, "filter_mutual_z")
    assert long["forward_tokens"] > 100
    counts = manifest(run, "prepare")["counts"]
    assert "seed_too_long" not in counts
    assert counts["responses"] == 57
    assert sum(r["keep"] for r in table.values()) == 7
    assert {r["weight"] for r in rows(run, "prepare", "seed")} == {0.5, 1.5, 2.5}

    align = stage_dir(run, "align")
    for part in (
        "round-0/forward",
        "round-1/reverse",
        "round-2/forward",
        "round-2/reverse",
        "control/reverse",
    ):
        log = [
            json.loads(line) for line in (align / part / "metrics.jsonl").read_text().splitlines()
        ]
        steps = {"r": {"round-0": 4}.get(part[:7], 2), "c": 4}[part[0]]
        assert [line["step"] for line in log if "loss_nats_per_token" in line] == list(
            range(1, steps + 1)
        )
    decoder = Decoder(load_checkpoint(folder / "model")[0])
    ends = [load_params(align / f"round-{k}" / "forward" / "checkpoints", decoder) for k in (1, 2)]
    assert max_difference(*ends) > 1e-6
    results = json.loads((run / "results.json").read_text())
    assert list(results["arms"]) == ["none", "random", "mutual_z"]
    assert results["arms"]["none"]["kept_pairs"] == sum(
        r["mutual"] is not None for r in table.values()
    )
    assert results["base"]["validation_nll_nats_per_token"] is None  # nothing was held out
    check_system_prompts(run, config, tmp_path)


TOLD = {"seed": "As an assistant.", "augmented": "From the web.", "inference": "To a question."}


def check_system_prompts(run: Path, config: Path, tmp_path: Path) -> None:
    """Of every training of the last stage, what it was told by origin; and the exported template."""
    trained = []
    opened = open_run(load_config(Config, str(config)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_module, "fit", lambda d, b, units, *_, **__: trained.append(units))
        counts = finetune_module.finetune(opened, epath.Path(tmp_path / "again"))
    seeds = sum(not row["drop_reason"] for row in rows(run, "prepare", "seed"))
    for arm, units in zip(("none", "random", "mutual_z"), trained, strict=True):
        texts = [opened.prompt.decode(unit.examples[0].tokens) for unit in units]
        assert len(texts) == seeds + counts[f"{arm}_kept"] > seeds
        assert all(f"{TOLD['seed']}\n\n" in text for text in texts[:seeds])
        assert all(f"{TOLD['augmented']}\n\n" in text for text in texts[seeds:])
    assert main(["export", str(run), str(tmp_path / "hf")]) == 0
    asked = load_tokenizer(tmp_path / "hf").apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False
    )
    assert f"{TOLD['inference']}\n\nWhy?" in asked and TOLD["seed"] not in asked
    question = opened.inference_prompt.question(Direction.FORWARD, opened.prompt.encode("Why?"), 99)
    assert f"{TOLD['inference']}\n\nWhy?" in opened.prompt.decode(question)
    assert SystemPrompts(seed="a", augmented="b").at_inference == "a"
    assert SystemPrompts(seed="a", inference="").at_inference == ""  # said: nothing


def test_no_rounds_and_too_many_drops(own, tmp_path, capsys):
    """Round 0 alone is enough for the rest; a file with too much waste is refused before any work."""
    values, _ = own
    run = tmp_path / "run"
    texts = [{"text": r["content"]} for r in response_rows()]
    responses = tmp_path / "responses.jsonl"
    responses.write_text("".join(json.dumps(t) + "\n" for t in texts))
    asked = tmp_path / "asked.jsonl"
    questions = [{"question": f"what is {i} and 1?", "gold": f"it is {i + 1}"} for i in range(7)]
    questions += [{"question": "", "gold": "x"}, {"question": "long?", "gold": "no " * 200}]
    asked.write_text("".join(json.dumps(q) + "\n" for q in questions))
    config = config_file(
        tmp_path / "config.yaml", values, output_dir=str(run),
        data={"responses_path": str(responses), "max_drop_share": 0.05, "eval_path": str(asked),
              "eval_columns": {"instruction": "question", "response": "gold"}},
        align={"rounds": 0}, finetune={"arms": []}, evaluate={"checker": "contains"},
    )  # fmt: skip
    code, out, err = call(capsys, "run", config)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(
        f"main-jax: {values['data']['seed_path']}: 4 of 40 rows cannot"
    )
    assert "more than data.max_drop_share 0.05 allows" in err
    code, _, err = call(capsys, "run", config, "--data.max_drop_share", "0.1")
    assert code == 0, err
    assert not list(run.glob("stages/*.old-*"))
    assert not (stage_dir(run, "align") / "round-1").exists()
    assert len(rows(run, "filter")) == 60
    ids = [r["id"] for r in rows(run, "augment")]
    assert len(set(ids)) == 60
    assert [r["response"] for r in rows(run, "filter")] == [t["text"] for t in texts]
    assert list(json.loads((run / "results.json").read_text())["arms"]) == ["mutual"]
    check_own_test(run, config, values, asked, tmp_path, capsys)
    asked.write_text('{"question": "why?", "gold": "so"}\n')
    # Other limits for instructions are a matter of the filter alone.
    lengths = sorted(len(r["instruction"]) for r in rows(run, "score") if r["keep"])
    limit = lengths[len(lengths) // 2]
    words = ("--data.max_drop_share", "0.1", "--filter.hygiene.max_characters", str(limit))
    assert call(capsys, "filter", config, *words)[0] == 0
    for scored, filtered in zip(rows(run, "score"), rows(run, "filter"), strict=True):
        long = scored["keep"] and len(scored["instruction"]) > limit
        assert (filtered["drop_reason"] == "long_instruction") == long
        assert not (long and filtered["keep"]) and (filtered["mutual"] is None) >= long
    words = (*words[:2], "--filter.hygiene.min_characters", str(limit))
    assert call(capsys, "filter", config, *words)[0] == 0
    for scored, filtered in zip(rows(run, "score"), rows(run, "filter"), strict=True):
        short = scored["keep"] and len(scored["instruction"]) < limit
        assert (filtered["drop_reason"] == "short_instruction") == short
    words = (*words[:2], "--filter.hygiene.keep_cut", "false")
    code, _, err = call(capsys, "filter", config, *words)  # a random model ends no text by itself
    assert code == 2 and "filter.mutual keeps no pair" in err
    cut = [r["keep"] and r["finish_reason"] == "length" for r in rows(run, "score")]
    assert any(cut)
    found = [r["drop_reason"] == "cut_instruction" for r in rows(run, "filter")]
    assert found == cut


def check_own_test(run, config, values, asked, tmp_path, capsys) -> None:
    """The NLL of the references as `score` measures it, the answers as `generate` gives them."""
    test = json.loads((run / "results.json").read_text())["test"]
    assert test["questions"] == {"asked": 7, "empty_instruction": 1, "too_long": 1}
    assert list(test["models"]) == ["base", "mutual"] and test["checker"] == "contains"
    columns = ("--columns", "instruction=question,response=gold", "--template", "none")
    for name, folder in (("base", values["model_name_or_path"]), ("mutual", run / "hf")):
        scored = tmp_path / f"{name}.parquet"
        words = (
            "--forward-model",
            folder,
            "--data",
            asked,
            "--output",
            scored,
            "--max-length",
            160,
        )
        assert call(capsys, "score", *words, *columns)[0] == 0
        table = pq.read_table(scored).to_pylist()
        kept = [row for row in table if row["forward_nll_sum"] is not None][:7]
        nll = sum(r["forward_nll_sum"] for r in kept) / sum(r["forward_tokens"] for r in kept)
        assert test["models"][name]["nll_nats_per_token"] == pytest.approx(nll, rel=1e-5)
        low, high = test["models"][name]["interval_nats_per_token"]
        assert low < nll < high
    answers = rows_of(stage_dir(run, "evaluate") / "test" / "answers" / "mutual" / "data")
    right = [contains(a["response"] or "", f"it is {i + 1}") for i, a in enumerate(answers)]
    assert test["models"]["mutual"]["right"] == sum(right) / 7
    # Other questions: nothing is trained again.
    asked.write_text('{"question": "why?", "gold": "so"}\n')
    code, out, err = call(capsys, "run", config, "--data.max_drop_share", "0.1")
    assert code == 0 and "finetune: done before, kept" in err and "evaluate: done in" in err
    assert "your questions (1 asked; right: contains)" in out
    asked.write_text('{"question": "why?", "gold": 3}\n')
    code, _, err = call(capsys, "run", config, "--data.max_drop_share", "0.1")
    assert code == 2
    assert err.splitlines()[-1] == f"main-jax: {asked}, row 1, response: expected text, found int"


def test_cleaning_leaves_a_reason_and_is_part_of_the_fingerprint(own, tmp_path, capsys):
    values, _ = own
    lines = [f"The sum of {i} and 1 is {i + 1}." for i in range(44)]
    (tmp_path / "tests.jsonl").write_text(
        json.dumps({"question": "so: the sum of 7 and 1?", "n": 3}) + "\n"
        + json.dumps({"messages": [{"role": "user", "content": "add 9 and 2 now please"}]}) + "\n"
    )  # fmt: skip
    rules = {
        "decontaminate": [str(tmp_path / "tests.jsonl")], "decontaminate_ngram": 4,
        "drop_patterns": [r"of 1\d and"], "near_duplicates": 0.9,
    }  # fmt: skip
    config = config_file(tmp_path / "c.yaml", values, output_dir=str(tmp_path / "run"), clean=rules)
    code, _, err = call(capsys, "prepare", config)
    assert code == 0, err
    table = {
        r["response"]: r["drop_reason"] for r in rows(tmp_path / "run", "prepare", "responses")
    }
    assert table[lines[7]] == "contaminated"  # "the sum of 7", "sum of 7 and", "of 7 and 1"
    assert {table[line] for line in lines[10:20]} == {"pattern"}
    others = [line for i, line in enumerate(lines) if i != 7 and not 10 <= i < 20]
    assert {table[line] for line in others} == {None}
    seed = rows(tmp_path / "run", "prepare", "seed") + rows(
        tmp_path / "run", "prepare", "validation"
    )
    gone = {r["instruction"] for r in seed if r["drop_reason"] == "contaminated"}
    assert gone == {"Add 9 and 2."}
    counts = manifest(tmp_path / "run", "prepare")["counts"]
    assert counts["responses_contaminated"] == 1 and counts["responses_pattern"] == 10
    assert counts["responses_duplicate"] == 1 and counts["seed_contaminated"] == 2
    assert call(capsys, "prepare", config)[2].splitlines() == ["prepare: done before, kept"]
    (tmp_path / "tests.jsonl").write_text(
        json.dumps({"question": "there is nothing of ours"}) + "\n"
    )
    assert "the old results are kept" in call(capsys, "prepare", config)[2]
    assert "responses_contaminated" not in manifest(tmp_path / "run", "prepare")["counts"]
    # Declaring a licence changes no result.
    licensed = config_file(tmp_path / "c.yaml", values, output_dir=str(tmp_path / "run"), clean=rules,
                           data={"seed_license": "mit"})  # fmt: skip
    assert call(capsys, "prepare", licensed)[2].splitlines() == ["prepare: done before, kept"]
    for key, value, said in (
        ("drop_patterns", "[(]", "clean.drop_patterns: '(' is no regular expression"),
        ("decontaminate", "[nowhere.jsonl]", "clean.decontaminate: nowhere.jsonl"),
        (
            "decontaminate_ngram",
            "13",
            f"clean.decontaminate: {tmp_path / 'tests.jsonl'}: no text in it "
            "has 13 words (clean.decontaminate_ngram)",
        ),
        ("near_duplicates", "1.5", "clean: near_duplicates: expected a similarity"),
    ):
        code, _, err = call(capsys, "prepare", config, f"--clean.{key}", value)
        assert code == 2 and said in err, err
