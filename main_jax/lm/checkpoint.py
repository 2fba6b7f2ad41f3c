"""Training checkpoints (Orbax): params | optimiser | weighting | JSON, atomic, the newest kept.

A checkpoint of an unfinished training holds everything a bit-for-bit continuation needs; the last one of
a finished training holds the parameters alone.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from main_jax.lm.model import Decoder
from main_jax.lm.sharding import one_copy
from main_jax.lm.step import TrainState, abstract_params
from main_jax.lm.weights import CheckpointError, one_line

PARTS = ("params", "opt_state", "weighting")


def _absolute(directory: epath.PathLike) -> epath.Path:
    """As Orbax wants it; `absolute` would take gs://bucket for a local name."""
    path = epath.Path(directory)
    return path if "://" in str(directory) else path.absolute()


class _Manager(ocp.CheckpointManager):
    """Does not ask for preemption at its own steps: JAX could no longer agree on one of `stop_asked`'s."""

    def reached_preemption(self, step: int) -> bool:
        """Never: `fit` decides when to save."""
        return False


class Checkpoints:
    """The checkpoints of one training, in one directory. Use as a context manager.

    `concurrent_bytes` bounds what a save holds on the host at a time; it must exceed the largest array.
    `keep` is how many stay, the newest; None: all. `read_only` leaves alone what another process may just
    be saving, and does not wait for others: each of several processes reads when it likes.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        concurrent_bytes: int = 96 * 10**9,
        *,
        keep: int | None = 1,
        read_only: bool = False,
    ):
        limit: Any = concurrent_bytes / 10**9
        writing = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )
        reading = ocp.CheckpointManagerOptions(
            read_only=True, create=False, multiprocessing_options=alone
        )
        self._manager = _Manager(
            _absolute(directory),
            options=reading if read_only else writing,
            item_handlers={
                p: ocp.StandardCheckpointHandler(save_concurrent_gb=limit) for p in PARTS
            }
            | {"position": ocp.JsonCheckpointHandler()},
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc) -> None:
        self.wait()
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Until what was saved is on disk."""
        self._manager.wait_until_finished()

    def save(self, step: int, state: TrainState, position: Mapping[str, Any] | None = None) -> None:
        """Saves the whole state, asynchronously; `position` is what JSON can say of it beside the step."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                opt_state=ocp.args.StandardSave(state.opt_state),
                weighting=ocp.args.StandardSave(state.weighting),
                position=ocp.args.JsonSave({"step": step, **(position or {})}),
            ),
        )

    def save_params(self, step: int, params: Any) -> None:
        """Saves parameters alone, asynchronously."""
        self._manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))

    def keep_only(self, *steps: int) -> None:
        """Removes all others, once what was saved is on disk."""
        self.wait()
        for other in self._manager.all_steps():
            if other not in steps:
                self._manager.delete(other)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `step`; `like` gives shapes, dtypes and places."""
        parts: Any = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(like.params),
                opt_state=ocp.args.StandardRestore(like.opt_state),
                weighting=ocp.args.StandardRestore(like.weighting),
            ),
        )
        return TrainState(parts.params, parts.opt_state, parts.weighting)

    def position(self, step: int) -> dict[str, Any]:
        """What was saved as the `position` of `step`, and the step."""
        args = ocp.args.Composite(position=ocp.args.JsonRestore())
        parts: Any = self._manager.restore(step, args=args)
        return parts.position

    def positions(self) -> list[dict[str, Any]]:
        """Those of all checkpoints, once what was saved is on disk."""
        self.wait()
        found = []
        for step in self._manager.all_steps():
            with suppress(KeyError, FileNotFoundError):  # an old one that a kill left half deleted
                found.append(self.position(step))
        return found

    def restore_params(self, step: int, decoder: Decoder, *, inference: bool = False) -> Any:
        """The parameters of `step` alone; for inference in `decoder.inference_dtype`."""
        wanted = abstract_params(decoder, inference=inference)
        args = ocp.args.Composite(params=ocp.args.StandardRestore(wanted))
        parts: Any = self._manager.restore(step, args=args)
        return parts.params


