"""Every model family gives what Transformers gives: logits, greedy texts, defaults, every field.

The folders come from `tiny_llama.FAMILIES`; without PyTorch the comparisons with files and with
Transformers' configuration classes remain, and the golden logits in test_hf.py.
"""

import collections
import copy
import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from score_reference import ROWS, largest_difference, reference
from tiny_llama import FAMILIES, make_tiny_llama, tiny_config

from main_jax.config import Runtime
from main_jax.data.sources import open_source
from main_jax.lm.arch import PRESETS, DecoderConfig, RopeScaling
from main_jax.lm.generate import Sampling, generate
from main_jax.lm.hf import (
    CheckpointError,
    flat_params,
    load_checkpoint,
    save_checkpoint,
    stop_ids,
)
from main_jax.lm.hf_config import FAMILIES as OURS
from main_jax.lm.hf_config import HONOURED_VALUES, IGNORED_FIELDS, from_hf, to_hf
from main_jax.lm.model import Decoder
from main_jax.models import open_checkpoint
from main_jax.tools.generate import generate_file
from main_jax.tools.score import score_file

try:
    import torch
except ImportError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="compares with Transformers on PyTorch")

TOKENS = np.random.default_rng(11).integers(0, 307, 512)
SHORT = (
    128  # positions that suffice to see a change: more than the windows and llama3's old context
)
SCORED = ("short", "input", "unicode", "long")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several only get in each other's way where the models are this small."""
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Case(NamedTuple):
    """One family's model folder, its parsed config.json, and what is loaded from it."""

    name: str
    path: Path
    fields: dict
    config: DecoderConfig
    params: Any


@functools.cache
def load(path: Path) -> Case:
    fields = json.loads((path / "config.json").read_text())
    return Case(path.name, path, fields, *load_checkpoint(path))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {
        name: make_tiny_llama(folder / name, seed=5, **family) for name, family in FAMILIES.items()
    }


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, folders):
    return load(folders[request.param])


@functools.partial(jax.jit, static_argnums=0)
def run(decoder, params, tokens):
    positions = jnp.arange(tokens.shape[0])[None]
    hidden, _ = decoder.apply(params, tokens[None], positions, jnp.ones_like(positions))
    return hidden[0] @ decoder.unembed(params)


def our_logits(config, params, tokens=TOKENS):
    return np.asarray(run(Decoder(config), params, jnp.asarray(tokens)))


def short_logits(config, params):
    """Operation by operation: many configs, and none of them is compiled."""
    with jax.disable_jit():
        return our_logits(config, params, TOKENS[:SHORT])


def their_model(folder):
    """What Transformers loads, complaining about nothing."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def their_logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(torch.tensor(tokens)[None], return_dict=True).logits[0].numpy()


def assert_close(found, expected):
    assert expected.std() > 1  # the tolerance is small against the values
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------- there and back


@needs_torch
def test_logits_equal_transformers(case, tmp_path):
    """Also from a folder that Transformers wrote, in the spelling of its configs today."""
    theirs = their_model(case.path)
    assert type(theirs).__name__ == case.fields["architectures"][0]
    expected = their_logits(theirs)
    assert_close(our_logits(case.config, case.params), expected)

    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written and "rope_theta" not in written
    config, params = load_checkpoint(tmp_path)
    assert config == case.config
    assert_close(our_logits(config, params), expected)


def test_tensors_come_back_bit_for_bit(case, tmp_path):
    for name, fields in (("same", case.fields), ("own", None)):
        save_checkpoint(tmp_path / name, case.config, case.params, fields=fields)
        back, there = (
            load_file(folder / "model.safetensors") for folder in (tmp_path / name, case.path)
        )
        assert back.keys() == there.keys()
        for tensor in there:
            assert back[tensor].dtype == there[tensor].dtype
            np.testing.assert_array_equal(back[tensor], there[tensor])
        assert load_checkpoint(tmp_path / name)[0] == case.config
    assert json.loads((tmp_path / "same" / "config.json").read_text()) == case.fields


@needs_torch
def test_transformers_loads_what_we_write(case, tmp_path):
    """With the file's own config it is the same class; by ours, a LLaMA where that says it all."""
    ours = our_logits(case.config, case.params)
    save_checkpoint(tmp_path / "same", case.config, case.params, fields=case.fields)
    model = their_model(tmp_path / "same")
    assert type(model).__name__ == case.fields["architectures"][0]
    assert_close(their_logits(model), ours)

    save_checkpoint(tmp_path / "own", case.config, case.params)
    model = their_model(tmp_path / "own")
    expected = {"mistral-v0.3": "LlamaForCausalLM"}.get(case.name, case.fields["architectures"][0])
    assert type(model).__name__ == expected
    assert_close(their_logits(model), ours)


