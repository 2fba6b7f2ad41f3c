"""Tokenizers by their own files: `tokenizer.model` against SentencePiece, and copies of the files."""

import functools
import itertools
import json
import shutil

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import CORPUS, make_tiny_llama
from tokenizers import Tokenizer

from main_jax.lm.tokenizer import copy_tokenizer, load_tokenizer
from main_jax.lm.weights import CheckpointError

# As LLaMA-2's and Mistral's were made.
LLAMA = {
    "model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "split_digits": True,
    "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
    "add_dummy_prefix": True, "allow_whitespace_only_pieces": True,
    "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "minloglevel": 2,
}  # fmt: skip
OTHERS = {
    "user-defined symbols": {"user_defined_symbols": ["<|im_start|>", "<|im_end|>"]},
    "control symbols": {"control_symbols": ["[INST]", "[/INST]"]},
    "other ids": {"unk_id": 3, "bos_id": 0, "eos_id": 1, "pad_id": 2},
    "no space before": {"add_dummy_prefix": False},
    "trimmed spaces": {"remove_extra_whitespaces": True},
    "SentencePiece's defaults": {
        "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True,
    },
    "unknown characters": {"byte_fallback": False, "vocab_size": 110},
    "unigram": {"model_type": "unigram", "vocab_size": 320},
}  # fmt: skip
TEXTS = [
    "What is the answer?", "", " ", "  ", " leading", "   three   and   trailing  ", "\n",
    "\nline\n\n  two\r\n\t", "2024 and 17, 3.5", "🙂👍🏽", "中文 и кириллица, שלום, ไทย, हिन्दी",
    "naïve e\u0301", "wide\u3000and\xa0fixed", "\x00\x01", "the <not special> \\n {x}",
]  # fmt: skip
ADDED = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False}
# As LLaMA-2's, before there was a tokenizer.json.
SETTINGS = {
    "add_bos_token": True, "add_eos_token": False,
    "bos_token": ADDED | {"content": "<s>", "single_word": False},
    "eos_token": ADDED | {"content": "</s>", "single_word": False},
    "unk_token": ADDED | {"content": "<unk>", "single_word": False},
    "clean_up_tokenization_spaces": False, "legacy": False, "model_max_length": 1000,
    "pad_token": None, "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer",
}  # fmt: skip


def train(folder, **changes):
    """Write a tokenizer.model."""
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 3), model_writer=file, **LLAMA | changes
        )
    return folder


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def llama(trained, tmp_path):
    """A folder with nothing but LLaMA's kind of tokenizer.model."""
    shutil.copy(trained / "tokenizer.model", tmp_path)
    return tmp_path


def pieces(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@functools.cache
def both(folder):
    return load_tokenizer(folder), pieces(folder)


def check(folder, texts=TEXTS):
    """Loads it, and compares ids and texts with SentencePiece's."""
    tokenizer, model = load_tokenizer(folder), pieces(folder)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == model.encode(text), text
        if model.unk_id() not in ids:
            assert tokenizer.decode(ids, skip_special_tokens=True) == model.decode(ids)
    return tokenizer


# -------------------------------------------------------------------------------- tokenizer.model


@pytest.mark.parametrize("model_type", [None, "llama", "mistral"])
@pytest.mark.parametrize(
    "name", [None, "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"]
)
def test_sentencepiece_ids_whatever_the_settings_say(llama, model_type, name):
    if model_type:
        write(llama, config={"model_type": model_type})
    if name is None:
        tokenizer = check(llama)
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
            "<s>", "</s>", None,
        )  # fmt: skip
        return
    for legacy, prefix in itertools.product([None, True, False], repeat=2):
        changes = {"tokenizer_class": name, "legacy": legacy, "add_prefix_space": prefix}
        settings = SETTINGS | changes
        write(llama, tokenizer_config={k: v for k, v in settings.items() if v is not None})
        tokenizer = check(llama)
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert ids == (1, 2, None) and len(tokenizer) == LLAMA["vocab_size"]


@pytest.mark.parametrize("kind", OTHERS)
def test_sentencepiece_models_of_other_kinds(tmp_path, kind):
    tokenizer, model = check(train(tmp_path, **OTHERS[kind])), pieces(tmp_path)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert ids == (model.bos_id(), model.eos_id(), model.unk_id())


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from([*" \n▁aethsky1🙂中\u0301\0", "the ", " is", "sky"])).map("".join))
def test_any_text(trained, text):
    tokenizer, model = both(trained)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == model.encode(text)


def test_symbols_of_sentencepiece_are_special_tokens(tmp_path):
    """User-defined ones too, which SentencePiece finds in a text; they are not lost in decoding."""
    folder = train(tmp_path, user_defined_symbols=["<|im_start|>"], control_symbols=["[INST]"])
    tokenizer, model = check(folder, [*TEXTS, "the sky<|im_start|> is  blue"]), pieces(folder)
    assert tokenizer.tokenize("<s>[INST]the")[:2] == ["<s>", "[INST]"]
    assert tokenizer.decode(model.encode("a<|im_start|>b"), skip_special_tokens=True) == (
        "a<|im_start|>b"
    )


@pytest.mark.parametrize(("legacy", "space"), [(None, []), (False, []), (True, ["▁"])])
def test_legacy_is_a_space_after_special_tokens(llama, legacy, space):
    write(llama, tokenizer_config={"legacy": legacy} if legacy is not None else {})
    tokens = load_tokenizer(llama).tokenize("<s>3</s> 3")
    assert tokens == ["<s>", *space, "3", "</s>", *space, "▁", "3"]


