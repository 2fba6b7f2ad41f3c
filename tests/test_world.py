"""The embedded world: the grammar and its inverse agree, and the truth is what the texts say."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from main_jax.world import grammar
from main_jax.world.generate import KIND_SHARES, World, make_world, pretraining_documents
from main_jax.world.grammar import ANSWER_FRAMES, ATTRIBUTES, ENTITIES, QUESTION_FRAMES, Fact
from main_jax.world.judge import exact_match, is_true_pair, reverse_correct
from main_jax.world.vocabulary import SPECIAL_TOKENS, build_tokenizer, save_tokenizer

WORDS = grammar.words()
# All wordings of one fact; entities and values are covered by the property tests.
ANSWER_WORDINGS = list(product(ATTRIBUTES, range(len(ANSWER_FRAMES)), range(grammar.PHRASES)))
QUESTION_WORDINGS = list(product(ATTRIBUTES, range(len(QUESTION_FRAMES)), range(grammar.PHRASES)))
SOME_ENTITIES = (ENTITIES[0], ENTITIES[35], ENTITIES[-1])


@st.composite
def facts(draw: st.DrawFn) -> Fact:
    attribute = draw(st.sampled_from(list(ATTRIBUTES)))
    value = draw(st.sampled_from(ATTRIBUTES[attribute].values))
    return Fact(draw(st.sampled_from(ENTITIES)), attribute, value)


def an_answer(fact: Fact) -> str:
    return grammar.render_answer(fact, 0, 0)


@pytest.fixture(scope="module", params=[0, 7])
def world(request: pytest.FixtureRequest) -> World:
    return make_world(request.param)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return pretraining_documents(0)


# ---- grammar ------------------------------------------------------------------------------------


def test_the_grammar_has_the_size_of_the_design():
    assert len(set(ENTITIES)) == 72
    assert len(ATTRIBUTES) == 6
    assert (len(ANSWER_FRAMES), len(QUESTION_FRAMES)) == (8, 7)
    for attribute in ATTRIBUTES.values():
        assert len(set(attribute.values)) == grammar.VALUES == 12
        assert len(set(attribute.phrases)) == grammar.PHRASES == 4
    # Two pairs of attributes can only be told apart by their phrase.
    shared = Counter(attribute.values for attribute in ATTRIBUTES.values())
    assert sorted(shared.values()) == [1, 1, 2, 2]


def test_entities_values_and_other_words_are_disjoint():
    values = [v for values in {a.values for a in ATTRIBUTES.values()} for v in values]
    assert len(values) == len(set(values)) == 48
    wording = " ".join(
        (
            *ANSWER_FRAMES,
            *QUESTION_FRAMES,
            *(p for a in ATTRIBUTES.values() for p in a.phrases),
            *grammar.NO_FACT_SENTENCES,
            *grammar.BOILERPLATE_SENTENCES,
            grammar.PRONOUN,
        )
    ).split()
    assert not set(values) & set(ENTITIES)
    assert not set(wording) & (set(values) | set(ENTITIES))


@pytest.mark.parametrize(("attribute", "frame", "phrase"), ANSWER_WORDINGS)
def test_every_answer_is_read_back(attribute: str, frame: int, phrase: int):
    for entity, value in product(SOME_ENTITIES, ATTRIBUTES[attribute].values):
        fact = Fact(entity, attribute, value)
        text = grammar.render_answer(fact, frame, phrase)
        assert grammar.parse_answer(text) == {fact}
        assert grammar.only_states_facts(text)
        assert grammar.parse_instruction(text) is None


@pytest.mark.parametrize(("attribute", "frame", "phrase"), QUESTION_WORDINGS)
def test_every_question_is_read_back(attribute: str, frame: int, phrase: int):
    for entity in ENTITIES:
        text = grammar.render_question(entity, attribute, frame, phrase)
        assert grammar.parse_instruction(text) == (entity, attribute)
        assert grammar.parse_answer(text) == frozenset()
        assert not grammar.only_states_facts(text)


def test_no_two_wordings_are_the_same_text():
    fact_of = {a: Fact(ENTITIES[0], a, ATTRIBUTES[a].values[0]) for a in ATTRIBUTES}
    answers = [grammar.render_answer(fact_of[a], f, p) for a, f, p in ANSWER_WORDINGS]
    questions = [grammar.render_question(ENTITIES[0], a, f, p) for a, f, p in QUESTION_WORDINGS]
    assert len({*answers, *questions}) == 6 * 4 * (8 + 7)


def test_an_ambiguous_grammar_is_refused():
    shared = {
        "export": (("the metal of {e} is {v} .",),),
        "import": (("the metal of {e} is {v} .",),),
    }
    with pytest.raises(ValueError, match="ambiguous template"):
        grammar._inverse(shared)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the main crop of brask is millet",  # no full stop
        "the main crop of brask is red .",  # no crop
        "the main crop of brask is .",
        "the main crop of it is millet .",
        "the main crop of brask is brask .",
        "the main crop of {e} is {v} .",
        "the main crop of brask is millet rice .",
        "the export crop of brask is millet .",
    ],
)
def test_what_is_no_answer_states_nothing(text: str):
    assert grammar.parse_answer(text) == frozenset()
    assert not grammar.only_states_facts(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "what is the main crop of brask",
        "what is the main crop of it ?",
        "what is the main crop of brask velm ?",
        "what is the main crop of {e} ?",
        "what is the main crop of brask ? what is the flag colour of brask ?",
        "please what is the main crop of brask ?",
        "what is the crop of brask ?",
    ],
)
def test_what_is_not_exactly_one_question_asks_nothing(text: str):
    assert grammar.parse_instruction(text) is None


@given(st.lists(st.sampled_from(WORDS), max_size=14))
def test_only_rendered_texts_are_read(words: list[str]):
    """Whatever a model writes: what is read from it can be rendered back to the same text."""
    text = " ".join(words)
    asked = grammar.parse_instruction(text)
    if asked is not None:
        wordings = [(f, p) for a, f, p in QUESTION_WORDINGS if a == asked[1]]
        assert text in {grammar.render_question(*asked, f, p) for f, p in wordings}
    for fact in grammar.parse_answer(text):
        wordings = [(f, p) for a, f, p in ANSWER_WORDINGS if a == fact.attribute]
        assert any(grammar.render_answer(fact, f, p) in text for f, p in wordings)


@given(facts(), st.sampled_from(range(8)), st.sampled_from(range(4)), st.data())
def test_one_other_word_changes_or_destroys_the_fact(
    fact: Fact, frame: int, phrase: int, data: st.DataObject
):
    words = grammar.render_answer(fact, frame, phrase).split()
    place = data.draw(st.integers(0, len(words) - 1))
    words[place] = data.draw(st.sampled_from(WORDS).filter(lambda word: word != words[place]))
    changed = grammar.parse_answer(" ".join(words))
    # "export" for "import" is another fact; a few words ("name", "what") have no say at all.
    assert len(changed) <= 1
    assert fact not in changed


@given(st.lists(facts(), min_size=1, max_size=4))
def test_several_sentences_state_the_set_of_their_facts(stated: list[Fact]):
    text = " ".join(an_answer(fact) for fact in stated)
    assert grammar.parse_answer(text) == set(stated)
    assert grammar.only_states_facts(text)
    around = f"{grammar.BOILERPLATE_SENTENCES[0]} {text} the main crop"
    assert grammar.parse_answer(around) == set(stated)
    assert not grammar.only_states_facts(around)


# ---- judges -------------------------------------------------------------------------------------


def test_judges_by_hand():
    question, answer = "name the export metal of velm .", "in velm the sold metal is tin ."
    fact = Fact("velm", "export", "tin")
    assert is_true_pair(question, answer, "clean")
    assert not is_true_pair(question, answer, "boilerplate")
    assert not is_true_pair("name the import metal of velm .", answer, "clean")
    assert not is_true_pair("name the export metal of brask .", answer, "clean")
    assert not is_true_pair("name the export metal .", answer, "clean")
    assert not is_true_pair(question, "in velm the sold metal is", "clean")

    assert exact_match(answer, *fact)
    assert not exact_match(answer, "velm", "export", "iron")
    assert not exact_match(answer, "velm", "import", "tin")
    assert not exact_match(f"{answer} in velm the flag colour is red .", *fact)
    assert not exact_match(f"{answer} all rights reserved .", *fact)
    assert not exact_match(f"{answer} in velm", *fact)
    assert not exact_match("tin", *fact)
    assert not exact_match("", *fact)

    assert reverse_correct(question, "velm", "export")
    assert not reverse_correct(question, "velm", "import")
    assert not reverse_correct("velm", "velm", "export")


@given(facts(), facts())
def test_exact_match_tells_facts_apart(stated: Fact, asked: Fact):
    assert exact_match(an_answer(stated), *asked) == (stated == asked)


# ---- the drawn world ----------------------------------------------------------------------------


def test_sizes_and_split(world: World):
    assert (len(world.seed), len(world.responses)) == (240, 2400)
    assert {name: len(test) for name, test in world.tests.items()} == {
        "heldout": 190,
        "paraphrase": 190,
        "seen": 190,
    }
    assert len(set(world.seed_entities)) == len(set(world.new_entities)) == 32
    assert not set(world.seed_entities) & set(world.new_entities)
    assert len(world.facts) == 72 * 6


def test_the_data_hold_no_truth(world: World):
    assert {tuple(row) for row in world.seed} == {("id", "instruction", "response")}
    assert {tuple(row) for row in world.responses} == {("id", "response")}
    ids = [row["id"] for row in (*world.seed, *world.responses)]
    assert len(set(ids)) == len(ids)
    # Shuffled: the kinds do not come in blocks that their ids would give away.
    kinds = [world.truth.responses[row["id"]].kind for row in world.responses]
    assert set(kinds[:100]) == set(KIND_SHARES)


def test_seed_truth_is_what_the_texts_say(world: World):
    for row in world.seed:
        truth = world.truth.seed[row["id"]]
        assert grammar.parse_answer(row["response"]) == {truth.fact}
        assert truth.fact.value == world.facts[truth.fact.entity, truth.fact.attribute]
        assert truth.fact.entity in world.seed_entities
        asked = grammar.parse_instruction(row["instruction"])
        assert asked is not None and asked[0] in world.seed_entities
        assert (asked != truth.fact[:2]) == truth.replaced
        assert is_true_pair(row["instruction"], row["response"], "clean") != truth.replaced
    each = Counter(truth.fact for truth in world.truth.seed.values())
    assert len(each) == 192 and set(each.values()) == {1, 2}


@pytest.mark.parametrize(("noise", "replaced"), [(0.0, 0), (0.1, 24), (0.3, 72), (1.0, 240)])
def test_the_noise_share_is_exact(noise: float, replaced: int):
    world = make_world(3, noise=noise, responses=1)
    assert sum(truth.replaced for truth in world.truth.seed.values()) == replaced


def test_noise_changes_replaced_instructions_only():
    clean, noisy, noisier = (make_world(5, noise=noise) for noise in (0.0, 0.3, 0.5))
    assert clean.facts == noisy.facts
    assert (clean.responses, clean.tests) == (noisy.responses, noisy.tests)
    assert clean.truth.responses == noisy.truth.responses
    originals = {row["instruction"] for row in clean.seed}
    for a, b, c in zip(clean.seed, noisy.seed, noisier.seed, strict=True):
        assert a["response"] == b["response"] == c["response"]
        assert (a["instruction"] != b["instruction"]) == noisy.truth.seed[a["id"]].replaced
        assert b["instruction"] in originals
        if noisy.truth.seed[a["id"]].replaced:
            assert b == c


def test_kinds_have_their_shares(world: World):
    kinds = Counter(truth.kind for truth in world.truth.responses.values())
    assert kinds == {kind: round(share * 2400) for kind, share in KIND_SHARES.items()}
    assert sum(KIND_SHARES.values()) == pytest.approx(1.0)
    of_new = Counter(
        entity in world.new_entities
        for row in world.responses
        for entity in {*row["response"].split()} & {*ENTITIES}
        if world.truth.responses[row["id"]].kind == "clean"
    )
    assert of_new[True] / of_new.total() == pytest.approx(0.85, abs=0.01)


def test_clean_facts_are_cycled_evenly(world: World):
    clean = [t.facts[0] for t in world.truth.responses.values() if t.kind == "clean"]
    each = Counter(fact for fact in clean if fact.entity in world.new_entities)
    assert len(each) == 192
    assert max(each.values()) - min(each.values()) <= 1


def test_kinds_state_what_they_should(world: World):
    stated = {"clean": {1}, "truncated": {0}, "no_fact": {0}, "pronoun": {0}, "mixed": {2}}
    for row in world.responses:
        text, truth = row["response"], world.truth.responses[row["id"]]
        facts = grammar.parse_answer(text)
        assert facts == set(truth.facts)
        assert all(world.facts[f.entity, f.attribute] == f.value for f in facts)
        assert len(facts) in stated.get(truth.kind, {0, 1})
        assert grammar.only_states_facts(text) == (truth.kind in ("clean", "mixed"))
        named = {*text.split()} & {*ENTITIES}
        if truth.kind == "clean":
            (fact,) = facts
            assert truth.asked == (fact.entity, fact.attribute)
            question = grammar.render_question(fact.entity, fact.attribute, 0, 0)
            assert is_true_pair(question, text, truth.kind)
        else:
            assert truth.asked is None
        if truth.kind == "truncated":
            assert text.split()[-1] != "."
        if truth.kind == "no_fact":
            assert len(named) == 1
        if truth.kind == "pronoun":
            assert not named and grammar.PRONOUN in text.split()
            assert grammar.parse_answer(text.replace(" it ", " brask ")) or text.startswith("it ")
        if truth.kind == "boilerplate":
            assert any(sentence in text for sentence in grammar.BOILERPLATE_SENTENCES)
        if truth.kind == "mixed":
            first, second = facts
            assert first.entity != second.entity and first.attribute != second.attribute


def test_boilerplate_comes_around_and_instead_of_a_fact(world: World):
    shapes = Counter(
        len(truth.facts) for truth in world.truth.responses.values() if truth.kind == "boilerplate"
    )
    assert shapes[0] > 10 and shapes[1] > 50


def test_truncated_responses_have_no_whole_sentence_left(world: World):
    """Even with the full stop that a generous reader would add."""
    for row in world.responses:
        if world.truth.responses[row["id"]].kind == "truncated":
            assert grammar.parse_answer(f"{row['response']} .") == frozenset()


def test_questions_ask_for_true_facts(world: World):
    entities = {"heldout": world.new_entities, "paraphrase": world.new_entities}
    for name, test in world.tests.items():
        for row in test:
            asked = row["entity"], row["attribute"]
            assert reverse_correct(row["question"], *asked)
            assert world.facts[asked] == row["value"]
            assert row["entity"] in entities.get(name, world.seed_entities)
        assert len({(row["entity"], row["attribute"]) for row in test}) == len(test)
    stated = {truth.fact for truth in world.truth.seed.values()}
    assert {(r["entity"], r["attribute"], r["value"]) for r in world.tests["seen"]} <= stated


def test_the_paraphrase_test_has_no_wording_of_the_seed(world: World):
    def wording(text: str) -> str:
        return " ".join("{e}" if word in ENTITIES else word for word in text.split())

    seed = {wording(row["instruction"]) for row in world.seed}
    unseen = {wording(row["question"]) for row in world.tests["paraphrase"]}
    assert not unseen & seed
    seed_phrases = [p for a in ATTRIBUTES.values() for p in a.phrases[: grammar.SEED_PHRASES]]
    assert not any(f" {phrase} " in text for phrase in seed_phrases for text in unseen)
    every = [w for w in QUESTION_WORDINGS if w[1] < 4 and w[2] < grammar.SEED_PHRASES]
    seen = {wording(grammar.render_question(ENTITIES[0], *one)) for one in every}
    assert seed | {wording(row["question"]) for row in world.tests["heldout"]} <= seen
    same = [
        [(row["entity"], row["attribute"]) for row in world.tests[name]]
        for name in ("heldout", "paraphrase")
    ]
    assert same[0] == same[1]


def test_a_world_follows_from_its_seed():
    assert make_world(4) == make_world(4)
    one, other = make_world(4), make_world(5)
    for field in dataclasses.fields(World):
        assert getattr(one, field.name) != getattr(other, field.name), field.name


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**32),
    st.floats(0, 1),
    st.integers(2, 60),
    st.integers(1, 60),
    st.integers(1, 9),
)
def test_any_size_gives_a_consistent_world(
    seed: int, noise: float, seed_pairs: int, responses: int, test_questions: int
):
    world = make_world(
        seed,
        noise=noise,
        seed_pairs=seed_pairs,
        responses=responses,
        test_questions=test_questions,
    )
    assert (len(world.seed), len(world.responses)) == (seed_pairs, responses)
    assert len(world.truth.responses) == responses
    assert sum(t.replaced for t in world.truth.seed.values()) == round(noise * seed_pairs)
    assert len(world.tests["heldout"]) == test_questions
    assert len(world.tests["seen"]) == min(test_questions, seed_pairs)


@pytest.mark.parametrize(
    "sizes",
    [{"noise": 1.5}, {"noise": -0.1}, {"seed_pairs": 1}, {"responses": 0}, {"test_questions": 193}],
)
def test_impossible_worlds_are_refused(sizes: dict[str, float]):
    with pytest.raises(ValueError):
        make_world(0, **sizes)  # ty: ignore[invalid-argument-type]


# ---- pre-training documents ---------------------------------------------------------------------


def test_documents_follow_from_the_seed():
    assert pretraining_documents(1, 50) == pretraining_documents(1, 50)
    assert pretraining_documents(1, 50) != pretraining_documents(2, 50)


def test_documents_are_filled_but_not_over(documents: list[str]):
    lengths = np.array([len(text.split()) for text in documents])
    assert len(documents) == 20_000
    assert lengths.max() <= 60 and lengths.mean() > 50
    assert max(len(text.split()) for text in pretraining_documents(0, 200, fill_to=90)) > 80
    with pytest.raises(ValueError, match="fill_to"):
        pretraining_documents(0, 1, fill_to=20)


def test_documents_cover_the_language(documents: list[str]):
    assert {word for text in documents for word in text.split()} == set(WORDS)
    faq = [text for text in documents if "?" in text or "name the" in text or "tell me" in text]
    assert len(faq) / len(documents) == pytest.approx(0.15, abs=0.02)
    # Both orders of question and answer, as both directions have to be learnt.
    starts = Counter(text.split()[0] in ("what", "name", "tell", "do", "please") for text in faq)
    assert min(starts.values()) > 500


def test_a_document_is_about_one_place_and_repeats_its_facts(documents: list[str]):
    repeated = 0
    for text in documents[:2000]:
        facts = grammar.parse_answer(text)
        assert len({fact.entity for fact in facts}) == 1
        assert len({fact.attribute for fact in facts}) == len(facts)  # never two values
        sentences = [" ".join(s) for s in grammar._sentences(text)]
        stated = [fact for s in sentences for fact in grammar.parse_answer(s)]
        repeated += len(stated) > len(facts)
    assert repeated / 2000 > 0.9


def test_documents_know_no_fact_of_the_world(documents: list[str]):
    """Values are uniform: the world's own are no more frequent than the 1 in 12 of chance."""
    world = make_world(0)
    drawn = [fact for text in documents for fact in grammar.parse_answer(text)]
    true = sum(world.facts[fact.entity, fact.attribute] == fact.value for fact in drawn)
    chance = len(drawn) / 12
    assert abs(true - chance) < 5 * np.sqrt(chance)
    # One (entity, attribute) has about 100 documents; no value of it takes a large part of them.
    of_one = Counter(f.value for f in drawn if f[:2] == (world.new_entities[0], "crop"))
    assert of_one.total() > 60
    assert len(of_one) >= 10 and max(of_one.values()) < 0.25 * of_one.total()


