"""The emulated GPUs: memory, launches, and what was wrong with a run."""

import ctypes
import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

SCHEDULES = ("forward", "reverse", "random", "priority")
Plan = tuple[str, int]  # a schedule and its seed
# Every schedule; those that draw, with three seeds. The others have but one order.
PLANS: tuple[Plan, ...] = tuple(
    (name, seed) for name in SCHEDULES for seed in range(3 if name in ("random", "priority") else 1)
)

# A line of nm. Kernels of one name in several files differ in their template's arguments.
KERNEL = re.compile(
    r"(?P<offset>[0-9a-f]+) t (void )?ringcomm::cuda::\(anonymous namespace\)::(?P<name>\w+_kernel(<.*>)?)\(.*\)"
)

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

    @functools.cached_property
    def kernels(self) -> dict[int, str]:
        """Every kernel of csrc that the library has: each instance of a template, as its source calls it. By offset in
        the module. Needs nm."""
        listed = subprocess.run(
            ["nm", "--demangle", str(self.path)], capture_output=True, text=True, check=True
        )
        kernels = {}
        for line in listed.stdout.splitlines():
            found = KERNEL.fullmatch(line)
            if found is not None:
                kernels[int(found["offset"], 16)] = found["name"].replace("ringcomm::", "")
        return kernels

    def kernels_ended(self) -> set[str]:
        """Those of them whose launches have come to their end since the last call."""
        offsets = (ctypes.c_uint32 * 4096)()
        count = self.library.simt_kernels_ended(offsets, ctypes.c_int64(len(offsets)))
        assert count <= len(offsets)
        return {self.kernels[offset] for offset in offsets[:count] if offset in self.kernels}

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
