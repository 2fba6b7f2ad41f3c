"""The filter's scores against slow scalar code, its selections, and the scorer that feeds it."""

import dataclasses
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_decoder import CONFIG, drawn_params, slow_nll
from tiny_llama import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from main_jax.errors import UserError
from main_jax.filter import SCORES, keep_by, pool_of, score_columns, select, with_filter
from main_jax.lm.model import Decoder
from main_jax.models import LanguageModel
from main_jax.pairs import table_of
from main_jax.prompts import Prompt
from main_jax.score import score_rows

# ------------------------------------------------------------------------------- the slow scores


def rank(values, x):
    """Average rank of x from 1, divided by n."""
    below, equal = sum(v < x for v in values), sum(v == x for v in values)
    return (below + (equal + 1) / 2) / len(values)


def z(values, x):
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    return (x - mean) / math.sqrt(variance) if len(set(values)) > 1 else 0.0


class Slow:
    """A row's per-token NLLs under the names of the method, and the pool they stand in."""

    def __init__(self, row, pool):
        self.f = row["forward_nll_sum"] / row["forward_tokens"]  # L_f(R|I)
        self.r = row["reverse_nll_sum"] / row["reverse_tokens"]  # L_r(I|R)
        self.f_alone = row["response_nll_sum"] / row["forward_tokens"]  # L_f(R)
        self.r_alone = row["instruction_nll_sum"] / row["reverse_tokens"]  # L_r(I)
        self.tokens = row["forward_tokens"]
        self.fs = [p["forward_nll_sum"] / p["forward_tokens"] for p in pool]
        self.rs = [p["reverse_nll_sum"] / p["reverse_tokens"] for p in pool]

    def dual(self):
        a, b = z(self.fs, self.f), z(self.rs, self.r)
        return math.exp(-(abs(a - b) + 0.5 * (a + b)))


METHOD = {
    "forward_ce": (lambda s: s.f, "low"),
    "reverse_ce": (lambda s: s.r, "low"),
    "mutual": (lambda s: max(rank(s.fs, s.f), rank(s.rs, s.r)), "low"),
    "mutual_z": (lambda s: z(s.fs, s.f) + z(s.rs, s.r), "low"),
    "mutual_sum": (lambda s: s.f + s.r, "low"),
    "dual_ce": (Slow.dual, "high"),
    "pmi": (lambda s: s.f_alone - s.f, "high"),
    "ifd": (lambda s: math.exp(s.f - s.f_alone), "high"),
    "ifd_ratio": (lambda s: s.f / s.f_alone, "high"),
    "reverse_ifd": (lambda s: math.exp(s.r - s.r_alone), "low"),
    "length": (lambda s: s.tokens, "high"),
}
ELIGIBLE = {"ifd": lambda score: score < 1, "ifd_ratio": lambda score: score <= 1}

SIDES = ("forward_nll_sum", "reverse_nll_sum", "response_nll_sum", "instruction_nll_sum")
REASONS = (None, None, None, "filter_pmi", "filter_mutual", "too_long", "empty_response")


@st.composite
def tables(draw, min_size=1):
    """Tables with many ties: a few NLLs per token, counts that divide exactly; and unscored rows."""
    n = draw(st.integers(min_size, 18))
    ids = draw(st.permutations([f"id-{i}" for i in range(n)]))
    rows = []
    for name in ids:
        reason = draw(st.sampled_from(REASONS))
        row = {"id": name, "drop_reason": reason, "keep": reason is None}
        if reason is None or reason.startswith("filter"):
            counts = draw(st.sampled_from([2, 4, 8])), draw(st.sampled_from([2, 4, 16]))
            row["forward_tokens"], row["reverse_tokens"] = counts
            for side in SIDES:
                tokens = counts[side in ("reverse_nll_sum", "instruction_nll_sum")]
                row[side] = tokens * draw(st.sampled_from([0.5, 1.0, 1.25, 2.75, 4.0]))
        rows.append(row)
    return rows


def pooled(rows):
    return [row for row in rows if "forward_nll_sum" in row]


def test_the_scores_and_their_ends_are_the_methods():
    ends = {name: end for name, (_, end) in METHOD.items()}
    assert {name: SCORES[name].keep for name in ends} == ends
    assert {name for name, score in SCORES.items() if score.eligible} == {
        *ELIGIBLE,
        "self_curation",
    }
    assert set(SCORES) >= {*METHOD, "random", "none"}


