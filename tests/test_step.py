"""The likelihood, the weights and the training step: against NumPy, and under every way to batch.

The losses `L` that the weights are computed from are recomputed here from logits, one example at a
time; the weights are the method's formulas in plain NumPy.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import CONFIG, DECODER, FAST, drawn_params, example, fresh, slow_nll

from main_jax.lm.batches import Example, Shape, Unit, UnitStream, collate
from main_jax.lm.loss import example_nlls, token_nll, weighted_nll, weighted_token_nll
from main_jax.lm.step import Optimizer, accumulate, init_state, is_matrix, train_step
from main_jax.lm.train import TrainingSettings
from main_jax.weighting import Weighting

STRATEGIES = {
    "constant": Weighting("constant", alpha=0.3),
    "loss_ratio": Weighting("loss_ratio"),
    "inverse_loss_ratio": Weighting("inverse_loss_ratio", decay=0.6),
    "schedule": Weighting("schedule", low=0.2, high=0.9),
    "pair_ratio": Weighting("pair_ratio"),
    "softmax": Weighting("softmax"),
    "softmax_sharp": Weighting("softmax", temperature=0.4),
    "seed_softmax": Weighting("seed_softmax", temperature=1.5),
}


def assert_trees_close(found, expected, tolerance=1e-5):
    """Each tensor's difference within `tolerance` of the tensor's norm."""
    leaves, other = (jax.tree_util.tree_leaves_with_path(t) for t in (found, expected))
    for (path, a), (_, b) in zip(leaves, other, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(b) > 0, path
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), path


# --------------------------------------------------------------------------------- the likelihood


@functools.partial(jax.jit, static_argnums=5, compiler_options=FAST)
def nll_and_gradients(hidden, unembed, targets, counted, factors, chunk_logits):
    def total(*arrays):
        return weighted_token_nll(*arrays, targets, counted, factors, chunk_logits)

    nll = token_nll(hidden, unembed, targets, counted, chunk_logits)
    return nll, jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, unembed)


@pytest.mark.parametrize("chunk_logits", [1, *(61 * n + 60 for n in (15, 21, 30, 48)), 61 * 60])
@pytest.mark.parametrize("share", [1, 0.5])
def test_chunked_token_nll_equals_log_softmax(chunk_logits, share):
    """3 rows of 17 tokens in chunks of 4 and 1, 12 and 3, ... 48 and 12, and 13; all counted, or some."""
    rows, n, d, v = 3, 17, 11, 61
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(rows, n, d)).astype(np.float32)
    unembed = rng.normal(size=(d, v)).astype(np.float32)
    targets = rng.integers(0, v, (rows, n)).astype(np.int32)
    factors = rng.normal(size=(rows, n)).astype(np.float32)
    counted = rng.random((rows, n)) < np.array([[1], [share > 0.5], [share]])
    nll, ((total, same_nll), gradients) = nll_and_gradients(
        hidden, unembed, targets, counted, factors, chunk_logits
    )
    factors = factors * counted

    h, w = hidden.astype(np.float64), unembed.astype(np.float64)
    logits = h @ w
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    for found in (nll, same_nll):
        np.testing.assert_allclose(found, expected * counted, rtol=1e-5, atol=1e-5)
    assert total == pytest.approx(np.sum(expected * factors), rel=1e-5)
    by_logits = (np.exp(log_probs) - np.eye(v)[targets]) * factors[..., None]
    by_unembed = np.einsum("btd,btv->dv", h, by_logits)
    assert_trees_close(gradients, (by_logits @ w.T, by_unembed))


def test_gradients_in_bfloat16_are_those_of_its_rounded_inputs():
    """Products of bfloat16 are added up in float32, and only what is handed on is rounded again."""
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(2, 96, 16)), jnp.bfloat16)
    unembed = jnp.asarray(rng.normal(size=(16, 61)), jnp.bfloat16)
    targets = rng.integers(0, 61, (2, 96)).astype(np.int32)
    counted, factors = rng.random((2, 96)) < 0.8, rng.normal(size=(2, 96)).astype(np.float32)

    def both(*arrays):
        return nll_and_gradients(*arrays, targets, counted, factors, 61 * 64)

    # As a model has them: hidden states computed in bfloat16, parameters held in float32.
    nll, (_, (d_hidden, d_unembed)) = both(hidden, unembed.astype(jnp.float32))
    expected_nll, (_, expected) = both(*(x.astype(jnp.float32) for x in (hidden, unembed)))
    assert d_hidden.dtype == jnp.bfloat16 and d_unembed.dtype == jnp.float32
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-4, atol=1e-4)
    assert_trees_close((d_hidden, d_unembed), expected, tolerance=0.01)


def drawn_examples(n, seed=0, longest=30):
    """Draw ragged examples: conditions of 1 to 15 tokens, targets of 1 to 15."""
    rng = np.random.default_rng(seed)
    half = longest // 2
    return [
        example(rng.integers(0, 61, rng.integers(1, half + 1)),
                rng.integers(0, 61, rng.integers(1, half + 1)))
        for _ in range(n)
    ]  # fmt: skip


@functools.partial(jax.jit, compiler_options=FAST)
def nll_and_gradient(params, batch, factors):
    """Per-example sums and counts, and the gradient of `Σ factor_e · L_e`."""

    def total(params):
        def weigh(_, counts):
            return factors / jnp.maximum(counts, 1), None

        found, sums, counts, _ = weighted_nll(DECODER, params, batch, weigh)
        return found, (sums, counts)

    (_, (sums, counts)), gradient = jax.value_and_grad(total, has_aux=True)(params)
    return sums, counts, gradient


def test_packed_nll_and_gradient_equal_one_by_one():
    examples, params = drawn_examples(9), drawn_params()
    factors = np.random.default_rng(4).uniform(0.5, 1.5, 9).astype(np.float32)
    expected = [slow_nll(*e, params) for e in examples]
    per_token = np.array([total / count for total, count in expected])
    assert per_token.std() > 0.5

    def check(sums, counts):
        assert counts.tolist() == [n for _, n in expected] + [0] * (len(counts) - 9)
        np.testing.assert_allclose(sums[:9] / counts[:9], per_token, rtol=0, atol=1e-5)
        assert not np.any(sums[9:])

    for shape, packing in ((Shape(3, 96, 12), True), (Shape(10, 32, 9), False)):
        batch = collate(examples, shape, packing=packing)
        assert packing == (batch.segment_ids.max() > 1)
        check(*example_nlls((DECODER,), (params,), (batch,))[0])
    batch = collate(examples, Shape(5, 48, 11))
    assert batch.segment_ids.max() > 1
    padded = np.pad(factors, (0, 2), constant_values=3.0)
    sums, counts, gradient = nll_and_gradient(params, batch, padded)
    check(sums, counts)
    singles = [
        nll_and_gradient(params, collate([e], Shape(1, 32, 1)), factor[None])[2]
        for e, factor in zip(examples, factors, strict=True)
    ]
    assert_trees_close(gradient, jax.tree.map(lambda *g: sum(g), *singles))


# ------------------------------------------------------------------------------- units and weights


class Row(NamedTuple):
    """An example of a batch with what decides its weight."""

    example: Example
    v: float
    aligned: bool
    pair: int
    nll: float
    count: int


def drawn_units(twins, seed=0, weights=True):
    """Draw units: `both` sides, or only the `seed` or the `aligned` one; twins share a target."""
    rng = np.random.default_rng(seed)
    units = []
    for kind in twins:
        target = rng.integers(0, 61, rng.integers(1, 12))
        members, fields = [], []
        for aligned in {"both": (False, True), "seed": (False,), "aligned": (True,)}[kind]:
            members.append(example(rng.integers(0, 61, rng.integers(1, 12)), target))
            v = float(rng.uniform(0.2, 3)) if weights else 1.0
            fields.append({"weight": v, "aligned": aligned})
        units.append(Unit(tuple(members), tuple(fields)))
    return units


MIXED = ("both", "both", "seed", "both", "both", "both", "seed", "both")


def rows_of(units, stream, step):
    """The rows of a step's global batch, their losses computed one at a time."""
    rows = []
    for pair, i in enumerate(stream.indices(step).ravel()):
        for e, fields in zip(units[i].examples, units[i].fields, strict=True):
            total, count = slow_nll(*e)
            rows.append(Row(e, fields["weight"], fields["aligned"], pair, total / count, count))
    return rows


