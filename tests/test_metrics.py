"""Where training metrics go: every sink holds what `metrics.jsonl` holds, each step once.

What TensorBoard and W&B wrote is read from their files, by the formats that these have.
"""

import json
import os
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from bucket import use_bucket
from etils import epath
from tiny_decoder import DECODER, drawn_params, example, fresh

import main_jax.lm.metrics as metrics
import main_jax.lm.train as train
from main_jax.cli import main
from main_jax.config import Config
from main_jax.errors import UserError
from main_jax.lm.batches import Shape, Unit
from main_jax.lm.metrics import MetricsLog, Reporting, Sinks
from main_jax.lm.step import train_step
from main_jax.lm.train import TrainingSettings, fit
from main_jax.pipeline import open_run, stages_of
from main_jax.run import Run
from main_jax.strict_yaml import load_config
from main_jax.weighting import Weighting

DEMO = str(Path(__file__).parent.parent / "configs" / "demo.yaml")
TENSORBOARD, WANDB = (Reporting((name,), group="the-run") for name in ("tensorboard", "wandb"))


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """W&B writing below a folder; a process reads W&B's settings once, so it forgets them here."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "")  # for the test's end: it is set where it is not
    monkeypatch.delenv("WANDB_FINISH_TIMEOUT")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    yield tmp_path / "wandb"
    wandb.teardown()


# ---------------------------------------------------------------------------------- reading it back


def logged(directory):
    """(step, name) -> value of everything finite in `metrics.jsonl`."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found = [
        ((line["step"], name), value)
        for line in lines
        for name, value in line.items()
        if name != "step" and value is not None
    ]
    assert len(dict(found)) == len(found) > 0
    return dict(found)