@settings(deadline=None)
@given(tables())
def test_every_score_equals_its_formula(rows):
    columns, pool = score_columns(table_of(rows), seed=0), pooled(rows)
    assert pool_of(table_of(rows)).tolist() == ["forward_nll_sum" in row for row in rows]
    assert set(columns) >= {*METHOD, "random"} and "none" not in columns
    for name, (formula, _) in METHOD.items():
        for row, value in zip(rows, columns[name], strict=True):
            if "forward_nll_sum" in row:
                assert value == pytest.approx(formula(Slow(row, pool)), rel=1e-12, abs=1e-12), name
            else:
                assert math.isnan(value)


def test_ranks_and_z_scores_by_hand():
    """L_f = 1, 2, 2, 4 and L_r = 3, 1, 2, 2; the last row was dropped and moves nothing."""
    rows = [
        {"id": f"{i}", "forward_nll_sum": f, "reverse_nll_sum": r, "forward_tokens": 1,
         "reverse_tokens": 1, "response_nll_sum": 1.0, "instruction_nll_sum": 1.0,
         "drop_reason": reason}
        for i, (f, r, reason) in enumerate(
            [(1, 3, None), (2, 1, None), (2, 2, "filter_ifd"), (4, 2, None), (9, 9, "too_long")]
        )
    ]  # fmt: skip
    columns = score_columns(table_of(rows), 0)
    assert columns["mutual"][:4].tolist() == [1.0, 2.5 / 4, 2.5 / 4, 1.0]
    spread_f, spread_r = math.sqrt((1.25**2 + 2 * 0.25**2 + 1.75**2) / 4), math.sqrt(0.5)
    expected = [-1.25 / spread_f + 1 / spread_r, -0.25 / spread_f - 1 / spread_r]
    np.testing.assert_allclose(columns["mutual_z"][:2], expected)
    assert all(np.isnan(column[4]) for column in columns.values())


# -------------------------------------------------------------------------------------- selections


def slow_select(rows, name, how, amount):
    """Ids kept, taken one at a time from the best end; ties by id."""
    pool = pooled(rows)
    formula, end = METHOD[name]
    scores = {row["id"]: formula(Slow(row, pool)) for row in pool}
    cost = {i: s if end == "low" else -s for i, s in scores.items()}
    eligible = [i for i in cost if ELIGIBLE.get(name, lambda s: True)(scores[i])]
    if how == "threshold":
        return {
            i for i in eligible if (scores[i] <= amount if end == "low" else scores[i] >= amount)
        }
    if how == "quantile":
        ordered = sorted(cost.values())
        place = amount * (len(ordered) - 1)
        low, part = ordered[int(place)], place - int(place)
        cut = low + part * (ordered[min(int(place) + 1, len(ordered) - 1)] - low)
        return {i for i in eligible if cost[i] <= cut}
    k = int(amount * len(pool) + 0.5) if how == "fraction" else amount
    kept = set()
    while len(kept) < k and kept != set(eligible):
        kept.add(min((i for i in eligible if i not in kept), key=lambda i: (cost[i], i)))
    return kept


# Scores that both sides compute to the same bit, so that ties are ties.
EXACT = ("forward_ce", "reverse_ce", "mutual", "mutual_sum", "pmi", "ifd_ratio", "length")
AMOUNTS = st.one_of(
    st.tuples(st.sampled_from(["fraction", "quantile"]), st.sampled_from([0.125, 0.25, 0.5, 1.0])),
    st.tuples(st.just("top_k"), st.integers(0, 20)),
    st.tuples(st.just("threshold"), st.sampled_from([0.0, 0.5, 1.0, 2.25, 4.0])),
)


@settings(deadline=None, max_examples=200)
@given(tables(), st.sampled_from(EXACT), AMOUNTS)
def test_selections_equal_slow_ones(rows, name, amount):
    how, amount = amount
    table = with_filter(table_of(rows), name, how, amount, seed=0)
    kept = {
        i
        for i, keep in zip(table["id"].to_pylist(), table["keep"].to_pylist(), strict=True)
        if keep
    }
    assert kept == (slow_select(rows, name, how, amount) if pooled(rows) else set())