# ---- vocabulary ---------------------------------------------------------------------------------


def test_nothing_is_out_of_vocabulary(world: World, documents: list[str]):
    tokenizer = build_tokenizer()
    texts = [
        *(row[field] for row in world.seed for field in ("instruction", "response")),
        *(row["response"] for row in world.responses),
        *(row["question"] for test in world.tests.values() for row in test),
        *documents[:3000],
    ]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.token_to_id("<unk>") not in ids
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text


@given(st.lists(st.sampled_from(WORDS), max_size=20))
def test_the_tokenizer_is_lossless(words: list[str]):
    tokenizer = build_tokenizer()
    text = " ".join(words)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_special_tokens_come_first():
    tokenizer = build_tokenizer()
    assert tokenizer.get_vocab_size() == len(SPECIAL_TOKENS) + len(WORDS)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(7))
    assert tokenizer.encode("<instruction> brask <eos>").tokens == [
        "<instruction>",
        "brask",
        "<eos>",
    ]
    assert tokenizer.encode("paris").ids == [tokenizer.token_to_id("<unk>")]


def test_transformers_loads_the_saved_tokenizer(tmp_path, world: World):
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 256}))
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ours = build_tokenizer()
    assert loaded.get_vocab() == ours.get_vocab()
    for token in ("unk", "bos", "eos", "pad"):
        assert getattr(loaded, f"{token}_token_id") == ours.token_to_id(f"<{token}>")
    for row in world.responses[:300]:
        ids = loaded.encode(row["response"], add_special_tokens=True)
        assert ids == ours.encode(row["response"]).ids
        assert loaded.decode(ids) == row["response"]
    marked = "<instruction> name the main crop of brask . <response>"
    assert loaded.encode(marked, add_special_tokens=False) == ours.encode(marked).ids
