"""Several processes of one run on this machine: `main-jax launch --num-processes 2 -- run CONFIG.yaml`.

The parent starts them, passes signals on, and when one fails it stops the others, which would wait for
it in vain, and says so in one line. It imports no JAX and nothing heavy.

Between parent and child is a socket, with two uses. A child that reads its end knows that the parent is
gone, however it went, and ends too: this needs nothing of the operating system but files, and no code
between fork and exec. And through it a child reports its error, so that what all have found is said once.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, NamedTuple

LAUNCHER = "MAIN_JAX_LAUNCHER"
"""The variable with the number of the child's socket."""
SETTLE_S = 2.0
"""For the others to end by themselves when one has failed: a mistake is found by all."""
GRACE_S = 10.0
"""Between SIGTERM and SIGKILL. The work of a step is lost with any one of them, files are written under
other names first: there is nothing to wait for but threads that write."""
MISTAKE, PREEMPTED, INTERRUPTED = 2, 75, 130

# ------------------------------------------------------------------------------------------ the child

_parent: socket.socket | None = None


def attach() -> None:
    """Call early in a process that may have been launched: from then on it ends with its launcher."""
    global _parent
    number = os.environ.pop(LAUNCHER, None)
    if number is None:
        return
    parent = _parent = socket.socket(fileno=int(number))
    parent.set_inheritable(False)

    def watch() -> None:
        with suppress(OSError):
            while parent.recv(1):
                pass
        os.kill(os.getpid(), signal.SIGKILL)  # JAX takes SIGTERM for a notice

    threading.Thread(target=watch, daemon=True, name="launcher").start()


def report(code: int, mark: str, message: str) -> bool:
    """Leave it to the launcher to say the line of an error, before ending with that exit code.

    The mark, of process and stage, goes before it where not all report the same. False when there is
    no launcher.
    """
    if _parent is None:
        return False
    try:
        _parent.sendall(json.dumps([time.monotonic(), code, mark, message]).encode() + b"\n")
    except OSError:
        return False
    return True


# ------------------------------------------------------------------------------------------ the parent


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def environments(
    num_processes: int,
    port: int | None = None,
    cpu_devices: int | None = None,
    gpus_per_process: int | None = None,
) -> list[dict[str, str]]:
    """The variables by which each process finds the others."""
    common = {
        "MAIN_JAX_COORDINATOR": f"127.0.0.1:{port or free_port()}",
        "MAIN_JAX_NUM_PROCESSES": str(num_processes),
    }
    if cpu_devices is not None:
        common["MAIN_JAX_CPU_DEVICES"] = str(cpu_devices)
    found = []
    for index in range(num_processes):
        own = common | {"MAIN_JAX_PROCESS_ID": str(index)}
        if gpus_per_process is not None:
            first = index * gpus_per_process
            devices = range(first, first + gpus_per_process)
            own["JAX_LOCAL_DEVICE_IDS"] = ",".join(str(i) for i in devices)
        found.append(own)
    return found


def launch(
    commands: Sequence[Sequence[str]],
    variables: Sequence[Mapping[str, str]],
    grace_s: float = GRACE_S,
) -> int:
    """Runs all commands at a time, each with its variables, to the end of all; returns the exit code.

    What process 0 writes passes unchanged; lines of the others carry "[1] ". Signals that end a program
    are passed on, and then it waits. 0: all did well. Otherwise 2 when the first failure was a user's
    mistake; the one code with which all ended that ended by themselves (75: preempted, resumable); or 1.
    Call it from the main thread.
    """
    return _Launch(len(commands), grace_s).run(commands, variables)


class _Report(NamedTuple):
    at: float  # by the one clock of the machine
    code: int
    mark: str
    message: str
    index: int


