"""Arms on held-out pairs: intervals against scipy's and a plain loop, differences worked out, real models."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats
from etils import epath
from tiny_llama import make_tiny_llama

from main_jax import evaluate
from main_jax.bootstrap import INTERVAL, NLL, compare, interval, resampled_means
from main_jax.config import Runtime
from main_jax.lm.train import mean_nll
from main_jax.models import open_checkpoint
from main_jax.pairs import table_of, write_table
from main_jax.prompts import Direction

SEED = 7


@pytest.fixture
def pairs():
    """([N, M] sums, [N] tokens) of 60 pairs under 2 models; long pairs are easier per token."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(3, 200, 60)
    per_token = draw.gamma(4, 0.5, (60, 1)) + 20 / tokens[:, None] + draw.normal(0, 0.1, (60, 2))
    return per_token * tokens[:, None], tokens


def test_draws_are_those_of_a_plain_loop(pairs):
    sums, tokens = pairs
    draw, expected = np.random.default_rng(SEED), []
    for _ in range(50):
        chosen = draw.integers(len(tokens), size=len(tokens))
        count = sum(int(tokens[i]) for i in chosen)
        expected.append([sum(float(sums[i, m]) for i in chosen) / count for m in range(2)])
    np.testing.assert_allclose(resampled_means(sums, tokens, SEED, 50), expected, rtol=1e-12)
    assert not np.allclose(resampled_means(sums, tokens, SEED + 1, 50), expected)


def test_intervals_are_those_of_scipy(pairs):
    """Within what two seeds of 10,000 draws differ by: a few hundredths of the interval."""
    sums, tokens = pairs
    found = compare({"base": sums[:, 0], "mutual": sums[:, 1]}, tokens, SEED)
    assert found["mutual"][NLL] == pytest.approx(sums[:, 1].sum() / tokens.sum(), rel=1e-12)
    difference = found["mutual"]["difference_to"]["base"]
    assert difference["nats_per_token"] == pytest.approx(found["mutual"][NLL] - found["base"][NLL])

    def theirs(nll):
        data, ratio = (nll, tokens), lambda s, n, axis: s.sum(axis) / n.sum(axis)
        drawn = scipy.stats.bootstrap(
            data, ratio, paired=True, method="percentile", n_resamples=10_000,
            random_state=np.random.default_rng(1),
        ).confidence_interval  # fmt: skip
        return drawn.low, drawn.high

    for ours, nll in (
        (found["base"][INTERVAL], sums[:, 0]),
        (found["mutual"][INTERVAL], sums[:, 1]),
        (difference[INTERVAL], sums[:, 1] - sums[:, 0]),
    ):
        low, high = theirs(nll)
        np.testing.assert_allclose(ours, [low, high], atol=0.05 * (high - low))


def test_a_difference_is_paired():
    """Better by exactly 0.125 on every token: certain, though pairs differ by far more than that."""
    tokens = np.array([4, 8, 100, 2])
    base = np.array([40.0, 8.0, 50.0, 1.0])
    sums = {"base": base, "seed_only": base - tokens / 16, "mutual": base - tokens / 8}
    found = compare(sums, tokens, SEED)
    assert found["base"] == {NLL: 99 / 114, INTERVAL: found["base"][INTERVAL]}
    assert found["base"][INTERVAL][1] > found["base"][INTERVAL][0] + 1
    for model, other, by in (("mutual", "base", 0.125), ("mutual", "seed_only", 0.0625),
                             ("seed_only", "base", 0.0625)):  # fmt: skip
        difference = found[model]["difference_to"][other]
        np.testing.assert_allclose(
            [difference["nats_per_token"], *difference[INTERVAL]], -by, atol=1e-12
        )
    assert list(found["seed_only"]["difference_to"]) == ["base"]
    assert list(found["mutual"]["difference_to"]) == ["base", "seed_only"]


def test_too_few_pairs_have_no_interval():
    one = compare({"base": [6.0], "mutual": [3.0]}, [3], SEED)
    assert one["mutual"] == {
        NLL: 1.0, INTERVAL: None, "difference_to": {"base": {"nats_per_token": -1.0, INTERVAL: None}}
    }  # fmt: skip
    none = compare({"base": (), "mutual": ()}, (), SEED)
    assert none["mutual"] == {
        NLL: None, INTERVAL: None, "difference_to": {"base": {"nats_per_token": None, INTERVAL: None}}
    }  # fmt: skip


