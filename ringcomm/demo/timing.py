"""Measures the time of gradient communication, for every communication hook in the same way."""

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

__all__ = ["CommTimer", "TimedDDP"]

# torch exports GradBucket only where it was built with distributed; DDP compares the annotation.
_Hook = Callable[[Any, dist.GradBucket], torch.futures.Future[torch.Tensor]]  # type: ignore[name-defined]


class CommTimer:
    """Adds up the time during which at least one bucket is on its way.

    From the call of the hook to the completion of its future: waiting for the other rank and for a
    core to run on is included, overlap between buckets counts once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending = 0
        self._since = 0.0
        self._seconds = 0.0

    def begin(self) -> None:
        """A bucket was handed to the hook."""
        with self._lock:
            if self._pending == 0:
                self._since = time.perf_counter()
            self._pending += 1

    def end(self) -> None:
        """A bucket is done. Any thread."""
        now = time.perf_counter()
        with self._lock:
            self._pending -= 1
            if self._pending == 0:
                self._seconds += now - self._since

    def take(self) -> float:
        """Seconds since the last call, and starts again from zero."""
        with self._lock:
            seconds, self._seconds = self._seconds, 0.0
        return seconds


class TimedDDP(DistributedDataParallel):
    """DDP that times whichever communication hook is registered with it."""

    def __init__(self, module: torch.nn.Module, **options: Any) -> None:
        super().__init__(module, **options)
        self.comm_timer = CommTimer()

    def register_comm_hook(self, state: object, hook: _Hook) -> None:
        """As in DDP; the hook's calls are timed by :attr:`comm_timer`."""
        timer = self.comm_timer

        def timed_hook(
            state: object,
            bucket: dist.GradBucket,  # type: ignore[name-defined]
        ) -> torch.futures.Future[torch.Tensor]:
            timer.begin()
            future = hook(state, bucket)
            future.add_done_callback(lambda _: timer.end())
            return future

        super().register_comm_hook(state, timed_hook)
