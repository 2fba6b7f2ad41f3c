"""Everything that is drawn: the facts, seed pairs, unlabelled responses, questions and documents.

    world = make_world(seed=0)
    world.seed[0]       {"id": ..., "instruction": ..., "response": ...}
    world.responses[0]  {"id": ..., "response": ...}                      no trace of the truth
    world.truth.responses[id].kind                                        the truth, kept apart

One integer determines a world. Every part draws from its own stream, seeded with (seed, purpose),
so that changing one part (say, the noise) leaves the others (say, the facts) as they are.

The kinds of unlabelled responses are chosen for what each direction can see. A cut-off or over-full
response is one that no question would be answered with: the forward model's loss is high on its end
or on what is too much. A response without its entity, or without any fact, may be fluent, but does
not determine an instruction: the reverse model has to guess and its loss is high.

Only a third is clean, so that not filtering costs more than the luck of one training.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np

from main_jax.world import grammar
from main_jax.world.grammar import ATTRIBUTES, ENTITIES, Fact

KIND_SHARES: dict[str, float] = {
    "clean": 0.33,
    "truncated": 0.18,
    "no_fact": 0.17,
    "pronoun": 0.12,
    "boilerplate": 0.10,
    "mixed": 0.10,
}
SEED_ENTITIES = NEW_ENTITIES = 32
NEW_SHARE = 0.85  # of the responses of each kind; the rest is about seed entities
FAQ_SHARE = 0.15  # of the pre-training documents


@dataclass(frozen=True)
class SeedTruth:
    """The fact that a seed response states, and whether its instruction asks for another one."""

    fact: Fact
    replaced: bool


@dataclass(frozen=True)
class ResponseTruth:
    """A response's kind, the facts it states, and the (entity, attribute) to ask if it is clean."""

    kind: str
    facts: tuple[Fact, ...]
    asked: tuple[str, str] | None


@dataclass(frozen=True)
class Truth:
    """What the generator knows of its texts, by the id of the seed pair or response."""

    seed: dict[str, SeedTruth]
    responses: dict[str, ResponseTruth]


@dataclass(frozen=True)
class World:
    """One world: data as the method may see it, test questions, and the truth for the judges.

    `tests` has "heldout" (new entities, seed wording), "paraphrase" (the same facts in frames and
    phrases which the seed never uses) and "seen" (facts that a seed response states); a question is
    {"id", "question", "entity", "attribute", "value"}.
    """

    seed: list[dict[str, str]]
    responses: list[dict[str, str]]
    tests: dict[str, list[dict[str, str]]]
    truth: Truth
    seed_entities: tuple[str, ...]
    new_entities: tuple[str, ...]
    facts: dict[tuple[str, str], str]


def make_world(
    seed: int,
    *,
    noise: float = 0.30,
    seed_pairs: int = 240,
    responses: int = 2400,
    test_questions: int = 190,
) -> World:
    """Draws world number `seed`.

    Args:
        seed: non-negative; facts, entity split, wording and noise all follow from it.
        noise: share of seed instructions replaced by another seed instruction for another fact.
        seed_pairs: number of pairs; the seed entities' 192 facts are cycled evenly.
        responses: number of unlabelled responses.
        test_questions: per test, at most the 192 facts of the new entities; "seen" has fewer if the
            seed states fewer facts.

    Raises:
        ValueError: if a size or the noise is out of range.
    """
    if not 0.0 <= noise <= 1.0:
        raise ValueError(f"noise is a share of the seed pairs, between 0 and 1, not {noise}")
    if seed_pairs < 2 or responses < 1:
        raise ValueError("a world needs at least 2 seed pairs and 1 response")
    if not 1 <= test_questions <= NEW_ENTITIES * len(ATTRIBUTES):
        raise ValueError(f"test_questions is 1 to {NEW_ENTITIES * len(ATTRIBUTES)}")

    split = [ENTITIES[i] for i in _stream(seed, "split").permutation(len(ENTITIES))]
    seed_entities = tuple(split[:SEED_ENTITIES])
    new_entities = tuple(split[SEED_ENTITIES : SEED_ENTITIES + NEW_ENTITIES])
    # In the order of ENTITIES, not of the split: the two draws are independent of each other.
    rng = _stream(seed, "facts")
    facts = {
        (entity, name): str(rng.choice(attribute.values))
        for entity in ENTITIES
        for name, attribute in ATTRIBUTES.items()
    }
    of_seed = [Fact(e, a, facts[e, a]) for e in seed_entities for a in ATTRIBUTES]
    of_new = [Fact(e, a, facts[e, a]) for e in new_entities for a in ATTRIBUTES]

    pairs, seed_truth = _seed_pairs(seed, of_seed, seed_pairs, noise)
    texts, response_truth = _responses(seed, of_seed, of_new, responses)
    stated = sorted({truth.fact for truth in seed_truth.values()})
    tests = _tests(seed, of_new, stated, test_questions)
    truth = Truth(seed_truth, response_truth)
    return World(pairs, texts, tests, truth, seed_entities, new_entities, facts)


