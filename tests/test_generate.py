"""Generation: the cached loop against one that recomputes everything, and sampling against NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_decoder import CONFIG, DECODER, drawn_params, logits_of

from main_jax.lm.decode import admit, decode
from main_jax.lm.generate import Sampling, Statistics, generate, row_key
from main_jax.lm.model import Decoder
from main_jax.lm.sampling import nucleus_mask, sample

NEW = 12
LIMIT = CONFIG.max_position_embeddings - NEW
GREEDY = Sampling(max_new_tokens=NEW)
DRAWN = Sampling(max_new_tokens=NEW, temperature=1.5, top_p=0.95)
MARGIN = 1e-4
"""Below this difference of the two largest logits, rounding may choose; nothing after it counts."""


@functools.cache
def prompts():
    """One or more of every length bucket (32, 48, 64, 84), out of order, both ends of the range."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 61, n) for n in (7, 40, 1, LIMIT, 32, 33, 64, 20)]


IDS = [f"row-{i}" for i in range(8)]


def gen(prompts, ids, sampling=GREEDY, stop_ids=(), seed=0, params=None, **how):
    return generate(
        DECODER, params or drawn_params(), prompts, ids, sampling,
        stop_ids=stop_ids, seed=seed, batch_size=3, **how,
    )  # fmt: skip


@functools.cache
def greedy():
    return gen(prompts(), IDS)


def uncached_greedy(prompt, new):
    """Argmax over a full forward pass per token, and the smallest margin before each token."""
    tokens, margins = list(prompt), []
    for _ in range(new):
        logits = logits_of(tokens)[-1]
        second, first = np.sort(logits)[-2:]
        margins.append(first - second)
        tokens.append(int(np.argmax(logits)))
    return tokens[len(prompt) :], np.minimum.accumulate(margins)


def test_greedy_generation_equals_an_uncached_loop():
    compared = 0
    for prompt, result in zip(prompts(), greedy(), strict=True):
        expected, margins = uncached_greedy(prompt, NEW)
        sure = int(np.sum(margins > MARGIN))
        assert result.tokens[:sure].tolist() == expected[:sure]
        assert len(result.tokens) == NEW and result.finish_reason == "length"
        compared += sure
    assert compared > 0.9 * NEW * len(prompts())
    assert len({tuple(r.tokens) for r in greedy()}) == len(prompts())


def test_a_stop_token_ends_a_row_and_is_not_part_of_it():
    """Two stop ids; the expectation is the unstopped row, cut."""
    stop_ids = (int(greedy()[0].tokens[0]), int(greedy()[1].tokens[5]))
    chosen = [0, 1, 2, 4, 7]  # two buckets
    stopped = gen([prompts()[i] for i in chosen], [IDS[i] for i in chosen], stop_ids=stop_ids)
    for free, cut in zip([greedy()[i] for i in chosen], stopped, strict=True):
        ends = np.flatnonzero(np.isin(free.tokens, stop_ids))
        end = ends[0] if len(ends) else NEW
        assert cut.tokens.tolist() == free.tokens[:end].tolist()
        assert cut.finish_reason == ("stop" if len(ends) else "length")
    lengths = [len(result.tokens) for result in stopped]
    assert lengths[0] == 0 and 0 < lengths[1] <= 5
    assert {r.finish_reason for r in stopped} == {"stop", "length"}


def test_the_longest_prompt_allowed_and_one_more():
    assert len(prompts()[3]) == LIMIT and len(greedy()[3].tokens) == NEW
    for length in (LIMIT + 1, 0):
        with pytest.raises(ValueError, match=f"prompt b: {length} tokens, expected 1 to {LIMIT}"):
            gen([np.zeros(3, int), np.zeros(length, int)], ["a", "b"])


def test_no_prompts_give_no_results():
    assert gen([], []) == []


def test_finished_rows_are_reported_in_batches():
    done = []
    gen([prompts()[0]] * 7, [f"{i}" for i in range(7)], on_done=done.append)
    assert done == [3, 3, 1]


# ------------------------------------------------------------------------------------------ refill


LIMITS = [1, 12, 3, 7, 12, 2, 5, 9]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
def test_a_row_ends_at_its_limit_whatever_shares_the_batch(batch_size):
    found = generate(
        DECODER, drawn_params(), prompts(), IDS, GREEDY,
        stop_ids=(), seed=0, batch_size=batch_size, limits=LIMITS,
    )  # fmt: skip
    for result, free, limit, prompt in zip(found, greedy(), LIMITS, prompts(), strict=True):
        _, margins = uncached_greedy(prompt, limit)
        sure = int(np.sum(margins > MARGIN))
        assert len(result.tokens) == limit and result.finish_reason == "length"
        assert result.tokens[:sure].tolist() == free.tokens[:sure].tolist()


