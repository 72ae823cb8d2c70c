"""What a rank of ``python -m ringcomm.tune`` does: it times every call both ways, as other ranks do at the same time.

On a GPU, times are the GPU's own: calls are queued behind work that keeps it busy meanwhile, so that it goes from
one to the next, and events in its stream tell how long that took.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import numpy as np

from ringcomm import _core, tuning
from ringcomm.comm import Communicator, connect
from ringcomm.device import SIMT
from ringcomm.errors import UsageError
from ringcomm.plan import one_shot_limit
from ringcomm.store import TCPStore

__all__ = ["DEVICE_SIZES", "SIZES", "START_S", "Job", "Timings", "measure"]

_KIB = 1024
SIZES = [round(_KIB * step) for step in (0.25, 1, 2, 3, 4, 6, 8, 12, 16, 24, 31.75)]
"""Bytes per rank on the CPU, as limits count them. The last leaves room for the counts of an exchange."""

DEVICE_SIZES = {
    "all_reduce": [_KIB * part << power for power in range(10) for part in (2, 3)],
    "broadcast": [_KIB << power for power in range(6, 17)],
}
"""Bytes per rank on GPUs, of which those are measured that can run both ways."""

START_S = 30.0  # for ranks to start and meet
_CALLS = 8  # of one kind in a row
_DEVICE_CALLS = 20
_MIN_ROUNDS = 3
_NO_LIMIT = 2**40
_BUSY_BYTES = 256 << 20  # to fill before calls that are timed, so often:
_BUSY_FILLS = 8

Call = Callable[[], Any]
Case = tuple[str, int, tuple[Call, Call]]


@dataclass
class Job:
    """What all ranks measure.

    Attributes:
        world_size: Number of ranks.
        port: Of the store where they meet.
        seconds: How long they measure.
        sizes: Bytes per rank, by row; on the CPU all rows have the same.
        device: "cuda" (one GPU per rank), "cuda:1" (one for all) or "simt"; "" is the CPU.
    """

    world_size: int
    port: int
    seconds: float
    sizes: dict[str, list[int]]
    device: str = ""

    def device_of(self, rank: int) -> str:
        return f"cuda:{rank}" if self.device == "cuda" else self.device


@dataclass
class Timings:
    """What rank 0 found.

    Attributes:
        rows: (row, bytes, seconds of a call as the first algorithm, and as the other one).
        built_in: By row: the limit without measurements, in bytes.
        gpus: What the ranks' GPUs are, as :class:`ringcomm.tuning.Gpus`; None on the CPU.
    """

    rows: list[tuple[str, int, float, float]]
    built_in: dict[str, int]
    gpus: list[str] | None = None


def measure(rank: int, job: Job) -> Timings:
    """Times every row and size both ways; collective.

    Raises:
        UsageError: there is nothing to choose between on these GPUs, or nothing here makes arrays on them.
    """
    store = TCPStore(port=job.port, is_server=False, timeout=START_S)
    with contextlib.ExitStack() as cleanup:

        def join(name: str, **options: Any) -> Communicator:
            comm = connect(
                store,
                rank,
                job.world_size,
                prefix=name,
                name=name,
                timeout=max(START_S, 4 * job.seconds),
                buffer_bytes=512 * _KIB,
                **options,
            )
            return cleanup.enter_context(comm)

        place = _OnDevice(rank, job, join) if job.device else _OnCpu(job, join)
        return _rounds(place, job.seconds)


class _Place(Protocol):
    """Where calls run: their cases, a clock, and a communicator for what the ranks have to say."""

    control: Communicator
    cases: list[Case]
    built_in: dict[str, int]
    gpus: list[str] | None

    def time(self, call: Call) -> float: ...


def _rounds(place: _Place, seconds: float) -> Timings:
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in place.cases]
    goes_on = np.ones(1, np.uint8)
    end = time.monotonic() + seconds
    num_rounds = 0
    while goes_on[0]:
        for number, (_, _, calls) in enumerate(place.cases):
            for way in (0, 1) if num_rounds % 2 else (1, 0):
                times[number][way].append(place.time(calls[way]))
        num_rounds += 1
        goes_on[0] = num_rounds < _MIN_ROUNDS or time.monotonic() < end
        place.control.broadcast(goes_on, 0)
    rows = [
        (row, size, median(first), median(other))
        for (row, size, _), (first, other) in zip(place.cases, times, strict=True)
    ]
    return Timings(rows, place.built_in, place.gpus)


# ---- on the CPU ----------------------------------------------------------------------------------


class _OnCpu:
    """Calls as one_shot, and as large ones."""

    def __init__(self, job: Job, join: Callable[..., Communicator]) -> None:
        n = job.world_size
        self.gpus: list[str] | None = None

        def limits(limit: int) -> tuning.Limits:
            return [(_core.OPS[op], limit) for ops in tuning.OPS.values() for op in ops]

        small = join("small", limits=limits(_core.INLINE_BYTES))
        large = join("large", limits=limits(0))
        self.control = small
        self.cases: list[Case] = [
            (row, size, (make(small, size), make(large, size)))
            for row, make in _cpu_calls(n).items()
            for size in job.sizes[row]
            if row != "reduce_scatter" or size * n <= _core.INLINE_BYTES  # else it cannot
        ]
        self.built_in = {}
        for row, ops in tuning.OPS.items():
            limit = one_shot_limit(ops[-1], n, _core.INLINE_BYTES)
            # That of exchanges counts what goes to others.
            self.built_in[row] = limit - limit // n if row == "exchange" else limit

    def time(self, call: Call) -> float:
        """Seconds of a call, in a row of them that ends when all ranks are through."""
        call()
        self.control.barrier()
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        self.control.barrier()
        return (time.perf_counter() - start) / _CALLS


def _cpu_calls(world_size: int) -> dict[str, Callable[[Communicator, int], Call]]:
    """By row: what makes a call of so many bytes, as the limits count them."""

    def array(num_bytes: int) -> Any:
        return np.zeros(max(1, num_bytes // 4), np.float32)

    def all_reduce(comm: Communicator, size: int) -> Call:
        x = array(size)
        return lambda: comm.all_reduce(x)

    def reduce(comm: Communicator, size: int) -> Call:
        x = array(size)
        return lambda: comm.reduce(x, 0)

    def broadcast(comm: Communicator, size: int) -> Call:
        x = array(size)
        return lambda: comm.broadcast(x, 0)

    def all_gather(comm: Communicator, size: int) -> Call:
        x, out = array(size), array(size * world_size)
        return lambda: comm.all_gather(x, out)

    def reduce_scatter(comm: Communicator, size: int) -> Call:
        out = array(size)
        x = np.zeros((world_size, len(out)), np.float32)
        return lambda: comm.reduce_scatter(x, out=out)

    def exchange(comm: Communicator, size: int) -> Call:
        x = np.zeros((world_size, max(1, size // (4 * (world_size - 1)))), np.float32)
        out = np.empty_like(x)
        return lambda: comm.all_to_all(x, out)

    made = (all_reduce, reduce, broadcast, all_gather, reduce_scatter, exchange)
    return {make.__name__: make for make in made}


# ---- on GPUs -------------------------------------------------------------------------------------


class _Library(Protocol):
    """Makes arrays on one GPU, and reads its clock."""

    def zeros(self, num_bytes: int) -> Any: ...
    def keep_busy(self) -> None: ...
    def mark(self) -> Any: ...
    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; the stream has passed both."""