# ------------------------------------------------------------------------------------------- greedy

# Two length buckets, so that little is compiled; the second is beyond the windows of 48 already
# when it is read, the first gets there while it is written.
LENGTHS = (1, 2, 3, 5, 8, 13, 21, 32, 97, 98, 99, 100, 101, 103, 107, 120)
NEW = 64


class Greedy(NamedTuple):
    """A text of Transformers: new tokens, why it ended, the first step that is nearly a tie."""

    tokens: list
    reason: str
    sure: int


def their_greedy(model, prompt, stops) -> Greedy:
    ids = torch.tensor(prompt)[None]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, len(prompt) :].tolist()
    best, second = torch.stack(out.logits)[:, 0].topk(2).values.T
    near = np.flatnonzero((best - second).numpy() < 1e-4)
    sure = int(near[0]) if len(near) else len(tokens)
    if tokens[-1] in stops:
        return Greedy(tokens[:-1], "stop", sure)
    return Greedy(tokens, "length", sure)


class Exported(NamedTuple):
    """A folder that we wrote, as Transformers loads it."""

    path: Path
    model: Any
    stops: tuple
    prompts: list


@pytest.fixture(scope="module")
def exported(case, tmp_path_factory):
    """Export a model; of its two stop tokens one does occur, late, and in few of the texts."""
    path = tmp_path_factory.mktemp("exported") / case.name
    save_checkpoint(path, case.config, case.params, fields=case.fields)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(case.path / file, path)
    rng = np.random.default_rng(12)
    prompts = [np.append(1, rng.integers(3, 307, n - 1)) for n in LENGTHS]

    padded = [np.pad(p, (max(LENGTHS) - len(p), 0)) for p in prompts]
    mask = [np.arange(max(LENGTHS)) >= max(LENGTHS) - len(p) for p in prompts]
    model = their_model(path)
    drafts = model.generate(
        torch.tensor(np.stack(padded)),
        attention_mask=torch.tensor(np.stack(mask)).long(),
        do_sample=False,
        max_new_tokens=NEW,
        pad_token_id=0,
    )[:, max(LENGTHS) :].tolist()
    firsts = collections.defaultdict(list)
    for draft in drafts:
        for token in set(draft) - {0, 2}:
            firsts[token].append(draft.index(token))
    late = {token: steps for token, steps in firsts.items() if min(steps) >= 8}
    stop = min(late, key=lambda token: (len(late[token]), token))

    generation = {"bos_token_id": 1, "eos_token_id": [2, stop], "pad_token_id": 0}
    (path / "generation_config.json").write_text(json.dumps(generation))
    return Exported(path, their_model(path), (2, stop), prompts)