def test_pad_may_be_absent_or_the_end(llama):
    write(llama, tokenizer_config=SETTINGS | {"pad_token": "</s>"})
    tokenizer = check(llama)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    folder = make_tiny_llama(llama / "fast")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for pad, expected in (("</s>", 2), (None, None)):
        write(folder, tokenizer_config=settings | {"pad_token": pad})
        assert load_tokenizer(folder).pad_token_id == expected


def test_added_tokens_have_the_ids_of_their_file(llama):
    write(llama, tokenizer_config=SETTINGS | {"pad_token": "<pad>"})
    write(llama, added_tokens={"<pad>": 420, "<|end|>": 421})
    tokenizer = check(llama)
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<|end|>"]) == [420, 421]
    assert tokenizer.pad_token_id == 420 and len(tokenizer) == 422
    write(llama, added_tokens={"<pad>": 420, "<|end|>": 423})
    with pytest.raises(
        CheckpointError, match=r"put the tokenizer.json .*'<\|end\|>' should be 423"
    ):
        load_tokenizer(llama)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"treat_whitespace_as_suffix": True}, "convert it with the model's own .slow. tokenizer"),
        ({"user_defined_symbols": ["  "]}, "other ids than tokenizer.model"),
        (None, "does not load .*; if tokenizer.model is not SentencePiece's, the folder needs"),
    ],
)
def test_what_would_get_other_ids_is_refused(tmp_path, changes, message):
    if changes is None:
        (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's format
    else:
        train(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


# ----------------------------------------------------------------------------------------- copies


def contents(folder):
    return {
        str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()
    }


@pytest.fixture
def source(tmp_path):
    """A model folder with a chat template in every place there is."""
    folder = make_tiny_llama(tmp_path / "source")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    # Written as nobody's JSON library would, to see that bytes are copied.
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": "settings"}, indent=7) + "\n\n"
    )
    write(folder, chat_template={"chat_template": "json"}, special_tokens_map={"eos_token": "</s>"})
    write(folder, vocab={"a": 0}, added_tokens={})
    (folder / "merges.txt").write_bytes(b"#version: 0.2\r\na b\n")
    (folder / "chat_template.jinja").write_text("jinja")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    return folder


def test_a_copy_has_the_tokenizers_bytes_and_nothing_else(source, tmp_path):
    copy_tokenizer(source, tmp_path / "new" / "copy")
    copy = contents(tmp_path / "new" / "copy")
    model = {"config.json", "generation_config.json", "model.safetensors"}
    assert copy == {name: data for name, data in contents(source).items() if name not in model}
    assert len(copy) == 9
    text = " What is\n\nthe 🙂?"
    raw = Tokenizer.from_file(str(source / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "new" / "copy")(text)["input_ids"] == raw.encode(text).ids


def test_a_copied_sentencepiece_model(llama, tmp_path):
    write(llama, tokenizer_config=SETTINGS)
    copy_tokenizer(llama, tmp_path / "copy", "{{ bos_token }}x")
    check(tmp_path / "copy")
    assert contents(tmp_path / "copy").keys() == {
        "tokenizer.model", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (llama / name).read_bytes()


def test_a_chat_template_of_ones_own_takes_the_place_of_all(source, tmp_path):
    copy, template = tmp_path / "copy", "{{ bos_token }}\n{{ 'é' }}"
    assert load_tokenizer(source).chat_template == {"default": "jinja", "tool_use": "tools"}
    copy_tokenizer(source, copy)
    copy_tokenizer(source, copy, template)  # also over an older copy
    assert load_tokenizer(copy).chat_template == template
    assert load_tokenizer(copy).get_chat_template() == template
    missing = {"chat_template.json", "additional_chat_templates/tool_use.jinja"}
    assert contents(source).keys() - contents(copy).keys() > missing
    assert not missing & contents(copy).keys()
    settings = json.loads((source / "tokenizer_config.json").read_text())
    assert settings.pop("chat_template") == "settings"
    assert json.loads((copy / "tokenizer_config.json").read_text()) == settings
    for name in ("tokenizer.json", "merges.txt", "special_tokens_map.json"):
        assert (copy / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_which_chat_template_transformers_reads(source, place):
    """The file before the settings; chat_template.json, a processor's, not at all."""
    shutil.rmtree(source / "additional_chat_templates")
    if place == "tokenizer_config.json":
        (source / "chat_template.jinja").unlink()
    expected = {"tokenizer_config.json": "settings", "chat_template.jinja": "jinja"}
    assert load_tokenizer(source).chat_template == expected[place]


def test_a_copy_replaces_another_tokenizer(source, llama, tmp_path):
    copy = tmp_path / "copy"
    copy_tokenizer(source, copy)
    (copy / "model.safetensors").write_bytes(b"weights")
    folder = llama / "alone"
    folder.mkdir()
    copy_tokenizer(folder, copy, "x")  # no tokenizer there: nothing happens
    assert contents(copy) == contents(copy) | {"chat_template.jinja": b"jinja"}
    shutil.copy(llama / "tokenizer.model", folder)
    copy_tokenizer(folder, copy)
    assert contents(copy).keys() == {"tokenizer.model", "model.safetensors"}


def test_copies_that_cannot_be_made(source, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        copy_tokenizer(tmp_path / "nowhere", tmp_path / "copy")
    (source / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: cannot be read as JSON"):
        copy_tokenizer(source, tmp_path / "copy", "x")
    assert not (tmp_path / "copy").exists()