def expected_weights(weighting, rows, alpha=None):
    """The method's table, row by row; `alpha` is that of the group strategies."""
    group_v = {a: sum(r.v for r in rows if r.aligned == a) for a in (False, True)}
    weights = []
    for row in rows:
        twin = [r for r in rows if r.pair == row.pair and r.aligned != row.aligned]
        if weighting.strategy in ("softmax", "seed_softmax"):
            w = row.v * math.exp(-row.nll / weighting.temperature)
            weights.append(0 if row.aligned and weighting.strategy == "seed_softmax" else w)
            continue
        if weighting.strategy == "pair_ratio":
            if twin:
                seed_nll, aligned_nll = (
                    (twin[0].nll, row.nll) if row.aligned else (row.nll, twin[0].nll)
                )
                a = seed_nll / (seed_nll + aligned_nll)
            missing = not twin
        else:
            a, missing = alpha, group_v[not row.aligned] == 0
        share = 1 if missing else a if row.aligned else 1 - a
        weights.append(share * row.v / group_v[row.aligned])
    return np.array(weights)


def expected_alphas(weighting, steps, batches):
    """α before each step, for the strategies that have one for the whole batch."""
    alphas, emas = [], None
    for step, rows in enumerate(batches):
        ratio = 0.5 if emas is None else emas[False] / (emas[False] + emas[True])
        alphas.append(
            {
                "constant": weighting.alpha,
                "schedule": weighting.low + (weighting.high - weighting.low) * step / steps,
                "loss_ratio": ratio,
                "inverse_loss_ratio": 1 - ratio,
            }.get(weighting.strategy)
        )
        means = {a: np.mean([r.nll for r in rows if r.aligned == a]) for a in (False, True)}
        emas = means if emas is None else {
            a: weighting.decay * emas[a] + (1 - weighting.decay) * means[a] for a in means
        }  # fmt: skip
    return alphas