@needs_torch
def test_greedy_texts_equal_transformers(exported):
    """Token by token, up to a near tie, which rounding may decide either way."""
    path, model, stops, prompts = exported
    assert stop_ids(path) == stops
    # As the verbs open it, so that they find everything compiled.
    decoder = open_checkpoint(str(path), Runtime()).decoder
    found = generate(
        decoder, load_checkpoint(path)[1], prompts, [str(i) for i in range(len(prompts))],
        Sampling(max_new_tokens=NEW), stop_ids=stops, seed=0, batch_size=8,
    )  # fmt: skip
    compared, reasons = 0, collections.Counter()
    for prompt, ours in zip(prompts, found, strict=True):
        theirs = their_greedy(model, prompt, stops)
        if theirs.sure >= len(theirs.tokens):
            assert ours.tokens.tolist() == theirs.tokens
            assert ours.finish_reason == theirs.reason
            reasons[theirs.reason] += 1
        else:
            assert ours.tokens.tolist()[: theirs.sure] == theirs.tokens[: theirs.sure]
        compared += min(theirs.sure, len(theirs.tokens))
    assert reasons["stop"] >= 1 and reasons["length"] >= 8, reasons
    assert compared > 0.7 * NEW * len(prompts)


@needs_torch
def test_generate_verb_equals_transformers(exported, tmp_path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(exported.path / "tokenizer.json"))
    texts = ["What is the colour of the sky?", "1, 2", "ÜÄ שלום", "Translate " * 5, "a"]
    rows = [{"instruction": text} for text in texts]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate_file(
        str(exported.path), str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"),
        template="none", sampling=Sampling(max_new_tokens=NEW), batch_size=8,
    )  # fmt: skip
    found = [row.values for row in open_source(str(tmp_path / "out.jsonl"))]
    assert [row["instruction"] for row in found] == texts
    for row in found:
        ids = tokenizer.encode(row["instruction"], add_special_tokens=False).ids
        theirs = their_greedy(exported.model, [1, *ids], exported.stops)
        assert theirs.sure >= len(theirs.tokens), "a near tie says nothing; take another text"
        known = [i for i in theirs.tokens if i < tokenizer.get_vocab_size()]
        assert row["completion"] == tokenizer.decode(known, skip_special_tokens=True)
        assert row["finish_reason"] == theirs.reason
    assert len({row["completion"] for row in found}) == len(found)


@needs_torch
def test_score_verb_equals_transformers(case, tmp_path):
    rows = [row for row in ROWS if row["id"] in SCORED]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score_file(
        str(case.path), None, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"),
        template="plain", tokens_per_batch=1024,
    )  # fmt: skip
    found = [row.values for row in open_source(str(tmp_path / "out.jsonl"))]
    expected = reference(case.path, case.path, "plain", rows)
    assert max(row["forward_tokens"] for row in expected) > 100  # beyond the windows of 48
    assert largest_difference(found, expected) < 1e-4


# ------------------------------------------------------------------------- every field has its place


def test_every_field_of_our_config(case):
    """Each changes the logits or does not fit the weights, but for what the model was trained for."""
    c = case.config
    changing = {
        "rope_theta": 123.0,
        "rope_scaling": RopeScaling("linear", 2.0),
        "sliding_window": 20,
        "rms_norm_eps": 1e-2,
    }
    misfit = {
        "vocab_size": 301,
        "hidden_size": 52,
        "intermediate_size": 80,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 12,
        "qkv_bias": not c.qkv_bias,
        "qk_norm": not c.qk_norm,
        "tie_word_embeddings": not c.tie_word_embeddings,
    }
    neither = {"max_position_embeddings": 77}
    names = [field.name for field in dataclasses.fields(DecoderConfig)]
    assert sorted(names) == sorted([*changing, *misfit, *neither])
    base = short_logits(c, case.params)
    for name, value in changing.items():
        logits = short_logits(dataclasses.replace(c, **{name: value}), case.params)
        assert np.abs(logits - base).max() > 1e-2, name
    for name, value in misfit.items():
        with pytest.raises(CheckpointError, match=r"params: .* has shape"):
            flat_params(dataclasses.replace(c, **{name: value}), case.params)
    for name, value in neither.items():
        changed = dataclasses.replace(c, **{name: value})
        np.testing.assert_array_equal(short_logits(changed, case.params), base)


SCALING = {
    "kind": "linear",
    "factor": 4.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 12.0,
    "original_max_position_embeddings": 256,
}


