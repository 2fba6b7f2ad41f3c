"""Hugging Face checkpoints: logits equal to Transformers', strict reading, writing back."""

import json
import re
import shutil
import struct
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_llama import make_tiny_llama, tiny_config, tiny_tensors

from main_jax.lm.arch import DecoderConfig, RopeScaling
from main_jax.lm.hf import (
    CheckpointError,
    load_checkpoint,
    load_config,
    save_checkpoint,
    stop_ids,
)
from main_jax.lm.hf_config import from_hf, to_hf
from main_jax.lm.hf_table import weights
from main_jax.lm.model import Decoder

try:
    import torch
except ImportError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="compares with Transformers on PyTorch")

GOLDEN = np.load(Path(__file__).parent / "golden" / "logits.npz")
VARIANTS = ("plain", "llama3", "linear", "tied", "mistral", "qwen2", "qwen3")
Q = "model.layers.1.self_attn.q_proj.weight"


def logits_of(folder, tokens, **kw):
    config, params = load_checkpoint(folder, **kw)
    decoder = Decoder(config)
    tokens = jnp.asarray(tokens)[None]
    positions = jnp.arange(tokens.shape[1])[None]
    hidden, _ = jax.jit(decoder.apply)(params, tokens, positions, jnp.ones_like(tokens))
    return np.asarray(hidden[0] @ decoder.unembed(params))


def write(folder, config, tensors):
    """Write a model folder by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def golden_folder(folder, variant):
    config = json.loads(str(GOLDEN[f"config/{variant}"]))
    tensors = {name: GOLDEN[f"tensor/{name}"] for name in tiny_tensors(config)}
    return write(folder, config, tensors)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model folder; tests copy it before they change anything."""
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), seed=3)


@pytest.fixture(scope="module")
def loaded(tiny):
    return load_checkpoint(tiny)


@pytest.fixture
def copy(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder, change, file="model.safetensors"):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def refused(folder, *parts):
    """Load, expecting a one-line CheckpointError that holds every part."""
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(folder)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# ------------------------------------------------------------------------------------ same results


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_golden_ones(tmp_path, variant):
    logits = logits_of(golden_folder(tmp_path, variant), GOLDEN["tokens"])
    expected = GOLDEN[f"logits/{variant}"]
    assert expected.std() > 1  # the tolerance below is small against the values
    np.testing.assert_allclose(logits[GOLDEN["positions"]], expected, atol=1e-4)


def test_golden_variants_differ_from_each_other():
    last = np.stack([GOLDEN[f"logits/{variant}"][-1] for variant in VARIANTS])
    for i in range(len(VARIANTS)):
        for j in range(i):
            assert np.abs(last[i] - last[j]).max() > 0.1


@needs_torch
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_there_and_back(tmp_path, variant):
    """Our logits of a saved PyTorch model, and PyTorch's of what we saved, at 320 positions."""
    from transformers import AutoModelForCausalLM

    there = golden_folder(tmp_path / "there", variant)
    theirs = AutoModelForCausalLM.from_pretrained(there, dtype=torch.float32).eval()
    tokens = np.asarray(GOLDEN["tokens"])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)[None]).logits[0].numpy()
    np.testing.assert_allclose(
        expected[GOLDEN["positions"]], GOLDEN[f"logits/{variant}"], atol=1e-4
    )
    theirs.save_pretrained(tmp_path / "saved")  # the spelling of the installed Transformers
    np.testing.assert_allclose(logits_of(tmp_path / "saved", tokens), expected, atol=1e-4)

    save_checkpoint(tmp_path / "back", *load_checkpoint(there))
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(back) is type(theirs)
    with torch.no_grad():
        again = back.eval()(torch.tensor(tokens)[None]).logits[0].numpy()
    np.testing.assert_array_equal(again, expected)


def test_old_and_new_spelling_of_rope_read_alike(tmp_path):
    llama3 = json.loads(str(GOLDEN["config/llama3"]))
    new = {**llama3, "rope_parameters": {**llama3["rope_scaling"], "rope_theta": 5e5}}
    old = {**llama3, "rope_theta": 5e5}
    old["rope_scaling"] = {**old["rope_scaling"], "type": old["rope_scaling"]["rope_type"]}
    del new["rope_scaling"], new["rope_theta"], old["rope_scaling"]["rope_type"]
    configs = [from_hf(hf) for hf in (new, old)]
    assert configs[0] == configs[1]
    assert configs[0].rope_theta == 5e5
    assert configs[0].rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


# ------------------------------------------------------------------------------------------ config


