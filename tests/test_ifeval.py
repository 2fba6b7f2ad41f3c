"""IFEval offline: all 25 kinds of instructions by the harness's checkers, and what is looked at first."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("nltk")
from tiny_llama import make_tiny_llama

from main_jax.cli import main
from main_jax.errors import UserError
from main_jax.evaluation import adapter, ifeval
from main_jax.lm.generate import Generation
from main_jax.lm.tokenizer import load_tokenizer

GERMAN = "Der Himmel ist heute sehr blau und die Sonne scheint den ganzen Tag."
ENGLISH = "The sky is very blue today and the sun will shine the whole day."
KINDS = {  # name: kwargs, an answer that follows it, one that does not
    "keywords:existence": ({"keywords": ["sky", "sea"]}, "the sky, the sea", "the sky"),
    "keywords:frequency": (
        {"keyword": "sky", "frequency": 2, "relation": "at least"}, "sky sky", "sky"
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["war"]}, "peace", "war"),
    "keywords:letter_frequency": (
        {"letter": "z", "let_frequency": 3, "let_relation": "at least"}, "zzz", "z"
    ),
    "language:response_language": ({"language": "de"}, GERMAN, ENGLISH),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "at least"}, "One comes. Two goes. Dr. Three stays.",
        "One comes. Dr. Two goes.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "one\n\n***\n\ntwo", "one"),
    "length_constraints:number_words": (
        {"num_words": 5, "relation": "at least"}, "a b c d e f", "a b"
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "blue"}, "Red.\n\nBlue sky.",
        "Red.\n\nRed sky.",
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2}, "[name] in [place]", "[name]"
    ),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Dear,\nP.S. more", "Dear,"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a\n* b", "* a"),
    "detectable_format:constrained_response": ({}, "My answer is yes.", "Perhaps."),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2}, "*a b* and *c d*", "*a b*"
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2}, "Section 1\na\nSection 2\nb", "one"
    ),
    "detectable_format:json_format": ({}, '{"a": 1}', "a: 1"),
    "detectable_format:title": ({}, "<<Sky>>\nblue", "Sky"),
    "combination:two_responses": ({}, "one******two", "one"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say this."}, "Say this. Yes.", "Yes."),
    "startend:end_checker": ({"end_phrase": "The end."}, "So it was. The end.", "So it was."),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"}, "BIG RED sky", "big red sky"
    ),
    "change_case:english_capital": ({}, ENGLISH.upper(), ENGLISH),
    "change_case:english_lowercase": ({}, ENGLISH.lower(), ENGLISH),
    "punctuation:no_comma": ({}, "a b", "a, b"),
    "startend:quotation": ({}, '"a b"', "a b"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Room for IFEval's 1,280 new tokens."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return str(make_tiny_llama(folder, seed=3, max_position_embeddings=2048))


@pytest.fixture
def punkt(tmp_path, monkeypatch):
    """A small punkt_tab, as `NLTK_DATA` would name it."""
    english = tmp_path / "nltk" / ifeval.PUNKT / "english"
    english.mkdir(parents=True)
    (english / "abbrev_types.txt").write_text("dr\nmr\n")
    (english / "sent_starters.txt").write_text("the\n")
    (english / "collocations.tab").write_text("dr\tthree\n")
    (english / "ortho_context.tab").write_text("the\t62\n")
    monkeypatch.setattr("nltk.data.path", [str(tmp_path / "nltk")])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return english


def write_prompts(path: Path, rows: list) -> str:
    """Rows of (prompt, {instruction: kwargs})."""
    lines = [
        {
            "key": 1000 + i,
            "prompt": prompt,
            "instruction_id_list": list(asked),
            "kwargs": list(asked.values()),
        }
        for i, (prompt, asked) in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def answer_with(monkeypatch, model, script: dict):
    """The model says what stands in the script; how it is asked and read stays real."""
    tokenizer = load_tokenizer(model)

    def generate(decoder, params, prompts, *_, on_done, **how):
        on_done(len(prompts))
        texts = [script[tokenizer.decode(p, skip_special_tokens=True)] for p in prompts]
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [Generation(np.asarray(i, np.int32), "stop") for i in ids]

    monkeypatch.setattr(adapter, "generate", generate)


def test_all_kinds_of_instructions(model, punkt, tmp_path, monkeypatch, capfd):
    assert len(KINDS) == 25
    rows, script, wrong = [], {}, 0
    for i, (name, (kwargs, right, not_so)) in enumerate(KINDS.items()):
        prompt = f"Question {i}?"
        rows.append((prompt, {name: kwargs}))
        script[prompt] = not_so if i % 5 == 2 else right
        wrong += i % 5 == 2
    # One of two is followed: half of the instructions, none of the prompts.
    rows.append(("Both?", {"punctuation:no_comma": {}, "detectable_format:title": {}}))
    script["Both?"] = "a b"
    # Followed once the first line is taken away: loose, not strict.
    rows.append(("Polite?", {"change_case:english_lowercase": {}}))
    script["Polite?"] = f"SURE, HERE it is:\n{ENGLISH.lower()}"
    answer_with(monkeypatch, model, script)
    prompts = write_prompts(tmp_path / "prompts.jsonl", rows)
    output = tmp_path / "ifeval.json"
    words = ["--model", model, "--tasks", "ifeval", "--ifeval-prompts", prompts]
    assert main(["evaluate", *words, "--output", str(output), "--log-samples"]) == 0
    found = json.loads(output.read_text())["results"]["ifeval"]
    assert found["sample_len"] == 27 and wrong == 5
    expected = {"prompt_level_strict": 20 / 27, "prompt_level_loose": 21 / 27,
                "inst_level_strict": 21 / 28, "inst_level_loose": 22 / 28}  # fmt: skip
    for name, value in expected.items():
        assert found[f"{name}_acc,none"] == pytest.approx(value), name
    samples = [json.loads(s) for s in output.with_suffix(".samples.jsonl").read_text().splitlines()]
    for sample in samples[:25]:
        assert sample["inst_level_strict_acc"] == [(sample["doc_id"] % 5 != 2)], sample
    shown = capfd.readouterr().out
    assert all(f"{name}_acc" in shown for name in expected)


def test_a_model_that_generates(model, punkt, tmp_path):
    rows = [(f"Question {i}?", {name: KINDS[name][0]}) for i, name in enumerate(KINDS)]
    prompts = write_prompts(tmp_path / "prompts.jsonl", rows)
    output = tmp_path / "ifeval.json"
    words = ["--model", model, "--tasks", "ifeval", "--ifeval-prompts", prompts]
    words += ["--limit", "2", "--batch-size", "2"]
    assert main(["evaluate", *words, "--output", str(output), "--log-samples"]) == 0
    lines = output.with_suffix(".samples.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for sample in map(json.loads, lines):
        assert sample["arguments"][0][1]["max_gen_toks"] == 1280 and sample["resps"][0][0]


# ------------------------------------------------------------------------------ looked at before


def test_without_punkt_nothing_is_begun(model, punkt, tmp_path, monkeypatch, capfd):
    shutil.rmtree(punkt)
    monkeypatch.setattr(adapter, "generate", None)
    prompts = write_prompts(tmp_path / "prompts.jsonl", [("A?", {"punctuation:no_comma": {}})])
    output = tmp_path / "ifeval.json"
    words = ["--model", model, "--tasks", "ifeval", "--ifeval-prompts", prompts]
    assert main(["evaluate", *words, "--output", str(output)]) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("main-jax: ")]
    assert "punkt_tab is not here" in line and "HF_HUB_OFFLINE" in line
    assert f"as DIR/{ifeval.PUNKT} and set NLTK_DATA=DIR" in line
    assert not list(tmp_path.glob("ifeval.json.partial/0*"))


def test_a_damaged_punkt_is_refused(punkt):
    ifeval.check_checkers()
    (punkt / "ortho_context.tab").unlink()
    with pytest.raises(UserError, match="punkt_tab cannot be read"):
        ifeval.check_checkers()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "langdetect", None)
    with pytest.raises(UserError, match=r"langdetect.*pip install 'main-jax\[eval\]'"):
        ifeval.check_checkers()


def test_verdicts_on_languages_are_always_the_same(punkt):
    import langdetect

    ifeval.check_checkers()
    doubtful = "die man in the hand war gift"
    assert len({str(langdetect.detect_langs(doubtful)) for _ in range(8)}) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a"}, "row 2: expected key, prompt, instruction_id_list and kwargs"),
        ({"key": 1, "prompt": "a", "instruction_id_list": ["x:y"], "kwargs": [{}]}, "x:y"),
        ({"key": 1, "prompt": "a", "instruction_id_list": ["startend:quotation"], "kwargs": []},
         "kwargs for each"),
        ({"key": 1, "prompt": "a", "instruction_id_list": ["startend:quotation"],
          "kwargs": [{"num_words": 3}]}, "row 2: kwargs of startend:quotation: .*num_words"),
    ],
)  # fmt: skip
def test_prompts_are_read_before(row, said, punkt, tmp_path):
    path = Path(write_prompts(tmp_path / "p.jsonl", [("A?", {"punctuation:no_comma": {}})]))
    ifeval.check_prompts(str(path))
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=said):
        ifeval.check_prompts(str(path))