def test_every_field_of_rope_scaling(folders):
    case = load(folders["llama-3"])
    assert [field.name for field in dataclasses.fields(RopeScaling)] == list(SCALING)
    base = short_logits(case.config, case.params)
    for name, value in SCALING.items():
        scaling = dataclasses.replace(case.config.rope_scaling, **{name: value})
        config = dataclasses.replace(case.config, rope_scaling=scaling)
        assert np.abs(short_logits(config, case.params) - base).max() > 1e-2, name


# The fields of a config.json, each with another value than the folder's: those that change the
# logits, those that are refused, and those that IGNORED_FIELDS says are ignored.
CHANGING = {
    "rms_norm_eps": 1e-2,
    "rope_theta": 123.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    "sliding_window": 20,
    "use_sliding_window": False,
    "max_window_layers": 3,
    "layer_types": ["full_attention"] * 3,
}
REFUSED = {
    "model_type": "gpt2",
    "architectures": ["LlamaForSequenceClassification"],
    "vocab_size": 301,
    "hidden_size": 52,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "tie_word_embeddings": True,
    "hidden_act": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
    "is_encoder_decoder": True,
    "partial_rotary_factor": 0.5,
    "quantization_config": {"bits": 4},
    "auto_map": {"AutoModelForCausalLM": "own.Model"},
    "is_causal": False,
    "per_layer_config": {"1": {"head_dim": 4}},
    "fusion_config": {"qkv": True},
    "transformers_weights": "other.safetensors",
}
IGNORED = {
    "attention_dropout": 0.5,
    "bos_token_id": 5,
    "chunk_size_feed_forward": 16,
    "dtype": "float16",
    "eos_token_id": [7, 8],
    "id2label": {"0": "a"},
    "initializer_range": 0.5,
    "label2id": {"a": 0},
    "output_attentions": True,
    "output_hidden_states": True,
    "pad_token_id": 9,
    "pretraining_tp": 2,
    "problem_type": "regression",
    "return_dict": False,
    "transformers_version": "4.30.0",
    "use_cache": False,
    "_name_or_path": "elsewhere",
}
# What the model was trained for; nothing is cut at it, here or there. It matters where llama3's
# original context is left out, which then is this: see the test below.
TRAINED_FOR = {"max_position_embeddings": 77}
# The folders whose config says most: those with a window, as far as there are any.
SPEAKING = {
    "llama": FAMILIES["llama-2"],
    "mistral": FAMILIES["mistral-v0.1"],
    "qwen2": FAMILIES["qwen2-window"],
    "qwen3": FAMILIES["qwen3"]
    | {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 0},
}


@pytest.fixture(scope="module", params=OURS)
def speaking(request, tmp_path_factory):
    model_type = request.param
    path = tmp_path_factory.mktemp("speaking") / model_type
    return load(make_tiny_llama(path, seed=5, **SPEAKING[model_type]))


def changed(case, folder, **fields):
    """The model folder with a changed config.json."""
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(case.path / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(case.fields | fields))
    return folder


def known_fields(case) -> dict[str, set]:
    """What the tables say of the fields that a file of this family may have."""
    from transformers import AutoConfig

    model_type = case.fields["model_type"]
    keys = AutoConfig.for_model(model_type).to_dict().keys()
    keys |= to_hf(case.config).keys() | case.fields.keys()
    changing = CHANGING.keys() & keys
    refused = set(REFUSED)
    if model_type == "llama":  # which has no window
        changing -= {"sliding_window"}
        refused |= {"sliding_window"}
    tables = {"changing": changing, "refused": refused, "ignored": set(IGNORED)}
    tables["neither"] = set(TRAINED_FOR)
    unknown = keys - set().union(*tables.values())
    assert not unknown, f"fields of {model_type} that main_jax has no opinion on: {unknown}"
    return tables


VALUES = CHANGING | REFUSED | IGNORED | TRAINED_FOR


def test_tables_are_complete_and_apart():
    assert len(VALUES) == len(CHANGING) + len(REFUSED) + len(IGNORED) + len(TRAINED_FOR)
    assert IGNORED.keys() == IGNORED_FIELDS.keys()
    assert all(len(reason) > 4 for reason in IGNORED_FIELDS.values())
    assert HONOURED_VALUES.keys() <= REFUSED.keys()


