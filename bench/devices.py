"""Where kernels are measured: arrays on a device, its streams, and its clock."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ringcomm import _core
from ringcomm.reference import bfloat16_to_float32, float32_to_bfloat16

__all__ = ["DEVICES", "Device", "Unavailable", "device", "rounded"]

ITEM_BYTES = _core.DTYPE_BYTES
Array = Any
ALL = slice(None)


class Unavailable(Exception):
    """The device is not here, in words."""


def rounded(values: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """float32 values as the raw elements of ``dtype``; bfloat16 as its bits in uint16."""
    if dtype == "bfloat16":
        return float32_to_bfloat16(values)
    return values.astype(dtype)


def widened(raw: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """float32 values of raw elements."""
    return bfloat16_to_float32(raw) if dtype == "bfloat16" else raw.astype(np.float32)


class Device:
    """The CPU, or emulated GPUs: NumPy arrays.

    Attributes:
        name: "cpu", "simt" or "cuda".
        rank_device: What ``ringcomm.init`` takes as ``device`` for a rank here.
        stream: What the functions of ``_core`` take as ``stream``.
        timed: Whether times here mean anything.
    """

    name = "cpu"
    rank_device: str | None = None
    timed = True

    @property
    def stream(self) -> int | None:
        return None

    def facts(self) -> dict[str, str]:
        return {"device": self.name}

    def put(self, raw: np.ndarray[Any, Any], dtype: str) -> Array:
        """A copy of raw elements on the device."""
        return raw.copy()

    def empty(self, count: int, dtype: str) -> Array:
        return np.full(count * ITEM_BYTES[dtype], 0xA5, np.uint8)

    def fetch(self, array: Array, window: slice = ALL) -> np.ndarray[Any, Any]:
        """The bytes in a window, on the host."""
        return np.asarray(array).reshape(-1).view(np.uint8)[window].copy()

    def pointer(self, array: Array) -> int:
        return int(array.ctypes.data)

    def copy(self, to: Array, source: Array) -> None:
        to.reshape(-1).view(np.uint8)[:] = source.reshape(-1).view(np.uint8)

    def synchronize(self) -> None:
        """Blocks until the device has nothing left to do."""

    def sample(self, works: list[Callable[[], None]]) -> list[float]:
        """Seconds of each, one after the other, each with caches that hold nothing of it where possible."""
        seconds = []
        for work in works:
            start = time.perf_counter()
            work()
            self.synchronize()
            seconds.append(time.perf_counter() - start)
        return seconds


class EmulatedDevice(Device):
    name = "simt"
    rank_device = "simt"
    timed = False

    def __init__(self) -> None:
        if _core.RUNTIME != "simt":
            raise Unavailable("this ringcomm is not the emulated build")

    @property
    def stream(self) -> int | None:
        return 0

    def synchronize(self) -> None:
        _core.simt.synchronize(0)


class CudaDevice(Device):
    """The current GPU of torch: tensors, CUDA events."""

    name = "cuda"

    def __init__(self) -> None:
        if _core.RUNTIME != "cuda":
            raise Unavailable("this ringcomm was built without CUDA (see python -m ringcomm.info)")
        # Before CUDA starts. Of 8 hardware queues, the default, two ranks that are threads may get the same for their
        # streams: then one's kernel would come after the other's that waits for it.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        try:
            import torch
        except ImportError as error:
            raise Unavailable(f"torch makes the arrays and times the kernels: {error}") from None
        if not torch.cuda.is_available():
            raise Unavailable("torch sees no CUDA device")
        self.torch = torch
        self.rank_device = f"cuda:{torch.cuda.current_device()}"
        about = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._about = about
        # Twice the cache, so that nothing of what was there before is left.
        num_bytes = 2 * int(getattr(about, "L2_cache_size", 64 << 20))
        self._flush = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")

    @property
    def stream(self) -> int | None:
        return int(self.torch.cuda.current_stream().cuda_stream)

    def facts(self) -> dict[str, str]:
        about = self._about
        facts = {
            "device": about.name,
            "capability": f"{about.major}.{about.minor}",
            "multiprocessors": str(about.multi_processor_count),
            "memory_GiB": f"{about.total_memory / 2**30:.0f}",
            "torch": self.torch.__version__,
            "cuda": str(self.torch.version.cuda),
        }
        driver = _core.cuda_probe().driver_version
        return {**facts, "driver_cuda": f"{driver // 1000}.{driver % 1000 // 10}"}

    def put(self, raw: np.ndarray[Any, Any], dtype: str) -> Array:
        torch = self.torch
        host = torch.from_numpy(raw.view(np.int16) if dtype == "bfloat16" else raw)
        return host.cuda().view(getattr(torch, dtype))

    def empty(self, count: int, dtype: str) -> Array:
        torch = self.torch
        poison = torch.full((count * ITEM_BYTES[dtype],), 0xA5, dtype=torch.uint8, device="cuda")
        return poison.view(getattr(torch, dtype))

    def fetch(self, array: Array, window: slice = ALL) -> np.ndarray[Any, Any]:
        raw: np.ndarray[Any, Any] = array.reshape(-1).view(self.torch.uint8)[window].cpu().numpy()
        return raw

    def pointer(self, array: Array) -> int:
        return int(array.data_ptr())

    def copy(self, to: Array, source: Array) -> None:
        to.copy_(source)

    def synchronize(self) -> None:
        self.torch.cuda.synchronize()

    def sample(self, works: list[Callable[[], None]]) -> list[float]:
        # The flush keeps the GPU busy while the next work is queued: events see kernels, not the host.
        event = self.torch.cuda.Event
        spans = []
        for work in works:
            begin, end = event(enable_timing=True), event(enable_timing=True)
            self._flush.zero_()
            begin.record()
            work()
            end.record()
            spans.append((begin, end))
        self.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in spans]


DEVICES = {"cpu": Device, "simt": EmulatedDevice, "cuda": CudaDevice}


def device(name: str) -> Device:
    """The device of that name.

    Raises:
        Unavailable: it is not here.
    """
    return DEVICES[name]()


def package_version(name: str) -> str | None:
    module = sys.modules.get(name)
    return None if module is None else str(getattr(module, "__version__", "?"))