def _stream(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(purpose.encode())]))


def _cycled(rng: np.random.Generator, facts: list[Fact]) -> Iterator[Fact]:
    """Endless and even: no fact ever comes up two times more than another."""
    return cycle([facts[i] for i in rng.permutation(len(facts))])


def _question(rng: np.random.Generator, fact: Fact, *, seed_wording: bool = True) -> str:
    """Asks for `fact` in the seed's frames and phrases, or only in those the seed never uses."""
    frames, phrases = grammar.SEED_QUESTION_FRAMES, grammar.SEED_PHRASES
    if seed_wording:
        frame, phrase = rng.integers(frames), rng.integers(phrases)
    else:
        frame = rng.integers(frames, len(grammar.QUESTION_FRAMES))
        phrase = rng.integers(phrases, grammar.PHRASES)
    return grammar.render_question(fact.entity, fact.attribute, int(frame), int(phrase))


def _answer(rng: np.random.Generator, fact: Fact, *, seed_wording: bool = False) -> str:
    """States `fact` in the seed's frames and phrases, or in any."""
    frames = grammar.SEED_ANSWER_FRAMES if seed_wording else len(grammar.ANSWER_FRAMES)
    phrases = grammar.SEED_PHRASES if seed_wording else grammar.PHRASES
    return grammar.render_answer(fact, int(rng.integers(frames)), int(rng.integers(phrases)))


def _seed_pairs(
    seed: int, facts: list[Fact], count: int, noise: float
) -> tuple[list[dict[str, str]], dict[str, SeedTruth]]:
    rng = _stream(seed, "seed pairs")
    chosen = list(islice(_cycled(rng, facts), count))
    chosen = [chosen[i] for i in rng.permutation(count)]
    # Question and answer draw their phrases apart: that both mean the same has to be learnt.
    questions = [_question(rng, fact) for fact in chosen]
    answers = [_answer(rng, fact, seed_wording=True) for fact in chosen]

    # Replaced rows are the first of a fixed order: more noise replaces these and further ones.
    rng = _stream(seed, "noise")
    replaced: dict[int, str] = {}
    for row in rng.permutation(count)[: round(noise * count)].tolist():
        others = [i for i in range(count) if chosen[i] != chosen[row]]
        replaced[row] = questions[others[rng.integers(len(others))]]

    pairs, truth = [], {}
    for row, (fact, question, answer) in enumerate(zip(chosen, questions, answers, strict=True)):
        name = f"seed-{row:04d}"
        instruction = replaced.get(row, question)
        pairs.append({"id": name, "instruction": instruction, "response": answer})
        truth[name] = SeedTruth(fact, row in replaced)
    return pairs, truth


def _responses(
    seed: int, of_seed: list[Fact], of_new: list[Fact], count: int
) -> tuple[list[dict[str, str]], dict[str, ResponseTruth]]:
    rng = _stream(seed, "responses")
    drawn: list[tuple[str, ResponseTruth]] = []
    for kind, size in _sizes(count).items():
        new = round(NEW_SHARE * size)
        for facts, share in ((of_new, new), (of_seed, size - new)):
            cycled = _cycled(rng, facts)
            drawn += [_response(rng, kind, next(cycled), facts) for _ in range(share)]

    # Ids are given after the shuffle, so that they tell nothing.
    records, truth = [], {}
    for row, source in enumerate(rng.permutation(count).tolist()):
        name = f"response-{row:05d}"
        text, truth[name] = drawn[source]
        records.append({"id": name, "response": text})
    return records, truth


def _sizes(count: int) -> dict[str, int]:
    """Kind -> number of responses, by largest remainder, so that they add up to `count`."""
    sizes = {kind: int(share * count + 1e-9) for kind, share in KIND_SHARES.items()}
    by_remainder = sorted(KIND_SHARES, key=lambda kind: sizes[kind] - KIND_SHARES[kind] * count)
    for kind in by_remainder[: count - sum(sizes.values())]:
        sizes[kind] += 1
    return sizes


