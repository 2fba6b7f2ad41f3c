"""What the processes of test_launch.py run: python launch_worker.py TASK [ARGUMENT] [options of main-jax].

`launch` is the parent, as `main-jax launch` has it; every other task is a process that finds the others by
the options or variables, does something and ends in one of the ways that a verb can end.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from main_jax import launch, processes
from main_jax.cli import guarded
from main_jax.errors import UserError
from main_jax.lm import progress
from main_jax.lm.runtime import initialize


def main() -> int:
    launch.attach()
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("argument", nargs="?")
    processes.add_options(parser)
    arguments = parser.parse_args()
    options = processes.start_options(arguments)
    return globals()[arguments.task](options, arguments.argument)


def sum_over_devices() -> float:
    """Over all devices of all processes."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("x"))
    values = np.arange(1.0, jax.device_count() + 1)
    data = jax.make_array_from_callback(values.shape, rows, lambda index: values[index])
    total = jax.jit(jnp.sum, out_shardings=jax.NamedSharding(mesh, jax.P()))(data)
    return float(total.addressable_data(0))


def psum(options, _) -> int:
    initialize(False, **options)
    import jax

    progress.say("said once")
    with progress.track("adding", 1, "sums") as bar:
        total = sum_over_devices()
        bar.advance()
    found = [jax.process_index(), jax.process_count(), jax.local_device_count(), total]
    print(json.dumps(found))
    return 0


def here(options, folder) -> int:
    """Leaves the process's id in the folder; returns the index."""
    index = options["distributed"].process_id
    Path(folder, f"{index}.pid").write_text(str(os.getpid()))
    return index


def wait_for_the_killed(options, folder) -> int:
    """The victim does nothing; the other waits for it in a collective."""
    initialize(False, **options)
    sum_over_devices()
    if here(options, folder) == int(os.environ["VICTIM"]):
        time.sleep(600)
    sum_over_devices()
    return 0


def fail_alone(options, kind) -> int:
    """Process 1 fails while process 0 waits for it, long after the start."""
    initialize(False, **options)
    sum_over_devices()
    if options["distributed"].process_id == 1:
        error = UserError("the disk is full") if kind == "known" else KeyError("surprise")
        error.stage = "align"
        raise error
    sum_over_devices()
    return 0


def wait_for_sigterm(options, folder) -> int:
    """Ends as a verb does that was preempted."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    return sleep(options, folder)


def sleep(options, folder) -> int:
    here(options, folder)
    time.sleep(600)
    return 0


def deaf(options, folder) -> int:
    """As a process is to SIGTERM that JAX has told of preemption; process 1 fails when all are there."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    index = here(options, folder)
    while len(list(Path(folder).glob("*.pid"))) < 2:
        time.sleep(0.02)
    if index == 1:
        return 7
    time.sleep(600)
    return 0


def end(options, codes) -> int:
    """Process i ends as the i-th word says: a code, a signal as -9, or a mistake's text; "." sleeps."""
    word = codes.split(",")[options["distributed"].process_id]
    if word == ".":
        time.sleep(600)
    if word.lstrip("-").isdigit():
        if int(word) < 0:
            os.kill(os.getpid(), -int(word))
        return int(word)
    index = options["distributed"].process_id
    progress.set_process(index, options["distributed"].num_processes)
    sys.stdout.write(f"out {index}\n")  # at once: print would write the line break apart
    sys.stderr.write(f"err {index}\n")
    raise UserError(word)


def parent() -> int:
    """python launch_worker.py launch N GRACE CPU_DEVICES TASK ..."""
    count, grace, devices = int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    command = [sys.executable, __file__, *sys.argv[5:]]
    return launch.launch([command] * count, launch.environments(count, None, devices), grace)


if __name__ == "__main__":
    sys.exit(parent() if sys.argv[1] == "launch" else guarded(main))
