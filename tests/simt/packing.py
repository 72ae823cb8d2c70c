"""Pieces in the memory of an emulated GPU, and the buffer that they are packed into."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from ringcomm import _core
from tests.simt.emulator import Emulator, Plan, pointers

GRANULE = 16
OLD = 0xA5  # of memory that is to be written, and of what is not

Array = Any


def expected_buffer(pieces: Sequence[Array]) -> Array:
    """Every piece at the next multiple of 16 bytes, behind zeros."""
    parts = []
    for piece in pieces:
        parts += [piece, np.zeros(-piece.size % GRANULE, np.uint8)]
    return np.concatenate([np.empty(0, np.uint8), *parts])


class Pieces:
    """Random pieces of these sizes, each ``shift`` bytes past an aligned address."""

    def __init__(
        self, simt: Emulator, sizes: Sequence[int], shifts: Sequence[int], seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.simt = simt
        self.values = [rng.integers(1, 256, size, np.uint8) for size in sizes]
        self.shifts = [shifts[k % len(shifts)] for k in range(len(sizes))]
        self.buffer = expected_buffer(self.values)

    def arrays(self, filled: bool) -> list[Array]:
        return [
            self.simt.array(values if filled else np.full_like(values, OLD), f"piece {k}", shift)
            for k, (values, shift) in enumerate(zip(self.values, self.shifts, strict=True))
        ]

    def call(self, packs: bool, arrays: list[Array], buffer: Array, on_cpu: bool = False) -> None:
        if on_cpu:
            pieces = [(array.ctypes.data, array.size) for array in arrays]
            (_core.pack if packs else _core.unpack)(pieces, buffer.ctypes.data)
            return
        sizes = (ctypes.c_int64 * len(arrays))(*(array.size for array in arrays))
        number = ctypes.c_int(len(arrays))
        self.simt.call(
            *("simt_pack", ctypes.c_int(packs), pointers(arrays), sizes, number, buffer, None)
        )

    def packed(self, plan: Plan, on_cpu: bool = False) -> tuple[list[str], Array]:
        """Reports, and the buffer."""
        buffer = self.simt.array(np.full(self.buffer.size, OLD, np.uint8), "buffer")
        self.call(True, self.arrays(True), buffer, on_cpu)
        return self.simt.run(*plan), buffer.copy()

    def unpacked(self, plan: Plan, on_cpu: bool = False) -> tuple[list[str], list[Array]]:
        """Reports, and the pieces."""
        arrays = self.arrays(False)
        self.call(False, arrays, self.simt.array(self.buffer, "buffer"), on_cpu)
        return self.simt.run(*plan), [array.copy() for array in arrays]