def test_ties_at_the_cut_go_by_id():
    column, pool = np.array([2.0, 1.0, 1.0, 1.0, 0.0]), np.array([True] * 4 + [False])
    ids = ["a", "d", "b", "c", "e"]
    for how, amount in (("top_k", 2), ("fraction", 0.5)):
        kept = select(column, SCORES["forward_ce"], ids, pool, how, amount)
        assert kept.tolist() == [False, False, True, True, False]
    best_first = select(column, SCORES["length"], ids, pool, "top_k", 2)
    assert best_first.tolist() == [True, False, True, False, False]
    kept = select(column, SCORES["forward_ce"], ids, pool, "quantile", 0.25)
    assert kept.tolist() == [False, True, True, True, False]


@pytest.mark.parametrize(("name", "at_one"), [("ifd", False), ("ifd_ratio", True)])
def test_pairs_that_are_not_eligible_leave_pool_and_k_alone(name, at_one):
    """Half of a pool of four is two, whoever is eligible; exactly 1 is eligible for the ratio only."""
    column, pool = np.array([1.5, 1.2, 1.0, 0.8, 0.3, np.nan]), np.array([True] * 5 + [False])
    ids = list("abcdef")
    kept = select(column, SCORES[name], ids, pool, "top_k", 2)
    assert kept.tolist() == [False, False, at_one, True, not at_one, False]
    kept = select(column, SCORES[name], ids, pool, "fraction", 0.4)
    assert kept.sum() == 2 and not kept[:2].any()
    kept = select(column, SCORES[name], ids, pool, "fraction", 1.0)
    assert kept.tolist() == [False, False, at_one, True, True, False]


@settings(deadline=None)
@given(tables(), st.randoms(use_true_random=False))
def test_random_depends_on_id_and_seed_alone(rows, random):
    def luck(rows, seed):
        column = score_columns(table_of(rows), seed)["random"]
        return {r["id"]: x for r, x in zip(rows, column, strict=True) if "forward_nll_sum" in r}

    first = luck(rows, 3)
    changed = [row | dict.fromkeys(SIDES, 1.0) if "forward_nll_sum" in row else row for row in rows]
    random.shuffle(changed)
    assert luck(changed, 3) == first
    some = [row for row in rows if random.random() < 0.5]
    assert all(first[i] == x for i, x in luck(some, 3).items())
    assert all(first[i] != x for i, x in luck(rows, 4).items())
    assert all(0 <= x < 1 for x in first.values())


def test_random_is_uniform():
    row = {"forward_tokens": 1, "reverse_tokens": 1} | dict.fromkeys(SIDES, 1.0)
    column = score_columns(table_of([row | {"id": f"{i}"} for i in range(2000)]), 0)["random"]
    counts, _ = np.histogram(column, bins=10, range=(0, 1))
    assert np.abs(counts - 200).max() < 60


@settings(deadline=None)
@given(tables(), st.sampled_from([*METHOD, "random", "none"]), st.sampled_from(["pmi", "random"]))
def test_filtering_again_starts_from_the_same_pool(rows, name, earlier):
    table = table_of(rows)
    once = with_filter(table, name, "fraction", 0.5, 1)
    assert with_filter(once, name, "fraction", 0.5, 1).equals(once)
    after_another = with_filter(
        with_filter(table, earlier, "top_k", 1, 1), name, "fraction", 0.5, 1
    )
    assert after_another.equals(once)


@settings(deadline=None)
@given(tables())
def test_every_row_stays_with_its_reason(rows):
    table = with_filter(table_of(rows), "mutual", "fraction", 0.5, 1)
    assert table["id"].to_pylist() == [row["id"] for row in rows]
    kept = slow_select(rows, "mutual", "fraction", 0.5) if pooled(rows) else set()
    for row, new in zip(rows, table.to_pylist(), strict=True):
        in_pool = "forward_nll_sum" in row
        assert new["keep"] == (row["id"] in kept)
        expected = (None if new["keep"] else "filter_mutual") if in_pool else row["drop_reason"]
        assert new["drop_reason"] == expected
        assert all((new[name] is not None) == in_pool for name in (*METHOD, "random"))
    assert with_filter(table, "none", "fraction", 0.5, 1)["keep"].to_pylist() == [
        "forward_nll_sum" in row for row in rows
    ]