def test_config_reads_every_size(tiny):
    assert load_config(tiny) == DecoderConfig(
        vocab_size=307,
        hidden_size=48,
        intermediate_size=88,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
    )


def test_config_defaults_are_transformers():
    hf = tiny_config()
    for name in ("num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps"):
        del hf[name]
    for name in ("max_position_embeddings", "tie_word_embeddings", "hidden_act"):
        del hf[name]
    config = from_hf(hf | {"rope_scaling": None, "sliding_window": None})
    assert (config.num_kv_heads, config.head_dim, config.max_position_embeddings) == (4, 12, 2048)
    assert (config.rope_theta, config.rms_norm_eps) == (10000.0, 1e-6)
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    "scaling", [None, RopeScaling("linear", 2.5), RopeScaling("llama3", 8.0, 1.5, 4.5, 128)]
)
def test_config_there_and_back(scaling):
    config = DecoderConfig(
        31, 24, 56, 3, 6, 2, 10, 77, 5e5, scaling, tie_word_embeddings=True, rms_norm_eps=2e-5
    )
    hf = json.loads(json.dumps(to_hf(config)))
    assert from_hf(hf) == config
    for names in (("rope_theta", "rope_scaling"), ("rope_parameters",)):  # either alone suffices
        assert from_hf({k: v for k, v in hf.items() if k not in names}) == config


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "gemma3"}, ["model_type", "gemma3", "llama, mistral, qwen2, qwen3"]),
        ({"model_type": None}, ["model_type"]),
        ({"architectures": ["LlamaModel"]}, ["architectures", "LlamaModel", "LlamaForCausalLM"]),
        ({"is_causal": False}, ["is_causal"]),
        ({"transformers_weights": "other.safetensors"}, ["transformers_weights"]),
        ({"per_layer_config": {"0": {}}}, ["per_layer_config"]),
        ({"model_type": ["llama"]}, ["model_type"]),
        ({"architectures": 5}, ["architectures"]),
        ({"rope_parameters": {"rope_type": []}}, ["rope_type"]),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, ["auto_map", "own code"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"sliding_window": 64}, ["sliding_window", 64]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", 0.5]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor", 0.5]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_type", "dynamic", "linear"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["rope_type", "yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling", "factor"]),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, ["factor", -1]),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, ["high_freq_factor"]),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, ["low_freq_factor"]),
        ({"rope_parameters": {"full": {"rope_theta": 1.0}}}, ["rope_parameters", "flat"]),
        ({"rope_scaling": "linear"}, ["rope_scaling"]),
        ({"rope_parameters": {"rope_theta": 7.0}}, ["rope_theta", 7.0, 10000.0]),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3},
            ["rope_scaling", "different"],
        ),
        (
            {
                "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64},
                "original_max_position_embeddings": 32,
            },
            ["original_max_position_embeddings", 64, 32],
        ),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", 0]),
        ({"num_hidden_layers": True}, ["num_hidden_layers", True]),
        ({"vocab_size": "many"}, ["vocab_size", "many"]),
        ({"num_key_value_heads": 3}, ["num_kv_heads", 3]),
        ({"head_dim": 11}, ["head_dim", 11]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings", "no"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps"]),
    ],
)
def test_config_refuses_by_name(copy, changes, parts):
    change_config(copy, **changes)
    refused(copy, copy / "config.json", *parts)


def test_config_ignores_what_cannot_change_the_result(copy, loaded):
    change_config(copy, pretraining_tp=2, use_cache=False, initializer_range=1, hidden_act="swish")
    assert load_config(copy) == loaded[0]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
        ("[]", "object"),
        ('{"a": 1, "a": 2}', "a is given twice"),
    ],
)
def test_broken_config_files(copy, text, part):
    (copy / "config.json").write_text(text)
    refused(copy, copy / "config.json", part)


def test_no_family_has_these_features(loaded, tmp_path):
    config = DecoderConfig(31, 24, 56, 1, 4, 2, 10, qk_norm=True, qkv_bias=True)
    params = Decoder(config).init(jax.random.key(0))
    with pytest.raises(CheckpointError, match="qk_norm"):
        save_checkpoint(tmp_path, config, params)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (5, 6, (5,)),
        ([5, 7, 5], 6, (5, 7)),
        (None, 6, (6,)),
        (None, [6, 8], (6, 8)),
        (None, None, ()),
    ],
)
def test_stop_ids(copy, generation, config, expected):
    change_config(copy, eos_token_id=config)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert stop_ids(copy) == expected
    if generation is None:
        (copy / "generation_config.json").unlink()
        assert stop_ids(copy) == expected


