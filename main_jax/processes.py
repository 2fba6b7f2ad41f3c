"""The options by which the processes of a run over several machines find each other."""

from __future__ import annotations

import argparse
import os
from typing import Any

from main_jax.errors import UserError
from main_jax.lm.rendezvous import split
from main_jax.lm.runtime import Distributed, detect


def natural(text: str) -> int:
    """An option's value from 0."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number, not {text!r}")
    return int(text)


def positive(text: str) -> int:
    """An option's value from 1."""
    if natural(text) < 1:
        raise argparse.ArgumentTypeError("expected a positive number, not 0")
    return int(text)


def address(text: str) -> str:
    """An option's value HOST:PORT."""
    try:
        split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


VARIABLES = {
    "coordinator": ("MAIN_JAX_COORDINATOR", address),
    "num_processes": ("MAIN_JAX_NUM_PROCESSES", positive),
    "process_id": ("MAIN_JAX_PROCESS_ID", natural),
    "cpu_devices": ("MAIN_JAX_CPU_DEVICES", positive),
}
"""Options that a launcher may give in the environment; what the command line says wins."""
TOGETHER = ("coordinator", "num_processes", "process_id")


def option(name: str) -> str:
    """As it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The group "several processes"; `start_options` reads it."""
    group = parser.add_argument_group(
        "several processes",
        "The same command for each, with --process-id 0, 1, ... On one machine `main-jax launch` does it. "
        f"The environment will do too: {', '.join(name for name, _ in VARIABLES.values())}.",
    )
    group.add_argument(
        "--coordinator", type=address, metavar="HOST:PORT", help="of process 0; any free port"
    )
    group.add_argument("--num-processes", type=positive, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=natural, metavar="I", help="which this one is, from 0")
    group.add_argument(
        "--distributed", choices=("auto", "off"),
        help="auto: as the TPU pod, SLURM or Open MPI says (the default where its variables tell of "
        "several processes); off: this process is alone",
    )  # fmt: skip
    group.add_argument(
        "--initialization-timeout", type=positive, default=300, metavar="S",
        help="seconds until all must have come (300)",
    )  # fmt: skip
    group.add_argument(
        "--heartbeat-timeout", type=positive, default=100, metavar="S",
        help="seconds of silence until a process is taken for lost, which ends the others (100)",
    )  # fmt: skip
    group.add_argument(
        "--cpu-devices", type=positive, metavar="D", help="compute on D CPU devices per process"
    )


def start_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `initialize` is to be told, from the options and the environment. Raises UserError."""
    return {
        "cpu_devices": _value(arguments, "cpu_devices"),
        "distributed": _distributed(arguments),
    }


def _distributed(arguments: argparse.Namespace) -> Distributed | None:
    timeouts = (arguments.initialization_timeout, arguments.heartbeat_timeout)
    automatic = Distributed(None, None, None, *timeouts, auto=True)
    if arguments.distributed is not None:
        for name in TOGETHER:
            if getattr(arguments, name) is not None:
                raise UserError(f"{option(name)} and --distributed exclude each other")
        return automatic if arguments.distributed == "auto" else None
    given = {name: _value(arguments, name) for name in TOGETHER}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(TOGETHER):
        return automatic if detect(os.environ) else None
    if missing:
        raise UserError(
            f"{option(missing[0])} (or {VARIABLES[missing[0]][0]}) is missing: several processes need "
            "--coordinator, --num-processes and --process-id"
        )
    coordinator, count, index = given.values()
    if index >= count:
        raise UserError(
            f"--process-id: {index} is too large for {count} processes, which count from 0"
        )
    return Distributed(coordinator, count, index, *timeouts)


def _value(arguments: argparse.Namespace, name: str) -> Any:
    """Of the option, or else of its variable."""
    value = getattr(arguments, name)
    variable, kind = VARIABLES[name]
    if value is None and (text := os.environ.get(variable)):
        try:
            return kind(text)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{variable}: {error}") from None
    return value
