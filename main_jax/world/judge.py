"""Exact judges: no model, no threshold, only the inverse grammar.

All three answer a yes-or-no question about one text or pair, so that a share of yeses is a figure
such as precision of the kept pairs, held-out exact match or reverse accuracy.
"""

from __future__ import annotations

from main_jax.world.grammar import only_states_facts, parse_answer, parse_instruction


def is_true_pair(instruction: str, response: str, kind: str) -> bool:
    """Whether the response is of kind "clean" and states exactly the fact the instruction asks."""
    stated = parse_answer(response)
    if kind != "clean" or len(stated) != 1:
        return False
    (fact,) = stated
    return parse_instruction(instruction) == (fact.entity, fact.attribute)


def exact_match(answer: str, entity: str, attribute: str, value: str) -> bool:
    """Whether the answer states exactly this fact, in complete sentences and with nothing else.

    Any frame and phrase will do, and saying the same fact twice is saying nothing else.
    """
    return only_states_facts(answer) and parse_answer(answer) == {(entity, attribute, value)}


def reverse_correct(instruction: str, entity: str, attribute: str) -> bool:
    """Whether the whole instruction is a question for exactly this attribute of this entity."""
    return parse_instruction(instruction) == (entity, attribute)
