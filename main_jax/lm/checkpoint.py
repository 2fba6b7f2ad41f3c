"""Training checkpoints (Orbax): params | optimiser | weighting | JSON, atomic, newest kept.

A checkpoint of an unfinished training holds everything a bit-for-bit continuation needs; the last one of
a finished training holds the parameters alone.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from main_jax.lm.model import Decoder
from main_jax.lm.sharding import abstract_like_params
from main_jax.lm.step import TrainState
from main_jax.lm.weights import CheckpointError, one_line

PARTS = ("params", "opt_state", "weighting")


class _Manager(ocp.CheckpointManager):
    """Does not ask for preemption at its own steps: JAX could no longer agree on one of `stop_asked`'s."""

    def reached_preemption(self, step: int) -> bool:
        """Never: `fit` decides when to save."""
        return False


class Checkpoints:
    """The checkpoints of one training, in one directory. Use as a context manager.

    `concurrent_bytes` bounds what a save holds on the host at a time; it must exceed the largest array.
    `read_only` leaves alone what another process may just be saving.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        concurrent_bytes: int = 96 * 10**9,
        *,
        read_only: bool = False,
    ):
        limit: Any = concurrent_bytes / 10**9
        writing = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
        reading = ocp.CheckpointManagerOptions(read_only=True, create=False)
        self._manager = _Manager(
            epath.Path(directory).absolute(),
            options=reading if read_only else writing,
            item_handlers={
                p: ocp.StandardCheckpointHandler(save_concurrent_gb=limit) for p in PARTS
            },
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Saves the whole state, asynchronously."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                opt_state=ocp.args.StandardSave(state.opt_state),
                weighting=ocp.args.StandardSave(state.weighting),
            ),
        )

    def save_params(self, step: int, params: Any) -> None:
        """Saves the parameters of a finished training."""
        self._manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))

    def keep_only(self, step: int) -> None:
        """Removes what a kill right after the last save has left beside it."""
        for other in self._manager.all_steps():
            if other != step:
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

    def restore_params(self, step: int, decoder: Decoder) -> Any:
        """The parameters of `step` alone."""
        shapes = jax.eval_shape(decoder.init, jax.random.key(0))
        abstract = abstract_like_params(shapes, decoder.config)
        args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        parts: Any = self._manager.restore(step, args=args)
        return parts.params


def load_params(directory: epath.PathLike, decoder: Decoder) -> Any:
    """The newest parameters under `directory`. Raises CheckpointError where none can be read."""
    with _readable(directory), Checkpoints(directory, read_only=True) as checkpoints:
        return checkpoints.restore_params(_newest(checkpoints, directory), decoder)


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
        folder, held = epath.Path(directory).absolute() / str(step) / "params", {}
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