class BestParams:
    """The parameters of the best evaluated step so far, in a directory of their own. A context manager.

    Every checkpoint names the step that was best by then: its parameters must be on disk before the
    checkpoint is, and stay as long as it does. What was better since then a continued training finds again.
    So one save, of either kind, is under way at a time.

        best = BestParams(directory, checkpoints, named)    # named: by the checkpoint to continue from
        best.offer(step, nll, params)
        checkpoints.save(step, state, {"best": best.named()})
    """

    def __init__(
        self, directory: epath.PathLike, checkpoints: Checkpoints, named: Mapping[str, Any] | None
    ):
        self.step: int = named["step"] if named else 0  # 0: none yet
        self.nll: float = named["nll"] if named else math.inf
        self._checkpoints, self._kept = checkpoints, Checkpoints(directory, keep=None)
        self._keep_named()

    def __enter__(self) -> BestParams:
        return self

    def __exit__(self, *exc) -> None:
        self._kept.__exit__(*exc)

    def offer(self, step: int, nll: float, params: Any) -> None:
        """Keeps the parameters where their NLL is lower than any before."""
        if nll < self.nll:
            self.step, self.nll = step, nll
            self._keep_named()
            self._kept.save_params(step, params)

    def _keep_named(self) -> None:
        found = [position["best"] for position in self._checkpoints.positions()]
        self._kept.keep_only(*(best["step"] for best in found if best))

    def named(self) -> dict[str, Any] | None:
        """What the checkpoint that is saved next is to say."""
        self._kept.wait()
        return {"step": self.step, "nll": self.nll} if self.step else None

    def restore(self, decoder: Decoder) -> Any:
        """The best parameters; there must have been some."""
        self._kept.wait()
        return self._kept.restore_params(self.step, decoder)


def load_params(directory: epath.PathLike, decoder: Decoder, *, inference: bool = False) -> Any:
    """The newest parameters under `directory`, in float32, or as `decoder.inference_dtype` says.

    Each of several processes reads what its own devices hold, and no one waits for another. Raises
    CheckpointError where none can be read.
    """
    with _readable(directory), Checkpoints(directory, read_only=True) as checkpoints:
        step = _newest(checkpoints, directory)
        params = checkpoints.restore_params(step, decoder, inference=inference)
    return one_copy(params) if inference else params


def _newest(checkpoints: Checkpoints, directory: epath.PathLike) -> int:
    step = checkpoints.latest_step
    if step is None:
        raise CheckpointError(f"{directory}: no checkpoint here")
    return step


@contextmanager
def _readable(directory: epath.PathLike) -> Generator[None]:
    """Says in one line that a checkpoint is damaged; Orbax raises whatever came up."""
    try:
        yield
    except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"[:200]
        raise CheckpointError(f"{directory}: damaged checkpoint ({reason})") from None


# ------------------------------------------------------------------------------- one array at a time


@dataclass(frozen=True)
class StoredArray:
    """An array in a checkpoint: `array[i]` reads it; the one read last is held for the next layer."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    folder: epath.Path
    held: dict[tuple[str, ...], np.ndarray]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Part of the array, on the host."""
        if self.path not in self.held:
            self.held.clear()
            self.held[self.path] = self._read()
        return self.held[self.path][index]

    def _read(self) -> np.ndarray:
        wanted: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        item: Any = 0
        for key in reversed(self.path):
            wanted, item = {key: wanted}, {key: item}
        args = ocp.args.PyTreeRestore(item=item, restore_args=wanted, partial_restore=True)
        with (
            _readable(self.folder),
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
        ):
            return jax.tree.leaves(checkpointer.restore(self.folder, args=args))[0]


def stored_params(directory: epath.PathLike) -> dict[str, Any]:
    """The newest parameters under `directory` as a tree of `StoredArray`, nothing of it read yet.

    Raises CheckpointError where there are none.
    """
    with _readable(directory):
        with Checkpoints(directory, read_only=True) as checkpoints:
            step = _newest(checkpoints, directory)
        folder, held = _absolute(directory) / str(step) / "params", {}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(folder).item_metadata.tree
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: StoredArray(
                tuple(key.key for key in path),
                tuple(leaf.shape),
                np.dtype(leaf.dtype),
                folder,
                held,
            ),
            tree,
        )
