"""``python -m ringcomm.tune``: measures where small calls should become large ones on this machine.

Small calls run as one_shot (data beside the flag, one hop), large ones as two_shot or staged (least
bytes moved). Where one overtakes the other depends on processors, caches and the number of ranks. This
command starts ranks of its own, times both by turns at every size, and stores the best switch points in
a file of this user and machine; every communicator made later uses them (``RINGCOMM_TUNING``). Run it
while the machine does nothing else. ``comm.explain(nbytes)`` says what holds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ringcomm import _core, env, tuning
from ringcomm.comm import Communicator, connect
from ringcomm.errors import RingcommError, UsageError
from ringcomm.machine import cpu_model, usable_cores
from ringcomm.plan import one_shot_limit
from ringcomm.store import TCPStore

__all__ = ["Decision", "decide", "main"]

_KIB = 1024
_SIZES = [round(_KIB * step) for step in (0.25, 1, 2, 3, 4, 6, 8, 12, 16, 24, 31.75)]
"""Bytes per rank, as limits count them. The last leaves room for the counts of an exchange."""

_CALLS = 8  # of one kind in a row
_MIN_ROUNDS = 3
_WORTH = 0.02  # a limit that saves less than this share of the time is not worth another table
_START_S = 30.0  # for ranks to start and meet


# ---- what the numbers mean -----------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """The switch point of one operation and world size.

    Attributes:
        row: Of the table, see :data:`ringcomm.tuning.OPS`.
        world_size: Number of ranks.
        built_in: The limit without this measurement, in bytes.
        limit: The largest call that one_shot should run, in bytes.
        gain: How much faster calls get on average whose algorithm changes; 1.0 if none does.
    """

    row: str
    world_size: int
    built_in: int
    limit: int
    gain: float


def decide(
    row: str, built_in: dict[int, int], times: dict[int, dict[int, tuple[float, float]]]
) -> list[Decision]:
    """The best switch points of one operation; a larger world never gets a higher one.

    Args:
        built_in: By world size: the limit without measurements, in bytes.
        times: By world size and size in bytes: seconds of a call as one_shot, and as the other algorithm.
    """
    worlds = sorted(times)
    log_ratios = {
        n: {size: math.log(one_shot / other) for size, (one_shot, other) in times[n].items()}
        for n in worlds
    }
    candidates = sorted({0, *built_in.values(), *(size for n in worlds for size in times[n])})

    def cost(
        n: int, limit: int
    ) -> float:  # of one_shot up to the limit against the other one everywhere
        return sum(ratio for size, ratio in log_ratios[n].items() if size <= limit)

    # By the limit of the smaller worlds seen so far: the least cost, and the limits.
    best: dict[int, tuple[float, list[int]]] = {candidates[-1]: (0.0, [])}
    for n in worlds:
        best = {
            limit: min(
                (total + cost(n, limit), [*limits, limit])
                for before, (total, limits) in best.items()
                if before >= limit
            )
            for limit in candidates
        }
    limits = dict(zip(worlds, min(best.values())[1], strict=True))

    def gain(n: int) -> float:
        between = sorted((built_in[n], limits[n]))
        changed = [size for size in times[n] if between[0] < size <= between[1]]
        return math.exp((cost(n, built_in[n]) - cost(n, limits[n])) / max(1, len(changed)))

    for n in worlds:
        others = [limits[m] for m in worlds if m < n] or [candidates[-1]]
        above, below = min(others), max((limits[m] for m in worlds if m > n), default=0)
        if gain(n) < 1 + _WORTH and below <= built_in[n] <= above:
            limits[n] = built_in[n]
    return [Decision(row, n, built_in[n], limits[n], gain(n)) for n in worlds]


def report(decisions: list[Decision]) -> str:
    """A table for people."""
    lines = [f"{'operation':<15} {'ranks':>5} {'built-in':>9} {'measured':>9}  faster between them"]
    for d in decisions:
        what = "(the same)" if d.limit == d.built_in else f"{d.gain:.2f} x"
        lines.append(
            f"{d.row:<15} {d.world_size:>5} {_in_kib(d.built_in):>9} {_in_kib(d.limit):>9}  {what}"
        )
    return "\n".join(lines)


def _in_kib(num_bytes: int) -> str:
    return f"{num_bytes / _KIB:.1f} KiB"


# ---- one rank ------------------------------------------------------------------------------------


def _calls(world_size: int) -> dict[str, Callable[[Communicator, int], Callable[[], Any]]]:
    """By row: what makes a call of so many bytes, as the limits count them."""

    def array(num_bytes: int) -> Any:
        return np.zeros(max(1, num_bytes // 4), np.float32)

    def all_reduce(comm: Communicator, size: int) -> Callable[[], Any]:
        x = array(size)
        return lambda: comm.all_reduce(x)

    def reduce(comm: Communicator, size: int) -> Callable[[], Any]:
        x = array(size)
        return lambda: comm.reduce(x, 0)

    def broadcast(comm: Communicator, size: int) -> Callable[[], Any]:
        x = array(size)
        return lambda: comm.broadcast(x, 0)

    def all_gather(comm: Communicator, size: int) -> Callable[[], Any]:
        x, out = array(size), array(size * world_size)
        return lambda: comm.all_gather(x, out)

    def reduce_scatter(comm: Communicator, size: int) -> Callable[[], Any]:
        out = array(size)
        x = np.zeros((world_size, len(out)), np.float32)
        return lambda: comm.reduce_scatter(x, out=out)

    def exchange(comm: Communicator, size: int) -> Callable[[], Any]:
        x = np.zeros((world_size, max(1, size // (4 * (world_size - 1)))), np.float32)
        out = np.empty_like(x)
        return lambda: comm.all_to_all(x, out)

    made = (all_reduce, reduce, broadcast, all_gather, reduce_scatter, exchange)
    return {make.__name__: make for make in made}


def _fits(row: str, size: int, world_size: int) -> bool:
    """Whether one_shot can run the call at all."""
    return row != "reduce_scatter" or size * world_size <= _core.INLINE_BYTES


def _measure(rank: int, world_size: int, port: int, seconds: float, sizes: list[int]) -> Any:
    """Times every row and size both ways; collective. Returns [row, size, one_shot, other] on rank 0."""
    store = TCPStore(port=port, is_server=False, timeout=_START_S)

    def join(name: str, limit: int) -> Communicator:
        limits = [(_core.OPS[op], limit) for ops in tuning.OPS.values() for op in ops]
        return connect(
            store,
            rank,
            world_size,
            prefix=name,
            name=name,
            timeout=max(_START_S, 4 * seconds),
            buffer_bytes=512 * _KIB,
            limits=limits,
        )

    with join("small", _core.INLINE_BYTES) as small, join("large", 0) as large:
        cases = [
            (row, size, (make(small, size), make(large, size)))
            for row, make in _calls(world_size).items()
            for size in sizes
            if _fits(row, size, world_size)
        ]
        times: list[tuple[list[float], list[float]]] = [([], []) for _ in cases]
        goes_on = np.ones(1, np.uint8)
        end = time.monotonic() + seconds
        num_rounds = 0
        while goes_on[0]:
            for number, (_, _, calls) in enumerate(cases):
                for way in (0, 1) if num_rounds % 2 else (1, 0):
                    times[number][way].append(_time(small, calls[way]))
            num_rounds += 1
            goes_on[0] = num_rounds < _MIN_ROUNDS or time.monotonic() < end
            small.broadcast(goes_on, 0)
        return [
            (row, size, *(median(way) for way in times[number]))
            for number, (row, size, _) in enumerate(cases)
        ]


def _time(comm: Communicator, call: Callable[[], Any]) -> float:
    """Seconds of a call, in a row of them that ends when all ranks are through."""
    call()
    comm.barrier()
    start = time.perf_counter()
    for _ in range(_CALLS):
        call()
    comm.barrier()
    return (time.perf_counter() - start) / _CALLS


# ---- the command ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _ranks(world_size: int, seconds: float, sizes: list[int]) -> Iterator[list[Any]]:
    """Processes that measure; ended, whatever happens."""
    with contextlib.ExitStack() as cleanup:
        store = TCPStore(is_server=True)
        cleanup.callback(store.close)
        settings = json.dumps([world_size, store.port, seconds, sizes])
        processes = []
        for rank in range(world_size):
            process = subprocess.Popen(
                [sys.executable, "-m", "ringcomm.tune", "--rank", str(rank), settings],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world_size)},
                text=True,
            )
            cleanup.callback(process.wait)
            cleanup.callback(process.kill)
            processes.append(process)
        yield processes


def measure(world_size: int, seconds: float, sizes: list[int]) -> dict[str, dict[int, Any]]:
    """Times every operation on ranks of its own.

    Args:
        seconds: How long the ranks measure; more makes the result steadier.

    Returns:
        By row and size in bytes: seconds of a call as one_shot, and as the other algorithm.

    Raises:
        RingcommError: the ranks failed.
    """
    with _ranks(world_size, seconds, sizes) as processes:
        try:
            text, errors = processes[0].communicate(timeout=2 * _START_S + 4 * seconds)
        except subprocess.TimeoutExpired:
            raise RingcommError(f"{world_size} ranks did not finish measuring") from None
        if processes[0].returncode != 0:
            raise RingcommError(f"measuring with {world_size} ranks failed:\n{errors.strip()}")
    found: dict[str, dict[int, Any]] = {}
    for row, size, one_shot, other in json.loads(text):
        found.setdefault(row, {})[size] = (one_shot, other)
    return found


def tune(
    world_sizes: list[int], seconds: float, sizes: list[int], say: Callable[[str], None]
) -> list[Decision]:
    """Measures every world size, then decides."""
    built_in: dict[str, dict[int, int]] = {}
    times: dict[str, dict[int, Any]] = {}
    for world_size in sorted(set(world_sizes)):
        say(f"measuring {world_size} ranks for {seconds / len(world_sizes):.0f} s")
        for row, found in measure(world_size, seconds / len(world_sizes), sizes).items():
            limit = one_shot_limit(tuning.OPS[row][-1], world_size, _core.INLINE_BYTES)
            if row == "exchange":  # its limit counts what goes to others
                limit -= limit // world_size
            built_in.setdefault(row, {})[world_size] = limit
            times.setdefault(row, {})[world_size] = found
    return [decision for row in times for decision in decide(row, built_in[row], times[row])]


def _default_world_sizes() -> list[int]:
    """Powers of two that fit on the processors; four ranks are common even on two."""
    most = max(4, min(usable_cores(), 64))
    return [2**power for power in range(1, 7) if 2**power <= most]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ringcomm.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--world-sizes",
        type=lambda text: [int(part) for part in text.split(",")],
        default=None,
        metavar="N,N",
        help="numbers of ranks to measure (default: powers of two up to the number of cores, at least 2,4)",
    )
    parser.add_argument(
        "--seconds", type=float, default=40.0, help="time to measure, in all (default 40)"
    )
    parser.add_argument(
        "--output", type=Path, default=None, help="file to write (default: the user's cache)"
    )
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--sizes", type=json.loads, default=_SIZES, help=argparse.SUPPRESS)
    parser.add_argument("--rank", nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.world_sizes is None:
        options.world_sizes = _default_world_sizes()
    if not all(2 <= size <= _core.MAX_RANKS for size in options.world_sizes):
        parser.error(f"--world-sizes: 2 to {_core.MAX_RANKS} each")
    if not 0 < options.seconds < 3600:
        parser.error("--seconds must be a positive number")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options = _parse(arguments)
    if options.rank is not None:
        world_size, port, seconds, sizes = json.loads(options.rank[1])
        rows = _measure(int(options.rank[0]), world_size, port, seconds, sizes)
        if options.rank[0] == "0":
            print(json.dumps(rows))
        return 0
    try:
        path = None if options.dry_run else _output(options.output)
        print(f"{cpu_model()}, {usable_cores()} cores, {_core.simd_level()} kernels", flush=True)
        decisions = tune(
            options.world_sizes,
            options.seconds,
            options.sizes,
            lambda line: print(line, flush=True),
        )
        print(report(decisions))
        if path is None:
            return 0
        table: dict[str, dict[int, int]] = {}
        for decision in decisions:
            table.setdefault(decision.row, {})[decision.world_size] = decision.limit
        tuning.save(path, table)
    except RingcommError as error:
        print(f"ringcomm.tune: {error}", file=sys.stderr)
        return 1
    print(f"written to {path}; communicators made from now on use it (RINGCOMM_TUNING=off: not)")
    return 0


def _output(given: Path | None) -> Path:
    if given is not None:
        return given
    chosen = env.get("RINGCOMM_TUNING")
    if chosen is None:
        return tuning.default_path()
    if chosen.lower() == "off":
        raise UsageError(
            "RINGCOMM_TUNING=off: nothing would read the table; unset it or use --output"
        )
    return Path(chosen)


if __name__ == "__main__":
    sys.exit(main())
