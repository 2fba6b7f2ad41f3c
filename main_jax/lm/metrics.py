"""Metrics of a training: `metrics.jsonl`, always written, and where they go besides.

    with Sinks(Reporting(("tensorboard", "wandb"), group="my-run"), directory, label, start) as sinks:
        log = MetricsLog(directory / "metrics.jsonl", keep_steps=start, sinks=sinks)
        log.add(step, metrics)
        log.flush(label)

A sink gets the lines of `metrics.jsonl` under the same names, when they are written there. A training that
continues from step `start` goes on in the same TensorBoard or W&B run; no step counts twice in it, and steps
that it lacks come from the file.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from etils import epath

from main_jax.lm.multihost import first
from main_jax.lm.progress import say

Lines = Sequence[tuple[int, dict[str, float]]]
"""(step, name -> value); what is not finite is left out."""

MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""What the sinks, which are called like the extras, need."""

FINISH_TIMEOUT_S = 20
"""W&B may take as long for the last uploads of a training, then this goes on: its own default is for ever,
and a machine that is being taken away waits for half a minute. `WANDB_FINISH_TIMEOUT` wins."""


class TrainingDiverged(RuntimeError):
    """The loss is no longer finite."""


@dataclass(frozen=True)
class Reporting:
    """Where metrics go: names of `MODULES`; `jsonl` adds nothing. `group` joins the trainings of a run."""

    to: tuple[str, ...] = ()
    group: str | None = None


def unavailable(name: str) -> str | None:
    """Why a sink cannot be used here, or None. Asks for W&B's key where nobody has logged in yet."""
    # A folder called wandb, as W&B leaves one, would pass for a package too, but one without an origin.
    if name in MODULES and getattr(find_spec(MODULES[name]), "origin", None) is None:
        return f"it is not installed: pip install 'main-jax[{name}]'"
    if name != "wandb" or not first() or os.environ.get("WANDB_MODE") == "offline":
        return None
    try:
        _wandb().login(verify=False)  # needs no network
    except Exception as error:
        return f"{_one_line(error)} Or set WANDB_MODE=offline."
    return None


class MetricsLog:
    """`metrics.jsonl`: one line per step, read from the device only when flushed.

    The file is written whole each time: object stores do not append. `keep_steps` drops what an interrupted
    run had logged past its last checkpoint.
    """

    def __init__(self, path: epath.Path, keep_steps: int, sinks: Sinks | None = None):
        self._path, self._pending, self._sinks = path, [], sinks
        self._lines: list[str] = []
        if first():
            lines = path.read_text().splitlines() if path.exists() else []
            complete = [line for line in lines if line.endswith("}")]
            kept = [line for line in map(json.loads, complete) if line["step"] <= keep_steps]
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(kept)

    def _write(self, new: Sequence[dict]) -> None:
        """Writes the file with further lines, and hands those to the sinks."""
        self._lines += map(json.dumps, new)
        _write_text(self._path, "".join(line + "\n" for line in self._lines))
        if self._sinks:
            self._sinks.write([
                (line["step"], {k: v for k, v in line.items() if k != "step" and v is not None})
                for line in new
            ])  # fmt: skip

    def add(self, step: int, metrics: dict) -> None:
        """Remembers a step's metrics, still on the device."""
        self._pending.append((step, metrics))

    def flush(self, label: str) -> float:
        """Writes what is pending; returns the last loss. Raises TrainingDiverged."""
        loss, new = math.nan, []
        for step, metrics in jax.device_get(self._pending):
            values = {name: np.asarray(value).item() for name, value in metrics.items()}
            loss = values.get("loss_nats_per_token", loss)
            for name in ("loss_nats_per_token", "grad_norm"):
                if name in values and not math.isfinite(values[name]):
                    raise TrainingDiverged(
                        f"{label}: {name} is {values[name]} at step {step}; lower learning_rate or"
                        " look at the data of that step; the last good checkpoint is kept"
                    )
            shown = {k: v if math.isfinite(v) else None for k, v in values.items()}
            new.append({"step": step} | shown)
        if first():
            self._write(new)
        self._pending = []
        return loss


