"""How much of the machine went to processes that are not part of the run: what spoils a figure."""

from __future__ import annotations

import os
import time
from pathlib import Path

from bench.world import World

__all__ = ["Watch"]

SHORTEST = 0.25  # seconds


class Watch:
    """Begins to count when it is made; collective, like :meth:`others`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._cores = os.cpu_count() or 1
        self._start = (time.monotonic(), _busy_seconds(), time.process_time())

    def others(self) -> float | None:
        """Processor time that other processes, and the hypervisor, took since: a share of all cores.

        None if too little time has passed to tell: the kernel counts in ticks of 10 ms.
        """
        elapsed, busy, own = (
            now - then
            for now, then in zip(
                (time.monotonic(), _busy_seconds(), time.process_time()), self._start, strict=True
            )
        )
        (ours,) = self._world.sum([own])
        share = (busy - ours) / max(elapsed, 1e-9) / self._cores
        share, elapsed = self._world.maximum([share, elapsed])
        return max(0.0, share) if elapsed >= SHORTEST else None


def _busy_seconds() -> float:
    """Since boot, of all processors: user, nice, system, irq, softirq and steal."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    ticks = [int(field) for field in fields[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
