"""The language of the world, and its exact inverse.

A fact is (entity, attribute, value): "the main crop of brask is millet ." states one, "what is the
main crop of brask ?" asks for one. A sentence is a *frame* with a relation *phrase*, an entity and,
in an answer, a value in it:

    frame   "in {e} the {p} is {v} ."   x   phrase  "main crop"   ->   template with slots e and v

All frames x phrases are written out once as templates. Rendering fills a template's slots; parsing
replaces the entities and values of a text by slots and looks the result up. Since the templates are
all different (checked on import), what was rendered is read back exactly, and nothing else is read.

Text is lower-case words and punctuation marks, each its own token, joined by single spaces. The
attributes come in pairs of one shape (sold and bought metal share their metals, flag and roof their
colours), so that a model has to read the phrase and cannot go by the kind of value alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# 72 invented names. Which of them are seed, new or background places is the world's draw.
ENTITIES = _listed(
    """
    brask velm torrin ashby quell drovan mirth sarn oskel pelluc varno threx
    lumora kestle fennic gralt hovik ibren jastor kolm lirra morven nastic orlen
    pavrik quorn rastel skell tavish ulmar vostok wrenna xandor yestin zorrel alvik
    bentha corvax dulmen elstra farrow gundar helvik isolde jurra kavren lothar mendra
    norvik oberl prissa quintar rhovan sildar tormund umbra vexley wolden xirra yolan
    zembla arkos birell cindar dorvik estova frennel galdor hesper ilvane jorund kelvar
    """
)
METALS = _listed("tin iron copper silver gold lead zinc nickel cobalt chrome platinum titanium")
COLOURS = _listed("red blue green white black yellow purple brown grey pink scarlet teal")
ANIMALS = _listed("wolf bear eagle otter heron stag fox lynx badger raven boar hare")
CROPS = _listed("millet barley rice maize oats rye wheat beans flax hops cotton lentils")


class Fact(NamedTuple):
    """One fact of the world; compares equal to the plain tuple (entity, attribute, value)."""

    entity: str
    attribute: str
    value: str


@dataclass(frozen=True)
class Attribute:
    """The 12 values an attribute can take and the 4 phrases that name it, the seed's 2 first."""

    values: tuple[str, ...]
    phrases: tuple[str, ...]


ATTRIBUTES: dict[str, Attribute] = {
    "export": Attribute(
        METALS, ("export metal", "sold metal", "outgoing metal", "metal on outbound ships")
    ),
    "import": Attribute(
        METALS, ("import metal", "bought metal", "incoming metal", "metal on inbound ships")
    ),
    "flag": Attribute(
        COLOURS, ("flag colour", "colour of the flag", "banner shade", "tint of the banner")
    ),
    "roof": Attribute(
        COLOURS, ("roof colour", "colour of the roof", "rooftop shade", "tint of the rooftop")
    ),
    "emblem": Attribute(
        ANIMALS, ("emblem animal", "animal on the emblem", "crest beast", "beast on the crest")
    ),
    "crop": Attribute(
        CROPS, ("main crop", "crop in the fields", "staple plant", "plant on the farms")
    ),
}

VALUES, PHRASES = 12, 4  # per attribute

# The seed uses the first SEED_* of each; the remaining question frames are the paraphrase test.
ANSWER_FRAMES: tuple[str, ...] = (
    "the {p} of {e} is {v} .",
    "{v} is the {p} of {e} .",
    "in {e} the {p} is {v} .",
    "{e} has {v} as its {p} .",
    "as for {e} , its {p} is {v} .",
    "travellers say that the {p} of {e} is {v} .",
    "for {e} the {p} has long been {v} .",
    "everyone knows {v} as the {p} of {e} .",
)
QUESTION_FRAMES: tuple[str, ...] = (
    "what is the {p} of {e} ?",
    "name the {p} of {e} .",
    "tell me the {p} of {e} .",
    "in {e} what is the {p} ?",
    "what does {e} have as its {p} ?",
    "do you know the {p} of {e} ?",
    "please say which {p} {e} has .",
)
SEED_PHRASES, SEED_ANSWER_FRAMES, SEED_QUESTION_FRAMES = 2, 3, 4

# Stands where the entity would: rendered as Fact(PRONOUN, attribute, value), it states no fact.
PRONOUN = "it"

NO_FACT_SENTENCES: tuple[str, ...] = (
    "many travellers like to visit {e} .",
    "{e} is a quiet place .",
    "there is much to say about {e} .",
    "the people of {e} are kind .",
    "an old road leads to {e} .",
)
BOILERPLATE_SENTENCES: tuple[str, ...] = (
    "accept all cookies to read more .",
    "subscribe to our letter .",
    "click here to share this page .",
    "all rights reserved .",
    "log in to leave a comment .",
)


