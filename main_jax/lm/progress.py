"""Progress of long work for people: a bar with rate and time left, plain lines when not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

PLAIN_INTERVAL_S = 10.0
_process = (0, 1)


def set_process(index: int, count: int) -> None:
    """Which of several processes this one is: only process 0 speaks here, and errors carry the mark."""
    global _process
    _process = (index, count)


def mark(stage: str | None = None) -> str:
    """What goes before an error's line: "[process 1 of 2, align] ", or nothing when there is one process."""
    index, count = _process
    if count == 1:
        return ""
    return f"[process {index} of {count}{f', {stage}' if stage else ''}] "


def _speaks() -> bool:
    return _process[0] == 0  # known before JAX is imported


def say(message: str) -> None:
    """One line about what the program does, on standard error; from process 0."""
    if _speaks():
        sys.stderr.write(f"{message}\n")  # at once: other processes may write there too
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Lines:
    """A line at most every ten seconds, and one at the end."""

    def __init__(self, label: str, total: int | None, unit: str, done: int):
        self.label, self.total, self.unit = label, total, unit
        self.start = self.last = time.monotonic()
        self.first = self.done = done

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        now = time.monotonic()
        if now - self.last >= PLAIN_INTERVAL_S and self.done != self.total:
            self.last = now
            self._print(now, note)

    def close(self) -> None:
        now = time.monotonic()
        short = self.total is None and now - self.start < PLAIN_INTERVAL_S
        if self.done > self.first and not short:
            self._print(now, "")

    def _print(self, now: float, note: str) -> None:
        elapsed = max(now - self.start, 1e-9)
        rate = (self.done - self.first) / elapsed
        of, tail = "", f"took {_clock(elapsed)}"
        if self.total is not None:
            of = f"/{self.total:,}"
            if self.done < self.total:
                tail = f"{_clock((self.total - self.done) / rate) if rate else '?'} left"
        note = f", {note}" if note else ""
        say(f"{self.label}: {self.done:,}{of} {self.unit}, {rate:,.1f}/s, {tail}{note}")


class _Silent:
    """Nothing."""

    def advance(self, n: int = 1, note: str = "") -> None:
        pass

    def close(self) -> None:
        pass


class _Bar:
    """A rich progress bar."""

    def __init__(self, label: str, total: int | None, unit: str, done: int):
        from rich import progress
        from rich.console import Console

        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn(
                f"{{task.completed:,.0f}}{'' if total is None else f'/{total:,}'} {unit}"
            ),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self.first, self.begin = done, time.monotonic()
        self.task = self.bar.add_task(label, total=total, completed=done, rate="", note="")
        self.bar.start()

    def advance(self, n: int = 1, note: str = "") -> None:
        task = self.bar.tasks[0]
        speed = (task.completed + n - self.first) / max(time.monotonic() - self.begin, 1e-9)
        self.bar.update(
            self.task, advance=n, rate=f"{speed:,.1f}/s", note=note or task.fields["note"]
        )

    def close(self) -> None:
        self.bar.stop()


@contextmanager
def track(
    label: str, total: int | None, unit: str, done: int = 0, *, shown: bool = True
) -> Generator[_Lines | _Bar | _Silent]:
    """Yields something with `advance(n=1, note="")`; `done` is what an earlier run had finished.

    `total` None: it is not known how much there is; nothing is said where it was soon over.
    With `shown` false nothing is printed: for work that is at times too short to speak of. Nor is it by
    any process but the first of several.
    """
    kind = _Bar if sys.stderr.isatty() else _Lines
    bar = kind(label, total, unit, done) if shown and _speaks() else _Silent()
    try:
        yield bar
    finally:
        bar.close()