def crc32c(data, crc=0xFFFFFFFF):
    """RFC 3720, bit by bit."""
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def events(directory):
    """The events of every file, in the order in which TensorBoard reads them: TFRecords."""
    from tensorboardX.proto.event_pb2 import Event

    def checked(data, masked):
        crc = crc32c(data)
        assert masked == struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
        return data

    found = []
    for path in sorted(epath.Path(directory).glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", checked(data[:8], data[8:12]))
            found.append(Event.FromString(checked(data[12 : 12 + size], data[12 + size :][:4])))
            data = data[16 + size :]
    return found


def shown(directory):
    """(step, name) -> values that TensorBoard shows: a start hides what came before from its step on."""
    from tensorboardX.proto.event_pb2 import SessionLog

    found = {}
    for event in events(directory):
        if event.session_log.status == SessionLog.START:
            found = {key: values for key, values in found.items() if key[0] < event.step}
        for value in event.summary.value:
            found.setdefault((event.step, value.tag), []).append(value.simple_value)
    return found


def sent(folder):
    """(W&B's description of the run, {(step, name) -> values}) of each offline run, oldest first.

    A file of records as LevelDB has them: blocks of 32 KiB, chunks of checksum, length, kind.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    def records(data, at=7):  # after W&B's own header
        record = b""
        while len(data) - at >= 7:
            if (left := 2**15 - at % 2**15) < 7:
                at += left
                continue
            _, size, kind = struct.unpack("<IHB", data[at : at + 7])
            record += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or the last part
                yield Record.FromString(record)
                record = b""

    sys.modules["wandb"].teardown()  # until then its own process may still be writing
    found = []
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        values, run = {}, None
        for record in records(path.read_bytes()):
            run = record.run if record.HasField("run") else run
            items = {
                i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item
            }
            for name in items.keys() - {"_step", "_timestamp", "_runtime"}:
                values.setdefault((items["_step"], name), []).append(items[name])
        found.append((run, values))
    return found


def once(found):
    """The values, each of which was there once."""
    assert all(len(values) == 1 for values in found.values()), found
    return {key: value for key, (value,) in found.items()}


def as_float32(values):
    """As TensorBoard keeps them."""
    return {key: float(np.float32(value)) for key, value in values.items()}


# --------------------------------------------------------------------------------------- a training


def train_tiny(directory, reporting, steps=7, best=True):
    rng = np.random.default_rng(0)

    def unit():
        target = rng.integers(0, 61, 5)
        pair = tuple(example(rng.integers(0, 61, 9), target) for _ in range(2))
        return Unit(pair, tuple({"weight": 1.0, "aligned": a} for a in (False, True)))

    settings = TrainingSettings(
        learning_rate=0.01, max_steps=steps, train_batch_size=2, save_steps=3, logging_steps=2,
        eval_steps=3, load_best_model_at_end=best,
    )  # fmt: skip
    fit(
        DECODER, lambda: fresh(drawn_params()), [unit() for _ in range(5)], settings,
        directory=directory, weighting=Weighting("pair_ratio"), seed=1, label="tiny", limit=32,
        validation=[e for _ in range(2) for e in unit().examples], shape=Shape(4, 32, 4),
        reporting=reporting,
    )  # fmt: skip


class Killed(BaseException):
    """Not an Exception: nothing may handle it."""


def killed_after(steps, *how):
    """A training whose step is taken away the given number of steps from its start."""
    done = []

    def step(*arguments, **named):
        if len(done) == steps:
            raise Killed
        done.append(None)
        return train_step(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "train_step", step)
        train_tiny(*how)


UNITS = ("_nats", "_nats_per_token", "_tokens", "_step")
UNITLESS = {"learning_rate", "grad_norm", "alpha"}


def test_a_killed_training_has_each_step_once_in_each_sink(tmp_path, offline, monkeypatch):
    """Killed in its 6th and 7th step; checkpoints are of steps 3 and 6."""
    reporting = Reporting(("jsonl", "tensorboard", "wandb"), group="the-run")
    for n, steps in enumerate((5, 3, None)):
        monkeypatch.setenv("WANDB_DIR", str(tmp_path / str(n)))
        (tmp_path / str(n)).mkdir()
        sys.modules["wandb"].teardown()  # as in a process of its own
        if steps is None:
            train_tiny(tmp_path, reporting)
        else:
            killed_after(steps, tmp_path, reporting)
    expected = logged(tmp_path)
    names = {name for _, name in expected}
    assert {step for step, _ in expected} == set(range(1, 8))
    assert {"loss_nats_per_token", "best_step", "validation_nll_nats_per_token"} < names
    assert all(name.endswith(UNITS) for name in names - UNITLESS), names
    assert all(not name.endswith(UNITS) for name in UNITLESS) and names > UNITLESS

    twice = [
        e.step
        for e in events(tmp_path)
        if any(v.tag == "loss_nats_per_token" for v in e.summary.value)
    ]
    assert twice == [1, 2, 3, 4, 4, 5, 6, 7]  # step 5 was not yet written when the kill came
    assert once(shown(tmp_path)) == as_float32(expected)
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 3

    runs = [run for n in range(3) for run in sent(tmp_path / str(n) / "wandb")]
    assert len(runs) == 3 and len({run.run_id for run, _ in runs}) == 1
    for run, _ in runs:
        assert (run.project, run.display_name, run.run_group) == ("main_jax", "tiny", "the-run")
    *before, (_, last) = runs
    assert once(last) == expected  # the newest folder has everything
    for (_, values), steps in zip(before, (4, 6), strict=True):
        assert once(values) == {k: v for k, v in expected.items() if k[0] <= steps}


def test_a_finished_training_opens_no_sink(tmp_path, monkeypatch):
    train_tiny(tmp_path, None, best=False)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(metrics, "TensorBoard", lambda *_: pytest.fail("opened"))
    train_tiny(tmp_path, TENSORBOARD, best=False)
    assert sorted(tmp_path.iterdir()) == before


# ------------------------------------------------------------------------------------------- sinks


def write(directory, reporting, steps, start=0):
    """Steps as a training would log them, without one."""
    directory = epath.Path(directory)
    with Sinks(reporting, directory, "tiny", start) as sinks:
        log = MetricsLog(directory / "metrics.jsonl", keep_steps=start, sinks=sinks)
        for step in range(start + 1, steps + 1):
            log.add(step, {"loss_nats_per_token": np.float32(1 / step), "other": np.float32("nan")})
            if step % 2 == 0:
                log.flush("tiny")
        log.flush("tiny")


def test_a_sink_that_comes_later_gets_what_was_before(tmp_path):
    write(tmp_path, Reporting(), 4)
    write(tmp_path, TENSORBOARD, 6, start=4)
    assert once(shown(tmp_path)) == as_float32(logged(tmp_path))
    assert {step for step, _ in shown(tmp_path)} == {1, 2, 3, 4, 5, 6}


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "first", lambda: False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    write(tmp_path, Reporting(("tensorboard", "wandb")), 4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["__init__", "write", "close"])
def test_a_sink_that_fails_is_named_once_and_left_out(method, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr(metrics.TensorBoard, method, fail)
    write(tmp_path, TENSORBOARD, 6)
    assert len(logged(tmp_path)) == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tiny: tensorboard failed") and line.endswith("no route to host")


def test_the_error_of_a_training_is_not_lost_in_a_sink(tmp_path):
    with pytest.raises(ZeroDivisionError), Sinks(TENSORBOARD, epath.Path(tmp_path), "tiny", 0):
        raise ZeroDivisionError


def test_event_files_go_where_nothing_can_be_appended_to(monkeypatch):
    bucket = use_bucket(monkeypatch)
    directory = epath.Path("gs://bucket/run/stages/forward")
    write(directory, TENSORBOARD, 6)
    assert len(events(directory)) == 8  # the format's version, the start, six steps
    write(directory, TENSORBOARD, 8, start=4)
    assert once(shown(directory)) == as_float32(logged(directory))
    assert len(bucket.store) == 3 and not Path("gs:").exists()


class FakeWandb(types.ModuleType):
    """W&B's server, as far as it is asked: it knows the last step of each run."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.runs, self.exits = [], {}, []

    def init(self, **how):
        self.inits.append(how)
        steps = self.runs.setdefault(how["id"], {})
        return types.SimpleNamespace(
            starting_step=max(steps, default=-1) + 1,
            log=lambda values, step: steps.setdefault(step, []).append(values),
            finish=lambda exit_code: self.exits.append(exit_code),
        )


def test_a_wandb_run_goes_on_where_the_server_has_it(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "7")
    write(tmp_path, WANDB, 6)
    (run,) = fake.runs.values()
    del run[6], run[5], run[4]  # a kill, before these had reached the server
    write(tmp_path, WANDB, 8, start=5)
    write(tmp_path, WANDB, 9, start=5)  # the server has more than the checkpoint
    assert run == {
        step: [{"loss_nats_per_token": float(np.float32(1 / step))}] for step in range(1, 10)
    }
    assert len(fake.inits) == 3 and all(how == fake.inits[0] for how in fake.inits)
    how = fake.inits[0]
    assert (how["project"], how["name"], how["group"]) == ("mine", "tiny", "the-run")
    assert how["resume"] == "allow" and fake.exits == [0, 0, 0]
    assert os.environ["WANDB_FINISH_TIMEOUT"] == "7"
    write(tmp_path / "another", WANDB, 1)
    assert len(fake.runs) == 2
    with pytest.raises(Killed), Sinks(WANDB, epath.Path(tmp_path), "tiny", 0):
        raise Killed
    assert fake.exits[-1] == 1


def test_wandb_does_not_wait_for_ever(tmp_path, offline, monkeypatch):
    sink = metrics.WeightsAndBiases(epath.Path(tmp_path), "tiny", None)
    assert sink._run.settings.finish_timeout == metrics.FINISH_TIMEOUT_S
    sink.close(failed=False)


# ---------------------------------------------------------------------------------------- the config


def refusal(*overrides):
    with pytest.raises(UserError) as caught:
        open_run(load_config(Config, DEMO, overrides))
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_an_unknown_name_names_its_nearest_match():
    line = refusal("--runtime.report_to", "[jsonl, tensorbord]")
    assert "runtime.report_to[1]: expected one of jsonl, tensorboard, wandb" in line
    assert line.endswith("found 'tensorbord'; did you mean tensorboard?")


@pytest.mark.parametrize(("name", "module"), metrics.MODULES.items())
def test_a_missing_extra_is_named_before_any_work(name, module, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    run = tmp_path / "run"
    assert main(["run", DEMO, "--output_dir", str(run), "--runtime.report_to", f"[{name}]"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"main-jax: runtime.report_to: {name}: it is not installed: pip install 'main-jax[{name}]'"
    )
    assert not run.exists()


def test_a_folder_called_wandb_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert "main-jax[wandb]" in (metrics.unavailable("wandb") or "")


def test_who_has_no_key_for_wandb_hears_it_before_any_work(offline, tmp_path, monkeypatch):
    assert metrics.unavailable("wandb") is None  # offline none is needed
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    line = refusal("--output_dir", str(tmp_path / "run"), "--runtime.report_to", "[wandb]")
    assert line.startswith("runtime.report_to: wandb: No API key") and "WANDB_MODE=offline" in line


def fingerprints(path, *overrides):
    config = load_config(Config, DEMO, ["--output_dir", str(path), *overrides])
    run = Run(config, stages_of(config))
    return [run.fingerprint(name) for name in run.stages]


def test_no_result_depends_on_it(tmp_path):
    plain = fingerprints(tmp_path)
    assert fingerprints(tmp_path, "--runtime.report_to", "[tensorboard, wandb]") == plain
    assert fingerprints(tmp_path, "--runtime.remat", "full") != plain


SHORT = {
    "world.documents": 300, "world.hidden_size": 32, "world.pretraining.max_steps": 4,
    "world.responses": 40, "world.seed_pairs": 30, "world.test_questions": 5,
    "align.round_0.max_steps": 3, "align.max_steps": 3, "finetune.max_steps": 3,
    "finetune.arms": ["none"], "align.sampling.max_new_tokens": 4,
    "augment.sampling.max_new_tokens": 4, "evaluate.sampling.max_new_tokens": 4,
}  # fmt: skip


@pytest.mark.slow
def test_every_training_of_a_run_goes_everywhere(offline, tmp_path, capsys):
    run = tmp_path / "my-run"
    words = ["run", DEMO, "--output_dir", str(run)]
    words += [f"--{k}={yaml.safe_dump(v, default_flow_style=True)}" for k, v in SHORT.items()]
    assert main([*words, "--runtime.report_to", "[tensorboard, wandb]"]) == 0
    directories = sorted(path.parent for path in run.rglob("metrics.jsonl"))
    assert len(directories) == 1 + 5 + 2  # the world's; two rounds and the control; two arms
    for directory in directories:
        assert once(shown(directory)) == as_float32(logged(directory))
    runs = {found.run_id: (found, values) for found, values in sent(offline)}
    labels = set()
    for directory in directories:
        found, values = runs.pop(json.loads((directory / "wandb.json").read_text())["id"])
        assert once(values) == logged(directory) and found.run_group == "my-run"
        labels.add(found.display_name)
    assert not runs and len(labels) == 8 and {"align round-1/reverse", "finetune none"} < labels
    capsys.readouterr()
    assert main(words) == 0  # to metrics.jsonl alone: nothing is done again
    assert capsys.readouterr().err.count("done before, kept") == 9
