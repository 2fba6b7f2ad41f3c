"""Attention in tiles against a dense one in float64, its bounds against brute force, and in a model."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_decoder import CONFIG, drawn_params, example

from main_jax.lm.attention import BACKENDS, _fault, attention
from main_jax.lm.attention_blocks import TILE, _flat_segments, attend, key_tiles
from main_jax.lm.batches import Shape, collate
from main_jax.lm.loss import weighted_nll
from main_jax.lm.model import Decoder
from main_jax.lm.sharding import MeshShape, make_mesh, place_rows


def layout(T, *rows):
    """Segments of rows, given their lengths in order, negative ones being padding, up to T slots."""
    ids = np.zeros((len(rows), T), np.int32)
    for row, lengths in zip(ids, rows, strict=True):
        start = 0
        for i, n in enumerate(lengths):
            row[start : start + abs(n)] = i + 1 if n > 0 else 0
            start += abs(n)
    return ids


def layouts(B, T):
    length = st.one_of(st.integers(1, 20), st.integers(-90, T).filter(bool), st.just(T))
    row = st.lists(length, max_size=12)
    return st.lists(row, min_size=B, max_size=B).map(lambda rows: layout(T, *rows))


def sees(ids, window=None):
    """Say which slots see which: `[B, T, T]`."""
    slots = np.arange(ids.shape[1])
    distance = slots[:, None] - slots
    mask = (ids[:, :, None] == ids[:, None]) & (ids[:, :, None] != 0) & (distance >= 0)
    return mask if window is None else mask & (distance < window)


def drawn(B, T, N, K, H, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, T, n, H)).astype(np.float32) for n in (N, K, K, N)]


def dense(q, k, v, d_out, ids, window):
    """The result and the gradients by q, k and v, all `[B, T, heads, H]`, written out in float64."""
    q, k, v, d_out = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (q, k, v, d_out))
    G, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    keys, values = np.repeat(k, G, 1), np.repeat(v, G, 1)
    mask = sees(ids, window)[:, None]
    scores = np.where(mask, q @ keys.swapaxes(2, 3) * scale, -np.inf)
    weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e30))
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    d_weights = d_out @ values.swapaxes(2, 3)
    d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True)) * scale

    def per_key_head(x):
        return x.reshape(*k.shape[:2], G, *k.shape[2:]).sum(2)

    d_keys = per_key_head(d_scores.swapaxes(2, 3) @ q)
    d_values = per_key_head(weights.swapaxes(2, 3) @ d_out)
    found = weights @ values, d_scores @ keys, d_keys, d_values
    return [x.transpose(0, 2, 1, 3) for x in found]


@functools.partial(jax.jit, static_argnums=5)
def with_gradients(q, k, v, d_out, ids, window=None):
    out, pull = jax.vjp(lambda *x: attend(*x, ids, window), q, k, v)
    return out, *pull(d_out.astype(out.dtype))


CASES = {
    "one tile": (2, 40, 3, 3, 8, None),
    "grouped": (2, 150, 6, 2, 16, None),
    "window": (1, 300, 4, 1, 10, 70),
    "narrow window": (3, 100, 2, 2, 8, 3),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_dense(case):
    *shape, window = case
    arrays = drawn(*shape)

    @settings(max_examples=20, deadline=None)
    @given(layouts(*shape[:2]))
    def check(ids):
        found = with_gradients(*arrays, ids, window)
        expected = dense(*arrays, ids, window)
        # Where segments are single tokens dq and dk cancel to zero: dv says of what size they were.
        size = np.linalg.norm(expected[3])
        for a, b in zip(found, expected, strict=True):
            assert np.linalg.norm(a - b) <= 2e-6 * max(np.linalg.norm(b), size)
            assert not np.any(np.asarray(a)[ids == 0])

    check()


def test_long_rows_are_as_exact_as_dense_ones_in_float32():
    ids = layout(700, [700], [1, 63, 64, -10, 65, 400])
    arrays = drawn(2, 700, 4, 2, 12)
    q, k, v, d_out = arrays
    out, pull = jax.vjp(lambda *x: attention(*x, ids, backend="xla"), q, k, v)
    found, plain = with_gradients(*arrays, ids), (out, *pull(d_out))
    for a, b, c in zip(found, plain, dense(*arrays, ids, None), strict=True):
        error, theirs = (np.linalg.norm(np.asarray(x) - c) / np.linalg.norm(c) for x in (a, b))
        assert error <= max(2e-6, 1.5 * theirs)


def test_large_scores():
    """One key has all the weight; the others' would overflow if no maximum were subtracted."""
    q, k, v, d_out = drawn(1, 150, 2, 1, 8)
    arrays = 300 * q, 20 * k, v, d_out
    ids = layout(150, [150])
    found, expected = with_gradients(*arrays, ids), dense(*arrays, ids, None)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-2)
    assert all(np.isfinite(x).all() for x in found)


