"""What generated instructions are dropped for: by hand, and over a table in parts."""

import pytest

from main_jax import pairs
from main_jax.hygiene import Hygiene, faults, loop_share
from main_jax.parts import Rows


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


def test_faults_of_a_table_in_parts(tmp_path):
    said = ["Tell me why", "tell  me why!", None, "TELL me why", "other one", "tell me why", "x"]
    reasons = [None, None, "empty_response", None, None, "too_long", None]
    rows = [
        {"id": str(i), "instruction": text, "drop_reason": reason, "finish_reason": "stop"}
        for i, (text, reason) in enumerate(zip(said, reasons, strict=True))
    ]
    for part in range(0, len(rows), 3):
        table = pairs.table_of(rows[part : part + 3])
        pairs.write_table(tmp_path / f"part-{part // 3:05}.parquet", table)
    stored = Rows(tmp_path)
    found = faults(stored, Hygiene(min_characters=2, max_repeats=2))
    expected = [None, None, "empty_response", "repeated_instruction", None, "too_long"]
    assert found == [*expected, "short_instruction"]
    assert faults(stored, Hygiene(min_characters=1, max_repeats=None)) == reasons
