"""Kernels against the xla backend, as far as a CPU goes; which backend is chosen; the comparison."""

import dataclasses
import importlib.machinery
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from main_jax.lm import attention as module
from main_jax.lm.arch import DecoderConfig
from main_jax.lm.attention import (
    BACKENDS,
    Backend,
    attention,
    check_backend,
    choose,
    target_platform,
)
from main_jax.lm.sharding import MeshShape, make_mesh, place_rows

CONFIG = DecoderConfig(
    vocab_size=7,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)


def rows(*lengths):
    """Segments of rows of segment lengths, negative ones being padding."""
    ids = [np.repeat([i + 1 if n > 0 else 0 for i, n in enumerate(r)], np.abs(r)) for r in lengths]
    return jnp.asarray(ids, jnp.int32)


def random_heads(B, T, N, K, H, dtype="float32"):
    rng = np.random.default_rng(3)
    return [jnp.asarray(rng.normal(size=(B, T, n, H)), dtype) for n in (N, K, K)]


def results(backend, q, k, v, ids, window=None):
    """Outputs and the gradients by q, k and v of a random function of them."""
    tilt = np.random.default_rng(4).normal(size=q.shape).astype(np.float32)

    def f(q, k, v):
        out = attention(q, k, v, ids, window, backend)
        return (out.astype(jnp.float32) * tilt).sum(), out

    grads, out = jax.jit(jax.grad(f, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x) for x in (out, *grads)]


def assert_same(found, expected, ids):
    for a, b in zip(found, expected, strict=True):
        assert np.abs(b).max() > 0.5
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
        assert np.all(a[np.asarray(ids) == 0] == 0)


# ------------------------------------------------------------------------------------------ splash


@pytest.mark.parametrize(
    ("heads", "window", "row"),
    [
        ((4, 2, 8), None, [90, -7, 60, 43]),  # T 200: one tile
        ((4, 2, 8), 2, [-3, 50, 147]),
        ((3, 1, 20), 130, [-3, 350, 1, 146]),  # T 500: a tile of 512
        ((2, 2, 16), 40, [333, -70, 197]),  # T 600: five tiles of 128, some of them skipped
    ],
)
def test_splash_equals_xla(heads, window, row):
    T = sum(map(abs, row))
    ids = rows(row, [-1, T - 10, -9])
    q, k, v = random_heads(2, T, *heads)
    expected = results("xla", q, k, v, ids, window)
    assert_same(results("splash", q, k, v, ids, window), expected, ids)


def tpu_text(f, *args):
    return jax.jit(f).trace(*args).lower(lowering_platforms=("tpu",)).as_text()


def test_splash_is_lowered_for_a_tpu_where_there_is_none():
    ids = rows([70, -10, 120])
    args = random_heads(1, 200, 4, 2, 64, "bfloat16")

    def loss(q, k, v):
        return attention(q, k, v, ids, 50).astype("float32").sum()

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    assert "tpu_custom_call" not in tpu_text(step, *args)
    with target_platform("tpu"):
        text = tpu_text(step, *args)
        for phase in ("fwd_segmented_residuals", "dq_segmented", "dkv_segmented"):
            assert f"splash_mha_{phase}" in text
        assert text.count("@tpu_custom_call") == 3
    assert "tpu_custom_call" not in tpu_text(step, *args)  # nothing is left in JAX's caches


def on_eight_devices():
    """Runs in a process of its own: splash under a mesh equals xla without one."""
    for B, N, K in ((4, 4, 2), (3, 3, 1)):  # the mesh divides all of it; none of it
        ids = rows([40, 20], [-10, 50], [60], [1, -19, 40])
        ids = ids[:B]
        q, k, v = random_heads(B, 60, N, K, 8)
        expected = results("xla", q, k, v, ids, 30)
        with jax.set_mesh(make_mesh(MeshShape(2, 2, 2))):
            if B == 4:
                q, k, v = place_rows((q, k, v))
            assert_same(results("splash", q, k, v, ids, 30), expected, ids)
            with target_platform("tpu"):
                text = tpu_text(attention, q, k, v, ids)
            shape = "1x2x128x8" if B == 4 else "3x3x128x8"  # of a device's part of q
            assert "tpu_custom_call" in text and f"tensor<{shape}xf32>" in text
    with jax.set_mesh(make_mesh(MeshShape(2, 2, 2))):
        assert check_backend("splash", "float32", CONFIG) == "splash"


