"""One all_reduce of several ranks in one process on one device, as share of the bound by bytes moved.

The ranks are threads with a communicator each. On a GPU the collective is one kernel per rank, and all of them run at
the same time: RINGCOMM_CUDA_MODE=in_kernel vouches for what a communicator cannot see, that each rank has a stream of
its own; left alone, it would run in steps that the host synchronises. The bound: all bytes that the ranks' kernels read and write, each once, at the rate of the device's own
copy, measured in turn with it.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import ringcomm
from bench.devices import ITEM_BYTES, Device, rounded, widened
from bench.kernel_cases import Wrong
from ringcomm import _core, codec, env, reference
from ringcomm.store import TCPStore

__all__ = ["RANKS", "bytes_moved", "measure"]

RANKS = 4
CALLS = 10  # in a row, for one sample
CHECKED = 1 << 15  # elements at either end that are compared with the reference
TIMEOUT = 60.0
MODE = "RINGCOMM_CUDA_MODE"

Way = tuple[str, str]  # codec and algorithm


def bytes_moved(num_bytes: int, ranks: int, dtype: str, spec: str, algo: str = "two_shot") -> int:
    """What the kernels of a two_shot or a direct all_reduce read and write, all ranks together.

    Each reads its input and writes its output, or as much of everybody's if it is direct. In a two_shot, (n - 1) / n of
    an array goes into boxes and out of them again, on the way to the owner and on the way back, encoded if there is a
    codec.
    """
    if algo == "direct":
        return ranks * 2 * num_bytes
    chosen = codec(spec)
    bits = 8 * ITEM_BYTES[dtype] if chosen.exact else chosen.bits_per_value
    boxes = num_bytes * bits / (8 * ITEM_BYTES[dtype]) * (ranks - 1) / ranks
    return round(ranks * (2 * num_bytes + 4 * boxes))


def measure(
    device: Device,
    num_bytes: int,
    dtype: str,
    specs: list[str],
    rounds: int,
    note: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """A row for each codec, verified, for an exact one also where the arrays are; and one of torch's operations.

    ``note`` is told the mode that the communicators worked in, which every row of theirs names too.

    Raises:
        Wrong: a result is, or the collectives did not run as they are to be measured.
    """
    count = num_bytes // ITEM_BYTES[dtype]
    server = TCPStore(is_server=True)
    meeting = threading.Barrier(RANKS, timeout=TIMEOUT)
    raws = [_values(rank, count, dtype) for rank in range(RANKS)]
    ways: list[Way] = [(spec, "two_shot") for spec in specs]
    ways += [(spec, "direct") for spec in specs if codec(spec).exact and device.name == "cuda"]
    results: dict[Way, list[list[float]]] = {way: [[] for _ in range(RANKS)] for way in ways}
    copies: list[float] = []
    modes: list[str | None] = [None] * RANKS
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            with _own_stream(device):
                _rank(rank)
        except BaseException as error:
            errors.append(error)
            meeting.abort()

    def _rank(rank: int) -> None:
        store = TCPStore(port=server.port, is_server=False, timeout=TIMEOUT)
        x = device.put(raws[rank], dtype)
        array = x if device.name == "cuda" else _typed(x, dtype)
        with ringcomm.init(
            rank, RANKS, store=store, timeout=TIMEOUT, device=device.rank_device
        ) as comm:
            modes[rank] = comm.device_mode
            if device.name == "cuda" and comm.device_mode != "in_kernel":
                raise Wrong(
                    f"the all_reduce of rank {rank} runs in mode {comm.device_mode}, expected in_kernel: its times "
                    "would be those of the host; see comm.explain()"
                )
            for way in ways:
                _verify(comm, device, array, raws, dtype, way, rank, meeting)
            twins = [device.empty(num_bytes, "uint8") for _ in range(2 if rank == 0 else 0)]
            meeting.wait()
            for _ in range(rounds):
                for way in ways:
                    # avg: what is averaged again and again stays what it is.
                    work = _calls(comm, array, way)
                    meeting.wait()
                    results[way][rank].append(_seconds(device, comm, work) / CALLS)
                    meeting.wait()
                if rank == 0:
                    copies.append(_copy_seconds(device, *twins))
                meeting.wait()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(RANKS)]
    with _in_kernel(device):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    server.close()
    if errors:
        raise next(
            (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
        )
    copy_rate = 2 * num_bytes / statistics.median(copies)
    note(f"all_reduce x{RANKS}: ranks are threads on one device, in mode {modes[0]}")
    for spec, algo in ways:
        slowest = [max(each) for each in zip(*results[spec, algo], strict=True)]
        moved = bytes_moved(num_bytes, RANKS, dtype, spec, algo)
        yield {
            "size": num_bytes,
            "type": dtype,
            "op": f"all_reduce x{RANKS}",
            "codec": spec,
            "who": "ringcomm",
            "algo": algo,
            "mode": modes[0],
            "moved": moved,
            **_speed(slowest, moved, copy_rate),
        }
    if device.name == "cuda":
        samples, moved = _torch_instead(device, num_bytes, dtype, rounds)
        yield {
            "size": num_bytes,
            "type": dtype,
            "op": f"all_reduce x{RANKS}",
            "codec": None,
            "who": "torch",
            "mode": None,
            "moved": moved,
            **_speed(samples, moved, copy_rate),
        }


def _speed(samples: list[float], moved: int, copy_rate: float) -> dict[str, Any]:
    ordered = sorted(samples)
    p50 = statistics.median(ordered)
    return {
        "p50_us": p50 * 1e6,
        "p99_us": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e6,
        "GB/s": moved / p50 / 1e9,
        "to_copy": moved / p50 / copy_rate,
        "samples_us": [round(sample * 1e6, 2) for sample in samples],
    }


def _values(rank: int, count: int, dtype: str) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(rank)
    return rounded(rng.standard_normal(count, dtype=np.float32), dtype)


def _typed(raw: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    return raw.view(reference_dtype(dtype))


def reference_dtype(dtype: str) -> Any:
    if dtype == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype)


def _verify(
    comm: Any,
    device: Device,
    array: Any,
    raws: list[np.ndarray[Any, Any]],
    dtype: str,
    way: Way,
    rank: int,
    meeting: threading.Barrier,
) -> None:
    """Both ends of the result have the reference's bytes. Leaves the array with ordinary values."""
    given = device.put(raws[rank], dtype)
    device.copy(array, given)
    meeting.wait()  # from here to the next, nothing but the collective: while a kernel waits, nobody may wait for the GPU
    spec, algo = way
    direct_calls = comm.direct_calls
    _calls(comm, array, way, 1)()
    comm.synchronize()
    meeting.wait()
    if (comm.direct_calls > direct_calls) != (algo == "direct"):
        raise Wrong(f"all_reduce with codec {spec}: it should have been {algo} and was not")
    found = device.fetch(array)
    chosen = codec(spec)
    names = {code: name for name, code in _core.CODECS.items()}
    ways = (None, None) if chosen.exact else (names[chosen.up], names[chosen.down])
    size = ITEM_BYTES[dtype]
    edge = min(CHECKED, len(raws[0])) // 32 * 32
    for part in (slice(0, edge), slice(len(raws[0]) - edge, None)):
        inputs = [raw[part].view(reference_dtype(dtype)) for raw in raws]
        expected = reference.all_reduce(inputs, "avg", *ways)
        begin = part.start * size
        got = found[begin : begin + expected.nbytes]
        if not np.array_equal(got, expected.view(np.uint8)):
            raise Wrong(f"all_reduce with codec {spec}: not the reference's bytes")
    assert np.isfinite(widened(found.view(raws[0].dtype), dtype)).all()