def expected_loss(rows, weights, normalization):
    nll, counts = np.array([r.nll for r in rows]), np.array([r.count for r in rows])
    if normalization == "token":
        return np.sum(weights * nll * counts) / np.sum(weights * counts)
    return np.sum(weights * nll) / np.sum(weights)


@dataclasses.dataclass(frozen=True)
class AnyOf:
    """Several strategies in one compiled program; the state says which. Only saves compilations."""

    strategies: tuple[Weighting, ...]

    def state(self, which):
        return {"which": jnp.int32(which), "own": self.strategies[which].init()}

    def prepare(self, fields):
        return self.strategies[0].prepare(fields)

    def weigh(self, nll, fields, state, progress):
        branches = [
            lambda own, w=w: jnp.asarray(w.weigh(nll, fields, own, progress), jnp.float32)
            for w in self.strategies
        ]
        return jax.lax.switch(state["which"], branches, state["own"])

    def sums(self, nll, weights, fields):
        return self.strategies[0].sums(nll, weights, fields)


ALL = AnyOf(tuple(STRATEGIES.values()))
NORMALIZATIONS = ("example", "token")

accumulated = jax.jit(
    accumulate, static_argnames=("decoder", "optimizer", "weighting"), compiler_options=FAST
)


def run(batch, state, progress=0.0, normalization="example", params=None):
    """Loss, gradient and sums of stacked microbatches under one of `ALL`."""
    params = drawn_params() if params is None else params
    optimizer = Optimizer(loss_normalization=normalization)
    progress = np.float32(progress)
    return accumulated(params, batch, state, progress,
                       decoder=DECODER, optimizer=optimizer, weighting=ALL)  # fmt: skip


def stream_of(units, per_micro, micro, shape=None, **how):
    how = dict(steps=4, seed=7, limit=48) | how
    return UnitStream(units, units_per_microbatch=per_micro, microbatches=micro, shape=shape, **how)


ONE, TWO, FOUR = (8, 1), (4, 2), (2, 4)
SHAPES = {ONE: Shape(6, 48, 16), TWO: Shape(4, 48, 8), FOUR: Shape(3, 48, 4)}


@functools.cache
def mixed(layout=ONE):
    units = drawn_units(MIXED + MIXED[::-1][:4], seed=1)
    return units, stream_of(units, *layout, shape=SHAPES[layout])