def test_splash_on_eight_devices_equals_xla_on_one():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    environment.pop("XLA_FLAGS", None)  # may set a device count too
    done = subprocess.run(
        [sys.executable, Path(__file__)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8 devices" in done.stdout


# --------------------------------------------------------------------------- cuDNN's and Tokamax's


def fake_kernel(query, key, value, bias=None, mask=None, *, implementation=None):
    """What both libraries' functions compute; where a query sees nothing, NaN all over."""
    out = dot_product_attention(query, key, value, mask=mask, implementation="xla")
    return out * jnp.where(mask.any(-1).swapaxes(1, 2)[..., None], 1, jnp.nan)


dot_product_attention = jax.nn.dot_product_attention


@pytest.mark.parametrize("name", ["cudnn", "tokamax"])
def test_kernels_that_take_a_mask_equal_xla(monkeypatch, name):
    fake = types.ModuleType("tokamax")
    fake.__spec__ = importlib.machinery.ModuleSpec("tokamax", None)
    fake.dot_product_attention = fake_kernel
    monkeypatch.setitem(sys.modules, "tokamax", fake)
    monkeypatch.setattr(jax.nn, "dot_product_attention", fake_kernel)
    ids = rows([20, -7, 34], [-1, 51, -9])
    heads = random_heads(2, 61, 4, 2, 8)
    any_dtype = dataclasses.replace(BACKENDS[name], refuses=lambda *_: None)
    monkeypatch.setitem(BACKENDS, name, any_dtype)
    for window in (None, 5):
        expected = results("xla", *heads, ids, window)
        with target_platform("gpu"):
            found = results(name, *heads, ids, window)
        assert_same(found, expected, ids)


def test_tokamax_is_available_where_it_is_installed(monkeypatch):
    fake = types.ModuleType("tokamax")
    fake.__spec__ = importlib.machinery.ModuleSpec("tokamax", None)
    monkeypatch.setitem(sys.modules, "tokamax", fake)
    case = dict(platform="gpu", dtype="float32", head_dim=64)
    assert choose("tokamax", **case) == "tokamax"
    assert choose("auto", **case) == "xla"


def test_cudnn_is_lowered_for_a_gpu_where_there_is_none(monkeypatch):
    internals = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    version = types.SimpleNamespace(cudnn_get_version=lambda: 91200)
    monkeypatch.setattr(internals, "cuda_versions", version)
    ids = rows([70, -10, 120])
    heads = random_heads(1, 200, 4, 2, 64, "bfloat16")
    with target_platform("gpu"):
        grads = jax.jit(jax.grad(lambda *x: attention(*x, ids).sum()))
        text = grads.trace(*heads).lower(lowering_platforms=("cuda",)).as_text()
    assert "@__cudnn$fmhaScaleBiasSoftmax(" in text
    assert "@__cudnn$fmhaScaleBiasSoftmaxBackward(" in text


# ------------------------------------------------------------------------------------------ choice


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "expected"),
    [
        ("cpu", "float32", 64, "blocks"),
        ("cpu", "bfloat16", 128, "blocks"),
        ("tpu", "bfloat16", 128, "splash"),
        ("tpu", "float32", 20, "splash"),
        ("tpu", "float16", 128, "xla"),
        ("gpu", "bfloat16", 128, "cudnn"),
        ("gpu", "float16", 64, "cudnn"),
        ("gpu", "float32", 64, "xla"),
        ("gpu", "bfloat16", 20, "xla"),
        ("gpu", "bfloat16", 256, "xla"),
        ("another", "bfloat16", 128, "xla"),
    ],
)
def test_auto(platform, dtype, head_dim, expected):
    case = dict(platform=platform, dtype=dtype, head_dim=head_dim)
    assert choose("auto", **case) == expected
    assert choose("xla", **case | {"platform": "cpu"}) == "xla"
    if expected != "xla":
        assert choose(expected, **case) == expected


def test_short_rows_are_not_worth_tiles():
    case = dict(platform="cpu", dtype="float32", head_dim=64)
    assert [choose("auto", **case, length=n) for n in (1, 191, 192)] == ["xla", "xla", "blocks"]
    assert choose("blocks", **case, length=1) == "blocks"