def _calls(comm: Any, array: Any, way: Way, calls: int = CALLS) -> Callable[[], None]:
    spec, algo = way

    def work() -> None:
        for _ in range(calls):
            comm.all_reduce(array, op="avg", codec=spec, algo=algo)

    return work


@contextmanager
def _in_kernel(device: Device) -> Iterator[None]:
    """The mode of communicators that are made in the block, on a GPU."""
    if device.name != "cuda":
        yield
        return
    before = os.environ.get(MODE)
    os.environ[MODE] = "in_kernel"
    env.forget()
    try:
        yield
    finally:
        if before is None:
            del os.environ[MODE]
        else:
            os.environ[MODE] = before
        env.forget()


@contextmanager
def _own_stream(device: Device) -> Iterator[None]:
    if device.name != "cuda":
        yield
        return
    torch = device.torch  # type: ignore[attr-defined]
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


def _seconds(device: Device, comm: Any, work: Callable[[], None]) -> float:
    """Of all that ``work`` queues, on this rank."""
    if device.name != "cuda":
        start = time.perf_counter()
        work()
        comm.synchronize()
        return time.perf_counter() - start
    event = device.torch.cuda.Event  # type: ignore[attr-defined]
    begin, end = event(enable_timing=True), event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _copy_seconds(device: Device, source: Any, to: Any) -> float:
    """Of the device's own copy."""
    device.synchronize()
    return statistics.median(device.sample([lambda: device.copy(to, source)] * 5))


def _torch_instead(
    device: Device, num_bytes: int, dtype: str, rounds: int
) -> tuple[list[float], int]:
    """The same with torch's operations in one stream: three sums, one division, a copy to each."""
    torch = device.torch  # type: ignore[attr-defined]
    count = num_bytes // ITEM_BYTES[dtype]
    arrays = [device.put(_values(rank, count, dtype), dtype) for rank in range(RANKS)]
    total = torch.empty_like(arrays[0])

    def work() -> None:
        torch.add(arrays[0], arrays[1], out=total)
        for one in arrays[2:]:
            total.add_(one)
        total.div_(RANKS)
        for one in arrays:
            one.copy_(total)

    work()
    samples = device.sample([work] * rounds)
    passes = 3 + 3 * (RANKS - 2) + 2 + 2 * RANKS
    return samples, passes * num_bytes