def test_keep_by_reads_the_score_columns_of_the_table():
    rows = [{"id": "a"} | dict.fromkeys(SIDES, 2.0), {"id": "b"} | dict.fromkeys(SIDES, 3.0)]
    rows = [row | {"forward_tokens": 1, "reverse_tokens": 1} for row in rows]
    table = with_filter(table_of(rows), "none", "fraction", 1.0, 0)
    assert keep_by(table, "forward_ce", "top_k", 1).tolist() == [True, False]
    place = table.column_names.index("forward_ce")
    table = table.set_column(place, "forward_ce", pa.array([5.0, 4.0]))
    assert keep_by(table, "forward_ce", "top_k", 1).tolist() == [False, True]


# -------------------------------------------------------------------------------------- the scorer

DECODER = Decoder(dataclasses.replace(CONFIG, vocab_size=307))
BOS, EOS = 1, 2
TEMPLATE = {
    "forward": {"before": "Q: ", "after": " A: "},
    "reverse": {"before": "", "after": "\nQ? "},
}
ROWS = [
    {"id": "a", "instruction": "Add them", "response": "6", "drop_reason": None},
    {"id": "b", "instruction": " \n", "response": "The sky", "drop_reason": None},
    {"id": "c", "instruction": "Write", "input": "1, 2", "response": "three numbers are it"},
    {"id": "d", "instruction": "List", "response": None, "drop_reason": None},
    {"id": "e", "instruction": "What is blue?", "response": "sky", "drop_reason": None},
    {"id": "f", "instruction": "What? " * 30, "response": "sky", "drop_reason": None},
    {"id": "g", "instruction": "Why", "response": "sky", "drop_reason": "empty_instruction_before"},
    {"id": "h", "instruction": "Translate", "response": "the right answer is clear. " * 2},
    {"id": "i", "instruction": "", "input": "only this", "response": "a"},
]
REASON = {"b": "empty_instruction", "d": "empty_response", "f": "too_long",
          "g": "empty_instruction_before"}  # fmt: skip
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=tiny_tokenizer(300), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
)


def raw(text):
    return tiny_tokenizer(300).encode(text, add_special_tokens=False).ids


def score(rows, budget=400, strategy="drop"):
    """Different parameters for the two directions, so that they cannot be swapped."""
    prompt = Prompt(TOKENIZER, TEMPLATE, max_length=64, excess_length_strategy=strategy)
    models = [(LanguageModel(DECODER, drawn_params(seed, DECODER)), prompt) for seed in (1, 2)]
    return score_rows(rows, *models, budget)


def slow_side(seed, before, condition, after, target):
    """(sum given the condition, sum without it, target tokens) in nats."""
    params = drawn_params(seed, DECODER)
    target = [*raw(target), EOS]

    def nll(condition):
        start = [BOS, *raw(before), *condition, *raw(after)]
        is_target = [False] * len(start) + [True] * len(target)
        return slow_nll([*start, *target], is_target, params, DECODER)[0]

    return nll(raw(condition)), nll([]), len(target)


def test_scores_equal_full_logits_one_pair_at_a_time():
    scored = score(ROWS)
    assert [row["id"] for row in scored] == [row["id"] for row in ROWS]
    for row in scored:
        assert row["drop_reason"] == REASON.get(row["id"])
        assert row["keep"] == (row["id"] not in REASON) and row["truncated"] is False
        if not row["keep"]:
            assert all(row.get(side) is None for side in SIDES)
            continue
        instruction, response = row["instruction"], row["response"]
        if row.get("input"):
            instruction += "\n\n" + row["input"]
        given, alone, count = slow_side(1, "Q: ", instruction, " A: ", response)
        assert row["forward_tokens"] == count
        assert row["forward_nll_sum"] == pytest.approx(given, abs=1e-5 * count)
        assert row["response_nll_sum"] == pytest.approx(alone, abs=1e-5 * count)
        given, alone, count = slow_side(2, "", response, "\nQ? ", instruction)
        assert row["reverse_tokens"] == count
        assert row["reverse_nll_sum"] == pytest.approx(given, abs=1e-5 * count)
        assert row["instruction_nll_sum"] == pytest.approx(alone, abs=1e-5 * count)
        assert len({round(row[side], 3) for side in SIDES}) == 4


