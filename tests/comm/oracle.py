"""Inputs that every rank can make for all ranks, and what ringcomm.reference makes of them."""

import math
from typing import Any

import numpy as np

from ringcomm import Communicator, _core, reference

DTYPES = ("float32", "float64", "float16", "bfloat16", "int32", "int64", "uint8")
OPS = ("sum", "avg", "min", "max", "product")
CACHE_LINE = 64

Array = Any


def storage(dtype: str) -> str:
    """NumPy's type for the dtype; bfloat16 travels as bit patterns."""
    return "uint16" if dtype == "bfloat16" else dtype


def random_input(dtype: str, count: int, rank: int, seed: int) -> Array:
    """What ``rank`` passes in: magnitudes from 1e-3 to 1e3 for floats, all bits for integers."""
    rng = np.random.default_rng((seed, rank))
    if dtype in ("int32", "int64", "uint8"):
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, count, dtype, endpoint=True)
    values = rng.standard_normal(count) * 10.0 ** rng.integers(-3, 3, count)
    if dtype == "bfloat16":
        return reference.float32_to_bfloat16(values.astype(np.float32))
    return values.astype(dtype)


def random_inputs(dtype: str, count: int, world_size: int, seed: int) -> list[Array]:
    return [random_input(dtype, count, rank, seed) for rank in range(world_size)]


def ring_ranges(
    count: int, world_size: int, dtype: str, buffer_bytes: int
) -> list[tuple[int, int, list[int]]]:
    """Which ranks a ring adds up in which order: chunk c of a segment in the order c+1, ..., c."""
    item = np.dtype(storage(dtype)).itemsize
    partial = 4 if dtype in ("float16", "bfloat16") else item
    granule = CACHE_LINE // item
    chunk = max(1, 2 * buffer_bytes // (world_size * partial) // granule) * granule
    ranges = []
    for first in range(0, count, chunk * world_size):
        elems = min(chunk * world_size, count - first)
        share = math.ceil(math.ceil(elems / world_size) / granule) * granule
        for owner in range(world_size):
            begin, end = min(elems, owner * share), min(elems, (owner + 1) * share)
            order = [(owner + 1 + i) % world_size for i in range(world_size)]
            ranges.append((first + begin, first + end, order))
    return ranges


def expected_all_reduce(
    inputs: list[Array], op: str, dtype: str, algo: str | None, buffer_bytes: int
) -> Array:
    if algo == "ring" and len(inputs) > 1:
        ranges = ring_ranges(len(inputs[0]), len(inputs), dtype, buffer_bytes)
        return reference.all_reduce_ring(inputs, op, ranges)
    if len(inputs) == 1:
        return inputs[0]
    return reference.all_reduce(inputs, op)


def all_reduce(comm: Communicator, x: Array, op: str, dtype: str, algo: str | None) -> None:
    """comm.all_reduce, also for bfloat16 bit patterns, which no NumPy dtype stands for."""
    if dtype != "bfloat16":
        comm.all_reduce(x, op, algo=algo)
        return
    algo_id = -1 if algo is None else _core.ALGOS[algo]
    address = x.ctypes.data
    comm._core.collective(
        _core.OPS["all_reduce"],
        address,
        address,
        x.size,
        _core.DTYPES[dtype],
        _core.REDUCE_OPS[op],
        -1,
        algo_id,
    )


def assert_same_bits(got: Array, expected: Array, what: object) -> None:
    assert got.dtype == expected.dtype, what
    assert got.shape == expected.shape, what
    wrong = np.flatnonzero(
        np.ascontiguousarray(got).reshape(-1).view(np.uint8)
        != np.ascontiguousarray(expected).reshape(-1).view(np.uint8)
    )
    assert wrong.size == 0, f"{what}: {wrong.size} bytes differ, the first at {wrong[0]}"