def _response(
    rng: np.random.Generator, kind: str, fact: Fact, facts: list[Fact]
) -> tuple[str, ResponseTruth]:
    """A response of this kind about `fact`; a mixed one takes its second fact from `facts`."""
    sentence = _answer(rng, fact)
    stated: tuple[Fact, ...] = ()
    if kind == "clean":
        text, stated = sentence, (fact,)
    elif kind == "truncated":
        # At least half of the words stay, but never the last one of entity, value and phrase:
        # every frame ends with one of these and a full stop.
        words = sentence.split()
        text = " ".join(words[: rng.integers(len(words) // 2, len(words) - 1)])
    elif kind == "no_fact":
        text = str(rng.choice(grammar.NO_FACT_SENTENCES)).format(e=fact.entity)
    elif kind == "pronoun":
        text = _answer(rng, fact._replace(entity=grammar.PRONOUN))
    elif kind == "boilerplate":
        first, second = map(str, rng.choice(grammar.BOILERPLATE_SENTENCES, 2, replace=False))
        shape = rng.integers(4)  # instead of a fact, before, after, or on both sides of it
        if shape == 0:
            text = f"{first} {second}"
        else:
            parts = (first, sentence, second)
            text, stated = " ".join((parts[:2], parts[1:], parts)[shape - 1]), (fact,)
    elif kind == "mixed":
        others = [f for f in facts if f.entity != fact.entity and f.attribute != fact.attribute]
        other = others[rng.integers(len(others))]
        text, stated = f"{sentence} {_answer(rng, other)}", (fact, other)
    else:
        raise ValueError(f"unknown kind of response: {kind!r}")
    asked = (fact.entity, fact.attribute) if kind == "clean" else None
    return text, ResponseTruth(kind, stated, asked)


def _tests(
    seed: int, of_new: list[Fact], of_seed: list[Fact], count: int
) -> dict[str, list[dict[str, str]]]:
    rng = _stream(seed, "tests")
    new = [of_new[i] for i in rng.permutation(len(of_new))[:count]]
    old = [of_seed[i] for i in rng.permutation(len(of_seed))[:count]]
    return {
        test: [
            {
                "id": f"{test}-{row:04d}",
                "question": _question(rng, fact, seed_wording=test != "paraphrase"),
                **fact._asdict(),
            }
            for row, fact in enumerate(facts)
        ]
        for test, facts in (("heldout", new), ("paraphrase", new), ("seen", old))
    }


def pretraining_documents(seed: int, count: int = 20_000, *, fill_to: int = 60) -> list[str]:
    """Short texts, each about one of all 72 entities, whose facts are drawn anew per document.

    So language and copying can be learnt from them, but no fact of the world. Two to four facts are
    stated again and again in other words until nothing more fits: without that filling, copying is
    not learnt. A share of them is question and answer, or for the reverse direction answer and
    question.

    Args:
        seed: of the world; the documents share no draw with its facts.
        count: number of documents.
        fill_to: most words of a document (at least 40); it has at most a sentence or two less.
    """
    if fill_to < 40:
        raise ValueError(f"fill_to is at least 40 words, not {fill_to}")
    rng = _stream(seed, "pretraining")
    # All draws at once, one row per document and one column per sentence (of at least 4 words).
    shape = count, fill_to // 4
    entity = rng.choice(ENTITIES, count).tolist()
    value = rng.integers(grammar.VALUES, size=(count, len(ATTRIBUTES))).tolist()
    known = rng.permuted(np.tile(np.arange(len(ATTRIBUTES)), (count, 1)), axis=1)
    which = rng.integers(rng.integers(2, 5, size=(count, 1)), size=shape)
    topic = np.take_along_axis(known, which, axis=1).tolist()
    answer_frame = rng.integers(len(grammar.ANSWER_FRAMES), size=shape).tolist()
    question_frame = rng.integers(len(grammar.QUESTION_FRAMES), size=shape).tolist()
    answer_phrase, question_phrase = rng.integers(grammar.PHRASES, size=(2, *shape)).tolist()
    aside = rng.choice(3, size=shape, p=(0.88, 0.06, 0.06)).tolist()
    pronoun = (rng.random(shape) < 0.06).tolist()
    no_fact, boilerplate = grammar.NO_FACT_SENTENCES, grammar.BOILERPLATE_SENTENCES
    filler = rng.integers(min(len(no_fact), len(boilerplate)), size=shape).tolist()
    faq = (rng.random(count) < FAQ_SHARE).tolist()
    answer_first = (rng.random(count) < 0.4).tolist()

    names = tuple(ATTRIBUTES)
    documents = []
    for d, place in enumerate(entity):
        parts: list[str] = []
        left = fill_to
        for s, i in enumerate(topic[d]):
            subject = grammar.PRONOUN if pronoun[d][s] and not faq[d] else place
            fact = Fact(subject, names[i], ATTRIBUTES[names[i]].values[value[d][i]])
            text = grammar.render_answer(fact, answer_frame[d][s], answer_phrase[d][s])
            if faq[d]:
                question = grammar.render_question(
                    place, names[i], question_frame[d][s], question_phrase[d][s]
                )
                text = f"{text} {question}" if answer_first[d] else f"{question} {text}"
            elif aside[d][s] == 1:
                text = no_fact[filler[d][s]].format(e=place)
            elif aside[d][s] == 2:
                text = boilerplate[filler[d][s]]
            left -= text.count(" ") + 1
            if left < 0:
                break
            parts.append(text)
        documents.append(" ".join(parts))
    return documents