def test_every_field_of_config_json(speaking, tmp_path):
    base = short_logits(speaking.config, speaking.params)
    for kind, names in known_fields(speaking).items():
        for name in sorted(names):
            assert speaking.fields.get(name) != VALUES[name], f"{name} is not changed"
            folder = changed(speaking, tmp_path / name, **{name: VALUES[name]})
            if kind == "refused":
                with pytest.raises(CheckpointError) as error:
                    load_checkpoint(folder)
                assert name in str(error.value) or "tensor" in str(error.value), name
                assert "\n" not in str(error.value)
                continue
            difference = np.abs(short_logits(*load_checkpoint(folder)) - base).max()
            if kind == "changing":
                assert difference > 1e-2, name
            else:
                assert difference == 0, name


@needs_torch
def test_every_field_means_what_it_means_to_transformers(speaking, tmp_path):
    """The changed logits are theirs too, and what we ignore changes nothing there."""
    tables = known_fields(speaking)
    tables["ignored"].remove("return_dict")  # false in a file, their own forward pass fails on it
    base = their_logits(their_model(speaking.path), TOKENS[:SHORT])
    for name in sorted(set().union(*tables.values()) - tables["refused"]):
        folder = changed(speaking, tmp_path / name, **{name: VALUES[name]})
        theirs = their_logits(their_model(folder), TOKENS[:SHORT])
        if name in tables["changing"]:
            assert_close(short_logits(*load_checkpoint(folder)), theirs)
        else:
            np.testing.assert_array_equal(theirs, base, err_msg=name)


def llama3_without_original(case, positions):
    scaling = dict(case.fields["rope_scaling"])
    del scaling["original_max_position_embeddings"]
    return {"rope_scaling": scaling, "max_position_embeddings": positions}


def test_llama3_falls_back_to_the_models_positions(folders, tmp_path):
    """Without an original context, that is max_position_embeddings, which matters nowhere else."""
    case = load(folders["llama-3"])
    logits = []
    for positions in (64, 256):
        fields = llama3_without_original(case, positions)
        folder = changed(case, tmp_path / str(positions), **fields)
        config, params = load_checkpoint(folder)
        assert config.rope_scaling.original_max_position_embeddings == positions
        logits.append(short_logits(config, params))
    np.testing.assert_array_equal(logits[0], short_logits(case.config, case.params))
    assert np.abs(logits[1] - logits[0]).max() > 1e-2


@needs_torch
def test_fields_of_llama3_mean_what_they_mean_to_transformers(folders, tmp_path):
    """In the old spelling and in the new, and where the original context is left out."""
    case = load(folders["llama-3"])
    names = {"rope_type": "linear"} | SCALING
    del names["kind"]
    variants = [llama3_without_original(case, 256)]
    for name, value in names.items():
        scaling = case.fields["rope_scaling"] | {name: value}
        variants.append({"rope_scaling": scaling})
        variants.append({"rope_scaling": None, "rope_parameters": {"rope_theta": 5e5, **scaling}})
    base = short_logits(case.config, case.params)
    for i, fields in enumerate(variants):
        folder = changed(case, tmp_path / str(i), **fields)
        theirs = their_logits(their_model(folder), TOKENS[:SHORT])
        assert_close(short_logits(*load_checkpoint(folder)), theirs)
        assert np.abs(theirs - base).max() > 1e-2, fields


# --------------------------------------------------------------------------- defaults and both ways

NEEDED = {
    "vocab_size": 31,
    "hidden_size": 640,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 64,
}