@pytest.mark.parametrize("layout", [ONE, FOUR])
@pytest.mark.parametrize("which", range(len(STRATEGIES)), ids=STRATEGIES)
def test_weights_follow_the_methods_table(which, layout):
    """Loss and effective α over four steps, under packing and accumulation, with uneven v.

    No parameters change, so that the losses, and with them the running means, are known.
    """
    weighting = ALL.strategies[which]
    units, stream = mixed(layout)
    batches = [rows_of(units, stream, step) for step in range(4)]
    alphas = expected_alphas(weighting, 4, batches)
    state, seen = ALL.state(which), []
    for step, rows in enumerate(batches):
        weights = expected_weights(weighting, rows, alphas[step])
        loss, _, sums = run(stream.batch(step), state, step / 4)
        assert loss == pytest.approx(expected_loss(rows, weights, "example"), rel=1e-5)
        assert sums.pop("target_tokens") == sum(r.count for r in rows)
        own, metrics = weighting.update(state["own"], sums)
        state = state | {"own": own}
        aligned = np.array([r.aligned for r in rows])
        effective = weights[aligned].sum() / weights.sum()
        assert metrics["alpha"] == pytest.approx(effective, rel=1e-5, abs=1e-7)
        for group in (False, True):
            name = f"{'aligned' if group else 'seed'}_nll_nats_per_token"
            mean = np.mean([r.nll for r in rows if r.aligned == group])
            assert metrics[name] == pytest.approx(mean, rel=1e-5)
        seen.append(effective)
    if weighting.strategy in ("loss_ratio", "inverse_loss_ratio"):
        assert seen[0] == pytest.approx(0.5) and abs(seen[2] - 0.5) > 0.005
    if weighting.strategy == "schedule":
        np.testing.assert_allclose(seen, [0.2, 0.375, 0.55, 0.725], rtol=1e-6)
    if weighting.strategy == "seed_softmax":
        assert not any(seen)


@functools.partial(jax.jit, static_argnums=3, compiler_options=FAST)
def with_fixed_weights(params, batch, weights, normalization):
    """Loss and gradient of one microbatch whose weights are given numbers."""

    def loss(params):
        def weigh(_, counts):
            if normalization == "token":
                return weights / jnp.sum(weights * counts), None
            return weights / jnp.maximum(counts, 1) / jnp.sum(weights), None

        return weighted_nll(DECODER, params, batch, weigh)[0]

    return jax.value_and_grad(loss)(params)


def test_the_head_is_computed_once_where_the_losses_decide_no_weight():
    """The loop over its chunks that only finds the losses is then no part of the program."""
    _, stream = mixed()
    loops = {}
    for strategy in ("constant", "loss_ratio", "pair_ratio", "softmax"):
        lowered = accumulated.lower(
            drawn_params(), stream.batch(0), Weighting().init(), np.float32(0), decoder=DECODER,
            optimizer=Optimizer(), weighting=Weighting(strategy),
        )  # fmt: skip
        loops[strategy] = lowered.compile().as_text().count(" while(")
    once = loops["constant"]
    assert loops == dict(constant=once, loss_ratio=once, pair_ratio=once + 1, softmax=once + 1)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_microbatches_equal_one_batch_with_fixed_weights(normalization):
    """Every strategy, k = 1, 2, 4: the same loss and gradient, and none flows through the weights."""
    units, stream = mixed()
    rows = rows_of(units, stream, 1)
    one = jax.tree.map(lambda x: x[0], stream.batch(1))
    for which, weighting in enumerate(ALL.strategies):
        state = ALL.state(which)
        state["own"] = {"seed_nll": jnp.float32(2.5), "aligned_nll": jnp.float32(4.0)}
        ratio = 2.5 / 6.5
        alpha = {"loss_ratio": ratio, "inverse_loss_ratio": 1 - ratio, "constant": 0.3,
                 "schedule": 0.2 + 0.7 * 0.25}.get(weighting.strategy)  # fmt: skip
        weights = expected_weights(weighting, rows, alpha)
        assert weights.std() > 0
        padded = np.pad(weights / weights.sum(), (0, 16 - len(rows))).astype(np.float32)
        expected = with_fixed_weights(drawn_params(), one, padded, normalization)
        assert expected[0] == pytest.approx(expected_loss(rows, weights, normalization), rel=1e-5)
        for layout in (ONE, TWO, FOUR):
            batch = mixed(layout)[1].batch(1)
            loss, gradient, _ = run(batch, state, 0.25, normalization)
            assert loss == pytest.approx(float(expected[0]), rel=1e-5), (weighting, layout)
            assert_trees_close(gradient, expected[1])


