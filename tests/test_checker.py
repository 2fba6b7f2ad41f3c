"""The checkers, by hand."""

import pytest

from main_jax.checker import CHECKERS


@pytest.mark.parametrize(
    ("name", "answer", "reference", "right"),
    [
        ("exact", "  The answer\nis BLUE. ", "the answer is blue", True),
        ("exact", "blue", "light blue", False),
        ("exact", "“Blue!”", "blue", True),
        ("exact", "3.5", "3,5", False),
        ("exact", "", "", True),
        ("contains", "It is Blue, I think.", "blue", True),
        ("contains", "It is bluer.", "blue", False),
        ("contains", "a (b) c", "(b)", True),
        ("contains", "a+b", "a.b", False),
        ("contains", "anything", "", False),
        ("contains", "מה? שלום עולם", "שלום עולם!", True),
        ("number", "3 apples and 4 pears make 7.", "#### 7", True),
        ("number", "That is 1,234.50 euros", "1234.5", True),
        ("number", "-2", "2", False),
        ("number", "none", "7", False),
        ("number", "7", "seven", False),
        ("number", "0.10", ".1 0.1", True),
    ],
)
def test_checkers(name, answer, reference, right):
    assert CHECKERS[name](answer, reference) is right