def test_stop_ids_refuses_words(copy):
    (copy / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(CheckpointError, match="eos_token_id"):
        stop_ids(copy)


# ----------------------------------------------------------------------------------------- reading


def test_tree_is_that_of_a_fresh_model(loaded):
    config, params = loaded
    fresh = Decoder(config).init(jax.random.key(0))
    shapes = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree) for tree in (params, fresh)]
    assert shapes[0] == shapes[1]
    assert config.num_params() == sum(x.size for x in jax.tree.leaves(params))


def test_axes_of_one_projection(tiny, loaded):
    """One value traced by hand through the transposition and the split into heads."""
    raw = load_file(tiny / "model.safetensors")
    attention = loaded[1]["layers"]["attention"]
    head, feature, hidden = 3, 7, 41
    assert attention["q"]["kernel"][1, hidden, head, feature] == raw[Q][head * 10 + feature, hidden]
    o = raw["model.layers.2.self_attn.o_proj.weight"]
    assert attention["o"]["kernel"][2, head, feature, hidden] == o[hidden, head * 10 + feature]


class InMemory(NamedTuple):
    """A tensor that says what was read of it."""

    array: np.ndarray
    sizes: list

    def read(self, ranges):
        part = self.array[tuple(slice(*r) for r in ranges)]
        self.sizes.append(part.size)
        return part


def test_table_inverts_itself():
    """Whole, and any part of it, of which nothing outside is read where a dimension is one axis."""
    config = DecoderConfig(31, 24, 56, 2, 6, 2, 10, qkv_bias=True, qk_norm=True)
    rng = np.random.default_rng(0)
    rows = weights(config)
    assert len(rows) == 17
    for row in rows:
        tensor = InMemory(rng.normal(size=row.their_shape(config)), [])
        whole = row.read(tensor, [slice(None)] * len(row.ours), config)
        assert whole.shape == row.our_shape(config)[-whole.ndim :]
        np.testing.assert_array_equal(row.to_theirs(whole, config), tensor.array)
        for _ in range(5):
            cuts = [sorted(rng.choice(n + 1, 2, replace=False)) for n in whole.shape]
            index = [slice(int(a), int(b)) for a, b in cuts]
            part = row.read(tensor, index, config)
            np.testing.assert_array_equal(part, whole[tuple(index)])
            if "H" not in row.ours:
                assert tensor.sizes[-1] == part.size


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_sources(copy, loaded, dtype):
    def cast(tensors):
        tensors |= {name: tensor.astype(dtype) for name, tensor in tensors.items()}

    change_tensors(copy, cast)
    _, params = load_checkpoint(copy)
    expected = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), loaded[1])
    assert_trees_equal(params, expected)


def test_target_dtype_and_buffer(tiny, loaded):
    made = []

    def buffer(shape, dtype):
        made.append(np.empty(shape, dtype))
        return made[-1]

    _, params = load_checkpoint(tiny, "bfloat16", buffer=buffer)
    assert [b.shape for b in made] == [row.our_shape(loaded[0]) for row in weights(loaded[0])]
    assert {b.dtype for b in made} == {np.dtype(ml_dtypes.bfloat16)}
    assert_trees_equal(params, jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), loaded[1]))