def test_packing_changes_nothing():
    units, stream = mixed()
    unpacked = stream_of(units, *ONE, packing=False, limit=32)
    assert unpacked.shape.rows == 16
    for which in range(len(STRATEGIES)):
        state = ALL.state(which)
        loss, gradient, sums = run(stream.batch(2), state, 0.5)
        other_loss, other_gradient, other_sums = run(unpacked.batch(2), state, 0.5)
        assert loss == pytest.approx(float(other_loss), rel=1e-5)
        assert_trees_close(gradient, other_gradient)
        for name, value in sums.items():
            assert value == pytest.approx(float(other_sums[name]), rel=1e-5), name


@pytest.mark.parametrize("present", ["seed", "aligned"])
def test_the_share_of_a_missing_group_goes_to_the_other(present):
    """All group and pair strategies then are a v-weighted mean of the group that is there."""
    units = drawn_units([present] * 8, seed=3)
    stream = stream_of(units, *FOUR, shape=SHAPES[FOUR])
    rows = rows_of(units, stream, 0)
    v = np.array([r.v for r in rows])
    for which, weighting in enumerate(ALL.strategies):
        if weighting.strategy == "seed_softmax" and present == "aligned":
            continue
        weights = expected_weights(weighting, rows) if "softmax" in weighting.strategy else v
        loss, _, sums = run(stream.batch(0), ALL.state(which), 0.5)
        assert loss == pytest.approx(expected_loss(rows, weights, "example"), rel=1e-5), weighting
        sums.pop("target_tokens")
        own, metrics = weighting.update(weighting.init(), sums)
        assert metrics["alpha"] == (present == "aligned")
        absent = "seed" if present == "aligned" else "aligned"
        assert math.isnan(own[f"{absent}_nll"]) and math.isnan(
            metrics[f"{absent}_nll_nats_per_token"]
        )


def test_running_means_survive_a_step_without_the_group():
    w = Weighting("loss_ratio", decay=0.9)
    state = {"seed_nll": jnp.float32(2.0), "aligned_nll": jnp.float32(3.0)}
    sums = {"seed_nll": 8.0, "seed_rows": 2.0, "aligned_nll": 0.0, "aligned_rows": 0.0,
            "aligned_weight": 0.0, "total_weight": 1.0}  # fmt: skip
    new, _ = w.update(state, {name: jnp.float32(value) for name, value in sums.items()})
    assert new["seed_nll"] == pytest.approx(0.9 * 2 + 0.1 * 4)
    assert new["aligned_nll"] == 3.0


def test_places_that_hold_no_example_count_nothing():
    """Whatever stands in the fields and the rows there, the numbers are the same to the bit."""
    _, stream = mixed(FOUR)
    batch = stream.batch(1)
    empty = ~batch.fields["valid"]
    assert 1 <= empty.sum() < empty.size / 2
    fields = {name: values.copy() for name, values in batch.fields.items()}
    for name, garbage in (("weight", 7.0), ("aligned", True), ("unit", 1)):
        fields[name][empty] = garbage
    tokens = np.where(batch.segment_ids == 0, 5, batch.tokens)
    targets = np.where(batch.example == SHAPES[FOUR].examples, 9, batch.targets)
    other = batch._replace(tokens=tokens, targets=targets, fields=fields)
    for which in range(len(STRATEGIES)):
        for a, b in zip(
            jax.tree.leaves(run(batch, ALL.state(which), 0.5)),
            jax.tree.leaves(run(other, ALL.state(which), 0.5)),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)


def test_two_perfectly_explained_rows_share_evenly():
    fields = {
        "weight": jnp.ones(4), "aligned": jnp.array([False, True, False, True]),
        "unit": jnp.array([0, 0, 1, 1]), "valid": jnp.ones(4, bool),
    }  # fmt: skip
    w = Weighting("pair_ratio")
    weights = w.weigh(jnp.array([0.0, 0.0, 1.0, 3.0]), w.prepare(fields), w.init(), 0.0)
    np.testing.assert_allclose(weights * 2, [0.5, 0.5, 0.75, 0.25])


@pytest.mark.parametrize(
    "numbers",
    [{"temperature": 0.05}, {"alpha": 1.5}, {"low": -0.1}, {"high": 2.0}, {"decay": 1.0}],
    ids=str,
)
def test_impossible_numbers_are_refused(numbers):
    with pytest.raises(ValueError, match=f"weighting.{next(iter(numbers))} must be"):
        Weighting(**numbers)


# -------------------------------------------------------------------------------------- optimiser