@pytest.mark.parametrize(
    ("backend", "change", "words"),
    [
        ("flash", {}, "'flash', only auto, splash, cudnn, tokamax, blocks, xla"),
        ("splash", {"platform": "gpu"}, "runs on tpu and cpu, not on gpu"),
        ("splash", {"platform": "tpu", "dtype": "float16"}, "no float16"),
        ("cudnn", {"platform": "cpu"}, "runs on gpu, not on cpu"),
        ("cudnn", {"dtype": "float32"}, "not float32"),
        ("cudnn", {"head_dim": 20}, "multiples of 8 features up to 128, not 20"),
        ("cudnn", {"head_dim": 136}, "not 136"),
        ("tokamax", {}, "not installed"),
    ],
)
def test_a_backend_asked_for_by_name_that_does_not_apply_says_why(
    monkeypatch, backend, change, words
):
    monkeypatch.setitem(sys.modules, "tokamax", None)  # as if it were not installed
    case = dict(platform="gpu", dtype="bfloat16", head_dim=64) | change
    with pytest.raises(ValueError, match=words):
        choose(backend, **case)


# -------------------------------------------------------------------------------------- comparison


def broken(how):
    """The xla backend with one fault."""

    def compute(q, k, v, segment_ids, sliding_window):
        if how == "raises":
            raise NotImplementedError("no such tile\nand more")
        if how == "one segment":
            segment_ids = jnp.minimum(segment_ids, 1)
        if how == "window":
            sliding_window += 1
        out = BACKENDS["xla"].compute(q, k, v, segment_ids, sliding_window)
        if how == "NaN":
            out = out.at[0, 7].set(jnp.nan)
        if how == "padding":
            out += 1e-6
        if how == "gradient":
            out = out + 0.1 * (v - jax.lax.stop_gradient(v)).repeat(q.shape[2] // v.shape[2], 2)
        return out

    return compute


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", r"broken does not run here \(NotImplementedError: no such tile\)"),
        ("one segment", "broken differs from xla in output"),
        ("window", "broken differs from xla in output"),
        ("NaN", "broken differs from xla in output"),
        ("padding", "broken has output other than zero at padding"),
        ("gradient", "broken differs from xla in dv"),
    ],
)
def test_the_comparison_finds_a_broken_kernel(monkeypatch, capsys, how, words):
    backend = Backend(broken(how), ("cpu",), ("cpu",), lambda *_: None)
    backends = {"broken": backend, **BACKENDS}
    monkeypatch.setattr(module, "BACKENDS", backends)
    monkeypatch.setattr(module, "_verdicts", {})
    config = dataclasses.replace(CONFIG, sliding_window=4096)
    assert check_backend("auto", "float32", config) == "xla"
    (said,) = capsys.readouterr().err.splitlines()
    assert "xla takes its place" in said
    with pytest.raises(ValueError, match=words):
        check_backend("broken", "float32", config)
    assert check_backend("auto", "float32", config) == "xla"
    assert check_backend("xla", "float32", config) == "xla"
    assert capsys.readouterr().err == ""  # said once, and not compared again


def test_a_kernel_that_passes_the_comparison_is_kept(monkeypatch, capsys):
    monkeypatch.setattr(module, "_verdicts", {})
    config = dataclasses.replace(CONFIG, sliding_window=300)
    assert check_backend("splash", "bfloat16", config) == "splash"
    assert list(module._verdicts.values()) == [None]
    assert check_backend("auto", "bfloat16", config) == "auto"  # ours on a CPU: nothing to compare
    with target_platform("tpu"):  # no such device: nothing to compare with
        assert check_backend("auto", "bfloat16", CONFIG) == "auto"
        with pytest.raises(ValueError, match="not on tpu"):
            check_backend("cudnn", "bfloat16", CONFIG)
    assert len(module._verdicts) == 1
    assert capsys.readouterr().err == ""


def test_the_comparison_is_on_several_segments_with_padding(monkeypatch):
    """Over several tiles, and no multiple of one."""
    seen = []

    def compute(q, k, v, segment_ids, sliding_window):
        seen.append(np.asarray(segment_ids))
        return BACKENDS["xla"].compute(q, k, v, segment_ids, sliding_window)

    backend = Backend(compute, ("cpu",), (), lambda *_: None)
    assert module._fault(backend, "float32", CONFIG) is None
    ids = seen[0]
    assert ids.shape == (2, 1000) and (ids == 0).any() and ids.max() == 5


if __name__ == "__main__":
    on_eight_devices()
    print(jax.device_count(), "devices")
