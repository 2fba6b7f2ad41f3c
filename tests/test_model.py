"""The decoder against a plain NumPy one, and its invariants: packing, caches, padding, remat."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from main_jax.lm import row_cache
from main_jax.lm.arch import DecoderConfig, RopeScaling
from main_jax.lm.attention import attention, visible
from main_jax.lm.model import REMAT_POLICIES, Decoder

PLAIN = DecoderConfig(
    vocab_size=61,
    hidden_size=20,
    intermediate_size=34,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
)
RICH = dataclasses.replace(
    PLAIN,
    rope_theta=500.0,
    rope_scaling=RopeScaling("llama3", 4.0, 1.0, 4.0, 32),
    sliding_window=5,
    qkv_bias=True,
    qk_norm=True,
    rms_norm_eps=1e-2,
)
TIED = dataclasses.replace(
    PLAIN, tie_word_embeddings=True, rope_scaling=RopeScaling("linear", 2.5), num_kv_heads=6
)
CONFIGS = {"plain": PLAIN, "rich": RICH, "tied": TIED}


@functools.cache
def params_of(config):
    """Draw parameters whose biases and scales are random too, so that each of them matters."""
    leaves, tree = jax.tree.flatten(Decoder(config).init(jax.random.key(1)))
    rng = np.random.default_rng(2)
    return jax.tree.unflatten(tree, [x + 0.3 * rng.normal(size=x.shape) for x in leaves])


@functools.partial(jax.jit, static_argnums=0)
def run(decoder, params, tokens, positions, segment_ids):
    """Give logits, `[B, T, V]`."""
    hidden, _ = decoder.apply(params, tokens, positions, segment_ids)
    return hidden @ decoder.unembed(params)


@functools.partial(jax.jit, static_argnums=0)
def run_cached(decoder, params, tokens, positions, segment_ids, cache):
    hidden, cache = decoder.apply(params, tokens, positions, segment_ids, cache)
    return hidden @ decoder.unembed(params), cache


@functools.partial(jax.jit, static_argnums=0)
def prefill(decoder, params, tokens, positions, segment_ids):
    hidden, new = decoder.apply(params, tokens, positions, segment_ids, prefill=True)
    return hidden @ decoder.unembed(params), new


def pack(*rows):
    """Make rows, each a list of segment lengths (negative: padding), into a random batch."""
    total = max(sum(map(abs, row)) for row in rows)
    tokens = np.random.default_rng(5).integers(0, PLAIN.vocab_size, (len(rows), total))
    positions, segment_ids = np.zeros((2, len(rows), total), np.int32)
    for b, row in enumerate(rows):
        start = 0
        for i, length in enumerate(row):
            if length > 0:
                positions[b, start : start + length] = np.arange(length)
                segment_ids[b, start : start + length] = i + 1
            start += abs(length)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(positions), jnp.asarray(segment_ids)


# ---------------------------------------------------------------------- the other implementation


def numpy_logits(config, params, tokens):
    """Decode one sequence of tokens, head by head and in float64: `[T]` -> `[T, V]`."""
    c, p = config, jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    T, H = len(tokens), c.head_dim

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_eps) * scale

    def rope(x):
        out = np.empty_like(x)
        for t in range(T):
            for i in range(H // 2):
                angle = c.rope_theta ** (-2 * i / H)
                if c.rope_scaling and c.rope_scaling.kind == "linear":
                    angle /= c.rope_scaling.factor
                elif c.rope_scaling:
                    s = c.rope_scaling
                    wavelength, old = 2 * np.pi / angle, s.original_max_position_embeddings
                    blend = (old / wavelength - s.low_freq_factor) / (
                        s.high_freq_factor - s.low_freq_factor
                    )
                    if wavelength > old / s.low_freq_factor:
                        angle /= s.factor
                    elif wavelength > old / s.high_freq_factor:
                        angle = (1 - blend) * angle / s.factor + blend * angle
                z = (x[t, i] + 1j * x[t, i + H // 2]) * np.exp(1j * t * angle)
                out[t, i], out[t, i + H // 2] = z.real, z.imag
        return out

    x = p["embed"]["embedding"][np.asarray(tokens)]
    for i in range(c.num_layers):
        layer = jax.tree.map(lambda w, i=i: w[i], p["layers"])
        a, m = layer["attention"], layer["mlp"]
        h, y = norm(x, layer["input_norm"]["scale"]), np.zeros_like(x)
        for n in range(c.num_heads):
            heads = {}
            for name, index in (("q", n), ("k", n * c.num_kv_heads // c.num_heads)):
                z = h @ a[name]["kernel"][:, index] + (a[name]["bias"][index] if c.qkv_bias else 0)
                heads[name] = rope(norm(z, a[f"{name}_norm"]["scale"]) if c.qk_norm else z)
            v = h @ a["v"]["kernel"][:, index] + (a["v"]["bias"][index] if c.qkv_bias else 0)
            for t in range(T):
                first = max(0, t + 1 - c.sliding_window) if c.sliding_window else 0
                score = np.exp(heads["k"][first : t + 1] @ heads["q"][t] / np.sqrt(H))
                y[t] += score / score.sum() @ v[first : t + 1] @ a["o"]["kernel"][n]
        x = x + y
        h = norm(x, layer["post_attention_norm"]["scale"])
        gate = h @ m["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ m["up"]["kernel"])) @ m["down"]["kernel"]
    head = p["embed"]["embedding"].T if c.tie_word_embeddings else p["head"]["kernel"]
    return norm(x, p["norm"]["scale"]) @ head


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_equal_numpy_one_segment_at_a_time(name):
    config, params = CONFIGS[name], params_of(CONFIGS[name])
    tokens, positions, segment_ids = pack([5, 9, -2, 6], [-3, 12, 4, -3])
    logits = np.asarray(run(Decoder(config), params, tokens, positions, segment_ids))
    for b in range(2):
        for segment in set(np.asarray(segment_ids[b])) - {0}:
            where = np.asarray(segment_ids[b]) == segment
            expected = numpy_logits(config, params, np.asarray(tokens[b])[where])
            assert expected.std() > 0.5
            np.testing.assert_allclose(logits[b, where], expected, atol=2e-4)


# ------------------------------------------------------------------------------ config and params

OTHER_VALUES = {  # field -> another value of it, from RICH
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "sliding_window": 4,
    "qkv_bias": False,
    "qk_norm": False,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
}
SIZES = {f.name for f in dataclasses.fields(DecoderConfig) if f.type is int}


def test_every_field_changes_the_logits():
    """Same parameters, another value of one field (sizes change the parameters themselves)."""
    fields = {field.name for field in dataclasses.fields(DecoderConfig)}
    assert fields == SIZES | set(OTHER_VALUES)
    config = dataclasses.replace(RICH, num_layers=1)
    batch = pack([24])
    params = params_of(config)
    with jax.disable_jit():  # the operations are the same ones each time: nothing to compile
        base = run(Decoder(config), params, *batch)
    scaling = config.rope_scaling
    others = [{name: value} for name, value in OTHER_VALUES.items()] + [
        {"rope_scaling": dataclasses.replace(scaling, **{name: value})}
        for name, value in [
            ("kind", "linear"),
            ("factor", 8.0),
            ("low_freq_factor", 2.0),
            ("high_freq_factor", 8.0),
            ("original_max_position_embeddings", 16),
        ]
    ]
    for other in others:
        changed = dataclasses.replace(config, **other)
        with jax.disable_jit():
            logits = run(Decoder(changed), params, *batch)
        assert np.abs(logits - base).max() > 1e-3, other


def test_parameters_have_the_agreed_names_and_shapes():
    V, D, F, L, N, K, H = 61, 20, 34, 3, 6, 2, 8
    params = Decoder(RICH).init(jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, params) == {
        "embed": {"embedding": (V, D)},
        "layers": {
            "input_norm": {"scale": (L, D)},
            "attention": {
                "q": {"kernel": (L, D, N, H), "bias": (L, N, H)},
                "k": {"kernel": (L, D, K, H), "bias": (L, K, H)},
                "v": {"kernel": (L, D, K, H), "bias": (L, K, H)},
                "o": {"kernel": (L, N, H, D)},
                "q_norm": {"scale": (L, H)},
                "k_norm": {"scale": (L, H)},
            },
            "post_attention_norm": {"scale": (L, D)},
            "mlp": {
                "gate": {"kernel": (L, D, F)},
                "up": {"kernel": (L, D, F)},
                "down": {"kernel": (L, F, D)},
            },
        },
        "norm": {"scale": (D,)},
        "head": {"kernel": (D, V)},
    }
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", CONFIGS)
def test_num_params_is_exact(name):
    shapes = jax.eval_shape(Decoder(CONFIGS[name]).init, jax.random.key(0))
    assert CONFIGS[name].num_params() == sum(x.size for x in jax.tree.leaves(shapes))
    assert ("head" in shapes) is (name != "tied")


def test_initial_spread():
    config = dataclasses.replace(PLAIN, hidden_size=64, intermediate_size=90, vocab_size=200)
    params = Decoder(config).init(jax.random.key(0))
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    residual = (2 * 3) ** -0.5
    for array, std in (
        (params["embed"]["embedding"], 1),
        (params["head"]["kernel"], 64**-0.5),
        (attention["q"]["kernel"], 64**-0.5),
        (attention["k"]["kernel"], 64**-0.5),
        (attention["v"]["kernel"], 64**-0.5),
        (attention["o"]["kernel"], 48**-0.5 * residual),
        (mlp["gate"]["kernel"], 64**-0.5),
        (mlp["up"]["kernel"], 64**-0.5),
        (mlp["down"]["kernel"], 90**-0.5 * residual),
    ):
        np.testing.assert_allclose(array.std(), std, rtol=0.06)
        assert abs(array.mean()) < 0.06 * std
    assert np.abs(np.corrcoef(mlp["gate"]["kernel"].reshape(3, -1))[0, 1]) < 0.05  # layers differ
    other = Decoder(config).init(jax.random.key(1))
    assert np.abs(other["head"]["kernel"] - params["head"]["kernel"]).max() > 0.1
    tied = jax.eval_shape(Decoder(TIED).init, jax.random.key(0))
    assert tied.keys() == {"embed", "layers", "norm"}
    spread = Decoder(dataclasses.replace(TIED, vocab_size=999)).init(jax.random.key(0))
    np.testing.assert_allclose(spread["embed"]["embedding"].std(), 20**-0.5, rtol=0.05)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"num_kv_heads": 4}, "num_kv_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_layers": 1.5}, "num_layers"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"qk_norm": 1}, "qk_norm"),
    ],
)
def test_config_names_the_wrong_field(changes, part):
    with pytest.raises(ValueError, match=part):
        dataclasses.replace(PLAIN, **changes)


def test_decoders_are_values():
    assert hash(Decoder(RICH)) == hash(Decoder(dataclasses.replace(RICH)))
    assert Decoder(RICH) == Decoder(dataclasses.replace(RICH)) != Decoder(RICH, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"remat.*most.*none, full, dots, projections"):
        Decoder(RICH, remat="most")


# --------------------------------------------------------------------------- packing and padding


@pytest.mark.parametrize("name", ["plain", "rich"])
def test_packed_rows_equal_separate_rows(name):
    decoder, params = Decoder(CONFIGS[name]), params_of(CONFIGS[name])
    lengths = [7, 4, 8]
    tokens, positions, segment_ids = pack(lengths)
    packed = np.asarray(run(decoder, params, tokens, positions, segment_ids))[0]
    ends = np.cumsum(lengths)
    separate = np.zeros((3, 8), np.int32)
    for row, length, end in zip(separate, lengths, ends, strict=True):
        row[:length] = tokens[0, end - length : end]
    ones = np.arange(8) < np.array(lengths)[:, None]
    logits = run(decoder, params, separate, np.tile(np.arange(8), (3, 1)), ones.astype(np.int32))
    np.testing.assert_allclose(packed, np.asarray(logits)[ones], atol=2e-5)


def test_padding_is_never_seen():
    """Neither the tokens nor the positions of padding reach another token."""
    decoder, params = Decoder(PLAIN), params_of(PLAIN)
    tokens, positions, segment_ids = pack([6, -4, 9])
    real = np.asarray(segment_ids) != 0
    base = run(decoder, params, tokens, positions, segment_ids)
    other = jnp.where(real, tokens, 60 - tokens), jnp.where(real, positions, 3)
    logits = run(decoder, params, *other, segment_ids)
    np.testing.assert_array_equal(np.asarray(logits)[real], np.asarray(base)[real])


def nll_sum(decoder, params, tokens, positions, segment_ids, weights):
    hidden, _ = decoder.apply(params, tokens, positions, segment_ids)
    logits = (hidden @ decoder.unembed(params).astype(hidden.dtype)).astype(jnp.float32)
    nll = -jax.nn.log_softmax(logits)[..., 0]
    return (nll * weights).sum()


gradients = jax.jit(jax.grad(nll_sum, argnums=1), static_argnums=0)


GRADIENT_CONFIG = dataclasses.replace(RICH, num_layers=2)  # one config and shape: few compiles


def test_rows_of_padding_leave_gradients_alone():
    decoder, params = Decoder(GRADIENT_CONFIG), params_of(GRADIENT_CONFIG)
    tokens, positions, segment_ids = pack([6, 4], [3, -7], [10])
    first = jnp.zeros(tokens.shape).at[0].set(1)
    alone = gradients(decoder, params, tokens, positions, segment_ids, first)
    segment_ids = segment_ids.at[1:].set(0)
    beside = gradients(decoder, params, tokens, positions, segment_ids, first)
    for a, b in zip(jax.tree.leaves(beside), jax.tree.leaves(alone), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    # Even where a loss looks at padding, gradients are finite.
    every = gradients(decoder, params, tokens, positions, segment_ids, jnp.ones(tokens.shape))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(every))


def test_remat_policies_give_the_same_gradients():
    params, batch = params_of(GRADIENT_CONFIG), pack([6, 4], [3, -7], [10])
    weights = (batch[2] != 0).astype(jnp.float32)
    expected = gradients(Decoder(GRADIENT_CONFIG), params, *batch, weights)
    for remat in REMAT_POLICIES:
        found = gradients(Decoder(GRADIENT_CONFIG, remat=remat), params, *batch, weights)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_remat_policies_keep_different_amounts():
    """What the backward pass holds grows from "full" to "none"."""
    batch, weights = pack([6]), jnp.ones((1, 6))
    kept = []
    for remat in ("full", "projections", "dots", "none"):
        loss = functools.partial(nll_sum, Decoder(GRADIENT_CONFIG, remat=remat))
        held = jax.eval_shape(
            lambda p, loss=loss: jax.vjp(lambda p: loss(p, *batch, weights), p)[1],
            params_of(GRADIENT_CONFIG),
        )
        kept.append(sum(x.size for x in jax.tree.leaves(held)))
    assert kept == sorted(kept) and len(set(kept)) == 4, kept


def test_bfloat16_is_the_dtype_of_the_computation():
    params, batch = params_of(PLAIN), pack([6, 4], [3, -7], [10])
    decoder = Decoder(PLAIN, dtype="bfloat16")
    hidden, _ = jax.jit(decoder.apply)(params, *batch)
    assert hidden.dtype == jnp.bfloat16
    exact, _ = jax.jit(Decoder(PLAIN).apply)(params, *batch)
    error = np.abs(np.asarray(hidden, np.float32) - np.asarray(exact))
    assert 0 < error.mean() < 0.03 * np.abs(exact).mean()
    grads = jax.eval_shape(functools.partial(gradients, decoder), params, *batch, batch[0])
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert row_cache.empty(decoder, 2, 3).keys.dtype == jnp.bfloat16


def test_token_outside_the_vocabulary_is_loud():
    tokens, positions, segment_ids = pack([10], [10], [10])
    tokens = tokens.at[1, 2].set(PLAIN.vocab_size)
    hidden, _ = jax.jit(Decoder(PLAIN).apply)(params_of(PLAIN), tokens, positions, segment_ids)
    assert np.isnan(hidden[1, 2:]).all() and np.isfinite(hidden[::2]).all()


# ------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("name", ["plain", "rich"])
def test_cached_decoding_equals_uncached(name):
    """Right-padded prompts of 7, 3 and 1 tokens, then single tokens, the second row pausing once."""
    decoder, params = Decoder(CONFIGS[name]), params_of(CONFIGS[name])
    done = np.array([7, 3, 1])
    tokens = np.random.default_rng(6).integers(0, 61, (3, 16)).astype(np.int32)
    positions = np.tile(np.arange(16, dtype=np.int32), (3, 1))
    expected = np.asarray(run(decoder, params, tokens, positions, np.ones_like(tokens)))

    real = np.arange(8) < done[:, None]
    prompt = np.where(real, tokens[:, :8], 9)
    logits, new = prefill(decoder, params, prompt, positions[:, :8], real.astype(int))
    np.testing.assert_allclose(np.asarray(logits)[real], expected[:, :8][real], atol=5e-5)
    cache = row_cache.empty(decoder, 3, 16)
    keys, values = (
        jnp.full_like(old, 1e4).at[:, :, :, :8].set(x.swapaxes(2, 3))  # nothing unwritten is seen
        for old, x in zip((cache.keys, cache.values), new, strict=True)
    )
    cache = dataclasses.replace(cache, keys=keys, values=values, lengths=jnp.asarray(done))
    for step in range(6):
        active = np.array([True, step != 2, True])
        token = np.where(active, tokens[np.arange(3), done], 9)
        logits, cache = run_cached(
            decoder, params, token[:, None], done[:, None], active[:, None].astype(int), cache
        )
        for b in np.flatnonzero(active):
            np.testing.assert_allclose(logits[b, 0], expected[b, done[b]], atol=5e-5)
        done += active
        np.testing.assert_array_equal(cache.lengths, done)


# --------------------------------------------------------------------------------------- attention


def random_attention(rng, B=2, T=9, S=9, N=6, K=2, H=8):
    q, k, v = (rng.normal(size=(B, *s, H)).astype(np.float32) for s in ((T, N), (S, K), (S, K)))
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_visible_is_its_definition(window):
    ids = np.repeat([[1, 2, 0, 3], [0, 1, 2, 0]], [2, 1, 2, 4], axis=1)
    expected = np.zeros((2, 9, 9), bool)
    for b, t, s in np.ndindex(2, 9, 9):
        expected[b, t, s] = (
            ids[b, t] == ids[b, s] != 0 and t >= s and (window is None or t - s < window)
        )
    assert expected.any()
    np.testing.assert_array_equal(visible(jnp.asarray(ids), window), expected)


def test_attention_equals_jax_and_empty_queries_give_zeros():
    q, k, v = random_attention(np.random.default_rng(8))
    _, _, segment_ids = pack([4, -1, 4], [-4, 5])
    real = np.asarray(segment_ids) != 0

    def ours(q, k, v):
        return attention(q, k, v, segment_ids, 3)

    def theirs(q, k, v):
        mask = visible(segment_ids, 3)
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])

    out = ours(q, k, v)
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(theirs(q, k, v))[real], atol=1e-5)
    assert np.all(np.asarray(out)[~real] == 0)

    tilt = jnp.asarray(np.random.default_rng(9).normal(size=out.shape))
    for f, weights in ((ours, tilt), (theirs, tilt * real[..., None, None])):
        grads = jax.grad(lambda *x, f=f, w=weights: (f(*x) * w).sum(), argnums=(0, 1, 2))
        grads = jax.jit(grads)(q, k, v)
        if f is ours:
            found = grads
    for a, b in zip(found, grads, strict=True):  # zeros where nothing is seen, and finite
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert np.all(np.asarray(a)[~real] == 0)


def test_attention_survives_huge_scores():
    q, k, v = random_attention(np.random.default_rng(10))
    ones = jnp.ones((2, 9), jnp.int32)
    out, grads = jax.value_and_grad(lambda q: attention(q * 1e4, k, v, ones).sum())(q)
    assert np.isfinite(out) and np.isfinite(grads).all()


def test_unknown_backend_is_named():
    q, k, v = random_attention(np.random.default_rng(11))
    with pytest.raises(ValueError, match=r"'flash'.*auto.*xla"):
        attention(q, k, v, jnp.ones((2, 9), jnp.int32), backend="flash")
    with pytest.raises(ValueError, match="'flash'"):
        decoder = Decoder(PLAIN, attention="flash")
        decoder.apply(params_of(PLAIN), *pack([3]))
