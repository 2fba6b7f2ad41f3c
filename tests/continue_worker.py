"""One process of test_continue.py: python continue_worker.py FOLDER MESH NAME [PROCESS PORT].

NAME is processes x devices of each. Two processes first do one training undisturbed and stop another one.
Then a copy of the stopped one continues, in FOLDER/NAME; what it restored is left in FOLDER/NAME.npz.
"""

import shutil
import sys
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
from test_train_resume import drawn_units
from tiny_decoder import DECODER, drawn_params

from main_jax.lm import train
from main_jax.lm.multihost import Preempted, barrier, first, on_host
from main_jax.lm.runtime import Distributed, initialize
from main_jax.lm.sharding import MeshShape, use_mesh
from main_jax.lm.step import train_step
from main_jax.weighting import Weighting

STEPS, STOP = 8, 4
MESHES = {"fsdp": MeshShape(fsdp=8), "data x fsdp": MeshShape(data=2, fsdp=4)}
SETTINGS = train.TrainingSettings(
    learning_rate=0.02,
    max_steps=STEPS,
    train_batch_size=4,
    save_steps=3,
    save_total_limit=2,
    eval_steps=1,
    load_best_model_at_end=True,
)


def run(directory: Path, stop: int = 0, restored: Path | None = None) -> None:
    """Train, until the end or as if SIGTERM came before the step after `stop`."""
    states, polls = [], []

    def step(state, *arguments, **named):
        if not states:
            states.append(jax.tree.map(on_host, state) if restored else None)
        return train_step(state, *arguments, **named)

    train.train_step = step
    train.stop_asked = lambda: polls.append(0) or len(polls) == stop
    with suppress(Preempted):
        train.fit(
            DECODER, lambda: jax.tree.map(np.copy, drawn_params()), drawn_units(7, seed=0), SETTINGS,
            directory=directory, weighting=Weighting("loss_ratio"), seed=3, label=directory.name,
            limit=32, validation=[e for u in drawn_units(3, seed=2) for e in u.examples],
        )  # fmt: skip
    if restored and first():
        leaves = jax.tree_util.tree_leaves_with_path(states[0])
        np.savez(restored, **{jax.tree_util.keystr(path): leaf for path, leaf in leaves})


def main(folder, mesh, name, process=None, port=None) -> None:
    """Run what the arguments say."""
    folder, processes, devices = Path(folder), *map(int, name.split("x"))
    how = Distributed(f"localhost:{port}", processes, int(process)) if processes > 1 else None
    initialize(False, cpu_devices=devices, distributed=how)
    assert (jax.process_count(), jax.local_device_count()) == (processes, devices)
    drawn_params()  # by every process for itself
    with use_mesh(MESHES[mesh] if jax.device_count() > 1 else MeshShape()):
        if processes > 1:
            run(folder / "undisturbed")
            run(folder / "stopped", stop=STOP)
        if first():
            shutil.copytree(folder / "stopped", folder / name)
        barrier("copied")
        run(folder / name, restored=folder / f"{name}.npz")


if __name__ == "__main__":
    main(*sys.argv[1:])