def test_limits_are_between_one_and_max_new_tokens():
    for limit in (0, NEW + 1):
        with pytest.raises(ValueError, match=f"prompt row-1: at most {limit} new tokens"):
            gen(prompts()[:2], IDS[:2], limits=[1, limit])


def test_a_free_row_takes_the_next_prompt_and_nothing_is_compiled_anew():
    rng = np.random.default_rng(3)
    asked = [rng.integers(0, 61, n) for n in rng.integers(1, 60, 40)]  # three buckets
    limits = [int(n) for n in rng.integers(1, NEW + 1, 40)]
    ids, statistics = [f"{i}" for i in range(40)], Statistics()
    before = decode._cache_size(), admit._cache_size()
    rows = gen(asked, ids, limits=limits, statistics=statistics)
    assert decode._cache_size() - before[0] <= 1 and admit._cache_size() - before[1] <= 3
    assert [len(row.tokens) for row in rows] == limits
    s = statistics
    assert s.rows == 40 and s.new_tokens == s.live_row_steps == sum(limits)
    assert s.row_steps == 3 * s.steps and s.prefills == 40
    # One at a time is refilled: only at the end does a row go without a prompt.
    assert s.row_steps - s.live_row_steps <= 3 * NEW
    assert s.utilisation == sum(limits) / (3 * s.steps) > 0.9


def test_a_window_is_that_of_packed_rows():
    """In a cache of several blocks, read from where the window begins."""
    config = dataclasses.replace(CONFIG, sliding_window=9, max_position_embeddings=256)
    decoder = Decoder(config)
    asked = [np.random.default_rng(n).integers(0, 61, n) for n in (3, 70, 200)]
    found = generate(
        decoder, drawn_params(), asked, IDS[:3], Sampling(6), stop_ids=(), seed=0, batch_size=2
    )
    for prompt, result in zip(asked, found, strict=True):
        tokens = list(prompt)
        for token in result.tokens:
            logits = logits_of(tokens, decoder=decoder)[-1]
            second, first = np.sort(logits)[-2:]
            if first - second < MARGIN:
                break
            assert token == np.argmax(logits)
            tokens.append(token)
        assert len(tokens) > len(prompt) + 2


# ---------------------------------------------------------------------------------------- sampling


def test_a_sampled_row_depends_on_its_id_and_the_seed_alone():
    rng = np.random.default_rng(1)
    asked = [rng.integers(0, 61, n) for n in (5, 9, 9, 17, 30)]
    asked[2] = asked[1]  # the same prompt under two ids
    ids = ["a", "b", "c", "d", "e"]
    together = [r.tokens.tolist() for r in gen(asked, ids, DRAWN)]
    for order in ([4, 2, 0, 3, 1], [2], [3, 1], [0, 1, 2, 3, 4]):
        again = gen([asked[i] for i in order], [ids[i] for i in order], DRAWN)
        assert [r.tokens.tolist() for r in again] == [together[i] for i in order]
    assert together[1] != together[2]
    other = [r.tokens.tolist() for r in gen(asked, ids, DRAWN, seed=1)]
    assert all(a != b for a, b in zip(together, other, strict=True))


def test_every_token_of_a_row_is_drawn_anew():
    """From a head of zeros: the same logits every time, 58 of 61 tokens in the nucleus."""
    flat = drawn_params() | {"head": jax.tree.map(np.zeros_like, drawn_params()["head"])}
    rows = gen([np.arange(3)] * 30, [f"{i}" for i in range(30)], DRAWN, params=flat)
    tokens = np.array([row.tokens for row in rows])
    assert tokens.shape == (30, NEW)
    repeats = np.mean(tokens[:, 1:] == tokens[:, :-1])
    assert repeats < 0.06  # 1 / 58 expected, 330 pairs
    assert np.bincount(tokens.ravel(), minlength=61).max() < 20  # 360 / 58 expected


def test_keys_are_as_many_as_ids_and_seeds():
    keys = {tuple(row_key(seed, f"{i}")) for seed in range(20) for i in range(20)}
    assert len(keys) == 400
    assert row_key(1, "11").tolist() != row_key(11, "1").tolist()


