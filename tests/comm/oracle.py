"""Inputs that every rank can make for all ranks, and what ringcomm.reference makes of them."""

import math
from typing import Any

import numpy as np

from ringcomm import reference
from tests.dtypes import random_array

CACHE_LINE = 64

Array = Any


def random_input(dtype: str, count: int, rank: int, seed: int) -> Array:
    """What ``rank`` passes in."""
    return random_array(dtype, count, (seed, rank))


def random_inputs(dtype: str, count: int, world_size: int, seed: int) -> list[Array]:
    return [random_input(dtype, count, rank, seed) for rank in range(world_size)]


def factor_of(rank: int) -> float:
    """What ``rank`` passes as the factor of premul_sum."""
    return (0.3, -1.7, 2.0, 1e-3)[rank % 4]


def premultiplied(inputs: list[Array]) -> list[Array]:
    """The inputs whose sum is their premul_sum."""
    return [reference.scale(values, factor_of(rank)) for rank, values in enumerate(inputs)]


def ring_ranges(
    count: int, world_size: int, dtype: Any, buffer_bytes: int
) -> list[tuple[int, int, list[int]]]:
    """Which ranks a ring adds up in which order: chunk c of a segment in the order c+1, ..., c."""
    partial = 4 if dtype.name in ("float16", "bfloat16") else dtype.itemsize
    granule = CACHE_LINE // dtype.itemsize
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


def expected_all_reduce(inputs: list[Array], op: str, algo: str | None, buffer_bytes: int) -> Array:
    if op == "premul_sum":
        inputs, op = premultiplied(inputs), "sum"
    if len(inputs) == 1:
        return inputs[0]
    if algo == "ring":
        ranges = ring_ranges(len(inputs[0]), len(inputs), inputs[0].dtype, buffer_bytes)
        return reference.all_reduce_ring(inputs, op, ranges)
    return reference.all_reduce(inputs, op)


def assert_same_bits(got: Array, expected: Array, what: object) -> None:
    assert got.dtype == expected.dtype, what
    assert got.shape == expected.shape, what
    wrong = np.flatnonzero(
        np.ascontiguousarray(got).reshape(-1).view(np.uint8)
        != np.ascontiguousarray(expected).reshape(-1).view(np.uint8)
    )
    assert wrong.size == 0, f"{what}: {wrong.size} bytes differ, the first at {wrong[0]}"
