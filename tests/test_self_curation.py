"""Self-curation with a scripted model: what it answers depends on the last token alone, and is known."""

import json

import jax
import numpy as np
import pytest
from tiny_llama import ANY_INSTRUCTION, make_tiny_llama, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from main_jax.config import Config
from main_jax.errors import UserError
from main_jax.lm.arch import DecoderConfig
from main_jax.lm.model import Decoder
from main_jax.models import LanguageModel
from main_jax.parts import read_parts
from main_jax.pipeline import execute, open_run
from main_jax.prompts import Prompt
from main_jax.self_curation import DEFAULT_PROMPT, Curator, read_prompt
from main_jax.strict_yaml import from_mapping

ANSWERS = {  # the last character of a response -> probabilities of "1" ... "5", the rest is all others'
    "a": (0.3, 0.2, 0.2, 0.1, 0.1),
    "b": (0.0, 0.0, 0.0, 0.1, 0.9),
    "c": (0.0, 0.05, 0.05, 0.05, 0.05),
}
EXPECTED = {"a": 2.2 / 0.9, "b": 4.9, "c": 3.5}  # Σ k p(k) / Σ p(k)
PARSED = {"a": True, "b": True, "c": False}  # of "c", another token has .8
OWN = {d: {"before": "", "after": ""} for d in ("forward", "reverse")}
ASKING = "{instruction} {response}"


@pytest.fixture(scope="module")
def prompt():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(300), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    return Prompt(tokenizer, OWN)


@pytest.fixture(scope="module")
def model(prompt):
    """No layer does anything; a token's embedding is a unit vector of its own, the head knows the answers."""
    config = DecoderConfig(
        vocab_size=300, hidden_size=320, intermediate_size=16, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-9,
    )  # fmt: skip
    decoder = Decoder(config)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), decoder.init(jax.random.key(0)))
    params["embed"]["embedding"] = np.eye(300, 320, dtype=np.float32)
    params["norm"]["scale"] = np.ones_like(params["norm"]["scale"])
    grades = [prompt.encode(str(k))[0] for k in range(1, 6)]
    other = prompt.encode("z")[0]
    for letter, shares in ANSWERS.items():
        token = prompt.encode(f"q {letter}")[-1]
        logits = np.full(300, -1e3)  # as good as never
        logits[grades] = np.log(np.maximum(shares, 1e-30))
        logits[other] = np.log(max(1 - sum(shares), 1e-30))
        params["head"]["kernel"][token] = logits / np.sqrt(320)  # which the last norm takes back
    return LanguageModel(decoder, params)


def rows(*responses, **changes):
    return [
        {"id": str(i), "instruction": "q", "response": r, "drop_reason": None} | changes
        for i, r in enumerate(responses)
    ]


def test_ratings_are_the_expectation_of_known_answers(prompt, model):
    pairs = [f"{'x' * n} {letter}" for n in range(8) for letter in "abc"]
    found = Curator(prompt, ASKING).rate(rows(*pairs), model, budget=256)
    for text, (rating, parsed) in zip(pairs, found, strict=True):
        assert rating == pytest.approx(EXPECTED[text[-1]], abs=1e-4)
        assert parsed is PARSED[text[-1]]


def test_what_is_not_asked_has_no_rating(prompt, model):
    curator = Curator(prompt, ASKING)
    given = rows("x a", "x " * 200 + "b", "x b")
    given[2]["drop_reason"] = "too_long"
    assert [rating is None for rating, _ in curator.rate(given, model, 256)] == [False, True, True]
    assert curator.rate([], model, 256) == []


