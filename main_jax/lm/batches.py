"""Examples -> packed batches of one shape, in an order that any step can be resumed from.

A batch is rows of tokens; an example is a segment of a row, with its own positions. A padded batch is
the special case of one segment per row. Which examples form a batch never depends on how they are
packed, so that a packed loss equals an unpacked one.

Letters: R rows, T tokens per row, E examples per microbatch, K microbatches per step.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np


class Example(NamedTuple):
    """One rendered example: `tokens` [T] int32 and `is_target` [T] bool (predicted and counted)."""

    tokens: np.ndarray
    is_target: np.ndarray


class Batch(NamedTuple):
    """A pytree of arrays; the training step receives them with a leading axis of K microbatches.

    tokens, positions, segment_ids: [R, T] int32; segment 0 is padding.
    targets: [R, T] int32, the token that follows within the segment.
    example: [R, T] int32, the example whose target is predicted here; E where nothing is counted.
    fields: name -> [E] array, what travels with each example (weights, groups); `valid` is always
        there and is False for the empty places of a batch that is not full.
    """

    tokens: Any
    positions: Any
    segment_ids: Any
    targets: Any
    example: Any
    fields: dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """The one shape of a stream of batches."""

    rows: int
    length: int
    examples: int

    @property
    def slots(self) -> int:
        """Places for tokens, padding included."""
        return self.rows * self.length


STRIDE = 64
"""Rows of long examples are a multiple of so many slots: a tile of the CPU's attention."""


def length_bucket(length: int, limit: int | None = None) -> int:
    """The smallest of 32, 48, 64, 96, 128, ... that holds `length`: few shapes, at most 1/3 waste."""
    bucket = 32
    while bucket < length:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return min(bucket, limit) if limit is not None else bucket


def first_fit(
    lengths: Sequence[int], capacity: int, max_items: int | None = None
) -> list[list[int]]:
    """First-fit decreasing: rows of indices whose lengths sum to at most `capacity`.

    A row takes at most `max_items` (None: any number). Raises ValueError for an item above the capacity.
    """
    if max(lengths, default=0) > capacity:
        raise ValueError(f"an example of {max(lengths)} tokens does not fit a row of {capacity}")
    rows: list[list[int]] = []
    free = np.zeros(len(lengths), np.int64)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = np.flatnonzero(free[: len(rows)] >= lengths[i])
        if len(fits):
            row = int(fits[0])
        else:
            row = len(rows)
            rows.append([])
            free[row] = capacity
        rows[row].append(i)
        full = max_items is not None and len(rows[row]) >= max_items
        free[row] = 0 if full else free[row] - lengths[i]
    return rows