def as_transformers_reads(fields) -> dict:
    """What Transformers' configuration class makes of a config.json, in our names."""
    from transformers import AutoConfig

    c: Any = AutoConfig.for_model(**copy.deepcopy(fields))
    rope = dict(c.rope_parameters)
    kind = rope.pop("rope_type")
    theta = rope.pop("rope_theta")
    assert kind in ("default", "linear", "llama3")
    window = getattr(c, "sliding_window", None)
    if c.model_type.startswith("qwen"):
        (layers,) = set(c.layer_types)  # a window in some layers only is not ours
        window = window if layers == "sliding_attention" else None
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_layers": c.num_hidden_layers,
        "num_heads": c.num_attention_heads,
        "num_kv_heads": c.num_key_value_heads,
        "head_dim": getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        "max_position_embeddings": c.max_position_embeddings,
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else RopeScaling(kind, **rope),
        "sliding_window": window,
        "tie_word_embeddings": c.tie_word_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
    }


def as_we_read(fields) -> dict:
    config = from_hf(fields)
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    # No field of a config.json says these two: they are the family's.
    assert values.pop("qkv_bias") == (fields["model_type"] == "qwen2")
    assert values.pop("qk_norm") == (fields["model_type"] == "qwen3")
    return values


@pytest.mark.parametrize("model_type", OURS)
def test_defaults_are_transformers(model_type):
    fields = {"model_type": model_type, **NEEDED}
    ours = as_we_read(fields)
    assert ours == as_transformers_reads(fields)
    if model_type.startswith("qwen"):
        on = {**fields, "use_sliding_window": True, "max_window_layers": 0}
        assert as_we_read(on) == as_transformers_reads(on)
        assert as_we_read(on)["sliding_window"] == 4096
        late = {**fields, "use_sliding_window": True}  # from layer 28 on, of 3 or of 30
        assert as_we_read(late) == as_transformers_reads(late)
        with pytest.raises(ValueError, match="max_window_layers"):
            from_hf({**late, "num_hidden_layers": 30})


@pytest.mark.parametrize("model_type", OURS)
def test_null_is_what_it_is_to_transformers(model_type):
    """Where Transformers accepts it: it refuses most of them."""
    nullable = {"sliding_window", "rope_scaling", "rope_parameters", "layer_types", "head_dim"}
    nullable |= {"num_key_value_heads"}
    nullable -= {"mistral": {"num_key_value_heads"}, "qwen3": {"head_dim"}}.get(model_type, set())
    for name in nullable:
        fields = {"model_type": model_type, **NEEDED, name: None}
        assert as_we_read(fields) == as_transformers_reads(fields), name


@pytest.mark.parametrize("name", [*FAMILIES, *PRESETS])
def test_configs_come_back_and_read_alike(name):
    config = PRESETS[name] if name in PRESETS else from_hf(tiny_config(**FAMILIES[name]))
    fields = json.loads(json.dumps(to_hf(config)))
    assert from_hf(fields) == config
    assert as_transformers_reads(fields) == as_we_read(fields)


@pytest.mark.parametrize("name", FAMILIES)
def test_published_spellings_read_alike(name):
    fields = tiny_config(**FAMILIES[name])
    assert as_transformers_reads(fields) == as_we_read(fields)


def test_windows():
    windows = {name: from_hf(tiny_config(**FAMILIES[name])).sliding_window for name in FAMILIES}
    assert windows == dict.fromkeys(FAMILIES) | {"mistral-v0.1": 48, "qwen2-window": 48}
    mistral = {"model_type": "mistral", **NEEDED}
    assert from_hf(mistral).sliding_window == 4096
    assert from_hf({**mistral, "sliding_window": None}).sliding_window is None


FULL, SLIDING = "full_attention", "sliding_attention"
ON = {"use_sliding_window": True, "sliding_window": 48}
MIXED = ["layer_types, max_window_layers", "some layers only"]


