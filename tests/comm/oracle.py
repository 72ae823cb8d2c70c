"""Inputs that every rank can make for all ranks, and what ringcomm.reference makes of them."""

from typing import Any

import numpy as np

from ringcomm import reference
from tests.dtypes import random_array

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


def expected_all_reduce(inputs: list[Array], op: str, algo: str | None) -> Array:
    if op == "premul_sum":
        inputs, op = premultiplied(inputs), "sum"
    if len(inputs) == 1:
        return inputs[0]
    if algo == "ring":
        return reference.all_reduce_ring(inputs, op)
    return reference.all_reduce(inputs, op)


def assert_same_bits(got: Array, expected: Array, what: object) -> None:
    assert got.dtype == expected.dtype, what
    assert got.shape == expected.shape, what
    wrong = np.flatnonzero(
        np.ascontiguousarray(got).reshape(-1).view(np.uint8)
        != np.ascontiguousarray(expected).reshape(-1).view(np.uint8)
    )
    assert wrong.size == 0, f"{what}: {wrong.size} bytes differ, the first at {wrong[0]}"
