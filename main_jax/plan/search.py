"""Every program compiled, and for what does not fit the nearest setting or machine that does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from main_jax.config import Config
from main_jax.errors import UserError
from main_jax.lm import plan as engine
from main_jax.lm.arch import DecoderConfig
from main_jax.lm.progress import say, track
from main_jax.lm.topology import GIB, Chip, Topology, TopologyError, larger, open_topology
from main_jax.plan.calls import Call, Work, calls, work_of


class Row(NamedTuple):
    """A call with its memory, where it was compiled."""

    call: Call
    memory: engine.Memory
    chip: Chip

    @property
    def fits(self) -> bool:
        """Whether a device holds it."""
        return self.memory.peak <= self.chip.memory

    @property
    def hours(self) -> float:
        """Of all calls."""
        return self.call.calls * self.call.seconds / 3600


def compile_row(call: Call, chip: Chip) -> Row:
    """Compiles; not where the arguments alone are too much."""
    with call.under():
        least = call.program.argument_bytes()
        if least > chip.memory:
            return Row(call, engine.Memory(least, None, least), chip)
        return Row(call, engine.compiled_memory(call.program), chip)


class Plan(NamedTuple):
    """The compiled programs of a run, and for those that do not fit what would (or None)."""

    topology: Topology
    work: Work
    rows: list[Row]
    advice: list[str]

    @property
    def fits(self) -> bool:
        """Whether all do."""
        return all(row.fits for row in self.rows)


def make_plan(
    load: Callable[[Sequence[str]], Config],
    model: DecoderConfig,
    topology: Topology,
    given: dict[str, int | None],
    stages: Sequence[str] = (),
    suggest: bool = True,
) -> Plan:
    """Compiles every program of the run (or of some stages), and looks for what fits where one does not.

    load: overrides, as on the command line -> the configuration.
    """
    config = load(())
    work = work_of(config, given)
    wanted = [c for c in calls(config, model, topology, work) if not stages or c.stage in stages]
    rows = []
    with track(f"plan {topology.name}", len(wanted), "programs") as bar:
        for call in wanted:
            rows.append(compile_row(call, topology.chip))
            bar.advance(note=f"{call.stage} {call.name}")
    advice = []
    for row in rows:
        if row.fits or not suggest:
            continue
        say(f"{row.call.stage} {row.call.name} does not fit: looking for what does")
        advice.append(_advice(row, load, model, topology, work))
    return Plan(topology, work, rows, advice)


def _advice(row: Row, load: Callable, model: DecoderConfig, topology: Topology, work: Work) -> str:
    """The nearest change that makes a row fit, each candidate compiled: settings first, then machines."""
    what = f"{row.call.stage} {row.call.name}"

    def again(overrides: Sequence[str], on: Topology) -> Row:
        every = calls(load(overrides), model, on, work)
        call = next(c for c in every if (c.stage, c.name) == (row.call.stage, row.call.name))
        return compile_row(call, on.chip)

    for axis in row.call.shorter:
        best = again(axis[-1], topology)
        if not best.fits:
            continue
        low, high = 0, len(axis) - 1  # axis[high] fits; the nearest that does lies at or before it
        while low < high:
            middle = (low + high) // 2
            tried = again(axis[middle], topology)
            if tried.fits:
                high, best = middle, tried
            else:
                low = middle + 1
        return f"{what}: {' '.join(axis[high])} fits ({_share(best)})"
    furthest = row.call.shorter[-1][-1] if row.call.shorter else []
    name = topology.name
    while (name := larger(name)) is not None:
        try:
            found = again(furthest, open_topology(name))
        except (UserError, TopologyError):
            continue  # a mesh that does not fit this many
        if found.fits:
            settings = f" with {' '.join(furthest)}" if furthest else ""
            return f"{what}: {name}{settings} fits ({_share(found)})"
    return f"{what}: nothing that was tried fits"


def _share(row: Row) -> str:
    return f"{row.memory.peak / GIB:.1f} GiB, {row.memory.peak / row.chip.memory:.0%} of a device's memory"