class _Emulated:
    """NumPy arrays; the host's clock, which says nothing about a GPU."""

    def zeros(self, num_bytes: int) -> Any:
        return np.zeros(num_bytes // 4, np.float32)

    def keep_busy(self) -> None:
        pass

    def mark(self) -> Any:
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        return time.perf_counter() - float(start)


class _Torch:
    """Tensors; events in the current stream."""

    def __init__(self, index: int) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._torch.cuda.set_device(index)
        self._busy = self._torch.empty(_BUSY_BYTES, dtype=self._torch.uint8, device="cuda")

    def zeros(self, num_bytes: int) -> Any:
        return self._torch.zeros(num_bytes // 4, dtype=self._torch.float32, device="cuda")

    def keep_busy(self) -> None:
        for _ in range(_BUSY_FILLS):
            self._busy.zero_()

    def mark(self) -> Any:
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class _Cupy:
    """CuPy arrays; likewise."""

    def __init__(self, index: int) -> None:
        self._cupy: Any = importlib.import_module("cupy")
        self._cupy.cuda.Device(index).use()
        self._busy = self._cupy.empty(_BUSY_BYTES, "uint8")

    def zeros(self, num_bytes: int) -> Any:
        return self._cupy.zeros(num_bytes // 4, "float32")

    def keep_busy(self) -> None:
        for _ in range(_BUSY_FILLS):
            self._busy.fill(0)

    def mark(self) -> Any:
        event = self._cupy.cuda.Event()
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        end.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(start, end)) / 1e3


def _library(device: str) -> _Library:
    """What makes arrays on the device: torch if it is here and sees GPUs, else CuPy."""
    if device == SIMT:
        return _Emulated()
    index = int(device.removeprefix("cuda:"))
    kinds: tuple[tuple[str, Callable[[int], _Library]], ...] = (("torch", _Torch), ("cupy", _Cupy))
    problems = []
    for name, kind in kinds:
        try:
            return kind(index)
        except Exception as problem:  # not installed, or built for the CPU, or for another driver
            problems.append(f"{name}: {problem}")
    raise UsageError(
        f"nothing here makes arrays on {device}; install torch with CUDA, or CuPy ({'; '.join(problems)})"
    )


class _OnDevice:
    """all_reduce as one_shot and two_shot; broadcast staged and around a ring."""

    def __init__(self, rank: int, job: Job, join: Callable[..., Communicator]) -> None:
        device = job.device_of(rank)
        self._library = _library(device)
        self._library.keep_busy()  # what it runs is loaded before a kernel of ours waits for a rank

        def on_device(name: str, limit: int) -> Communicator:
            limits = [(_core.OPS[row], limit) for row in tuning.DEVICE_OPS]
            return join(name, device=device, device_limits=limits)

        self.control = join("control")
        small, large = on_device("small", _NO_LIMIT), on_device("large", 0)
        self._comms = (small, large)
        if small.device_mode != "in_kernel":
            raise UsageError(
                f"there is nothing to tune: collectives on these GPUs run in mode {small.device_mode} "
                f"({small._devices.reason}), and only kernels that wait for each other have a choice"
            )
        self.gpus: list[str] | None = list(small._devices.gpus())
        self.cases: list[Case] = []
        self.built_in: dict[str, int] = {}
        for row in tuning.DEVICE_OPS:
            if row == "broadcast" and job.world_size == 2:
                continue  # one sends, one receives, whatever it is called
            self.built_in[row] = small._devices.built_in_limit(row)
            for size in job.sizes[row]:
                if small.explain(size, row).algo != large.explain(size, row).algo:  # else it cannot
                    x = self._library.zeros(size)
                    calls = (_device_call(small, row, x), _device_call(large, row, x))
                    self.cases.append((row, size, calls))

    def time(self, call: Call) -> float:
        """Seconds of a call on the GPU, in a row of them without a pause."""
        call()
        self._settle()
        self.control.barrier()
        self._library.keep_busy()
        start = self._library.mark()
        for _ in range(_DEVICE_CALLS):
            call()
        end = self._library.mark()
        self._settle()
        return self._library.seconds(start, end) / _DEVICE_CALLS

    def _settle(self) -> None:
        for comm in self._comms:
            comm.synchronize()


def _device_call(comm: Communicator, row: str, x: Any) -> Call:
    return (lambda: comm.all_reduce(x)) if row == "all_reduce" else (lambda: comm.broadcast(x, 0))
