"""Several processes as one program: who writes, where all wait for all, and how all stop together.

Every process computes the same; the first one writes what is not Orbax's. `barrier` stands before others
read what the first has written. Alone, all of this costs nothing.

A machine that is to be taken away sends SIGTERM. Long work asks `stop_asked` at every step, commits what it
has, and raises `Preempted`; with several processes, all of them at the same step, whichever got the signal.
"""

from __future__ import annotations

import itertools
import signal
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils


def first() -> bool:
    """Whether this process writes files and speaks to people."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


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