def test_as_stored(copy, loaded):
    """Without a dtype every parameter keeps its own, also where a file mixes them."""

    def cast(tensors):
        for name in tensors:
            if "norm" not in name:
                tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

    change_tensors(copy, cast)
    _, params = load_checkpoint(copy, None)
    assert params["norm"]["scale"].dtype == np.float32
    assert params["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    save_checkpoint(copy / "back", loaded[0], params)
    again, first = (load_file(folder / "model.safetensors") for folder in (copy / "back", copy))
    assert_trees_equal(again, first)


def test_float16_cannot_hold_every_value(copy, tmp_path):
    def enlarge(tensors):
        tensors[Q][3, 3] = 1e5

    change_tensors(copy, enlarge)
    with pytest.raises(CheckpointError, match=f"{Q}.*float16"):
        load_checkpoint(copy, "float16")
    with pytest.raises(CheckpointError, match=f"{Q}.*float16"):
        save_checkpoint(tmp_path / "out", *load_checkpoint(copy), dtype="float16")


def test_old_buffers_are_ignored(copy, loaded):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
        tensors["model.rotary_emb.inv_freq"] = np.ones(5, np.float32)

    change_tensors(copy, add)
    assert_trees_equal(load_checkpoint(copy)[1], loaded[1])


def test_tied_head_may_be_a_copy_only(copy):
    change_config(copy, tie_word_embeddings=True)
    refused(copy, "lm_head.weight", "tie_word_embeddings", "differs")

    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    change_tensors(copy, tie)
    assert "head" not in load_checkpoint(copy)[1]


def test_tensor_refusals_name_the_tensor(copy):
    original = load_file(copy / "model.safetensors")

    def attempt(*parts, **changes):
        tensors = {k: v for k, v in (original | changes).items() if v is not None}
        save_file(tensors, copy / "model.safetensors")
        refused(copy, *parts)

    attempt(Q, "missing", **{Q: None})
    attempt(Q, "missing", "1 more", **{Q: None, Q.replace("q_proj", "v_proj"): None})
    attempt("lm_head.weight", "missing", "tie_word_embeddings", **{"lm_head.weight": None})
    attempt("model.layers.3.x", "unknown", **{"model.layers.3.x": np.ones(1, np.float32)})
    bias = Q.replace("weight", "bias")
    attempt(bias, "unknown", **{bias: np.ones(40, np.float32)})
    attempt(Q, "[48, 40]", "[40, 48]", **{Q: np.ascontiguousarray(original[Q].T)})
    attempt("model.norm.weight", "[1, 48]", **{"model.norm.weight": np.ones((1, 48), np.float32)})
    attempt(Q, "I32", "F32", **{Q: original[Q].astype(np.int32)})


def test_damaged_files(copy):
    file = copy / "model.safetensors"
    raw = file.read_bytes()
    for damaged in (raw[:-7], b"", raw[:5], b"version https://git-lfs.github.com/spec/v1\n"):
        file.write_bytes(damaged)
        refused(copy, file, "damaged", "download it again")
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f'{{"x":{entry},"x":{entry}}}'.encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refused(copy, file, "damaged")


def test_folders_without_weights(copy, tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "no such folder")
    refused("gs://bucket/model", "gs://bucket/model", "local")
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    refused(copy, "model.safetensors.index.json", "index")
    (copy / "model-00001-of-00002.safetensors").rename(copy / "pytorch_model.bin")
    refused(copy, "pickled", "save_pretrained")
    (copy / "pytorch_model.bin").unlink()
    refused(copy, "no weights")
    (copy / "config.json").unlink()
    refused(copy, copy / "config.json", "not found")


# ------------------------------------------------------------------------------ writing and shards


def test_save_and_load_are_bit_equal(loaded, tmp_path):
    save_checkpoint(tmp_path, *loaded, fields={"eos_token_id": 9})
    config, params = load_checkpoint(tmp_path)
    assert config == loaded[0]
    assert_trees_equal(params, loaded[1])
    assert stop_ids(tmp_path) == (9,)
    hf = json.loads((tmp_path / "config.json").read_text())
    assert hf["architectures"] == ["LlamaForCausalLM"]
    assert (hf["dtype"], hf["bos_token_id"]) == ("float32", None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_saved_tensors_are_those_that_were_read(tiny, loaded, tmp_path):
    save_checkpoint(tmp_path, *loaded)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, tiny))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_bfloat16_round_trip(loaded, tmp_path):
    config, params = loaded
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    save_checkpoint(tmp_path, config, params)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert_trees_equal(load_checkpoint(tmp_path, "bfloat16")[1], params)


@pytest.fixture
def sharded(loaded, tmp_path):
    """A folder of several shards."""
    save_checkpoint(tmp_path / "sharded", *loaded, max_shard_bytes=60_000)
    return tmp_path / "sharded"


def read_index(folder):
    file = folder / "model.safetensors.index.json"
    return file, json.loads(file.read_text())


def test_shards_equal_a_single_file(sharded, loaded):
    _, index = read_index(sharded)
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and all((sharded / file).exists() for file in files)
    assert all((sharded / file).stat().st_size < 64_000 for file in files)
    assert index["metadata"]["total_size"] == 4 * loaded[0].num_params()
    assert_trees_equal(load_checkpoint(sharded)[1], loaded[1])


def test_writing_replaces_older_weights(sharded, loaded):
    save_checkpoint(sharded, *loaded)
    assert sorted(p.name for p in sharded.iterdir()) == ["config.json", "model.safetensors"]
    save_checkpoint(sharded, *loaded, max_shard_bytes=60_000)
    assert not (sharded / "model.safetensors").exists()
    assert_trees_equal(load_checkpoint(sharded)[1], loaded[1])


@needs_torch
def test_transformers_loads_our_shards(sharded, loaded):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(sharded)
    norm = model.model.norm.weight.detach().numpy()
    np.testing.assert_array_equal(norm, np.asarray(loaded[1]["norm"]["scale"]))


