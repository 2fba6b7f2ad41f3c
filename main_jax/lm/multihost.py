"""Several processes as one program: who does what, where all wait for all, and how all stop together.

Training is one program over the devices of all. Work on rows is dealt out (`deal`): each process does its
part alone and writes its own files. What is left, every process computes alike and the first one writes.
`barrier` stands before others read what one has written. Alone, all of this costs nothing.

A machine that is to be taken away sends SIGTERM. Long work asks `stop_asked` at every step, commits what it
has, and raises `Preempted`; with several processes, all of them at the same step, whichever got the signal.
"""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

WEEK_S = 7 * 24 * 3600


def first() -> bool:
    """Whether this process speaks to people, and writes what all have computed alike."""
    return jax.process_index() == 0


def deal(items: Sequence[int]) -> list[int | None]:
    """What this process is to do of `items`, one a round; as many rounds for all, at last perhaps None."""
    count = jax.process_count()
    return [*items, *[None] * (-len(items) % count)][jax.process_index() :: count]


def barrier(name: str) -> None:
    """Wait until every process has come here, however long one may be at work."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        # On the host first: a collective gives up on a process that is late (Gloo's after half an hour).
        everyone = set(range(jax.process_count()))
        multihost.sync_global_processes("main_jax", timeout=WEEK_S, processes=everyone)
        multihost_utils.sync_global_devices(name)  # and all at the same place


def on_host(x: jax.Array) -> np.ndarray:
    """The whole array on the host; every process must ask for one that several hold."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


class Preempted(Exception):
    """The program was asked to stop, and what was done is on disk."""


_polls = itertools.count()
_asked = threading.Event()


def watch_sigterm() -> None:
    """Make SIGTERM a request instead of an end. With several processes JAX itself watches for it."""
    if not jax.distributed.is_initialized():
        signal.signal(signal.SIGTERM, lambda *_: _asked.set())


def stop_asked() -> bool:
    """Whether to commit and stop now. Every process must ask as often as the others."""
    if jax.distributed.is_initialized():
        return multihost_utils.reached_preemption_sync_point(next(_polls))
    return _asked.is_set()
