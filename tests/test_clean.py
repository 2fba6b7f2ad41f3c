"""Cleaning: duplicates against brute force, n-gram overlap and rules by hand."""

import random

import pytest

from main_jax.data import clean
from main_jax.errors import UserError


def duplicates(texts: list[str], near: float | None = None) -> dict[int, str]:
    """Place -> drop reason, of texts that come one after another."""
    said_before = clean.duplicates(near)
    reasons = {place: said_before(text) for place, text in enumerate(texts)}
    return {place: reason for place, reason in reasons.items() if reason}


def triples(text: str) -> set[tuple[str, ...]]:
    said = text.lower().split()
    return {tuple(said[i : i + 3]) for i in range(max(1, len(said) - 2))}


def jaccard(a: str, b: str) -> float:
    a, b = triples(a), triples(b)
    return len(a & b) / len(a | b)


def test_the_same_words_are_a_duplicate_whatever_their_case_and_punctuation():
    texts = [
        "The cat, it sat.",
        "a dog",
        "the CAT it sat",
        "",
        "  ",
        "A dog!",
        "a dog barks",
        "!!",
        "!!",
    ]
    assert duplicates(texts) == {2: "duplicate", 5: "duplicate", 8: "duplicate"}


def test_near_duplicates_are_those_of_brute_force_away_from_the_threshold():
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(400)]
    texts = []
    for _ in range(60):
        said = rng.choices(vocabulary, k=80)
        texts.append(" ".join(said))
        for changes in (1, 2, 5, 20):  # similarities of about .93, .86, .70, .25
            other = list(said)
            for place in rng.sample(range(80), changes):
                other[place] = "other"
            texts.append(" ".join(other))
    rng.shuffle(texts)
    found = duplicates(texts, near=0.8)
    kept = [i for i in range(len(texts)) if i not in found]
    for i, text in enumerate(texts):
        closest = max((jaccard(text, texts[j]) for j in kept if j < i), default=0.0)
        if closest >= 0.9:
            assert i in found, closest
        if closest <= 0.7:
            assert i not in found, closest
    assert 60 < len(found) < 240
    assert set(found.values()) <= {"duplicate", "near_duplicate"}
    assert duplicates(texts, near=0.8) == found  # nothing is drawn anew
    assert not duplicates(texts[:1], near=0.8)


def test_without_near_only_equal_texts_are_dropped():
    texts = ["one two three four five six seven", "one two three four five six eight"] * 2
    assert duplicates(texts) == {2: "duplicate", 3: "duplicate"}


def test_contamination_is_so_many_words_in_a_row():
    questions = ["What is the capital of France, and why?", "Too short"]
    contaminated = clean.contamination(clean.fingerprints(questions, 5), 5)
    assert contaminated("I ask: what is THE capital of Spain?")  # "what is the capital of"
    assert not contaminated("what is the big capital of france and")
    assert contaminated("...the capital of France and...")
    assert not contaminated("the capital of")
    assert not contaminated("too short") and not contaminated("")
    assert not clean.contamination(set(), 5)("what is the capital of France")


def test_the_texts_of_a_row_are_found_however_deep():
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": ["So.", None]}]
    row = {"id": 7, "question": "Who?", "messages": turns, "choices": {"text": ["A", "B"]}}
    assert list(clean.texts_in(row)) == ["Who?", "user", "Why?", "assistant", "So.", "A", "B"]


def test_patterns():
    drop = clean.patterns([r"(?i)cookie policy", r"^\s*\{"], "data.drop_patterns")
    assert drop("see our Cookie Policy") and drop('  {"a": 1}')
    assert not drop("cookies") and not drop("a {")
    with pytest.raises(UserError, match=r"data.drop_patterns: '\(' is no regular expression"):
        clean.patterns(["ok", "("], "data.drop_patterns")


def test_a_language_needs_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lingua", None)
    with pytest.raises(UserError, match=r"data.language: .*main-jax\[language\]"):
        clean.other_language("en", "data.language")


def test_another_language():
    differs = clean.other_language("en", "data.language")
    assert not differs(
        "The harbour was quiet, and the boats lay side by side in the morning light."
    )
    assert differs("Der Hafen war still, und die Boote lagen im Morgenlicht nebeneinander.")
    assert differs(
        "Le port était calme et les bateaux reposaient côte à côte dans la lumière du matin."
    )
    assert not differs("12345 67890")  # nothing that tells
    with pytest.raises(UserError, match="'xx' is no language"):
        clean.other_language("xx", "data.language")