@pytest.mark.parametrize(
    ("name", "changes", "parts"),
    [
        *(
            (name, changes, parts)
            for name in ("qwen2", "qwen3")
            for changes, parts in [
                ({**ON, "max_window_layers": 1}, MIXED),
                ({**ON, "max_window_layers": 2}, MIXED),
                ({**ON, "layer_types": [FULL, SLIDING, SLIDING]}, MIXED),
                ({**ON, "layer_types": [SLIDING, FULL, SLIDING]}, MIXED),
                # Transformers looks at layer_types alone, and has no window then.
                ({"layer_types": [SLIDING] * 3}, ["layer_types", "needs a sliding_window"]),
                ({**ON, "layer_types": [SLIDING] * 2}, ["layer_types", "expected 3"]),
                ({"layer_types": ["chunked_attention"] * 3}, ["layer_types", FULL, SLIDING]),
                ({"layer_types": 3}, ["layer_types"]),
                ({"layer_types": [[FULL]] * 3}, ["layer_types"]),
                ({**ON, "max_window_layers": 0, "sliding_window": 0}, ["sliding_window", "0"]),
                ({**ON, "max_window_layers": None}, ["max_window_layers", "None"]),
                ({**ON, "max_window_layers": "all"}, ["max_window_layers", "all"]),
            ]
        ),
        ("mistral-v0.3", {"layer_types": [SLIDING] * 3}, ["layer_types", "needs a sliding_window"]),
        ("mistral-v0.1", {"layer_types": [FULL] * 3}, ["layer_types", "contradicts", "48"]),
        ("mistral-v0.1", {"layer_types": [FULL, SLIDING, FULL]}, MIXED),
        ("mistral-v0.1", {"sliding_window": -1}, ["sliding_window", "-1"]),
        ("llama-2", {"sliding_window": 48}, ["sliding_window", "48", "llama"]),
        ("llama-2", {"layer_types": [SLIDING] * 3}, ["layer_types"]),
        ("qwen3", {"attention_bias": True}, ["attention_bias", "True"]),
        ("qwen2", {"attention_bias": True}, ["attention_bias", "True"]),
    ],
)
def test_refused(name, changes, parts):
    with pytest.raises(ValueError) as error:
        from_hf(tiny_config(**(FAMILIES[name] | changes)))
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("model_type", OURS)
def test_architectures_of_another_class_are_refused(model_type):
    right = OURS[model_type].architecture
    others = [family.architecture for family in OURS.values() if family.architecture != right]
    fields = {"model_type": model_type, **NEEDED}
    assert from_hf({**fields, "architectures": [right]}) == from_hf(fields)
    for other in [*others, right.replace("CausalLM", "SequenceClassification"), right[:-11]]:
        with pytest.raises(ValueError, match=f"architectures.*{other}.*{right}"):
            from_hf({**fields, "architectures": [other]})


# --------------------------------------------------------------------------------- RoPE and presets


@needs_torch
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("head_dim", [10, 64, 128])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScaling("linear", 2.5),
        RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
    ],
)
def test_rope_frequencies_equal_transformers(theta, head_dim, scaling):
    """To 2 ulp: PyTorch's own float32 power is up to one off."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = DecoderConfig(
        31, 64, 77, 1, 4, 2, head_dim, 131072, rope_theta=theta, rope_scaling=scaling
    )
    ours = config.rope_frequencies()
    theirs = LlamaRotaryEmbedding(AutoConfig.for_model(**to_hf(config))).inv_freq.numpy()
    assert ours.dtype == theirs.dtype == np.float32
    assert (np.diff(theirs) < 0).all()  # positive and falling: their bits count ulps
    assert np.abs(ours.view(np.int32) - theirs.view(np.int32)).max() <= 2


PUBLISHED = {
    "llama-2-7b": 6738415616,
    "llama-2-13b": 13015864320,
    "llama-3.1-8b": 8030261248,
    "mistral-7b-v0.1": 7241732096,
    "mistral-7b-v0.3": 7248023552,
    "qwen2.5-0.5b": 494032768,
    "qwen2.5-7b": 7615616512,
    "qwen3-8b": 8190735360,
}


def test_presets_have_the_published_number_of_parameters():
    assert {name: preset.num_params() for name, preset in PRESETS.items()} == PUBLISHED


@needs_torch
@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_transformers_number_of_parameters(name):
    """Nothing is allocated; a shared tensor counts once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**to_hf(PRESETS[name])))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]