def test_scores_do_not_depend_on_the_budget_or_the_order():
    scored = {row["id"]: row for row in score(ROWS)}
    for rows, budget in ((ROWS, 64), (ROWS[::-1], 400)):
        for row in score(rows, budget):
            other = scored[row["id"]]
            assert row.keys() == other.keys()
            for name, value in row.items():
                if name not in SIDES:
                    assert value == other[name]
                else:
                    forward = name in ("forward_nll_sum", "response_nll_sum")
                    count = row["forward_tokens" if forward else "reverse_tokens"]
                    assert value == pytest.approx(other[name], abs=1e-5 * count)


def test_a_truncated_pair_is_marked_and_scored_on_what_is_left():
    """The condition is cut from its end until 64 tokens are left, each direction for itself."""
    (row,) = score([ROWS[5]], strategy="truncate")
    assert row["keep"] and row["truncated"] and row["drop_reason"] is None
    instruction, response = raw(ROWS[5]["instruction"]), raw("sky")
    room = 64 - 1 - len(raw("Q: ")) - len(raw(" A: ")) - len(response) - 1
    tokens = [BOS, *raw("Q: "), *instruction[:room], *raw(" A: "), *response, EOS]
    is_target = np.arange(64) >= 64 - len(response) - 1
    expected, count = slow_nll(tokens, is_target, drawn_params(1, DECODER), DECODER)
    assert row["forward_tokens"] == count == len(response) + 1
    assert row["forward_nll_sum"] == pytest.approx(expected, abs=1e-5 * count)
    # In reverse the response goes first, whole, and then the instruction, its end token aside.
    room = 64 - 1 - len(raw("\nQ? ")) - 1
    assert row["reverse_tokens"] == room + 1


def test_a_pair_too_long_is_named_under_raise():
    row = ROWS[5] | {"source": "seed.jsonl", "row_number": 7}
    with pytest.raises(UserError, match=r"^seed.jsonl, row 7: a pair has \d+ tokens \(forward\)"):
        score([ROWS[0], row], strategy="raise")
    with pytest.raises(UserError, match="pair f: a pair has"):
        score([ROWS[5]], strategy="raise")


def test_nothing_to_score():
    assert score([]) == []
    assert [row["drop_reason"] for row in score([ROWS[1]])] == ["empty_instruction"]


def test_self_curation_takes_the_best_graded_and_nothing_that_was_not_graded():
    base = {**dict.fromkeys(SIDES, 4.0), "forward_tokens": 2, "reverse_tokens": 2}
    grades = [3.5, None, 4.5, 1.0, 4.5]
    rows = [{"id": f"r{i}", "rating": g} | base for i, g in enumerate(grades)]
    rows.append({"id": "out", "drop_reason": "too_long", "rating": 5.0})
    table = with_filter(table_of(rows), "self_curation", "fraction", 0.4, 0)
    assert table["keep"].to_pylist() == [False, False, True, False, True, False]
    assert table["self_curation"].to_pylist() == [3.5, None, 4.5, 1.0, 4.5, None]
    everything = with_filter(table_of(rows), "self_curation", "fraction", 1.0, 0)
    assert everything["keep"].to_pylist() == [True, False, True, True, True, False]


def test_a_quantile_of_grades_leaves_out_who_has_none():
    base = {**dict.fromkeys(SIDES, 4.0), "forward_tokens": 2, "reverse_tokens": 2}
    grades = [1.0, None, 4.0, 2.0, 3.0]
    rows = [{"id": f"r{i}", "rating": g} | base for i, g in enumerate(grades)]
    table = with_filter(table_of(rows), "self_curation", "quantile", 0.5, 0)  # 2.5 or more
    assert table["keep"].to_pylist() == [False, False, True, False, True]


def test_without_grades_there_is_no_self_curation():
    rows = [{"id": "a", **dict.fromkeys(SIDES, 4.0), "forward_tokens": 2, "reverse_tokens": 2}]
    assert "self_curation" not in score_columns(table_of(rows), seed=0)
    with pytest.raises(UserError, match="scored without it; score them with self-curation"):
        with_filter(table_of(rows), "self_curation", "fraction", 0.4, 0)