def test_the_question_is_the_users_file_with_both_texts_as_they_are(prompt, model, tmp_path):
    file = tmp_path / "ask.txt"
    file.write_text("Grade {response} for {instruction}!\n")
    curator = Curator(prompt, read_prompt(str(file)))
    asked = curator._question(
        {"instruction": "{response}", "input": "x", "response": "{instruction}\\1"}
    )
    assert asked == "Grade {instruction}\\1 for {response}\n\nx!"
    for text, said in (("{response} alone", "{instruction} somewhere"), (None, "cannot be read")):
        file.unlink() if text is None else file.write_text(text)
        with pytest.raises(UserError, match=said):
            read_prompt(str(file))
    assert read_prompt(None) == DEFAULT_PROMPT.read_text().strip()


def test_a_tokenizer_that_needs_two_tokens_for_a_grade_is_refused(prompt):
    class Spelled(Prompt):
        def __init__(self):
            pass

        def encode(self, text):
            return [7, 7 + int(text), 3] if text == "4" else [7, 7 + int(text)]

    with pytest.raises(UserError, match="does not write the grades 1 to 5 as one token"):
        Curator(Spelled(), ASKING)


# ------------------------------------------------------------------------------------------ in a run


@pytest.fixture
def values(tmp_path):
    """Of a run whose filter is self-curation; two texts are too long with the question around them."""
    make_tiny_llama(tmp_path / "model", seed=2, num_hidden_layers=1)
    seed = [{"instruction": f"Add {i} and 2.", "response": str(i + 2)} for i in range(8)]
    texts = [
        {"text": f"The sum of {i} and 1 is {i + 1}.{' really' * 55 * (i < 2)}"} for i in range(12)
    ]
    for name, rows in (("seed", seed), ("texts", texts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ask.txt").write_text(f"{'Well. ' * 60}Grade {{response}} for {{instruction}}:")
    short = {"max_new_tokens": 4}
    return {
        "output_dir": str(tmp_path / "run"), "model_name_or_path": str(tmp_path / "model"),
        "data": {"seed_path": str(tmp_path / "seed.jsonl"), "responses_path": str(tmp_path / "texts.jsonl")},
        "prompt": {"max_length": 480, "template": "none"},
        "align": {"rounds": 0, "round_0": {"max_steps": 1}, "train_batch_size": 4, "sampling": short},
        "augment": {"sampling": short},
        "score": {"self_curation": True, "curation_prompt": str(tmp_path / "ask.txt")},
        "filter": {"by": "self_curation", "select": "quantile", "keep": 0.3, "hygiene": ANY_INSTRUCTION},
    }  # fmt: skip


def test_a_run_keeps_the_best_graded_pairs(values):
    run = open_run(from_mapping(Config, values, "test"))
    for stage in ("prepare", "align", "augment", "score", "filter"):
        execute(run, stage)
    table = read_parts(run.directory("filter") / "data").to_pylist()
    ratings = {row["id"]: row["rating"] for row in table if row["rating"] is not None}
    pool = [row["id"] for row in table if row["forward_nll_sum"] is not None]
    assert len(table) == 12 and 0 < len(ratings) < len(pool)  # some are asked, some too long for it
    assert all(1 <= rating <= 5 for rating in ratings.values())
    counts = run.manifest("score")["counts"]
    assert counts["rated"] == len(ratings) >= counts["unparsable_ratings"]
    kept = {row["id"] for row in table if row["keep"]}
    worst = np.quantile(list(ratings.values()), 0.7)
    assert kept == {i for i, rating in ratings.items() if rating >= worst} and len(kept) >= 2


def test_a_model_that_cannot_grade_is_refused_before_any_work(values, monkeypatch, tmp_path):
    monkeypatch.setattr("main_jax.self_curation.GRADES", (1, 2, 3, 4, 12345))
    with pytest.raises(UserError, match="does not write the grades 1 to 5 as one token"):
        open_run(from_mapping(Config, values, "test"))
    world = {"world": {}, "prompt": {"max_length": 64}, "score": {"self_curation": True}}
    with pytest.raises(UserError, match="the world's words have no grades"):
        open_run(from_mapping(Config, world | {"output_dir": str(tmp_path / "world")}, "test"))
    assert not (tmp_path / "run").exists() and not (tmp_path / "world").exists()