def test_index_refusals(sharded):
    file, index = read_index(sharded)
    home = index["weight_map"][Q]
    elsewhere = next(f for f in sorted(set(index["weight_map"].values())) if f != home)

    def attempt(weight_map, *parts):
        file.write_text(json.dumps({"weight_map": weight_map}))
        refused(sharded, *parts)

    for outside in ("../model.safetensors", "/etc/passwd", "sub/model.safetensors", ".."):
        attempt(index["weight_map"] | {Q: outside}, "outside", outside)
    attempt(index["weight_map"] | {Q: "gone.safetensors"}, "gone.safetensors", "not there")
    attempt(index["weight_map"] | {Q: elsewhere}, Q)
    attempt(index["weight_map"] | {"new": home}, "new", "missing", home)
    attempt([], "weight_map")
    file.write_text(f'{{"weight_map": {{"{Q}": "{home}", "{Q}": "{elsewhere}"}}}}')
    refused(sharded, Q, "twice")


def test_tensor_in_two_shards(sharded):
    _, index = read_index(sharded)
    files = sorted(set(index["weight_map"].values()))
    name = next(n for n, f in index["weight_map"].items() if f == files[0])
    tensor = load_file(sharded / files[0])[name]
    change_tensors(sharded, lambda tensors: tensors.update({name: tensor}), file=files[1])
    refused(sharded, name, "twice", files[0], files[1])


def test_stale_single_file_beside_an_index(sharded, tiny):
    shutil.copy(tiny / "model.safetensors", sharded)
    refused(sharded, "both", "stale")


def test_saving_refuses_a_tree_that_does_not_fit(loaded, tmp_path):
    config, params = loaded
    for broken, part in (
        ({**params, "norm": {"scale": jnp.ones(47)}}, r"norm.scale.*\(47,\).*\(48,\)"),
        ({k: v for k, v in params.items() if k != "head"}, r"head.kernel.*None.*\(48, 307\)"),
        ({**params, "extra": {"scale": jnp.ones(3)}}, r"extra.scale.*\(3,\).*None"),
    ):
        with pytest.raises(CheckpointError, match=part):
            save_checkpoint(tmp_path / "out", config, broken)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------- tokenizer


def test_tokenizer_alone_in_a_folder(tiny, tmp_path):
    from tokenizers import Tokenizer

    from main_jax.lm.tokenizer import load_tokenizer

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, tmp_path)
    text = "What is the colour of the sky?\n Ünïcode 🙂"
    expected = Tokenizer.from_file(str(tiny / "tokenizer.json")).encode(text).ids
    for folder in (tiny, tmp_path):
        tokenizer = load_tokenizer(folder)
        assert tokenizer(text)["input_ids"] == expected
        assert tokenizer.decode(expected, skip_special_tokens=True) == text
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
        assert len(tokenizer) < load_config(tiny).vocab_size


def test_sentencepiece_alone_in_a_folder(tmp_path):
    import sentencepiece
    from tiny_llama import CORPUS

    from main_jax.lm.tokenizer import load_tokenizer

    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=file, vocab_size=100, model_type="bpe"
        )
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    text = "What is the answer?"
    ids = load_tokenizer(tmp_path)(text, add_special_tokens=False)["input_ids"]
    assert ids == model.encode(text)


def test_tokenizer_refusals(tiny, tmp_path, monkeypatch):
    import transformers

    from main_jax.lm.tokenizer import load_tokenizer

    with pytest.raises(CheckpointError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no tokenizer"):
        load_tokenizer(tmp_path)
    other = make_tiny_llama(tmp_path / "other", vocab_size=287)  # fewer merges, so other ids
    swapped = transformers.AutoTokenizer.from_pretrained(other)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: swapped)
    with pytest.raises(CheckpointError, match="another tokenizer") as error:
        load_tokenizer(tiny)
    assert "PreTrainedTokenizerFast" in str(error.value)
    monkeypatch.undo()
    (other / "tokenizer.json").write_text('{"version":\n"1.0"}')
    with pytest.raises(CheckpointError, match=re.escape(str(other))) as error:
        load_tokenizer(other)
    assert "\n" not in str(error.value)


def test_tiny_llama_follows_its_seed(tiny, tmp_path):
    again, other = (make_tiny_llama(tmp_path / str(seed), seed=seed) for seed in (3, 4))
    for file in ("model.safetensors", "tokenizer.json"):
        assert (again / file).read_bytes() == (tiny / file).read_bytes()
    assert (other / "model.safetensors").read_bytes() != (tiny / "model.safetensors").read_bytes()
