"""Pairs to units: tokens against the tokenizer, who tokenises what, twins beside their seed pairs."""

import numpy as np
import pytest
from tiny_llama import make_tiny_llama
from together import Together
from transformers import AutoTokenizer

from main_jax import parts
from main_jax.errors import UserError
from main_jax.prompts import Direction, Prompt
from main_jax.units import TokenPair, pair_units, tokenise

ROWS = [
    {
        "id": f"r{i}", "instruction": f"say {i} times", "input": "now" if i % 3 == 0 else None,
        "response": "so " * i + "it is", "weight": i / 2,
        "drop_reason": "too_long" if i in (2, 6) else None,
    }
    for i in range(9)
]  # fmt: skip


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_tiny_llama(folder)
    return Prompt(AutoTokenizer.from_pretrained(folder), "plain", max_length=120)


def expected(prompt, row):
    text = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
    encode = prompt.tokenizer.encode
    return [encode(t, add_special_tokens=False) for t in (text, row["response"])]


def test_tokens_are_those_of_the_tokenizer(prompt, tmp_path):
    found = tokenise(ROWS, tmp_path, prompt, 4)
    assert [pair is None for pair in found] == [i in (2, 6) for i in range(9)]
    for row, pair in zip(ROWS, found, strict=True):
        if pair:
            assert [pair.instruction.tolist(), pair.response.tolist()] == expected(prompt, row)
            assert pair.weight == row["weight"] and pair.instruction.dtype == np.int32


def test_wanted_rows_alone_whatever_they_were_dropped_for(prompt, tmp_path):
    found = tokenise(ROWS, tmp_path, prompt, 4, wanted={"r2", "r5"})
    assert [i for i, pair in enumerate(found) if pair] == [2, 5]
    assert tokenise([], tmp_path / "none", prompt, 4) == []


def test_each_process_tokenises_its_own_rows_and_gets_all(prompt, tmp_path, monkeypatch):
    alone = tokenise(ROWS, tmp_path / "alone", prompt, 2)
    stored = parts.map_chunks(ROWS, tmp_path / "rows", 2, lambda chunk, advance: list(chunk))
    texts = [[], [], []]
    together = Together(monkeypatch, 3)

    class Watched:
        def __init__(self, index):
            self.index = index

        def encode_all(self, asked):
            texts[self.index] += asked
            return prompt.encode_all(asked)

    found, _ = together.run(lambda index: tokenise(stored, tmp_path / "dealt", Watched(index), 2))
    for each in found:
        for pair, same in zip(each, alone, strict=True):
            assert (pair is None) == (same is None)
            for a, b in zip(pair or (), same or (), strict=True):
                np.testing.assert_array_equal(a, b)
    # Chunks 0 to 4 of two rows each: 0 and 3, 1 and 4, 2. The texts of a dropped row are nobody's.
    responses = [[text for text in mine if text.endswith("it is")] for mine in texts]
    assert responses == [
        [ROWS[i]["response"] for i in mine] for mine in ((0, 1, 7), (3, 8), (4, 5))
    ]


def test_a_unit_is_a_pair_and_its_twin(prompt, tmp_path):
    seeds = tokenise(ROWS[:4], tmp_path / "seeds", prompt, 4)
    written = [row | {"instruction": f"other {i}", "input": None} for i, row in enumerate(ROWS[:4])]
    written[1]["drop_reason"] = "empty_instruction"
    twins = tokenise(written, tmp_path / "twins", prompt, 4)
    units = pair_units(seeds, Direction.FORWARD, prompt, twins)
    assert [len(unit.examples) for unit in units] == [2, 1, 2]  # r2 was dropped
    for unit, i in zip(units, (0, 1, 3), strict=True):
        assert [f["aligned"] for f in unit.fields] == [False, True][: len(unit.examples)]
        assert {f["weight"] for f in unit.fields} == {i / 2}
        ends = [example.tokens[example.is_target].tolist() for example in unit.examples]
        assert all(end == [*expected(prompt, ROWS[i])[1], prompt.end] for end in ends)
    whole = prompt.render(Direction.FORWARD, *expected(prompt, ROWS[3])).example
    np.testing.assert_array_equal(units[2].examples[0].tokens, whole.tokens)


def test_what_does_not_fit_is_left_out(prompt):
    short, long = (np.ones(n, np.int32) for n in (5, 200))
    pairs_of = [
        TokenPair(short, long, 1.0),
        TokenPair(short, short, 1.0),
        TokenPair(short, short, 1.0),
    ]
    units = pair_units(
        pairs_of, Direction.FORWARD, prompt, [None, TokenPair(long, short, 1.0), None]
    )
    assert [len(unit.examples) for unit in units] == [1, 1]


def test_a_source_is_read_by_the_first_process_and_its_mistake_is_everybodys(tmp_path, monkeypatch):
    together, reading = Together(monkeypatch, 3), []

    def rows(index, bad):
        for i in range(5):
            reading.append(index)
            if i == bad:
                raise UserError("f.jsonl, row 4: wrong")
            yield {"id": str(i)}

    def stage(folder, bad=None):
        def work(index):
            try:
                found = parts.stage_rows(rows(index, bad), tmp_path / folder, 2, {"left_out": 3})
            except UserError as error:
                return str(error)
            return found.column("id"), parts.staged_facts(tmp_path / folder)

        return next(iter(together.run(work)))

    assert stage("bad", 3) == ("f.jsonl, row 4: wrong",) * 3
    assert not (tmp_path / "bad").exists()
    assert stage("good") == ((list("01234"), {"left_out": 3}),) * 3
    assert set(reading) == {0} and len(reading) == 4 + 5
    assert stage("good") == ((list("01234"), {"left_out": 3}),) * 3
    assert len(reading) == 4 + 5  # not again
