"""`verify`: equal logits pass, wrong ones are caught and placed, and what is missing is said."""

import dataclasses
import math
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_llama import make_tiny_llama

from main_jax import verify as module
from main_jax.errors import UserError
from main_jax.lm.hf import CheckpointError, load_checkpoint, load_config
from main_jax.verify import Comparison, Verdict, compare, verify, window_note

try:
    import torch
except ImportError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="compares with Transformers on PyTorch")

POSITIONS = 200


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny_llama(tmp_path_factory.mktemp("tiny"), seed=3))


def verdict_of(difference, tolerance=1e-3, note="", **columns):
    """Build a verdict by hand from the differences at each position."""
    difference = np.asarray(difference, float)
    n = len(difference)
    c = dict(kl=np.zeros(n), same_argmax=np.ones(n, bool), std=np.full(n, 1.5)) | columns
    return Verdict("model", Comparison(difference, **c), tolerance, 0, note, {"jax": "1"})


# ------------------------------------------------------------------------------------ with PyTorch


@needs_torch
def test_a_tiny_llama_is_equal(tiny, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", 64 * 307)  # four chunks, the last one short
    verdict = verify(tiny, positions=POSITIONS)
    assert verdict.ok and verdict.positions == POSITIONS
    assert verdict.max_difference.shape == verdict.kl.shape == (POSITIONS,)
    assert 0 < verdict.max_difference.max() < 1e-4
    assert verdict.kl.min() >= 0 and verdict.kl.max() < 1e-6
    assert verdict.comparison.same_argmax.all()
    assert verdict.comparison.std.min() > 0.5  # so the differences above are small
    assert verdict.show().endswith("equal within 0.001")
    assert {"main_jax", "transformers", "torch"} < verdict.versions.keys()
    assert not verify(tiny, positions=POSITIONS, tolerance=1e-9).ok


@needs_torch
def test_tied_and_stretched_is_equal(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    path = make_tiny_llama(tmp_path / "m", tie_word_embeddings=True, rope_scaling=scaling)
    verdict = verify(str(path), positions=POSITIONS, seed=1)
    assert verdict.ok
    # Tied to an embedding of unit size, these logits are some seven times as large.
    assert (verdict.max_difference / verdict.comparison.std).max() < 1e-4


@needs_torch
def test_another_rope_theta_grows_with_the_position(tiny, monkeypatch):
    def wrong(path):
        config, params = load_checkpoint(path)
        return dataclasses.replace(config, rope_theta=config.rope_theta * 1.002), params

    monkeypatch.setattr(module, "load_checkpoint", wrong)
    verdict = verify(tiny, positions=POSITIONS)
    assert not verdict.ok
    assert verdict.max_difference[0] < 1e-5  # at position 0 nothing is rotated
    means = [part.mean() for part in np.array_split(verdict.max_difference, 4)]
    assert means == sorted(means) and means[-1] > 3 * means[0]
    assert "NOT equal: logits differ by more than 0.001" in verdict.show().splitlines()[-1]


@needs_torch
@pytest.mark.parametrize("name", ["q", "k", "gate"])
def test_a_weight_in_the_wrong_order_is_caught(tiny, monkeypatch, name):
    def wrong(path):
        config, params = load_checkpoint(path)
        layer = params["layers"]["mlp" if name == "gate" else "attention"][name]
        layer["kernel"] = layer["kernel"][..., ::-1]
        return config, params

    monkeypatch.setattr(module, "load_checkpoint", wrong)
    verdict = verify(tiny, positions=16)
    assert not verdict.ok and verdict.kl.max() > 1e-3


@needs_torch
def test_nan_in_a_weight_is_not_equal(tmp_path, capfd):
    path = make_tiny_llama(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    verdict = verify(str(path), positions=8)
    assert not verdict.ok
    last = verdict.show().splitlines()[-1]
    assert last == "NOT equal: their logits are not finite at 8 of 8 positions, first at position 0"
    assert "Warning" not in capfd.readouterr().err


@needs_torch
def test_nan_in_ours_alone_is_not_equal(tiny, monkeypatch):
    def wrong(path):
        config, params = load_checkpoint(path)
        return config, jax.tree.map(lambda x: x * np.nan, params)

    monkeypatch.setattr(module, "load_checkpoint", wrong)
    verdict = verify(tiny, positions=8)
    assert not verdict.ok
    assert "our logits are not finite at 8 of 8 positions" in verdict.show()


@needs_torch
def test_transformers_is_silent_and_left_as_it_was(tiny, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    verify(tiny, positions=8)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    out, err = capfd.readouterr()
    assert out == ""
    assert all(line.startswith((tiny, "load ")) for line in err.splitlines())  # our own words


@needs_torch
def test_what_transformers_refuses_is_one_line(tiny, monkeypatch):
    from transformers import AutoModelForCausalLM

    def fail(*args, **kw):
        raise KeyError("no\nsuch model")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(UserError, match="transformers cannot load or run it") as error:
        verify(tiny, positions=8)
    assert "KeyError" in str(error.value) and "\n" not in str(error.value)


# --------------------------------------------------------------------------------- without PyTorch


def test_missing_torch_says_how_to_install_it(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="pip install torch") as error:
        verify(tiny)
    assert "https://download.pytorch.org/whl/cpu" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        pytest.param(  # which takes the folder's config, looked at only where PyTorch is there
            {"positions": 513}, ["513", "max_position_embeddings", "512"], marks=needs_torch
        ),
        ({"positions": 1}, ["positions", "1", "2"]),
        ({"tolerance": 0.0}, ["tolerance"]),
        ({"tolerance": math.nan}, ["tolerance", "nan"]),
        ({"seed": -1}, ["seed", "-1"]),
    ],
)
def test_arguments_are_refused_by_name(tiny, options, parts):
    with pytest.raises(UserError) as error:
        verify(tiny, **options)
    assert all(part in str(error.value) for part in parts)


@needs_torch
def test_folders_are_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        verify(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        verify(str(tmp_path))


def test_compare_by_hand():
    theirs = np.log([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]])
    ours = np.log([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]])
    ours[1] += 1  # no other distribution, and yet other logits
    c = compare(theirs, ours)
    np.testing.assert_allclose(c.kl, [0.25 * math.log(2), 0], atol=1e-14)
    np.testing.assert_allclose(c.max_difference, [math.log(2), 1])
    assert c.same_argmax.tolist() == [False, True]
    np.testing.assert_allclose(c.std[0], math.log(2) * math.sqrt(2) / 3)


def test_compare_keeps_what_is_not_finite():
    theirs = np.zeros((5, 4), np.float32)
    ours = theirs.copy()
    ours[1, 2], ours[2, 0], theirs[3, 1] = np.nan, -np.inf, np.inf
    ours[3, 1] = np.inf  # inf on both sides is no agreement
    c = compare(theirs, ours)
    assert np.isnan(c.max_difference).tolist() == [False, True, True, True, False]
    assert np.isnan(c.kl).tolist() == [False, True, True, True, False]
    assert c.same_argmax.tolist() == [True, False, False, False, True]
    assert not verdict_of(c.max_difference, kl=c.kl).ok
    large = np.float32(3e38) * np.array([[1, -1]])  # finite, with a difference beyond float32
    assert np.isfinite(compare(large, -large)).all()


def test_ok_is_about_the_worst_position():
    assert verdict_of([0, 1e-3]).ok
    assert not verdict_of([0, 1.1e-3]).ok
    for broken in (np.nan, np.inf):
        assert not verdict_of([0, broken]).ok
        assert not verdict_of([0, 0], kl=np.array([broken, 0.0])).ok


def test_show_has_a_line_for_each_range_and_the_verdict():
    difference = np.linspace(0, 2e-2, 20)
    lines = verdict_of(difference, note="a note").show().splitlines()
    start = next(i for i, line in enumerate(lines) if "max |Δ logit|" in line) + 1
    table = lines[start : lines.index("", start)]
    assert len(table) == 8
    assert len({len(line) for line in [lines[start - 1], *table]}) == 1  # columns line up
    assert table[0].split()[:2] == ["0-2", "2.1e-03"]
    assert table[-1].split() == ["18-19", "2.0e-02", "0.0e+00", "0.0e+00", "100.0%", "1.5"]
    assert lines[-2] == "a note"
    assert lines[-1] == (
        "NOT equal: logits differ by more than 0.001 at 19 of 20 positions,"
        " first at position 1; most, 0.02, at position 19"
    )
    few = verdict_of([0.0, 0.0, np.nan]).show()
    assert "2-2" in few and "nan" in few
    assert few.endswith(
        "NOT equal: our logits are not finite at 1 of 3 positions, first at position 2"
    )


def test_a_window_that_was_not_reached_is_said(tiny):
    config = dataclasses.replace(load_config(tiny), sliding_window=64)
    assert window_note(config, 65) == window_note(load_config(tiny), 8) == ""
    assert "--positions 65" in window_note(config, 64)
    note = window_note(dataclasses.replace(config, max_position_embeddings=64), 64)
    assert "--positions" not in note and "max_position_embeddings 64" in note
