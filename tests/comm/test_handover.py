"""However staged bytes change hands (transport/staging_access.h), the result is the same."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator, reference
from tests.comm.oracle import assert_same_bits, random_inputs
from tests.worlds import Worlds

CALLS = 30  # a probe hands 24 segments over, in every way there is
SIZES = (6000, 150_000)  # elements: beside the flag, and in two segments or more


def check_op(
    comm: Communicator,
    call: Callable[[Communicator, Any], Any],
    expect: Callable[[list[Any], int], Any],
    divisor: int,
) -> None:
    for size in SIZES:
        for seed in range(CALLS):
            inputs = random_inputs("float32", size // divisor * divisor, comm.world_size, seed)
            got = call(comm, inputs[comm.rank].copy())
            assert_same_bits(np.ravel(got), expect(inputs, comm.rank), (size, seed))


def all_to_all(inputs: list[Any], rank: int) -> Any:
    parts = [np.split(values, len(inputs)) for values in inputs]
    return np.concatenate(reference.all_to_all(parts)[rank])


OPS = {
    "all_reduce": (lambda c, x: c.all_reduce(x), lambda xs, rank: reference.all_reduce(xs, "sum")),
    "broadcast": (lambda c, x: c.broadcast(x, 1), lambda xs, rank: xs[1]),
    "all_gather": (lambda c, x: c.all_gather(x), lambda xs, rank: reference.all_gather(xs)),
    "reduce_scatter": (
        lambda c, x: c.reduce_scatter(x),
        lambda xs, rank: reference.reduce_scatter(xs, "sum")[rank],
    ),
    "all_to_all": (lambda c, x: c.all_to_all(x), all_to_all),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_handover_gives_the_oracles_bits(worlds: Worlds, world_size: int, op: str) -> None:
    worlds.run(world_size, run_op, op)


def run_op(comm: Communicator, op: str) -> None:
    call, expect = OPS[op]
    check_op(comm, call, expect, comm.world_size)


def check_codec(comm: Communicator) -> None:
    inputs = random_inputs("float32", SIZES[1], comm.world_size, 1)
    results = {
        comm.all_reduce(inputs[comm.rank].copy(), codec="int8").tobytes() for _ in range(CALLS)
    }
    assert len(results) == 1


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_handover_gives_the_same_sums_with_a_codec(worlds: Worlds, world_size: int) -> None:
    worlds.run(world_size, check_codec)