def test_top_k_of_one_is_greedy():
    one = Sampling(max_new_tokens=NEW, temperature=1.3, top_k=1)
    chosen = [0, 2, 4, 7]  # one bucket
    found = gen([prompts()[i] for i in chosen], [IDS[i] for i in chosen], one)
    for i, result in zip(chosen, found, strict=True):
        assert result.tokens.tolist() == greedy()[i].tokens.tolist()


def nucleus(logits, sampling):
    """Token probabilities after temperature, top-k and top-p, by sorting and counting."""
    scaled = np.asarray(logits, np.float64) / sampling.temperature
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    order = order[: sampling.top_k or len(order)]
    weights = np.exp(scaled[order] - scaled.max())
    weights /= weights.sum()
    kept, total = [], 0.0
    for i, w in zip(order, weights, strict=True):
        kept.append((i, w))
        total += w
        if total >= sampling.top_p:
            break
    probs = np.zeros(len(scaled))
    for i, w in kept:
        probs[i] = w / total
    return probs


@functools.partial(jax.jit, static_argnums=2)
def draw(logits, seed, sampling):
    keys = jax.random.split(jax.random.key(seed), 20_000)
    return sample(jnp.broadcast_to(logits, (20_000, logits.shape[0])), keys, sampling)


LOGITS = np.array([0.3, 2.0, -1.0, 1.1, 1.9, -3.0, 0.9, 0.0, 1.6, -0.4, 0.5], np.float32)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=2.5, top_p=0.6),
        Sampling(temperature=1.0, top_p=0.3),
        Sampling(temperature=0.7, top_p=0.9),
        Sampling(temperature=1.0, top_k=3),
        Sampling(temperature=1.5, top_k=5, top_p=0.7),
        Sampling(temperature=1.0, top_k=50, top_p=0.9),
    ],
    ids=str,
)
def test_sampling_frequencies_equal_the_nucleus(sampling):
    probs = nucleus(LOGITS, sampling)
    found = np.bincount(draw(LOGITS, 0, sampling), minlength=len(LOGITS)) / 20_000
    assert set(np.flatnonzero(found)) == set(np.flatnonzero(probs))
    assert np.all(np.abs(found - probs) <= 4.5 * np.sqrt(probs * (1 - probs) / 20_000))


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.floats(-4, 4, width=32), min_size=6, max_size=6, unique=True), st.integers(0, 99)
)
def test_nothing_outside_the_nucleus_is_drawn(logits, seed):
    sampling = Sampling(temperature=0.8, top_p=0.75)
    probs = nucleus(logits, sampling)
    scaled = np.sort(np.exp(np.array(logits) / 0.8))[::-1]
    reached = np.cumsum(scaled / scaled.sum())
    # Else rounding decides who is in.
    assume(np.abs(reached - 0.75).min() > 1e-4 and np.diff(np.sort(logits)).min() > 1e-4)
    found = np.bincount(draw(np.array(logits, np.float32), seed, sampling), minlength=6)
    assert not np.any(found[probs == 0])
    assert np.all(found[probs > 0.002] > 0)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_the_nucleus_of_a_large_vocabulary(top_p):
    sampling = Sampling(temperature=0.7, top_p=top_p)
    logits = np.random.default_rng(1).normal(0, 2.5, (3, 4001)).astype(np.float32)
    found = np.asarray(nucleus_mask(jax.nn.softmax(logits / np.float32(0.7)), top_p))
    for row, kept in zip(logits, found, strict=True):
        probs = nucleus(row, sampling)
        # Summed in another order, in float32: the last token of the set may be in or out.
        assert abs(kept.sum() - (probs > 0).sum()) <= 1
        assert row[kept].min() > row[~kept].max()


def test_equally_likely_tokens_are_in_the_nucleus_together():
    probs = np.array([[0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.4, 0.1]], np.float32)
    assert nucleus_mask(probs, 0.5).tolist() == [[True] * 4, [True, True, True, False]]


def test_temperature_zero_is_argmax():
    assert set(np.asarray(draw(LOGITS, 0, Sampling()))) == {1}


@pytest.mark.parametrize(
    "numbers",
    [{"max_new_tokens": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}],
    ids=str,
)
def test_impossible_settings_are_refused(numbers):
    with pytest.raises(ValueError, match=r"max_new_tokens must|sampling needs"):
        Sampling(**numbers)
