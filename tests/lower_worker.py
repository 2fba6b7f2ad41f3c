"""Lowers every program of the configurations named, for the machine that each names, on virtual CPU devices.

python lower_worker.py CONFIG ...     -> JSON: config -> [[stage, program, argument bytes, has a kernel]]
"""

import json
import re
import sys
from pathlib import Path

import jax

from main_jax import plan
from main_jax.config import Config
from main_jax.lm.topology import CHIPS, Topology, split
from main_jax.strict_yaml import load_config

DEVICES = 32


def topology(name: str) -> Topology:
    """As `open_topology` would give it, with CPU devices."""
    family, sizes = split(name)
    count, chip = 1, CHIPS[family]
    for n in sizes:
        count *= n
    on_host = min(count, 8 if chip.platform == "gpu" else 4)
    devices = jax.devices()
    assert count <= DEVICES == len(devices)
    return Topology(name, chip, devices[:count], devices[:on_host])


def main() -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    found = {}
    for path in sys.argv[1:]:
        named = re.search(r"--topology (\S+)", Path(path).read_text())
        machine = topology(named[1] if named else "v5e:2x2")
        # Without cuDNN its attention cannot even be traced.
        of_gpus = ["--runtime.attention", "xla"] if machine.chip.platform == "gpu" else []
        config = load_config(Config, path, of_gpus)
        rows = []
        for call in plan.calls(config, plan.model_of(config), machine, plan.Work()):
            with call.under():
                platform = {"gpu": "cuda"}.get(machine.chip.platform, "tpu")
                lowered = call.program.trace().lower(lowering_platforms=(platform,))
                kernel = "tpu_custom_call" in lowered.as_text()
                rows.append([call.stage, call.name, call.program.argument_bytes(), kernel])
        found[Path(path).name] = rows
    print(json.dumps(found))


if __name__ == "__main__":
    main()
