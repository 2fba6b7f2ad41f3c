"""Parameters for inference: half the bytes where bfloat16 computes, and the same results bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import FAMILIES, make_tiny_llama

from main_jax.config import Runtime
from main_jax.lm.batches import Example
from main_jax.lm.checkpoint import Checkpoints, load_params
from main_jax.lm.generate import Sampling, generate
from main_jax.models import LanguageModel, open_checkpoint
from main_jax.score import Side, nll_sums


def drawn_examples(vocab_size: int) -> list[Example]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 60, 24)
    return [
        Example(rng.integers(3, vocab_size, n).astype(np.int32), np.arange(n) >= n // 2)
        for n in lengths
    ]


def computed(decoder, params) -> tuple:
    """NLLs, greedy and sampled texts."""
    examples = drawn_examples(decoder.config.vocab_size)
    ((sums, _),) = nll_sums([Side(LanguageModel(decoder, params), examples, 64)], 512)
    texts = [
        generation.tokens.tolist()
        for sampling in (Sampling(12), Sampling(12, temperature=1.0, top_p=0.9))
        for generation in generate(
            decoder, params, [e.tokens for e in examples], [str(i) for i in range(24)], sampling,
            stop_ids=(), seed=0,
        )
    ]  # fmt: skip
    return sums.tolist(), texts


@pytest.mark.parametrize("family", ["llama-2", "qwen2", "qwen2-tied", "qwen3"])
def test_results_are_those_of_float32_parameters(family, tmp_path):
    make_tiny_llama(tmp_path / "model", seed=1, num_hidden_layers=2, **FAMILIES[family])
    checkpoint = open_checkpoint(str(tmp_path / "model"), Runtime(compute_dtype="bfloat16"))
    decoder, whole, half = checkpoint.decoder, checkpoint.load(), checkpoint.model().params
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save_params(3, whole)
    stored = load_params(tmp_path / "checkpoints", decoder, inference=True)
    paths = jax.tree_util.tree_leaves_with_path(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(whole)} == {jnp.dtype("float32")}
    for (path, leaf), same, source in zip(
        paths, jax.tree.leaves(stored), jax.tree.leaves(whole), strict=True
    ):
        norm = path[-1].key == "scale"
        assert leaf.dtype == same.dtype == ("float32" if norm else "bfloat16"), path
        assert np.array_equal(leaf, source.astype(leaf.dtype)), path
        assert np.array_equal(leaf, same), path
    assert any(path[-1].key == "bias" for path, _ in paths) == family.startswith("qwen2")
    expected = computed(decoder, whole)
    assert computed(decoder, half) == expected
    assert len({tuple(text) for text in expected[1]}) > 30
    # The dtype matters: rounding what is to stay float32 is seen.
    rounded = jax.tree.map(lambda x: x + 0.003 * (x.dtype == jnp.float32), half)
    assert computed(decoder, rounded) != expected


def test_where_float32_computes_nothing_is_rounded(tmp_path):
    make_tiny_llama(tmp_path / "model", seed=1, num_hidden_layers=2)
    checkpoint = open_checkpoint(str(tmp_path / "model"), Runtime(compute_dtype="float32"))
    trees = zip(
        jax.tree.leaves(checkpoint.load()), jax.tree.leaves(checkpoint.model().params), strict=True
    )
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in trees)