class NumpyAdamW:
    """AdamW (Loshchilov & Hutter 2019) after clipping by the global norm, in float64."""

    def __init__(self, optimizer, decayed):
        self.o, self.decayed, self.step, self.m, self.v = optimizer, decayed, 0, {}, {}

    def update(self, params, gradients, learning_rate):
        o, norm = self.o, np.sqrt(sum(np.sum(g**2) for g in gradients.values()))
        scale = min(1.0, o.max_grad_norm / norm)
        self.step += 1
        new = {}
        for name, p in params.items():
            g = gradients[name] * scale
            self.m[name] = o.beta1 * self.m.get(name, 0) + (1 - o.beta1) * g
            self.v[name] = o.beta2 * self.v.get(name, 0) + (1 - o.beta2) * g**2
            m = self.m[name] / (1 - o.beta1**self.step)
            v = self.v[name] / (1 - o.beta2**self.step)
            decay = o.weight_decay if name in self.decayed else 0.0
            new[name] = p - learning_rate * (m / (np.sqrt(v) + o.epsilon) + decay * p)
        return new


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(k.key for k in path): np.asarray(x, np.float64) for path, x in leaves}


MATRICES = {
    "embed/embedding", "head/kernel",
    *(f"layers/attention/{n}/kernel" for n in "qkvo"),
    *(f"layers/mlp/{n}/kernel" for n in ("gate", "up", "down")),
}  # fmt: skip


def test_only_kernels_and_the_embedding_decay():
    """By name: the stacked norm scales have two axes, and a bias of stacked layers three."""
    params = drawn_params()
    mask = flat(is_matrix(params))
    assert {name for name, decays in mask.items() if decays} == MATRICES
    assert params["layers"]["input_norm"]["scale"].ndim == 2
    assert is_matrix({"q": {"kernel": 0, "bias": 0}}) == {"q": {"kernel": True, "bias": False}}


@pytest.mark.parametrize(
    "optimizer",
    [
        Optimizer(max_grad_norm=1e9),
        Optimizer(max_grad_norm=0.3, weight_decay=0.2),
        Optimizer(beta1=0.5, beta2=0.7, epsilon=0.1, max_grad_norm=40.0),
    ],
    ids=["no clipping", "clipping and decay", "other numbers, clipping at times"],
)
def test_the_optimiser_equals_numpy_adamw(optimizer):
    rng = np.random.default_rng(0)
    shapes = {"q": {"kernel": (2, 5, 3), "bias": (2, 3)}, "norm": {"scale": (2, 5)},
              "embed": {"embedding": (7, 5)}}  # fmt: skip
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    draw = lambda s: rng.normal(size=s).astype(np.float32)  # noqa: E731
    params = jax.tree.map(draw, shapes, is_leaf=is_shape)
    reference = NumpyAdamW(optimizer, {"q/kernel", "embed/embedding"})
    expected, clipped = flat(params), []
    transform = optimizer.transform()
    state = transform.init(params)
    for learning_rate in (0.1, 0.03, 0.2, 0.05):
        gradients = jax.tree.map(lambda s: draw(s) * rng.uniform(1, 8), shapes, is_leaf=is_shape)
        norm = np.sqrt(sum(np.sum(g**2) for g in flat(gradients).values()))
        clipped.append(norm > optimizer.max_grad_norm)
        direction, state = transform.update(gradients, state, params)
        params = jax.tree.map(lambda p, d, lr=learning_rate: p - lr * d, params, direction)
        expected = reference.update(expected, flat(gradients), learning_rate)
        for name, value in flat(params).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert {1e9: not any(clipped), 0.3: all(clipped), 40.0: any(clipped) and not all(clipped)}[
        optimizer.max_grad_norm
    ]