def spread(lengths: Sequence[int], rows: int, capacity: int) -> list[list[int]] | None:
    """Longest first, each into the emptiest row: as even as can be, so that devices wait little.

    Rows of indices as of `first_fit`; None where it does not fit so (first-fit may).
    """
    found: list[list[int]] = [[] for _ in range(rows)]
    filled = [(0, row) for row in range(rows)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, row = filled[0]
        if tokens + lengths[i] > capacity:
            return None
        heapq.heapreplace(filled, (tokens + lengths[i], row))
        found[row].append(i)
    return found


def fitting_shape(
    batches: Sequence[Sequence[int]], examples: int, limit: int, rows_multiple: int = 1
) -> Shape:
    """The shape with the fewest slots that holds each of these batches, given as lengths of examples.

    Rows are of the bucket of the longest example or of one of the next two, or, where it is long, of any
    multiple of `STRIDE` from there on, at most `limit`: a few longer ones may hold what much padding would.
    """
    longest, most = max(map(max, batches)), max(map(sum, batches))
    lengths = [length_bucket(longest, limit)]
    while len(lengths) < 3 and lengths[-1] < limit:
        lengths.append(length_bucket(lengths[-1] + 1, limit))
    if longest > 2 * STRIDE:
        lengths += range(longest + -longest % STRIDE, limit + 1, STRIDE)

    def shape(rows: int, length: int) -> Shape:
        return Shape(rows + -rows % rows_multiple, length, examples)

    def fewest(length: int) -> int:
        return shape(-(-most // length), length).slots

    best = shape(sum(map(len, batches)), lengths[0])
    fullest_first = sorted(batches, key=sum, reverse=True)
    for length in sorted(set(lengths), key=lambda length: (fewest(length), length)):
        rows = -(-most // length)
        for batch in fullest_first:
            if shape(rows, length).slots > best.slots:
                break  # what is found already is better
            rows = max(rows, len(first_fit(batch, length)))
        best = min(best, shape(rows, length), key=lambda found: (found.slots, found.length))
    return best


def collate(
    examples: Sequence[Example],
    shape: Shape,
    fields: Mapping[str, Sequence[float] | np.ndarray] | None = None,
    packing: bool = True,
) -> Batch:
    """Packs up to `shape.examples` examples into one batch. Raises ValueError when they do not fit."""
    lengths = [len(e.tokens) for e in examples]
    rows = spread(lengths, shape.rows, shape.length) if packing else None
    rows = rows or first_fit(lengths, shape.length, None if packing else 1)
    if len(rows) > shape.rows or len(examples) > shape.examples:
        raise ValueError(f"{len(examples)} examples in {len(rows)} rows do not fit {shape}")
    grid = (shape.rows, shape.length)
    tokens, positions, segments, targets = (np.zeros(grid, np.int32) for _ in range(4))
    example = np.full(grid, shape.examples, np.int32)
    for r, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members, start=1):
            ids, is_target = examples[index]
            stop = start + len(ids)
            tokens[r, start:stop] = ids
            positions[r, start:stop] = np.arange(len(ids))
            segments[r, start:stop] = segment
            targets[r, start : stop - 1] = ids[1:]
            example[r, start : stop - 1][is_target[1:]] = index
            start = stop
    padded = {"valid": np.arange(shape.examples) < len(examples)}
    for name, values in (fields or {}).items():
        values = np.asarray(values)
        padded[name] = np.zeros(shape.examples, values.dtype)
        padded[name][: len(values)] = values
    return Batch(tokens, positions, segments, targets, example, padded)


def pack_table(
    examples: Sequence[Example], budget: int, limit: int, rows_multiple: int = 1
) -> Iterator[tuple[list[int], Batch]]:
    """Packs any number of examples into batches of one shape of about `budget` tokens.

    Yields (indices, batch): example j of the batch is `examples[indices[j]]`. The row length is the
    bucket of the longest example, at most `limit`; the shape follows from it and the budget alone, its
    rows a multiple of `rows_multiple`.
    """
    if not examples:
        return
    lengths = [len(e.tokens) for e in examples]
    length = length_bucket(max(lengths), limit)
    rows_per_batch, most = max(1, budget // length), max(1, length // 4)
    rows_per_batch += -rows_per_batch % rows_multiple
    shape = Shape(rows_per_batch, length, rows_per_batch * most)
    rows = first_fit(lengths, length, max_items=most)
    for i in range(0, len(rows), shape.rows):
        indices = [j for row in rows[i : i + shape.rows] for j in row]
        yield indices, collate([examples[j] for j in indices], shape)


@dataclass(frozen=True)
class Unit:
    """Examples that must share a microbatch (a seed row and its aligned twin), and their fields."""

    examples: tuple[Example, ...]
    fields: tuple[Mapping[str, float | bool], ...]


class UnitStream:
    """The training batches of a run: step -> stacked microbatches, a pure function of the step.

    Every epoch is a fresh permutation drawn from (seed, epoch); batches run across epoch boundaries,
    so every step has the same number of units, and resuming needs nothing but the step number.

    Args:
        units: the data; must not be empty.
        units_per_microbatch: units in each of the K microbatches of a step.
        microbatches: K.
        limit: longest row allowed, in tokens.
        steps: which the shape holds.
        shape: of a microbatch, where several streams share one compiled step (`shared_shape`); default:
            what its own steps need.
        rows_multiple: what the number of rows is a multiple of, to be cut up evenly.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        *,
        units_per_microbatch: int,
        microbatches: int,
        steps: int,
        seed: int,
        limit: int,
        packing: bool = True,
        shape: Shape | None = None,
        rows_multiple: int = 1,
    ):
        if not units:
            raise ValueError("there is nothing to train on")
        self.units, self.seed, self.packing = units, seed, packing
        self.per_micro, self.micro = units_per_microbatch, microbatches
        self.steps, self.limit, self.rows_multiple = steps, limit, rows_multiple
        self._orders: dict[int, np.ndarray] = {}
        if shape:
            self.shape = replace(shape, rows=shape.rows + -shape.rows % rows_multiple)

    @property
    def examples(self) -> int:
        """What a microbatch holds at most."""
        return self.per_micro * max(len(unit.examples) for unit in self.units)

    @cached_property
    def shape(self) -> Shape:
        """Of every microbatch."""
        return shared_shape([self])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            rng = np.random.default_rng([self.seed, epoch])
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1} | {
                epoch: rng.permutation(len(self.units))
            }
        return self._orders[epoch]

    def indices(self, step: int) -> np.ndarray:
        """[K, units per microbatch] indices of the units of one step (0-based)."""
        size = self.per_micro * self.micro
        places = np.arange(step * size, (step + 1) * size)
        epochs, offsets = np.divmod(places, len(self.units))
        chosen = [self._order(int(e))[o] for e, o in zip(epochs, offsets, strict=True)]
        return np.asarray(chosen).reshape(self.micro, self.per_micro)

    def lengths(self) -> Iterator[list[int]]:
        """Of the examples of each microbatch of all its steps."""
        own = [[len(e.tokens) for e in unit.examples] for unit in self.units]
        for step in range(self.steps):
            for micro in self.indices(step):
                yield [n for i in micro for n in own[i]]

    def batch(self, step: int) -> Batch:
        """The stacked microbatches of a step: every leaf has a leading axis K."""
        return stack([self._microbatch(micro) for micro in self.indices(step)])

    def _microbatch(self, indices: np.ndarray) -> Batch:
        units = [self.units[i] for i in indices]
        examples = [e for u in units for e in u.examples]
        rows = [f for u in units for f in u.fields]
        fields = {name: np.asarray([row[name] for row in rows]) for name in rows[0]}
        fields = {n: v.astype(np.float32) if v.dtype.kind == "f" else v for n, v in fields.items()}
        fields["unit"] = np.repeat(np.arange(len(units)), [len(u.examples) for u in units])
        return collate(examples, self.shape, fields, self.packing)


def shared_shape(streams: Sequence[UnitStream]) -> Shape:
    """The `fitting_shape` of all steps of these streams, which have limit, packing and multiple in common."""
    batches = [lengths for stream in streams for lengths in stream.lengths()]
    examples, a = max(stream.examples for stream in streams), streams[0]
    if a.packing:
        return fitting_shape(batches, examples, a.limit, a.rows_multiple)
    length = length_bucket(max(max(lengths) for lengths in batches), a.limit)
    return Shape(examples + -examples % a.rows_multiple, length, examples)


def stack(batches: Sequence[Batch]) -> Batch:
    """Stacks batches of one shape along a new leading axis."""
    arrays = [np.stack(leaves) for leaves in zip(*(b[:5] for b in batches), strict=True)]
    return Batch(*arrays, {k: np.stack([b.fields[k] for b in batches]) for k in batches[0].fields})
