"""Model folders in both forms, there and back, and what the verbs say."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_cli import call, read, refused, write
from tiny_llama import make_tiny_llama

from main_jax.config import Runtime
from main_jax.convert import convert
from main_jax.lm.hf import CheckpointError, load_checkpoint, stop_ids
from main_jax.models import is_orbax, open_checkpoint, stored_dtype

try:
    import torch
except ImportError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="compares with Transformers on PyTorch")

UP = "model.layers.1.mlp.up_proj.weight"
ROWS = [{"instruction": f"Add {i} and 2.", "response": f"{i + 2}"} for i in range(5)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "model", seed=5, pretraining_tp=3)


@pytest.fixture(scope="module")
def orbax(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("orbax") / "model"
    convert(str(tiny), str(folder))
    return folder


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def tensors(folder: Path) -> dict:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_tensors_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name])


def change_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_there_and_back_by_the_verb(tiny, tmp_path, capsys):
    there, back = tmp_path / "there", tmp_path / "back"
    code, _, err = call(capsys, "convert", tiny, there)
    assert code == 0 and err.endswith("parameters in Orbax form\n")
    assert files(there) == {"checkpoints", *files(tiny)} - {"model.safetensors"}
    code, _, err = call(capsys, "convert", there, back, "--max-shard-size", "0.1MB")
    assert code == 0 and err.endswith("parameters in Hugging Face form\n")
    assert len(list(back.glob("model-*.safetensors"))) > 2
    assert all(file.stat().st_size < 110_000 for file in back.glob("*.safetensors"))
    assert_tensors_equal(tensors(back), tensors(tiny))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (tiny / name).read_bytes()
    assert json.loads((back / "config.json").read_text()) == json.loads(
        (tiny / "config.json").read_text()
    )
    assert files(tmp_path) == {"there", "back"}  # nothing staged is left


def test_an_orbax_folder_serves_wherever_a_model_does(tiny, orbax, tmp_path, capsys):
    pairs = write(tmp_path / "pairs.jsonl", ROWS)
    scored, answers = [], []
    for model in (tiny, orbax):
        out = tmp_path / f"{len(scored)}.jsonl"
        more = ("--data", pairs, "--output", out)
        assert call(capsys, "score", "--forward-model", model, *more)[0] == 0
        scored.append(read(out))
        more = ("--prompts", pairs, "--output", out, "--max-new-tokens", 5)
        assert call(capsys, "generate", "--model", model, *more)[0] == 0
        answers.append(read(out))
    assert scored[0] == scored[1] and scored[0][0]["forward_nll_sum"] > 0
    assert answers[0] == answers[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_each_way(tiny, orbax, tmp_path, dtype):
    convert(str(tiny), str(tmp_path / "there"), dtype)
    convert(str(tmp_path / "there"), str(tmp_path / "back"))
    convert(str(orbax), str(tmp_path / "direct"), dtype)
    assert stored_dtype(str(tmp_path / "there")) == dtype
    expected = {k: v.astype(load_checkpoint(tiny, dtype)[1]["norm"]["scale"].dtype)
                for k, v in tensors(tiny).items()}  # fmt: skip
    for name in ("back", "direct"):
        assert_tensors_equal(tensors(tmp_path / name), expected)
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == dtype
        assert stored_dtype(str(tmp_path / name)) == dtype


def test_every_stop_id_is_listed(tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    generation = {"eos_token_id": [7, 2], "temperature": 0.6, "_from_model_config": True}
    (model / "generation_config.json").write_text(json.dumps(generation))
    convert(str(model), str(tmp_path / "there"))
    convert(str(tmp_path / "there"), str(tmp_path / "back"))
    found = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert found == {"eos_token_id": [7, 2], "temperature": 0.6}
    (model / "generation_config.json").unlink()
    convert(str(model), str(tmp_path / "alone"))
    assert stop_ids(tmp_path / "alone") == (2,)
    assert json.loads((tmp_path / "alone" / "generation_config.json").read_text()) == {
        "eos_token_id": [2]
    }


def test_failures_leave_nothing_behind(tiny, tmp_path, capsys):
    model = shutil.copytree(tiny, tmp_path / "model")
    large = load_file(model / "model.safetensors")
    large[UP][0, 0] = 1e6
    save_file(large, model / "model.safetensors")
    line = refused(capsys, "convert", model, tmp_path / "new", "--dtype", "float16")
    assert UP in line and "bfloat16" in line
    assert files(tmp_path) == {"model"}
    # What a killed conversion has left is in nobody's way.
    (tmp_path / ".new.tmp" / "staging").mkdir(parents=True)
    assert call(capsys, "convert", model, tmp_path / "new")[0] == 0
    assert files(tmp_path) == {"model", "new"}


def test_mistakes(tiny, orbax, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for taken in (orbax, tmp_path / "empty", tmp_path / "link", "."):
        assert "is there already" in refused(capsys, "convert", tiny, taken)
    assert "local folder" in refused(capsys, "convert", tiny, "gs://bucket/model")
    assert "inside SRC" in refused(capsys, "convert", orbax, orbax / "checkpoints" / "5")
    # What is cheap to check comes before a model that may have to be fetched.
    assert "is there already" in refused(capsys, "convert", "org/name", orbax)
    assert "is there already" in refused(capsys, "convert", tiny, tiny / "config.json")
    assert "no such directory" in refused(capsys, "convert", tmp_path / "nowhere", tmp_path / "new")
    for size in ("big", "0", "0.1B"):
        line = refused(capsys, "convert", orbax, tmp_path / "new", "--max-shard-size", size)
        assert "max_shard_size" in line and size in line
    line = refused(capsys, "convert", tiny, tmp_path / "new", "--max-shard-size", "1GB")
    assert "max_shard_size" in line and "Orbax" in line
    assert "--dtype" in refused(capsys, "convert", orbax, tmp_path / "new", "--dtype", "int8")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    assert "MB are free" in refused(capsys, "convert", tiny, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_faults_are_found_before_the_weights_are_written(tiny, tmp_path, capsys, monkeypatch):
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": "x"}')
    monkeypatch.setattr("main_jax.lm.hf.load_checkpoint", None)
    assert "eos_token_id" in refused(capsys, "convert", model, tmp_path / "new")


def test_a_hugging_face_folder_may_have_checkpoints(tiny, tmp_path):
    """Trainers leave such subfolders."""
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "checkpoints" / "500").mkdir(parents=True)
    assert not is_orbax(str(model))
    assert open_checkpoint(str(model), Runtime()).load().keys() == {
        "embed",
        "head",
        "layers",
        "norm",
    }


def test_an_orbax_folder_that_does_not_fit_its_config(orbax, tmp_path):
    copy = shutil.copytree(orbax, tmp_path / "copy")
    change_config(copy, hidden_size=44)
    wrong = rf"{copy}: .*embed.embedding.*\(307, 48\).*\(307, 44\)"
    with pytest.raises(CheckpointError, match=wrong):
        open_checkpoint(str(copy), Runtime())
    change_config(copy, hidden_size=48, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"head.kernel.*None"):
        open_checkpoint(str(copy), Runtime())


@pytest.mark.parametrize("part", ["", "_METADATA", "manifest.ocdbt", "d"])
def test_damage_is_one_line(part, orbax, tmp_path, capsys):
    copy = shutil.copytree(orbax, tmp_path / "copy")
    broken = copy / "checkpoints" / "0" / "params" / part
    shutil.rmtree(broken) if broken.is_dir() else broken.write_bytes(b"")
    assert "damaged" in refused(capsys, "convert", copy, tmp_path / "new")
    pairs = write(tmp_path / "pairs.jsonl", ROWS)
    files = ("--data", pairs, "--output", tmp_path / "out.jsonl")
    code, _, err = call(capsys, "score", "--forward-model", copy, *files)
    assert code == 2 and "damaged" in err.splitlines()[-1] and "Traceback" not in err
    shutil.rmtree(copy / "checkpoints" / "0")
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        open_checkpoint(str(copy), Runtime())


def test_reading_leaves_alone_what_is_being_saved(orbax, tmp_path):
    copy = shutil.copytree(orbax, tmp_path / "copy")
    saving = copy / "checkpoints" / "1.orbax-checkpoint-tmp"
    saving.mkdir()
    open_checkpoint(str(copy), Runtime()).load()
    assert saving.exists()


@needs_torch
def test_verify_by_the_verb(tiny, orbax, tmp_path, capsys):
    assert "Orbax weights" in refused(capsys, "verify", orbax)
    code, out, _ = call(capsys, "verify", tiny, "--positions", 64)
    assert code == 0 and "equal within 0.001" in out
    code, out, _ = call(capsys, "verify", tiny, "--positions", 64, "--tolerance", 1e-12)
    assert code == 1 and "NOT equal" in out