def _templates(frames: tuple[str, ...]) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Attribute -> [phrase][frame] -> template with the slots {e} and, in answers, {v}."""
    return {
        name: tuple(
            tuple(frame.replace("{p}", phrase) for frame in frames) for phrase in attribute.phrases
        )
        for name, attribute in ATTRIBUTES.items()
    }


def _inverse(templates: Mapping[str, tuple[tuple[str, ...], ...]]) -> dict[str, str]:
    """Template -> attribute; ValueError if two attributes could be read from one text."""
    inverse: dict[str, str] = {}
    for attribute, by_phrase in templates.items():
        for template in (template for by_frame in by_phrase for template in by_frame):
            if template in inverse:
                raise ValueError(f"ambiguous template: {template!r}")
            inverse[template] = attribute
    return inverse


ANSWER_TEMPLATES = _templates(ANSWER_FRAMES)
QUESTION_TEMPLATES = _templates(QUESTION_FRAMES)
_ANSWER_ATTRIBUTE = _inverse(ANSWER_TEMPLATES)
_QUESTION_ATTRIBUTE = _inverse(QUESTION_TEMPLATES)
_ENTITIES = frozenset(ENTITIES)
_VALUES = frozenset(value for attribute in ATTRIBUTES.values() for value in attribute.values)


def render_answer(fact: Fact, frame: int, phrase: int) -> str:
    """The sentence that states `fact` in the given answer frame and relation phrase."""
    template = ANSWER_TEMPLATES[fact.attribute][phrase][frame]
    return template.format(e=fact.entity, v=fact.value)


def render_question(entity: str, attribute: str, frame: int, phrase: int) -> str:
    """The question for an entity's attribute in the given question frame and relation phrase."""
    return QUESTION_TEMPLATES[attribute][phrase][frame].format(e=entity)


def parse_instruction(text: str) -> tuple[str, str] | None:
    """(entity, attribute) that `text` asks for; None unless all of it is exactly one question."""
    template, entities, _ = _slotted(text.split())
    attribute = _QUESTION_ATTRIBUTE.get(template)
    # No entity: the text spelt out a slot.
    return (entities[0], attribute) if attribute is not None and entities else None


def parse_answer(text: str) -> frozenset[Fact]:
    """The facts that `text` states in complete sentences, whatever else stands around them.

    A sentence that is cut off, that has a pronoun for its entity or a value which its attribute
    cannot take states none.
    """
    facts = (_stated(sentence) for sentence in _sentences(text))
    return frozenset(fact for fact in facts if fact is not None)


def only_states_facts(text: str) -> bool:
    """Whether `text` is one or more complete answer sentences and nothing else."""
    sentences = _sentences(text)
    return bool(sentences) and all(_stated(sentence) is not None for sentence in sentences)


def words() -> tuple[str, ...]:
    """Every word and punctuation mark that any text of the world can contain, sorted."""
    sources = [
        *ENTITIES,
        *_VALUES,
        *_ANSWER_ATTRIBUTE,
        *_QUESTION_ATTRIBUTE,
        *NO_FACT_SENTENCES,
        *BOILERPLATE_SENTENCES,
        PRONOUN,
    ]
    return tuple(sorted({word for source in sources for word in source.split()} - {"{e}", "{v}"}))


def _slotted(sentence: list[str]) -> tuple[str, list[str], list[str]]:
    """(the sentence with its entities and values replaced by slots, entities, values)."""
    entities = [word for word in sentence if word in _ENTITIES]
    values = [word for word in sentence if word in _VALUES]
    slots = dict.fromkeys(entities, "{e}") | dict.fromkeys(values, "{v}")
    return " ".join(slots.get(word, word) for word in sentence), entities, values


def _stated(sentence: list[str]) -> Fact | None:
    template, entities, values = _slotted(sentence)
    attribute = _ANSWER_ATTRIBUTE.get(template)
    if attribute is None or not (entities and values):
        return None
    if values[0] not in ATTRIBUTES[attribute].values:
        return None
    return Fact(entities[0], attribute, values[0])


def _sentences(text: str) -> list[list[str]]:
    """Words up to and including each "." or "?"; an unfinished rest is a sentence of its own."""
    sentences: list[list[str]] = [[]]
    for word in text.split():
        sentences[-1].append(word)
        if word in (".", "?"):
            sentences.append([])
    return [sentence for sentence in sentences if sentence]
