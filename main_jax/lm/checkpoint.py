"""Training checkpoints (Orbax): params | optimiser | weighting | JSON, atomic, newest kept.

A checkpoint of an unfinished training holds everything a bit-for-bit continuation needs; the last one of
a finished training holds the parameters alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from main_jax.lm.model import Decoder
from main_jax.lm.step import TrainState

PARTS = ("params", "opt_state", "weighting")


class Checkpoints:
    """The checkpoints of one training, in one directory. Use as a context manager.

    `concurrent_bytes` bounds what a save holds on the host at a time; it must exceed the largest array.
    """

    def __init__(self, directory: epath.PathLike, concurrent_bytes: int = 96 * 10**9):
        limit: Any = concurrent_bytes / 10**9
        self._manager = ocp.CheckpointManager(
            epath.Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True),
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
        """The state of `step`; `like` gives shapes and dtypes."""
        abstract = _on_this_device(like)
        parts: Any = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                opt_state=ocp.args.StandardRestore(abstract.opt_state),
                weighting=ocp.args.StandardRestore(abstract.weighting),
            ),
        )
        return TrainState(parts.params, parts.opt_state, parts.weighting)

    def restore_params(self, step: int, decoder: Decoder) -> Any:
        """The parameters of `step` alone."""
        abstract = _on_this_device(jax.eval_shape(decoder.init, jax.random.key(0)))
        args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        parts: Any = self._manager.restore(step, args=args)
        return parts.params


def _on_this_device(tree: Any) -> Any:
    """Shapes and dtypes of `tree`, to be placed on the first device wherever they were saved."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)


def load_params(directory: epath.PathLike, decoder: Decoder) -> Any:
    """The newest parameters under `directory`. Raises FileNotFoundError when there are none."""
    with Checkpoints(directory) as checkpoints:
        step = checkpoints.latest_step
        if step is None:
            raise FileNotFoundError(f"{directory}: no checkpoint here")
        return checkpoints.restore_params(step, decoder)


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
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(self.folder, args=args)
        return jax.tree.leaves(restored)[0]


def stored_params(directory: epath.PathLike) -> dict[str, Any]:
    """The newest parameters under `directory` as a tree of `StoredArray`, nothing of it read yet.

    Raises FileNotFoundError when there are none.
    """
    with Checkpoints(directory) as checkpoints:
        step = checkpoints.latest_step
    if step is None:
        raise FileNotFoundError(f"{directory}: no checkpoint here")
    folder, held = epath.Path(directory).absolute() / str(step) / "params", {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: StoredArray(
            tuple(key.key for key in path), tuple(leaf.shape), np.dtype(leaf.dtype), folder, held
        ),
        tree,
    )
