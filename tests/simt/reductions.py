"""Collectives that reduce, on new random arrays of emulated GPUs, and what the CPU makes of the same numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ringcomm import _core, reference
from tests.dtypes import NUMPY, assert_same_numbers, random_array
from tests.simt import collectives
from tests.simt.collectives import Call
from tests.simt.emulator import Emulator

# The operation and the algorithm of each.
KINDS = {
    "two_shot": ("all_reduce", "two_shot"),
    "one_shot": ("all_reduce", "one_shot"),
    "ring": ("all_reduce", "ring"),
    "reduce": ("reduce", "staged"),
    "reduce_scatter": ("reduce_scatter", "staged"),
    "reduce_scatter of a list": ("reduce_scatter", "staged"),
    "direct": ("all_reduce", "direct"),
    "direct reduce": ("reduce", "direct"),
    "direct reduce_scatter": ("reduce_scatter", "direct"),
}

Array = Any


def sum_of(dtype: str, op: str, inputs: Sequence[Array]) -> Array:
    """In the order of the inputs, by the CPU. ``op`` is premul_sum for inputs that are multiplied already, too."""
    output = np.zeros_like(inputs[0])
    addresses = [values.ctypes.data for values in inputs]
    ids = _core.DTYPES[dtype], _core.REDUCE_OPS["sum" if op == "premul_sum" else op]
    _core.reduce(*ids, addresses, output.size, output.ctypes.data)
    return output


def scaled(dtype: str, values: Array, factor: float) -> Array:
    output = np.zeros_like(values)
    _core.scale(_core.DTYPES[dtype], values.ctypes.data, factor, output.ctypes.data, values.size)
    return output


def ring_sum_of(dtype: str, op: str, inputs: Sequence[Array]) -> Array:
    """As the reference has it, by the CPU."""
    chunks = reference.ring_chunks(inputs[0].size, len(inputs), inputs[0].itemsize)
    return np.concatenate(
        [
            sum_of(dtype, op, [inputs[rank][chunk].copy() for rank in order])
            for chunk, order in chunks
        ]
    )


class Reduction:
    """One collective of a group: its calls, and what has to be where when they are done."""

    def __init__(
        self,
        simt: Emulator,
        kind: str,
        world_size: int,
        dtype: str,
        op: str,
        count: int,
        seed: int = 0,
        shifts: tuple[int, int] = (0, 0),
        in_place: bool = False,
    ) -> None:
        """``shifts``: where inputs and outputs begin, in elements past an aligned address."""
        self.what = (kind, world_size, dtype, op, count, seed, shifts, in_place)
        self.expected: list[tuple[Array, Array]] = []
        name, algo = KINDS[kind]
        scatters, lists = name == "reduce_scatter", "list" in kind
        root = seed % world_size if name == "reduce" else -1
        factors = [1 / (3 + rank) for rank in range(world_size)]
        total = count * world_size if scatters else count
        inputs = [random_array(dtype, total, (seed, rank), True) for rank in range(world_size)]
        summed = inputs
        if op == "premul_sum":
            summed = [scaled(dtype, *pair) for pair in zip(inputs, factors, strict=True)]
        result = (ring_sum_of if kind == "ring" else sum_of)(dtype, op, summed)
        bytes_in, bytes_out = (shift * NUMPY[dtype].itemsize for shift in shifts)

        self.calls: list[Call] = []
        for rank, values in enumerate(inputs):
            own = slice(rank * count, (rank + 1) * count) if scatters else slice(None)
            fields: dict[str, Any] = {}
            if lists:
                parts = [
                    simt.array(part, f"part for {k} of rank {rank}", bytes_in)
                    for k, part in enumerate(np.split(values, world_size))
                ]
                fields = {"sends": parts, "has_parts": 1}
                given, own_part = None, parts[rank]
            else:
                given = simt.array(values, f"input of rank {rank}", bytes_in)
                own_part = given[own]
            output = own_part
            if not in_place:
                empty = np.full(count * values.itemsize, 0xA5, np.uint8).view(values.dtype)
                output = simt.array(empty, f"output of rank {rank}", bytes_out)
                self.expected.append((own_part, values[own]))
            gets_none = name == "reduce" and rank != root
            if not gets_none:
                self.expected.append((output, result[own]))
            elif in_place:
                self.expected.append((output, values))
            made = collectives.call(
                *(name, algo, dtype, count),
                **dict(root=root, input=given, output=None if gets_none else output, **fields),
            )
            made.reduce_op = _core.REDUCE_OPS[op]
            made.factor = factors[rank]
            self.calls.append(made)
        if algo == "direct":
            collectives.where_they_are(self.calls)

    def check(self, what: object = "") -> None:
        """All ranks have the CPU's bits, and inputs are as they were."""
        for array, values in self.expected:
            assert_same_numbers(array.copy(), values, (self.what, what))