def test_the_training_step_is_numpy_adamw_on_the_accumulated_gradient():
    """Three steps; the learning rate is an argument, so that none of them is compiled again."""
    which = list(STRATEGIES).index("loss_ratio")
    weighting = STRATEGIES["loss_ratio"]
    # An epsilon of the size of gradients, so that rounding in them does not decide a sign.
    optimizer = Optimizer(beta1=0.8, beta2=0.9, epsilon=1e-2, weight_decay=0.3, max_grad_norm=0.5)
    _, stream = mixed(TWO)
    state = init_state(fresh(drawn_params()), CONFIG, optimizer, weighting)
    reference, before = NumpyAdamW(optimizer, MATRICES), train_step._cache_size()
    for step, learning_rate in enumerate((0.05, 0.0, 0.02)):
        params, own = state.params, state.weighting
        switched = {"which": jnp.int32(which), "own": own}
        loss, gradient, _ = run(stream.batch(step), switched, step / 3, params=params)
        expected = reference.update(flat(params), flat(gradient), learning_rate)
        old = flat(params)
        state, metrics = train_step(
            state, stream.batch(step), np.float32(learning_rate), np.float32(step / 3),
            decoder=DECODER, optimizer=optimizer, weighting=weighting,
        )  # fmt: skip
        norm = np.sqrt(sum(np.sum(g**2) for g in flat(gradient).values()))
        assert norm > 1 and metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert metrics["loss_nats_per_token"] == pytest.approx(float(loss), rel=1e-5)
        for name, value in flat(state.params).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=2e-6, err_msg=name)
            assert np.array_equal(value, old[name]) == (learning_rate == 0)
    assert train_step._cache_size() == before + 1


# --------------------------------------------------------------------------------------- schedules


def rates(**how):
    settings = TrainingSettings(learning_rate=2.0, max_steps=8, **how)
    schedule = settings.schedule(settings.steps(100))
    return [float(schedule(step)) for step in range(8)]


def test_schedules_by_hand():
    ramp = [2 / 3, 4 / 3]  # a quarter of eight steps, and the peak is reached right after them
    down = [k / 6 for k in range(6)]
    how = dict(warmup_ratio=0.25, min_learning_rate_ratio=0.1)
    cosine = [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2) for x in down]
    linear = [2 * (1 - 0.9 * x) for x in down]
    assert rates(lr_scheduler_type="cosine", **how) == pytest.approx(ramp + cosine)
    assert rates(lr_scheduler_type="linear", **how) == pytest.approx(ramp + linear)
    assert rates(lr_scheduler_type="constant", **how) == pytest.approx(ramp + [2.0] * 6)


def test_schedules_without_warm_up_and_to_zero():
    how = dict(warmup_ratio=0.0, min_learning_rate_ratio=0.0)
    assert rates(lr_scheduler_type="constant", **how) == [2.0] * 8
    assert rates(lr_scheduler_type="linear", **how) == pytest.approx(
        [2 * (1 - k / 8) for k in range(8)]
    )
    assert rates(lr_scheduler_type="cosine", **how)[4] == pytest.approx(1.0)
    assert rates(lr_scheduler_type="linear", warmup_ratio=0.03)[:2] == pytest.approx([1.0, 2.0])


def test_steps_come_from_epochs_unless_given():
    settings = TrainingSettings(
        train_batch_size=12, gradient_accumulation_steps=3, num_train_epochs=2.5
    )
    assert settings.steps(100) == math.ceil(2.5 * 100 / 12) == 21
    assert settings.steps(1) == 1
    assert dataclasses.replace(settings, max_steps=7).steps(100) == 7


def test_every_optimiser_setting_reaches_the_step():
    settings = TrainingSettings(
        adam_beta1=0.1, adam_beta2=0.2, adam_epsilon=0.3, weight_decay=0.4, max_grad_norm=0.5,
        loss_normalization="token", adam_mu_dtype="bfloat16",
    )  # fmt: skip
    assert settings.optimizer() == Optimizer(0.1, 0.2, 0.3, 0.4, 0.5, "bfloat16", "token")


def test_a_first_moment_in_bfloat16_takes_two_bytes_less():
    """And steps are those of float32 to bfloat16's rounding."""
    weighting, params = Weighting("constant"), drawn_params()
    moved, sizes = {}, {}
    for dtype in ("float32", "bfloat16"):
        optimizer = Optimizer(mu_dtype=dtype)
        state = init_state(fresh(params), CONFIG, optimizer, weighting)
        sizes[dtype] = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
        transform = optimizer.transform()
        state, total = state.opt_state, jax.tree.map(np.zeros_like, params)
        for k in range(3):
            grads = jax.tree.map(lambda x, k=k: jnp.cos((k + 2) * x), params)
            step, state = transform.update(grads, state, params)
            total = jax.tree.map(np.add, total, step)
        moved[dtype] = np.concatenate([np.ravel(x) for x in jax.tree.leaves(total)])
    assert sizes["float32"] - sizes["bfloat16"] == 2 * CONFIG.num_params()
    error = np.abs(moved["float32"] - moved["bfloat16"])
    assert 0 < error.mean() < 0.01 * np.abs(moved["float32"]).mean()