def test_nothing_but_padding():
    found = with_gradients(*drawn(2, 100, 2, 1, 8), layout(100, [], [-100]))
    assert all(not np.any(x) for x in found)


def test_bfloat16_is_computed_in_float32():
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in drawn(1, 150, 4, 2, 8)]
    ids = layout(150, [90, 50])
    exact = with_gradients(*(x.astype(jnp.float32) for x in arrays), ids)
    for a, b in zip(with_gradients(*arrays, ids), exact, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))


# ------------------------------------------------------------------------------------ which tiles


@functools.partial(jax.jit, static_argnums=1)
def visited(ids, window):
    return key_tiles(_flat_segments(ids), window)


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(layouts(1, 280), layouts(3, 100), layouts(2, 64)), st.sampled_from([None, 1, 20, 65])
)
def test_the_tiles_visited_are_those_between_the_first_and_the_last_in_sight(ids, window):
    B, T = ids.shape
    size = B * T + -B * T % TILE
    mask = np.zeros((size, size), bool)
    for b, of_row in enumerate(sees(ids, window)):
        mask[b * T : (b + 1) * T, b * T : (b + 1) * T] = of_row
    pairs = mask.reshape(size // TILE, TILE, -1, TILE).any((1, 3))
    first, end = map(np.asarray, visited(ids, window))
    for of_tile, a, b in zip(pairs, first, end, strict=True):
        needed = np.flatnonzero(of_tile)
        assert (a, b) == (needed[0], needed[-1] + 1) if len(needed) else a == b


@pytest.mark.parametrize("T", [512, 4096])
def test_work_follows_segments_and_windows_and_not_rows(T):
    def most(length, window=None):
        ids = layout(T, [length] * (T // length))
        first, end = visited(ids, window)
        return int((end - first).max())

    assert most(60) == 2
    assert most(64) == 1
    assert most(200) == 4
    assert most(T) == T // TILE
    assert most(T, window=65) == 2


def test_what_no_query_sees_is_not_read():
    """A tile that was visited would spread its NaN, masked or not."""
    arrays = drawn(1, 512, 2, 1, 8)
    ids = layout(512, [100, -28, 384])
    clean = with_gradients(*arrays, ids, 65)
    dirty = [x.copy() for x in arrays]
    for x in dirty:
        x[:, :128] = np.nan
    for a, b in zip(clean, with_gradients(*dirty, ids, 65), strict=True):
        np.testing.assert_array_equal(a[:, 128:], b[:, 128:])
        assert np.isnan(b[:, :128]).any()


# -------------------------------------------------------------------------------------- in a model


def test_a_model_learns_the_same():
    rng = np.random.default_rng(0)
    lengths = [(5, 30), (1, 2), (40, 50), (3, 80), (2, 9), (20, 1)]
    texts = [example(*(rng.integers(0, CONFIG.vocab_size, n) for n in pair)) for pair in lengths]
    batch = collate(texts, Shape(rows=4, length=96, examples=7))
    weights = np.arange(1.0, 8.0, dtype=np.float32)

    def results(backend):
        decoder = Decoder(CONFIG, attention=backend)

        def loss(params):
            found = weighted_nll(decoder, params, batch, lambda _, n: (weights / (n + 1), None))
            return found[:2]

        grads, sums = jax.jit(jax.grad(loss, has_aux=True))(drawn_params())
        return [sums, *jax.tree.leaves(grads)]

    for a, b in zip(results("blocks"), results("xla"), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_what_is_asked_of_other_backends_holds_for_it():
    assert _fault(BACKENDS["blocks"], "float32", CONFIG) is None


def on_two_devices():
    """Runs in a process of its own: rows, and then heads, on two devices."""
    ids = layout(150, [70, 60], [150])
    arrays = drawn(2, 150, 4, 2, 8)
    expected = dense(*arrays, ids, None)

    def f(q, k, v, d_out):
        g = functools.partial(attention, segment_ids=ids, backend="blocks")
        out, pull = jax.vjp(g, q, k, v)
        return out, *pull(d_out)

    for shape in (MeshShape(data=2, fsdp=1), MeshShape(fsdp=1, tensor=2)):
        with jax.set_mesh(make_mesh(shape)):
            found = jax.jit(f)(*place_rows(tuple(arrays)))
        assert len(found[0].sharding.device_set) == 2
        for a, b in zip(found, expected, strict=True):
            assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b)


def test_two_devices():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    environment.pop("XLA_FLAGS", None)  # may set a device count too
    done = subprocess.run(
        [sys.executable, Path(__file__)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 devices" in done.stdout


if __name__ == "__main__":
    on_two_devices()
    print(jax.device_count(), "devices")