class Sinks:
    """What gets a training's metrics besides the file; a context manager. Process 0 has them all.

    One that fails, at any time, says so in one line and gets no more: no training ends of it.
    """

    def __init__(self, reporting: Reporting, directory: epath.Path, label: str, start: int):
        self._label = label
        self._open: dict[str, TensorBoard | WeightsAndBiases] = {}
        for name in [name for name in MODULES if name in reporting.to and first()]:
            with self._spared(name):
                directory.mkdir(parents=True, exist_ok=True)
                self._open[name] = (
                    TensorBoard(directory, start)
                    if name == "tensorboard"
                    else WeightsAndBiases(directory, label, reporting.group)
                )

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc) -> None:
        for name, sink in [*self._open.items()]:
            with self._spared(name):
                sink.close(failed=kind is not None)

    def write(self, lines: Lines) -> None:
        """Gives each sink what it does not have yet."""
        for name, sink in [*self._open.items()]:
            with self._spared(name):
                sink.write([line for line in lines if line[0] >= sink.next_step])

    @contextmanager
    def _spared(self, name: str) -> Generator[None]:
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            say(
                f"{self._label}: {name} failed and gets no more of this training, which goes on "
                f"(metrics.jsonl has everything): {_one_line(error)}"
            )


class TensorBoard:
    """Event files beside `metrics.jsonl`, one for each time that the training was started.

    tensorboardX's `SummaryWriter` writes in a thread of its own: a flush does not wait for it, and once a
    write has failed the next ones wait for ever. This writes at once, so that what a checkpoint has seen
    is on disk before the checkpoint is.
    """

    def __init__(self, directory: epath.Path, start: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # ty: ignore
        from tensorboardX.record_writer import register_writer_factory

        self._event = Event
        self.next_step = start + 1 if any(directory.glob("events.out.tfevents.*")) else 0
        scheme, remote, _ = str(directory).partition("://")
        if remote:
            register_writer_factory(scheme, SimpleNamespace(open=_WholeFile))
        # By its first step: of two starts within one second, the second would overwrite the other's file.
        self._writer = EventsWriter(f"{directory}/events", f".{self.next_step:09}")
        # What an interrupted run had logged past its last checkpoint is no longer shown.
        restart = SessionLog(status=SessionLog.START)
        self._writer.write_event(
            Event(wall_time=time.time(), step=self.next_step, session_log=restart)
        )

    def write(self, lines: Lines) -> None:
        """Appends to the file, through to the disk."""
        for step, values in lines:
            summary = {"value": [{"tag": k, "simple_value": v} for k, v in values.items()]}
            self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Closes the file."""
        self._writer.close()


class _WholeFile:
    """An event file on an object store, which does not append: written whole at every flush."""

    def __init__(self, path: str):
        self._path, self._data = epath.Path(path), bytearray()

    def write(self, data: bytes) -> None:
        self._data += data

    def flush(self) -> None:
        self._path.write_bytes(bytes(self._data))

    def close(self) -> None:
        pass  # flushed before


class WeightsAndBiases:
    """A W&B run per training, whose id stands in `wandb.json` beside `metrics.jsonl`.

    A training that starts over, its old directory set aside, is thus a new run. W&B cannot take back what
    it has: steps that are done again are not sent again. Offline it does not know what it has: every start
    writes all steps, and the folder of the last one is the one to `wandb sync`.
    Project `main_jax`; else by W&B's environment variables: WANDB_PROJECT, WANDB_MODE, WANDB_DIR, ...
    """

    def __init__(self, directory: epath.Path, label: str, group: str | None):
        file = directory / "wandb.json"
        if not file.exists():
            _write_text(file, json.dumps({"id": secrets.token_hex(8)}) + "\n")
        self._run = _wandb().init(
            project=os.environ.get("WANDB_PROJECT", "main_jax"), name=label, group=group,
            id=json.loads(file.read_text())["id"], resume="allow", reinit="create_new",
        )  # fmt: skip
        self.next_step = self._run.starting_step

    def write(self, lines: Lines) -> None:
        """Sends the lines, without waiting for the network."""
        for step, values in lines:
            self._run.log(values, step=step)

    def close(self, failed: bool) -> None:
        """Ends W&B's run, once all is uploaded or the time is over."""
        self._run.finish(exit_code=int(failed))


def _wandb() -> Any:
    """The module, which reads its environment once."""
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_TIMEOUT_S))
    import wandb

    return wandb


def _write_text(path: epath.Path, text: str) -> None:
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_text(text)
    temporary.replace(path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
