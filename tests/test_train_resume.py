"""The training loop: an interrupted training continues to the bit; a diverged one stops.

A kill is an exception out of the training step: whatever was not on disk by then is lost. All runs
share one compiled step.
"""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
from tiny_decoder import DECODER, drawn_params, example, fresh, slow_nll

import main_jax.lm.train as train
from main_jax.lm.batches import Shape, Unit, UnitStream
from main_jax.lm.checkpoint import BestParams, Checkpoints, load_params
from main_jax.lm.metrics import MetricsLog, TrainingDiverged
from main_jax.lm.step import train_step
from main_jax.lm.train import TrainingSettings, fit, mean_nll
from main_jax.weighting import Weighting

STEPS, SAVE = 7, 3
SETTINGS = TrainingSettings(
    learning_rate=0.01,
    warmup_ratio=0.3,
    max_steps=STEPS,
    train_batch_size=2,
    save_steps=SAVE,
    logging_steps=2,
    eval_steps=3,
)
SHAPE = Shape(4, 32, 4)
SEED = 11


def drawn_units(n=5, seed=0):
    rng = np.random.default_rng(seed)
    units = []
    for _ in range(n):
        target = rng.integers(0, 61, rng.integers(2, 8))
        pair = tuple(example(rng.integers(0, 61, rng.integers(1, 20)), target) for _ in range(2))
        fields = tuple({"weight": float(rng.uniform(0.5, 2)), "aligned": a} for a in (False, True))
        units.append(Unit(pair, fields))
    return units


UNITS = drawn_units()
HELD_OUT = [e for unit in drawn_units(3) for e in unit.examples]


def run(directory, units=UNITS, settings=SETTINGS, **how):
    """Fit; the weighting has a state, so that a checkpoint without it shows."""
    how = dict(validation=HELD_OUT) | how
    fit(
        DECODER, lambda: fresh(drawn_params()), units, settings, directory=directory,
        weighting=Weighting("loss_ratio"), seed=SEED, label="tiny", limit=32, shape=SHAPE, **how,
    )  # fmt: skip


class Killed(BaseException):
    """Not an Exception: nothing may handle it."""


def kill_after(monkeypatch, steps):
    """Let the training step run `steps` times, then raise. Only the first may be compiled."""
    compiled = []

    def step(*arguments, **named):
        if len(compiled) == steps:
            raise Killed
        result = train_step(*arguments, **named)
        compiled.append(train_step._cache_size())
        assert compiled[-1] == compiled[0]
        return result

    monkeypatch.setattr(train, "train_step", step)


def results(directory):
    """The final parameters' bytes and the metrics file."""
    params = load_params(directory / "checkpoints", DECODER)
    leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves(params)]
    return leaves, (directory / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    before = train_step._cache_size()
    run(directory)
    assert train_step._cache_size() - before == 1
    return directory


def latest(directory):
    with Checkpoints(directory / "checkpoints") as checkpoints:
        return checkpoints.latest_step


# ------------------------------------------------------------------------------------------ resuming


def test_the_runs_below_cross_epochs_and_do_not_end_on_a_save():
    size = SETTINGS.train_batch_size
    assert STEPS % SAVE and STEPS * size > 2 * len(UNITS) and (SAVE * size) % len(UNITS)


@pytest.mark.parametrize("kills", [(0,), (2,), (3,), (4,), (6,), (5, 1, 0, 2)], ids=str)
def test_killed_and_resumed_equals_undisturbed(kills, undisturbed, tmp_path, monkeypatch):
    """Killed in the given step of each start, then left alone."""
    done = 0
    for steps in kills:
        kill_after(monkeypatch, steps)
        with pytest.raises(Killed):
            run(tmp_path)
        done = (done + steps) // SAVE * SAVE
        assert (latest(tmp_path) or 0) == done
    kill_after(monkeypatch, STEPS)
    run(tmp_path)
    params, metrics = results(tmp_path)
    expected_params, expected_metrics = results(undisturbed)
    assert metrics == expected_metrics
    assert params == expected_params


def test_training_changes_every_parameter(undisturbed):
    """Else the comparison above would compare initial parameters with themselves."""
    trained = load_params(undisturbed / "checkpoints", DECODER)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(trained), jax.tree.leaves(drawn_params()), strict=True
    ):
        assert np.abs(np.asarray(a) - b).max() > 1e-4, path


def test_a_finished_training_is_not_touched_again(undisturbed, monkeypatch):
    kill_after(monkeypatch, 0)
    before = results(undisturbed)
    fit(
        DECODER, lambda: pytest.fail("asked for parameters"), UNITS, SETTINGS,
        directory=undisturbed, weighting=Weighting("loss_ratio"), seed=SEED, label="tiny", limit=32,
    )  # fmt: skip
    assert results(undisturbed) == before