class _Child:
    """A process, and the threads that listen to it."""

    def __init__(
        self,
        index: int,
        command: Sequence[str],
        variables: Mapping[str, str],
        events: queue.SimpleQueue[tuple[int, int]],
        reports: list[_Report],
    ):
        self.index = index
        self.socket, theirs = socket.socketpair()
        pipe = None if index == 0 else subprocess.PIPE
        with theirs:
            number = theirs.fileno()
            own = {"PYTHONUNBUFFERED": "1", **variables, LAUNCHER: str(number)}
            self.process = subprocess.Popen(
                command, env=os.environ | own, pass_fds=[number],
                stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe,
                start_new_session=True,  # of Ctrl-C a child hears from us, once
            )  # fmt: skip
        tasks: list[tuple] = [(self._reports, reports)]
        if index:
            tasks.append((self._copy, self.process.stdout, sys.stdout))
            tasks.append((self._copy, self.process.stderr, sys.stderr))
        self.threads = [
            threading.Thread(target=task, args=rest, daemon=True) for task, *rest in tasks
        ]
        for thread in self.threads:
            thread.start()
        threading.Thread(target=self._wait, args=(events,), daemon=True).start()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """It and what it has started."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def drain(self) -> None:
        """Has all read that it wrote; something it has started may keep the pipes open."""
        for thread in self.threads:
            thread.join(2.0)

    def _wait(self, events: queue.SimpleQueue[tuple[int, int]]) -> None:
        events.put((self.index, self.process.wait()))

    def _reports(self, reports: list[_Report]) -> None:
        with self.socket.makefile("rb") as lines:
            for line in lines:
                reports.append(_Report(*json.loads(line), self.index))

    def _copy(self, source: IO[bytes], target: IO[str]) -> None:
        for line in source:
            # Where nobody reads us any more, the child must not stop for it.
            with suppress(OSError, ValueError):
                target.write(f"[{self.index}] {line.decode('utf-8', 'replace').rstrip()}\n")
                target.flush()


class _Launch:
    """From the start of the first process to the end of the last."""

    def __init__(self, count: int, grace_s: float):
        self.count, self.grace_s = count, grace_s
        self.children: list[_Child] = []
        self.events: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self.reports: list[_Report] = []
        self.said: set[str] = set()
        self.asked: set[int] = set()  # signals that came to us

    def run(self, commands, variables) -> int:
        before = {
            number: signal.signal(number, self._pass_on)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            if signal.getsignal(number) is not signal.SIG_IGN  # nohup, a shell's background
        }
        try:
            for index, (command, own) in enumerate(zip(commands, variables, strict=True)):
                self.children.append(_Child(index, command, own, self.events, self.reports))
            for number in list(self.asked):  # while they were started: not all have heard it
                self._pass_on(number, None)
            ends = self._watch()
            self._say_reports(ends)
            return self._conclude(ends)
        finally:
            for child in self.children:
                child.kill()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, _frame) -> None:
        self.asked.add(number)
        for child in self.children:
            child.signal(number)

    def _watch(self) -> dict[int, int]:
        """The exit codes of those that ended by themselves, in this order."""
        ends: dict[int, int] = {}
        left = {child.index for child in self.children}
        stopping = False
        until: float | None = None
        while left:
            try:
                wait = None if until is None else max(until - time.monotonic(), 0)
                index, code = self.events.get(timeout=wait)
            except queue.Empty:
                if not stopping:
                    stopping = True
                    self._say_reports(ends)
                    for child in self.children:
                        child.signal(signal.SIGTERM)
                    until = time.monotonic() + self.grace_s
                else:
                    for child in self.children:
                        child.kill()
                    until = None
                continue
            left.discard(index)
            self.children[index].drain()
            if not stopping:
                ends[index] = code
                if code and until is None:
                    until = time.monotonic() + SETTLE_S
        return ends

    def _cause(self, ends: dict[int, int]) -> int:
        """The process that failed first; -1 when none has failed.

        Not merely the first to end: what a killed process held takes time to be freed, and meanwhile
        the others fail for the want of it, with other codes or an abort, and report it after the first.
        """
        reported = [report.index for report in sorted(self.reports)]

        def order(index: int) -> tuple[int, int]:
            code = ends[index]
            ranks = {PREEMPTED: 3, -signal.SIGABRT: 2, MISTAKE: 0}
            rank = ranks.get(code, 0 if code < 0 else 1)
            return rank, reported.index(index) if index in reported else len(reported)

        return min((index for index, code in ends.items() if code), key=order, default=-1)

    def _say_reports(self, ends: dict[int, int]) -> None:
        """Each line once; not what others report that end with another code, in consequence."""
        code = ends.get(self._cause(ends))
        for own in sorted(self.reports):
            if own.message not in self.said and own.code == code:
                self.said.add(own.message)
                same = {r.index for r in self.reports if r.message == own.message}
                _say(own.message if len(same) == self.count else own.mark + own.message)

    def _conclude(self, ends: dict[int, int]) -> int:
        """Says the one line, and returns the exit code."""
        first = self._cause(ends)
        code = ends.get(first, 0)
        codes = {*ends.values()} - {0}
        if code in (0, MISTAKE):
            result = code
        elif signal.SIGINT in self.asked:
            result = INTERRUPTED
        elif signal.SIGTERM in self.asked and codes <= {PREEMPTED, -signal.SIGTERM}:
            result = PREEMPTED
        elif len(codes) == 1 and code > 0:
            result = code
        else:
            result = 1
        told = any(report.index == first for report in self.reports)
        if code and (not told or result == 1):
            stopped = self.count - len(ends)
            others = {0: "", 1: ", the other was stopped"}.get(stopped, ", the others were stopped")
            _say(
                f"process {first} of {self.count} {_in_words(code)}{others}; "
                "the same command continues where the run stopped"
            )
        return result


def _in_words(code: int) -> str:
    """An exit code as Popen has it."""
    if code == PREEMPTED:
        return "ended early as it was asked to (exit code 75)"
    if code > 0:
        return f"ended first, with exit code {code}"
    reason = {
        signal.SIGKILL: " (by a user, or the system for want of memory)",
        signal.SIGABRT: " (as JAX ends a process that has lost another)",
    }.get(signal.Signals(-code), "")
    return f"ended first, by {signal.Signals(-code).name}{reason}"


def _say(message: str) -> None:
    print(f"main-jax: {message}", file=sys.stderr, flush=True)
