"""Several processes as threads, for what is dealt out between them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax

from main_jax import parts
from main_jax.lm.multihost import Preempted


class Together:
    """Processes as threads: each knows its number, all wait for all, and all stop at the same question."""

    def __init__(self, monkeypatch, count, stop_at=None):
        self.here, self.all, self.stop_at = threading.local(), threading.Barrier(count), stop_at
        self.count = count
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(jax, "process_index", lambda: self.here.index)
        monkeypatch.setattr(parts, "barrier", lambda name: self.all.wait(30))
        monkeypatch.setattr(parts, "stop_asked", self.stop_asked)

    def stop_asked(self) -> bool:
        self.here.asked += 1
        return self.here.asked == self.stop_at

    def run(self, work):
        """What `work(index)` gives in each process, or its Preempted; and how often it was asked to stop."""

        def process(index):
            self.here.index, self.here.asked = index, 0
            try:
                found = work(index)
            except Preempted as error:
                found = error
            return found, self.here.asked

        with ThreadPoolExecutor(self.count) as pool:
            return zip(*pool.map(process, range(self.count)), strict=True)
