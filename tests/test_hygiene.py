"""What generated instructions are dropped for: by hand, and over a table in parts."""

import pytest

from main_jax import pairs, parts
from main_jax.hygiene import Hygiene, loop_share, mark_repeats


def row(instruction, finish="stop"):
    return {"instruction": instruction, "finish_reason": finish}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (row("Name the crop of Dor."), None),
        (row("Name the crop of", "length"), "cut_instruction"),
        (row("123456789"), "short_instruction"),
        (row("1234567890"), None),
        (row("x" * 800), None),
        (row("x" * 801), "long_instruction"),
        (row("why not " * 20), "looping_instruction"),
        (row(None, None), "short_instruction"),
    ],
)
def test_a_text_by_itself(given, reason):
    assert Hygiene().fault(given) == reason


def test_every_rule_can_be_turned_off():
    lax = Hygiene(True, 1, 10**6, 1.0, None)
    for text in ("a", "why not " * 200):
        assert lax.fault(row(text, "length")) is None


def test_loop_share_by_hand():
    assert loop_share("a b c a b c a b c a b") == 0  # eleven words
    # abc bca cab and then again: 10 triples of 12 words, 3 different.
    assert loop_share("A b, c a b c a b c a b c!") == pytest.approx(0.7)
    assert loop_share(" ".join(map(str, range(50)))) == 0


def table(folder, rows):
    for part in range(0, len(rows), 3):
        pairs.write_table(
            folder / f"part-{part // 3:05}.parquet", pairs.table_of(rows[part : part + 3])
        )


def test_the_same_for_many_responses(tmp_path):
    said = ["Tell me", "tell  me!", None, "TELL me", "other", "tell me", "tell me"]
    reasons = [None, None, "empty_response", None, None, "too_long", None]
    rows = [
        {"id": str(i), "instruction": text, "drop_reason": reason, "response": f"r{i}"}
        for i, (text, reason) in enumerate(zip(said, reasons, strict=True))
    ]
    table(tmp_path, rows)
    mark_repeats(tmp_path, 2)
    again = "repeated_instruction"
    expected = [None, None, "empty_response", again, None, "too_long", again]
    assert parts.Rows(tmp_path).column("drop_reason") == expected
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    mark_repeats(tmp_path, 2)  # as after a kill
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert parts.Rows(tmp_path).column("response") == [f"r{i}" for i in range(7)]
    mark_repeats(tmp_path, 4)
    assert parts.Rows(tmp_path).column("drop_reason") == reasons
