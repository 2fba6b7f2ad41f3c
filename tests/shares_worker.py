"""One process of test_shares.py: python shares_worker.py CONFIG RUN LOG STAGES [PROCESS PORT].

Runs stages of a run on two devices, alone or as one of two processes, and leaves in LOG what this process
did: by stage, the parts that it wrote, the texts that it turned into tokens, and the models that it loaded.
"""

import copy
import json
import sys
from pathlib import Path

import jax

from main_jax import align, parts, pipeline
from main_jax.config import Config
from main_jax.lm.runtime import Distributed, initialize
from main_jax.lm.sharding import MeshShape, current_mesh, use_mesh
from main_jax.prompts import Prompt
from main_jax.strict_yaml import load_config


def main(config: str, run: str, log: str, stages: str, *which: str) -> None:
    if which:
        process, port = map(int, which)
        together = Distributed(f"localhost:{port}", 2, process, 60)
        initialize(False, cpu_devices=2, distributed=together)
        check_meshes()
    else:
        initialize(False, cpu_devices=2)
    write_part, encode_all, load_params = parts._write_part, Prompt.encode_all, align.load_params
    done: dict[str, list] = {"parts": [], "texts": [], "models": []}
    did = {}

    def written(path, table):
        done["parts"].append("/".join(path.parts[-3:]))
        write_part(path, table)

    def encoded(prompt, texts):
        done["texts"] += texts
        return encode_all(prompt, texts)

    def loaded(directory, *how, **named):
        params = load_params(directory, *how, **named)
        if named.get("inference"):
            assert lies_here(params)
            done["models"].append(directory.parent.name)
        return params

    parts._write_part, Prompt.encode_all, align.load_params = written, encoded, loaded
    opened = pipeline.open_run(load_config(Config, config, ["--output_dir", run]))
    with use_mesh(MeshShape(fsdp=2), local=True):
        assert lies_here(opened.base.load())
    for stage in stages.split(","):
        for list_ in done.values():
            list_.clear()
        pipeline.execute(opened, stage)
        did[stage] = copy.deepcopy(done)
    Path(log).write_text(json.dumps(did))


def lies_here(params) -> bool:
    """Whether this process's two devices hold all of it, in parts."""
    leaves = jax.tree.leaves(params)
    cut = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
    whole = sum(leaf.size for leaf in leaves)
    return all(x.is_fully_addressable for x in leaves) and whole / 2 <= cut < 0.6 * whole


def check_meshes() -> None:
    """A process's own mesh within that of all, also of a single device, and that of all again."""
    with use_mesh(MeshShape()):
        assert current_mesh().size == 4
        for shape, size in (
            (MeshShape(), 2),
            (MeshShape(data=-1, fsdp=1), 2),
            (MeshShape(1, 1), 1),
        ):
            with use_mesh(shape, local=True):
                assert size == (current_mesh().size if current_mesh() else 1)
                assert set(jax.sharding.get_mesh().devices.flat) <= set(jax.local_devices())
        assert current_mesh().size == 4


if __name__ == "__main__":
    main(*sys.argv[1:])