def test_the_interval_holds_95_of_100_draws():
    assert interval(np.arange(1001.0)) == pytest.approx([25, 975])


# --------------------------------------------------------------------------------- of real models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        name: open_checkpoint(str(make_tiny_llama(folder / name, seed=i)), Runtime())
        for i, name in enumerate(("base", "seed_only", "mutual"))
    }


def a_run(models, path, rows) -> SimpleNamespace:
    """As much of a run as `evaluate` asks for."""
    write_table(path / "filter" / "data" / "part-00000.parquet", table_of([{"id": "x"}]))
    prompt = models["base"].prompt("none", 60)
    return SimpleNamespace(
        world=False, rows=lambda stage, part: rows, inference_prompt=prompt, base=models["base"],
        config=SimpleNamespace(
            seed=SEED, runtime=SimpleNamespace(chunk_rows=5), data=SimpleNamespace(eval_path=None)
        ),
        directory=lambda stage: epath.Path(path) / stage,
    )  # fmt: skip


def measured(monkeypatch, models, path, rows) -> dict:
    monkeypatch.setattr(evaluate, "arms", lambda run: ["seed_only", "mutual"])
    monkeypatch.setattr(evaluate, "finetuned", lambda run, arm: models[arm].model())
    monkeypatch.setattr(evaluate, "kept_by_arm", lambda run, arm: np.ones(3, bool))
    out = epath.Path(path) / "evaluate"
    assert evaluate.evaluate(a_run(models, path, rows), out) == {"arms": 2}
    return json.loads((out / "results.json").read_text())


def test_held_out_pairs_under_every_model(models, tmp_path, monkeypatch):
    rows = [
        {"id": f"v{i}", "instruction": f"Say {i}", "response": "a word " * (1 + i % 5),
         "weight": 1.0, "drop_reason": None}
        for i in range(12)
    ]  # fmt: skip
    rows[4]["response"] = "very long " * 100  # does not fit
    results = measured(monkeypatch, models, tmp_path, rows)
    assert results["pairs"]["validation"] == 11
    table = pq.read_table(tmp_path / "evaluate" / "held_out.parquet").to_pydict()
    assert table["id"] == [f"v{i}" for i in range(12) if i != 4]
    # One pair at a time, by the mean that training reports.
    prompt = models["base"].prompt("none", 60)
    texts = [(r["instruction"], r["response"]) for r in rows if r["id"] != "v4"]
    examples = [
        prompt.render(Direction.FORWARD, *map(prompt.encode, text)).example for text in texts
    ]
    for name, checkpoint in models.items():
        mean = partial(mean_nll, *checkpoint.model())
        found = results["base"] if name == "base" else results["arms"][name]
        assert found[NLL] == pytest.approx(mean(examples, 60), abs=1e-6)
        per_token = np.divide(table[f"{name}_nll_sum"], table["tokens"])
        np.testing.assert_allclose(per_token, [mean([e], 60) for e in examples], atol=1e-5)
        low, high = found[INTERVAL]
        assert low < found[NLL] < high
    assert table["tokens"] == [int(e.is_target.sum()) for e in examples]

    told = evaluate.show(results).splitlines()
    mutual = results["arms"]["mutual"]
    assert [line.split()[0] for line in told[1:4]] == ["base", "seed_only", "mutual"]
    assert f"{mutual[NLL]:.4f} [{mutual[INTERVAL][0]:.4f}, {mutual[INTERVAL][1]:.4f}]" in told[3]
    for other in ("base", "seed_only"):
        difference = mutual["difference_to"][other]
        assert f"minus {other}" in told[0] and f"{difference['nats_per_token']:+.4f} [" in told[3]
    assert "95% intervals" in told[4]
    # As an older version wrote it.
    old = {"base": {NLL: 3.0}, "arms": {"mutual": {"kept_pairs": 1200, NLL: 2.5}}}
    assert [line.split() for line in evaluate.show(old).splitlines()[1:]] == [
        ["base", "–", "3.0000"], ["mutual", "1,200", "2.5000"]
    ]  # fmt: skip


def test_nothing_held_out(models, tmp_path, monkeypatch):
    results = measured(monkeypatch, models, tmp_path, [])
    assert results["base"] == {NLL: None, INTERVAL: None}
    assert pq.read_table(tmp_path / "evaluate" / "held_out.parquet").num_rows == 0
    assert "–" in evaluate.show(results)
