"""Communicators on arrays of emulated GPUs: the CPU's bits in every mode, and no failure that hangs."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator, reference
from ringcomm.errors import (
    AbortedError,
    DeadlineError,
    MismatchError,
    PeerLostError,
    UsageError,
)
from ringcomm.store import TCPStore
from tests.comm import test_codec, test_exact, test_exchange
from tests.comm.oracle import assert_same_bits, random_inputs
from tests.dtypes import NUMPY
from tests.simt import emulated
from tests.worlds import Outcome, Worlds

# What makes a group choose a mode.
MODES = {
    "in_kernel": {"RINGCOMM_SIMT_DEVICES": "4"},
    "stepped": {"RINGCOMM_SIMT_DEVICES": "1"},
    "host": {"RINGCOMM_SIMT_DEVICES": "4", "RINGCOMM_SIMT_PEERS": "0"},
}
SLAB = {"RINGCOMM_CUDA_SLAB_MIB": "1"}  # small: several rounds


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[[str], Worlds]]:
    """Rank processes whose groups choose the mode."""
    emulated.require()
    made: dict[str, Worlds] = {}

    def pool(mode: str) -> Worlds:
        if mode not in made:
            made[mode] = Worlds(package=emulated.PACKAGE, **MODES[mode], **SLAB)
        return made[mode]

    yield pool
    for worlds in made.values():
        worlds.close()
        assert worlds.leftovers() == []


Pools = Callable[[str], Worlds]


# ---- the CPU's bits ------------------------------------------------------------------------------


class Settled:
    """A communicator whose collectives have come to their end when they return."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if name not in COLLECTIVES:
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            self._target.synchronize()
            return result

        return call


COLLECTIVES = ("all_reduce", "broadcast", "reduce", "all_gather", "reduce_scatter")
COLLECTIVES += ("gather", "scatter", "all_to_all")


def settled(comm: Communicator, mode: str, body: Callable[..., Any], *args: Any) -> Any:
    comm.use_device("simt")
    assert comm._devices.mode == mode
    return body(Settled(comm), *args)


BODIES: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (test_exact.check_all_reduce, ("float32", None)),
    (test_exact.check_all_reduce, ("float16", "two_shot")),
    (test_exact.check_all_reduce, ("int64", None)),
    (test_exact.check_all_reduce, ("complex64", "two_shot")),
    (test_exact.check_data_movement, ("uint8",)),
    (test_exact.check_data_movement, ("float64",)),
    (test_exact.check_reduce, ("float32",)),
    (test_exact.check_reduce, ("bool",)),
    (test_exact.check_reduce_of_views, ()),
    (test_exact.check_lists, ("float16",)),
    (test_exact.check_reduce_scatter, ("float32",)),
    (test_exact.check_special_values, ()),
    (test_exact.check_default_buffers, ()),
    (test_exchange.check_even, ("float32",)),
    (test_exchange.check_uneven, (0,)),
    (test_codec.check_codec, ("int8", True, "float32")),
    (test_codec.check_codec, ("int4[rounding=stochastic,seed=5]", True, "float32")),
    (test_codec.check_codec, ("bf16", False, "float16")),
    (test_codec.check_non_finite, ()),
]


@pytest.mark.parametrize("number", range(len(BODIES)), ids=lambda n: f"{BODIES[n][0].__name__}-{n}")
@pytest.mark.parametrize(
    ("mode", "world_size"), [("in_kernel", 2), ("in_kernel", 4), ("stepped", 3), ("host", 2)]
)
def test_gpus_give_the_oracles_bits(pools: Pools, mode: str, world_size: int, number: int) -> None:
    body, args = BODIES[number]
    pools(mode).run(world_size, settled, mode, body, *args)
