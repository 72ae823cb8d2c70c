"""The emulated GPUs: memory, launches, and what was wrong with a run."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

SCHEDULES = ("forward", "reverse", "random", "priority")
# Every schedule; the random ones with three seeds.
PLANS = tuple((name, seed) for name in SCHEDULES for seed in range(1 if name[-1] in "de" else 3))

Array = Any


class EmulatorError(Exception):
    """A launch was refused, as the library says."""


class Emulator:
    """One per process. Launches are queued; `run` executes them and returns the reports."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        for name in ("simt_last_error", "simt_run"):
            getattr(self.library, name).restype = ctypes.c_char_p
        for name in ("simt_allocate", "simt_stream"):
            getattr(self.library, name).restype = ctypes.c_void_p
        self.streams: dict[tuple[int, int], int] = {}

    def array(self, values: Array, name: str, shift: int = 0) -> Array:
        """A copy of ``values`` in device memory, ``shift`` bytes past an aligned address."""
        values = np.ascontiguousarray(values)
        num_bytes = values.nbytes + shift
        address = self.library.simt_allocate(ctypes.c_size_t(num_bytes), name.encode())
        if address is None:
            raise MemoryError(self.last_error())
        memory = np.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), np.uint8)
        copy = memory[shift:].view(values.dtype)
        copy[:] = values
        return copy

    def release_all(self) -> None:
        """Every array of this emulator is gone afterwards."""
        self.library.simt_release_all()

    def stream(self, rank: int, number: int = 0) -> int:
        if (rank, number) not in self.streams:
            self.streams[rank, number] = self.library.simt_stream(rank, number)
        return self.streams[rank, number]

    def last_error(self) -> str:
        return str(self.library.simt_last_error().decode())

    def call(self, name: str, *arguments: Any) -> None:
        """Calls an exported function that returns 0 or fails.

        Arrays and integers at addresses go as pointers, floats as float32, Python integers as int64.
        """
        status = getattr(self.library, name)(*map(as_argument, arguments))
        if status != 0:
            raise EmulatorError(self.last_error())

    def run(
        self,
        schedule: str = "forward",
        seed: int = 0,
        switch_probability: float = 0.01,
        max_resident_blocks: int = 64,
    ) -> list[str]:
        """Executes what is queued. Returns what was wrong, a sentence each."""
        text = self.library.simt_run(
            SCHEDULES.index(schedule),
            ctypes.c_uint64(seed),
            ctypes.c_double(switch_probability),
            max_resident_blocks,
        )
        if text is None:
            raise EmulatorError(self.last_error())
        return self.with_lines(text.decode()).splitlines()

    def with_lines(self, text: str) -> str:
        """Writes ``file:line`` for the addresses in the module, where addr2line is there to tell."""
        addresses = sorted(set(re.findall(r"@(0x[0-9a-f]+)", text)))
        if not addresses or shutil.which("addr2line") is None:
            return text
        found = subprocess.run(
            ["addr2line", "-e", str(self.path), *addresses], capture_output=True, text=True
        )
        lines = found.stdout.splitlines()
        for address, line in zip(addresses, lines, strict=True):
            text = re.sub(rf"@{address}\b", line.split(" ")[0].rpartition("/")[2], text)
        return text

    def counts(self) -> tuple[int, int, int]:
        """Switches, accesses and threads so far."""
        numbers = [ctypes.c_uint64() for _ in range(3)]
        self.library.simt_counts(*map(ctypes.byref, numbers))
        switches, accesses, threads = (number.value for number in numbers)
        return switches, accesses, threads


def as_argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p()
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, bytes):
        return ctypes.c_char_p(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return value


def pointers(arrays: list[Array]) -> Any:
    """A C array of the arrays' addresses."""
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
