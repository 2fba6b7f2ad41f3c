"""Buckets, packing and the stream of batches, against slow code and as properties."""

from collections import Counter

import hypothesis
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from main_jax.lm.batches import (
    Example,
    Shape,
    Unit,
    UnitStream,
    collate,
    first_fit,
    fitting_shape,
    length_bucket,
    pack_table,
    shared_shape,
    spread,
)

LENGTHS = st.lists(st.integers(1, 20), max_size=40)


def numbered(lengths, targets=None):
    """Make examples without two equal tokens: example i has the tokens 100 i + 1, 100 i + 2, ..."""
    targets = targets or [max(1, n // 2) for n in lengths]
    return [
        Example(np.arange(n, dtype=np.int32) + 100 * i + 1, np.arange(n) >= n - t)
        for i, (n, t) in enumerate(zip(lengths, targets, strict=True))
    ]


# --------------------------------------------------------------------------------------- the parts


def test_length_buckets_are_the_smallest_of_their_list():
    buckets = sorted([32 * 2**k for k in range(9)] + [48 * 2**k for k in range(9)])
    for length in range(1, 8193):
        bucket = length_bucket(length)
        assert bucket == next(b for b in buckets if b >= length)
        assert length <= 32 or 3 * (bucket - length) < bucket
        assert length_bucket(length, length + 1) == min(bucket, length + 1)


def slow_first_fit(lengths, capacity, max_items):
    rows = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for row in rows:
            room = capacity - sum(lengths[j] for j in row)
            if room >= lengths[i] and (max_items is None or len(row) < max_items):
                row.append(i)
                break
        else:
            rows.append([i])
    return rows


@given(LENGTHS, st.integers(20, 50), st.none() | st.integers(1, 4))
def test_first_fit_places_everything_once_within_its_limits(lengths, capacity, max_items):
    rows = first_fit(lengths, capacity, max_items)
    assert Counter(i for row in rows for i in row) == Counter(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    assert max_items is None or all(1 <= len(row) <= max_items for row in rows)
    assert rows == slow_first_fit(lengths, capacity, max_items)


def test_first_fit_refuses_what_cannot_fit():
    with pytest.raises(ValueError, match="an example of 9 tokens does not fit a row of 8"):
        first_fit([3, 9], 8)


@given(LENGTHS, st.integers(1, 12), st.integers(20, 90))
def test_spread_fills_rows_evenly_or_says_that_it_does_not_fit(lengths, count, capacity):
    rows = spread(lengths, count, capacity)
    if rows is None:
        assert sum(lengths) > count * (capacity - max(lengths))  # else the emptiest row has room
        return
    assert len(rows) == count
    assert Counter(i for row in rows for i in row) == Counter(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= capacity
    assert max(filled) - min(filled) <= max(lengths, default=0)


@given(
    st.lists(st.lists(st.integers(1, 180), min_size=1, max_size=20), min_size=1, max_size=4),
    st.integers(180, 600),
    st.integers(1, 4),
)
def test_the_fitting_shape_holds_every_batch_in_fewest_slots(batches, limit, multiple):
    shape = fitting_shape(batches, 20, limit, multiple)
    assert shape.rows % multiple == 0 and shape.examples == 20
    longest = max(n for lengths in batches for n in lengths)
    allowed = sorted({length_bucket(n, limit) for n in range(longest, limit + 1)})[:3]
    if longest > 128:
        allowed += [n for n in range(longest, limit + 1) if n % 64 == 0]
    assert shape.length in allowed
    slots = []
    for length in allowed:
        rows = max(len(slow_first_fit(lengths, length, None)) for lengths in batches)
        slots.append(-(-rows // multiple) * multiple * length)
    assert shape.slots == shape.rows * shape.length == min(slots)
    equal = [n for n, count in zip(allowed, slots, strict=True) if count == min(slots)]
    assert shape.length == min(equal)
    for lengths in batches:
        collate(numbered(lengths), shape)


def test_rows_are_longer_where_that_saves_padding():
    """3,300 tokens: five rows of 768 would be eight on four devices, where four of 960 hold them."""
    lengths = [[700, 700, 300, 300, 300, 300, 500, 200]]
    assert fitting_shape(lengths, 8, 2048) == Shape(2, 1728, 8)
    assert fitting_shape(lengths, 8, 2048, 4) == Shape(4, 960, 8)
    assert fitting_shape(lengths, 8, 768, 4) == Shape(8, 704, 8)  # none may be longer
    short = [[n // 10 for n in lengths[0]]]
    assert fitting_shape(short, 8, 2048) == Shape(4, 96, 8)  # of short examples, only buckets


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=12),
    st.booleans(),
    st.integers(0, 2),
)
def test_collate_equals_a_slow_reconstruction(sizes, packing, spare):
    lengths = [n for n, _ in sizes]
    examples = numbered(lengths, [min(t, n) for n, t in sizes])
    num_rows = len(slow_first_fit(lengths, 24, None if packing else 1))
    shape = Shape(num_rows + spare, 24, len(examples) + spare)
    weights = np.arange(len(examples)) + 0.5
    batch = collate(examples, shape, {"weight": weights}, packing)

    found = {}
    for r in range(shape.rows):
        for t in range(shape.length):
            if batch.segment_ids[r, t]:
                found.setdefault((r, int(batch.segment_ids[r, t])), []).append(t)
    assert packing or all(segment == 1 for _, segment in found)
    seen, counted = set(), 0
    for (r, _), places in found.items():
        i = int(batch.tokens[r, places[0]]) // 100
        seen.add(i)
        tokens, is_target = examples[i]
        assert places == list(range(places[0], places[0] + len(tokens)))
        assert batch.tokens[r, places].tolist() == tokens.tolist()
        assert batch.positions[r, places].tolist() == list(range(len(tokens)))
        for t, place in enumerate(places):
            if t + 1 < len(tokens) and is_target[t + 1]:
                assert batch.example[r, place] == i
                assert batch.targets[r, place] == tokens[t + 1]
                counted += 1
    assert len(found) == len(seen) == len(examples)
    assert np.sum(batch.example < shape.examples) == counted
    assert np.all(batch.example <= shape.examples)
    empty = batch.segment_ids == 0
    assert not batch.tokens[empty].any() and np.all(batch.example[empty] == shape.examples)
    assert batch.fields["valid"].tolist() == [True] * len(examples) + [False] * spare
    assert batch.fields["weight"].tolist() == weights.tolist() + [0.0] * spare


def test_collate_refuses_what_does_not_fit():
    examples = numbered([5, 5, 5])
    collate(examples, Shape(2, 10, 3))
    for shape, packing in (
        (Shape(2, 10, 2), True),
        (Shape(1, 10, 3), True),
        (Shape(2, 15, 3), False),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            collate(examples, shape, packing=packing)


@settings(deadline=None)
@given(
    st.lists(st.integers(2, 60) | st.integers(2, 4), min_size=1, max_size=80),
    st.integers(1, 300),
    st.integers(60, 100),
)
@hypothesis.example([2] * 40 + [3] * 40, 64, 60)  # so short that the examples fill up, not the rows
def test_a_packed_table_holds_every_example_once_in_one_shape(lengths, budget, limit):
    examples = numbered(lengths)
    seen, shapes = [], set()
    for indices, batch in pack_table(examples, budget, limit):
        shapes.add((*batch.tokens.shape, *batch.fields["valid"].shape))
        assert batch.fields["valid"].sum() == len(indices)
        for j, index in enumerate(indices):
            targets = batch.targets[batch.example == j]
            assert sorted(targets) == examples[index].tokens[examples[index].is_target].tolist()
        seen += indices
    assert sorted(seen) == list(range(len(lengths)))
    ((rows, length, _),) = shapes
    assert length == length_bucket(max(lengths), limit) and rows == max(1, budget // length)
    again = pack_table(numbered([max(lengths)]), budget, limit)
    assert {(*b.tokens.shape, *b.fields["valid"].shape) for _, b in again} == shapes


def test_an_empty_table_gives_no_batch():
    assert list(pack_table([], 100, 50)) == []


# -------------------------------------------------------------------------------------- the stream


def units_of(pattern):
    """Make units: one example (False) or an example and its twin (True), all tokens different."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(4, 30, sum(1 + twin for twin in pattern))
    examples, units = iter(numbered(lengths.tolist())), []
    for i, twin in enumerate(pattern):
        aligned = [False, True] if twin else [False]
        fields = tuple({"weight": float(i + 1), "aligned": a} for a in aligned)
        units.append(Unit(tuple(next(examples) for _ in aligned), fields))
    return units


def leaves(batch):
    return [*batch[:5], *(batch.fields[name] for name in sorted(batch.fields))]


PATTERNS = st.lists(st.booleans(), min_size=1, max_size=9)


@settings(deadline=None, max_examples=40)
@given(PATTERNS, st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_a_batch_is_a_pure_function_of_its_step(pattern, per_micro, micro, packing):
    units = units_of(pattern)
    how = dict(units_per_microbatch=per_micro, microbatches=micro, steps=12, seed=5, limit=40)
    stream = UnitStream(units, packing=packing, **how)
    forwards = [stream.batch(step) for step in range(12)]
    other = UnitStream(units, packing=packing, **how)
    for step in (11, 0, 7, 7, 3):
        for a, b in zip(leaves(forwards[step]), leaves(other.batch(step)), strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
    unpacked = UnitStream(units, packing=not packing, **how)
    for step in range(12):
        np.testing.assert_array_equal(stream.indices(step), unpacked.indices(step))


@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))
def test_every_epoch_is_a_permutation(num_units, per_micro, micro, seed):
    stream = UnitStream(
        units_of([False] * num_units), units_per_microbatch=per_micro, microbatches=micro,
        steps=1, seed=seed, limit=40, shape=Shape(9, 40, 9),
    )  # fmt: skip
    size = per_micro * micro
    order = [int(i) for step in range(5 * num_units) for i in stream.indices(step).ravel()]
    for epoch in range(5 * size):
        chunk = order[epoch * num_units : (epoch + 1) * num_units]
        assert sorted(chunk) == list(range(num_units))


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed):
        stream = UnitStream(
            units_of([False] * 12), units_per_microbatch=12, microbatches=1, steps=1, seed=seed,
            limit=40, shape=Shape(12, 40, 12),
        )  # fmt: skip
        return [tuple(stream.indices(step).ravel().tolist()) for step in range(3)]

    assert len(set(order(0) + order(1))) == 6


@settings(deadline=None, max_examples=40)
@given(PATTERNS, st.integers(1, 3), st.integers(1, 3))
def test_twins_share_a_microbatch_and_fields_travel_with_their_example(pattern, per_micro, micro):
    units = units_of(pattern)
    stream = UnitStream(
        units, units_per_microbatch=per_micro, microbatches=micro, steps=6, seed=1, limit=30
    )
    for step in range(6):
        batch = stream.batch(step)
        assert batch.tokens.shape == (micro, stream.shape.rows, stream.shape.length)
        for k, indices in enumerate(stream.indices(step)):
            fields = {name: values[k] for name, values in batch.fields.items()}
            expected = [
                (u, j) for u, i in enumerate(indices) for j in range(len(units[i].examples))
            ]
            assert fields["valid"].sum() == len(expected)
            for e, (u, j) in enumerate(expected):
                unit = units[indices[u]]
                assert fields["unit"][e] == u
                assert fields["weight"][e] == unit.fields[j]["weight"]
                assert fields["aligned"][e] == unit.fields[j]["aligned"] == (j == 1)
                tokens, is_target = unit.examples[j]
                targets = batch.targets[k][batch.example[k] == e]
                assert sorted(targets) == tokens[is_target].tolist()


def test_weights_are_float32_and_flags_stay_flags():
    stream = UnitStream(
        units_of([True]), units_per_microbatch=1, microbatches=1, steps=1, seed=0, limit=40
    )
    fields = stream.batch(0).fields
    assert {name: fields[name].dtype.kind for name in fields} == {
        "valid": "b", "weight": "f", "aligned": "b", "unit": "i",
    }  # fmt: skip
    assert fields["weight"].dtype == np.float32


def test_a_stream_takes_the_shape_of_others():
    small, large = units_of([False, False]), units_of([True] * 4)
    how = dict(units_per_microbatch=2, microbatches=1, steps=4, seed=0, limit=40)
    shared = shared_shape([UnitStream(units, **how) for units in (small, large)])
    assert shared == UnitStream(large, **how).shape  # which holds the small ones too
    batch = UnitStream(small, shape=shared, **how).batch(3)
    assert batch.tokens.shape == (1, shared.rows, shared.length)
    assert batch.fields["valid"].shape == (1, shared.examples)
    assert batch.fields["valid"].sum() == 2


@settings(deadline=None)
@given(PATTERNS, st.integers(1, 3))
def test_the_own_shape_is_no_larger_than_its_steps_need(pattern, per_micro):
    units, steps = units_of(pattern), 4
    stream = UnitStream(
        units, units_per_microbatch=per_micro, microbatches=2, steps=steps, seed=2, limit=30
    )
    assert stream.shape.length == length_bucket(
        max(len(e.tokens) for u in units for e in u.examples), 30
    )
    used = [
        int(np.any(micro, axis=1).sum())
        for step in range(steps)
        for micro in stream.batch(step).segment_ids
    ]
    assert stream.shape.rows == max(used)


def test_streams_share_a_shape_no_larger_than_all_their_batches_need():
    """Not the longest rows of one and the most rows of another."""

    def of(*lengths):
        units = [Unit((e,), ({"weight": 1.0},)) for e in numbered(lengths)]
        return UnitStream(
            units, units_per_microbatch=len(units), microbatches=1, steps=1, seed=0, limit=2048
        )

    streams = of(*[700, 60] * 4), of(*[500] * 6)
    assert [s.shape for s in streams] == [Shape(4, 768, 8), Shape(6, 512, 6)]
    shared = shared_shape(streams)
    assert shared == Shape(2, 1536, 8)
    for stream in streams:
        collate([unit.examples[0] for unit in stream.units], shared)


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(ValueError, match="nothing to train on"):
        UnitStream([], units_per_microbatch=1, microbatches=1, steps=1, seed=0, limit=8)