def test_metrics_have_a_line_per_step_and_a_line_per_validation(undisturbed):
    lines = [json.loads(s) for s in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss_nats_per_token" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    schedule = SETTINGS.schedule(STEPS)
    for line in steps:
        assert line["learning_rate"] == pytest.approx(float(schedule(line["step"] - 1)))
        assert line["grad_norm"] > 0 and 0 < line["alpha"] < 1
    name = "validation_nll_nats_per_token"
    evaluations = {line["step"]: line[name] for line in lines if name in line}
    assert list(evaluations) == [3, 6, 7]
    trained = load_params(undisturbed / "checkpoints", DECODER)
    totals = np.sum([slow_nll(*e, trained) for e in HELD_OUT], axis=0)
    assert evaluations[7] == pytest.approx(totals[0] / totals[1], rel=1e-5)


def test_the_validation_loss_is_per_token_over_all_batches():
    """Σ nll / Σ tokens, not a mean of means; batches of one row each."""
    totals = np.array([slow_nll(*e) for e in HELD_OUT])
    expected = totals[:, 0].sum() / totals[:, 1].sum()
    assert abs(np.mean(totals[:, 0] / totals[:, 1]) / expected - 1) > 1e-3
    assert mean_nll(DECODER, drawn_params(), HELD_OUT, 32, 32) == pytest.approx(expected, rel=1e-5)
    assert math.isnan(mean_nll(DECODER, drawn_params(), [], 32))


def test_the_share_of_the_schedule_may_be_given(undisturbed, tmp_path, monkeypatch):
    shares = []
    real = train_step
    monkeypatch.setattr(
        train, "train_step", lambda *a, **k: (shares.append(float(a[3])), real(*a, **k))[1]
    )
    run(tmp_path / "a", validation=())
    run(tmp_path / "b", validation=(), progress=lambda step: (10 + step) / 20)
    own = [step / STEPS for step in range(STEPS)]
    assert shares == pytest.approx(own + [(10 + step) / 20 for step in range(STEPS)])


def test_an_interrupted_metrics_file_is_repaired(tmp_path):
    path = train.epath.Path(tmp_path) / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 2.0}\n{"step": 2}\n{"step": 3}\n{"st')
    log = MetricsLog(path, keep_steps=2)
    log.add(3, {"loss_nats_per_token": np.float32(0.5), "other": np.float32("nan")})
    assert path.read_text() == '{"step": 1, "a": 2.0}\n{"step": 2}\n'
    assert log.flush("x") == 0.5
    assert [json.loads(s) for s in path.read_text().splitlines()] == [
        {"step": 1, "a": 2.0}, {"step": 2}, {"step": 3, "loss_nats_per_token": 0.5, "other": None},
    ]  # fmt: skip


def test_no_units_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing to train on"):
        run(tmp_path, units=[])


# ------------------------------------------------------------------------------------ which are kept


KEEP_BEST = dataclasses.replace(
    SETTINGS, learning_rate=0.05, eval_steps=1, load_best_model_at_end=True
)
# On these the loss falls until step 3, rises, is lowest at 5 and rises again: saves are at 3 and 6.
OTHERS = [e for unit in drawn_units(3, seed=7) for e in unit.examples]
LOWEST = 5


def run_best(directory, settings=KEEP_BEST, **how):
    run(directory, settings=settings, **dict(validation=OTHERS) | how)


def kill_at(monkeypatch, owner, name, call, after=False):
    """Raise at the given call (from 1) of a function, before or after it has done its work."""
    real, calls = getattr(owner, name), []

    def killing(*arguments, **named):
        calls.append(name)
        if len(calls) == call and not after:
            raise Killed
        result = real(*arguments, **named)
        if len(calls) == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, killing)


def left(directory):
    """What lies in a training's directory, and the steps there."""
    return {
        p.name: sorted(int(q.name) for q in p.iterdir()) for p in directory.iterdir() if p.is_dir()
    }


def evaluations(directory):
    """The log's evaluations by step, and its last line."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    name = "validation_nll_nats_per_token"
    return {line["step"]: line[name] for line in lines if name in line}, lines[-1]


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    directory = tmp_path_factory.mktemp("best")
    run_best(directory)
    return directory


def test_the_best_evaluated_step_wins(best, tmp_path, monkeypatch):
    """The parameters are those that another training has when it stops there."""
    found, last = evaluations(best)
    assert list(found) == list(range(1, STEPS + 1))
    assert min(found, key=found.__getitem__) == LOWEST and found[4] > found[3] > found[LOWEST]
    assert last == {
        "step": STEPS, "best_step": LOWEST, "best_validation_nll_nats_per_token": found[LOWEST],
    }  # fmt: skip
    assert left(best) == {"checkpoints": [STEPS]}
    plain = dataclasses.replace(KEEP_BEST, load_best_model_at_end=False, save_steps=LOWEST)
    kill_after(monkeypatch, LOWEST + 1)
    with pytest.raises(Killed):
        run_best(tmp_path, plain)
    assert latest(tmp_path) == LOWEST
    assert results(tmp_path)[0] == results(best)[0]


@pytest.mark.parametrize(
    "kills",
    [
        [(train, "train_step", 3)],
        [(train, "train_step", 4)],
        [(train, "train_step", 6)],
        [(train, "train_step", 7)],
        [(train, "train_step", 6), (train, "train_step", 1), (train, "train_step", 4)],
        [(BestParams, "offer", 3, True)],  # before any checkpoint
        [(Checkpoints, "save_params", 4), (Checkpoints, "save_params", 1, True)],
        [(Checkpoints, "save", 1), (Checkpoints, "save", 2), (Checkpoints, "save", 1, True)],
        [(BestParams, "restore", 1)],
        [(Checkpoints, "save_params", 5)],
        [(Checkpoints, "save_params", 5, True)],
        [(train, "finish", 1)],
    ],
    ids=lambda kills: " ".join(f"{name}-{call}" for _, name, call, *_ in kills),
)
def test_killed_and_resumed_has_the_same_best(kills, best, tmp_path):
    for kill in kills:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, *kill)
            run_best(tmp_path)
    run_best(tmp_path)
    assert results(tmp_path) == results(best)
    assert left(tmp_path) == {"checkpoints": [STEPS]}


def test_what_a_checkpoint_names_as_best_is_kept(best, tmp_path, monkeypatch):
    """On another mesh rounding may take away what was better after the checkpoint, and is on disk too."""
    kill_after(monkeypatch, LOWEST)
    with pytest.raises(Killed):
        run_best(tmp_path)
    assert left(tmp_path) == {"checkpoints": [SAVE], "best": [SAVE, LOWEST]}
    found, _ = evaluations(best)
    monkeypatch.setattr(train, "train_step", train_step)
    monkeypatch.setattr(train, "mean_nll", lambda *_: found[SAVE])  # and the first of equals wins
    run_best(tmp_path)
    assert evaluations(tmp_path)[1]["best_step"] == SAVE
    monkeypatch.undo()
    plain = dataclasses.replace(KEEP_BEST, load_best_model_at_end=False)
    kill_after(monkeypatch, SAVE + 1)
    with pytest.raises(Killed):
        run_best(tmp_path / "stopped", plain)
    assert results(tmp_path)[0] == results(tmp_path / "stopped")[0]


def test_the_newest_n_are_kept_and_any_of_them_continues(best, tmp_path, monkeypatch):
    settings = dataclasses.replace(KEEP_BEST, save_steps=1, save_total_limit=2)
    kill_after(monkeypatch, LOWEST)
    with pytest.raises(Killed):
        run_best(tmp_path, settings)
    assert left(tmp_path) == {"checkpoints": [LOWEST - 1, LOWEST], "best": [SAVE, LOWEST]}
    found, _ = evaluations(best)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.position(LOWEST - 1) == {
            "step": LOWEST - 1,
            "data": {"seed": SEED, "units": len(UNITS), "units_per_step": 2},
            "best": {"step": SAVE, "nll": found[SAVE]},
        }
        assert checkpoints.position(LOWEST)["best"] == {"step": LOWEST, "nll": found[LOWEST]}
    shutil.rmtree(tmp_path / "checkpoints" / str(LOWEST))
    monkeypatch.undo()
    run_best(tmp_path, settings)
    assert results(tmp_path) == results(best)
    assert left(tmp_path) == {"checkpoints": [STEPS]}


def test_what_a_kill_left_half_deleted_does_no_harm(best, tmp_path, monkeypatch):
    kill_after(monkeypatch, LOWEST)
    with pytest.raises(Killed):
        run_best(tmp_path)
    for whole, half, lost in (
        ("checkpoints/3", "checkpoints/1", "position"),
        ("checkpoints/3", "checkpoints/2", "position/metadata"),
        (f"best/{LOWEST}", "best/2", "params"),
    ):
        shutil.copytree(tmp_path / whole, tmp_path / half)
        path = tmp_path / half / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.undo()
    run_best(tmp_path)
    assert results(tmp_path) == results(best)
    assert left(tmp_path) == {"checkpoints": [STEPS]}


def test_a_training_that_gets_no_better_ends_early(best, tmp_path, monkeypatch):
    found, _ = evaluations(best)
    stop = next(step for step in found if step > 1 and found[step] >= found[step - 1])
    assert stop < LOWEST  # it would have become better yet
    settings = dataclasses.replace(KEEP_BEST, early_stopping_patience=1)
    kill_after(monkeypatch, stop - 1)
    with pytest.raises(Killed):
        run_best(tmp_path, settings)
    monkeypatch.undo()
    run_best(tmp_path, settings)
    trained, last = evaluations(tmp_path)
    assert trained == {step: nll for step, nll in found.items() if step <= stop}
    assert last == {
        "step": STEPS, "best_step": stop - 1,
        "best_validation_nll_nats_per_token": found[stop - 1],
    }  # fmt: skip
    assert left(tmp_path) == {"checkpoints": [STEPS]}  # which says that it is done
    plain = dataclasses.replace(KEEP_BEST, load_best_model_at_end=False, save_steps=stop - 1)
    kill_after(monkeypatch, stop)
    with pytest.raises(Killed):
        run_best(tmp_path / "stopped", plain)
    assert results(tmp_path)[0] == results(tmp_path / "stopped")[0]
    log = (tmp_path / "metrics.jsonl").read_text()
    assert f'"step": {stop}, "early_stop": 1' in log and f'"step": {stop + 1}, "loss' not in log


def test_early_stopping_needs_the_best(tmp_path):
    with pytest.raises(ValueError, match="set load_best_model_at_end to true as well"):
        dataclasses.replace(SETTINGS, early_stopping_patience=2)


def test_the_best_needs_evaluations(tmp_path):
    with pytest.raises(ValueError, match="set eval_steps"):
        dataclasses.replace(KEEP_BEST, eval_steps=None)
    with pytest.raises(ValueError, match=r"tiny: .* set data\.validation_share"):
        run_best(tmp_path, validation=())
    assert left(tmp_path) == {}


def test_without_any_finite_evaluation_the_last_step_is_left(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "mean_nll", lambda *_: math.nan)
    run(tmp_path, settings=dataclasses.replace(SETTINGS, load_best_model_at_end=True))
    assert results(tmp_path)[0] == results(undisturbed)[0]
    assert left(tmp_path) == {"checkpoints": [STEPS]}


def test_a_checkpoint_of_other_data_is_refused(tmp_path, monkeypatch):
    kill_after(monkeypatch, SAVE)
    with pytest.raises(Killed):
        run(tmp_path)
    with pytest.raises(
        ValueError, match=r"tiny: the checkpoint of step 3 .*'units': 5.*'units': 4"
    ):
        run(tmp_path, units=UNITS[:4])


# ---------------------------------------------------------------------------------------- divergence


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    """A token id outside the vocabulary makes the loss of the step that first meets it NaN."""
    units = drawn_units(20)
    stream = UnitStream(
        units, units_per_microbatch=2, microbatches=1, steps=STEPS, seed=SEED, limit=32, shape=SHAPE
    )
    bad = int(stream.indices(4)[0, 1])  # met in the fifth step, between the saves at 3 and 6
    assert all(bad not in stream.indices(step) for step in range(4))
    e = units[bad].examples[0]
    e.tokens[len(e.tokens) - 2] = 61
    with pytest.raises(
        TrainingDiverged, match="tiny: loss_nats_per_token is nan at step 5; lower learning"
    ):
        run(tmp_path, units=units)
    assert latest(tmp_path) == 3
    like = jax.tree.leaves(load_params(tmp_path / "checkpoints", DECODER))
    assert all(np.isfinite(x).all() for x in like)
    # The same steps without the bad one leave the same parameters.
    good, settings = drawn_units(20), SETTINGS
    directory = tmp_path / "good"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 4)
        run(directory, units=good, settings=settings)
    for a, b in zip(
        like, jax.tree.leaves(load_params(directory / "checkpoints", DECODER)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    log = MetricsLog(train.epath.Path(tmp_path) / "metrics.jsonl", keep_steps=0)
    log.add(1, {"loss_nats_per_token": np.float32(1), "grad_norm": np.float32(2)})
    log.add(2, {"loss_nats_per_token": np.float32(1), "grad_norm": np.float32("inf")})
    with pytest.raises(TrainingDiverged, match="x: grad_norm is inf at step 2"):
        log.flush("x")
