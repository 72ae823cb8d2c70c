"""Collectives on GPUs have the oracle's bits: the bodies of tests/comm, with copies of their arrays on the GPU.

Ranks are threads of one process, whose kernels run at the same time; or processes that take turns on one GPU; or
processes whose kernels share it, with the MPS daemon. What the emulated GPU does is tested at length in
tests/simt/test_communicator.py: here it only shows that these tests work.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator, reference
from tests.comm import test_coalesced, test_codec, test_exact, test_exchange
from tests.comm.oracle import assert_same_bits, random_inputs
from tests.dtypes import REDUCED
from tests.gpu import places
from tests.gpu.conftest import Pools

BODIES: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    *((test_exact.check_all_reduce, (dtype, None)) for dtype in REDUCED),
    (test_exact.check_all_reduce, ("float32", "two_shot")),
    (test_exact.check_all_reduce, ("bfloat16", "two_shot")),
    (test_exact.check_data_movement, ("uint8",)),
    (test_exact.check_data_movement, ("float64",)),
    (test_exact.check_reduce, ("float32",)),
    (test_exact.check_reduce, ("float16",)),
    (test_exact.check_reduce_of_views, ()),
    (test_exact.check_lists, ("float16",)),
    (test_exact.check_reduce_scatter, ("float32",)),
    (test_exchange.check_even, ("float32",)),
    (test_exchange.check_uneven, (0,)),
    (test_exchange.check_in_place, ()),
    *((test_coalesced.check_ops, (dtype,)) for dtype in ("float32", "bfloat16", "bool")),
    (test_coalesced.check_mixture, ()),
    *(
        (test_codec.check_codec, (spec, residuals, dtype))
        for spec, residuals, dtype in (
            ("bf16", True, "float32"),
            ("bf16", False, "float16"),
            ("fp16", True, "float32"),
            ("int8", True, "float32"),
            ("int8", False, "bfloat16"),
            ("int4", True, "float32"),
            ("int4/4", True, "float32"),
        )
    ),
    (test_codec.check_non_finite, ()),
]
STOCHASTIC = [  # with a communicator of its own: draws depend on how many calls there were before
    (test_codec.check_codec, ("int4[rounding=stochastic,seed=5]", True, "float32"))
]
SHORT = [
    (test_exact.check_all_reduce, ("float16", None)),
    (test_coalesced.check_ops, ("float16",)),
    (test_exact.check_reduce_of_views, ()),
    (test_exchange.check_uneven, (0,)),
    (test_codec.check_codec, ("int8", True, "float32")),
]


def several(comm: Communicator, mode: str | None, bodies: Any) -> None:
    """All bodies with one communicator."""
    for body, args in bodies:
        try:
            places.mirrored(comm, mode, body, *args)
        except AssertionError as error:
            raise AssertionError(f"{body.__name__}{args}: {error}") from error


@pytest.mark.parametrize("bodies", ["many", "stochastic"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_that_are_threads(device: str, pools: Pools, world_size: int, bodies: str) -> None:
    """Their kernels run at the same time, on one GPU."""
    worlds = pools(device, **places.of_threads(device, world_size))
    worlds.run_threads(world_size, several, "in_kernel", chosen(device, bodies), deadline=100)


@pytest.mark.parametrize("bodies", ["many", "stochastic"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_that_take_turns(device: str, pools: Pools, world_size: int, bodies: str) -> None:
    pools(device).run(world_size, several, "stepped", chosen(device, bodies), deadline=100)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_whose_kernels_share_the_gpu(
    cuda: None, pools: Pools, mps: dict[str, str], world_size: int
) -> None:
    pools("cuda", **mps).run(world_size, several, "in_kernel", BODIES, deadline=100)


def chosen(device: str, bodies: str) -> Any:
    if bodies == "stochastic":
        return STOCHASTIC
    return BODIES if device == "cuda" else SHORT


def test_a_single_rank(device: str, pools: Pools) -> None:
    bodies = [(test_exact.check_all_reduce, ("float32", None)), (test_codec.check_single, ())]
    pools(device).run(1, several, None, bodies)


def check_special_values(comm: Communicator) -> None:
    x = np.array([np.nan, 1, np.inf, -np.inf, 0.0] * 100, np.float32)
    if comm.rank:
        x = np.array([1, np.nan, np.inf, np.inf, -0.0] * 100, np.float32)
    for op in ("sum", "min", "max"):
        got = x.copy()
        comm.all_reduce(got, op)
        got = got.reshape(-1, 5)
        assert np.isnan(got[:, :2]).all(), (op, got)
        assert (np.isnan(got[:, 3]) if op == "sum" else np.isinf(got[:, 3])).all(), (op, got)
        assert (got[:, 2] == np.inf).all(), (op, got)


def test_nan_and_infinity_reach_every_rank(device: str, pools: Pools) -> None:
    pools(device).run(2, places.mirrored, "stepped", check_special_values)
    worlds = pools(device, **places.of_threads(device, 2))
    worlds.run_threads(2, places.mirrored, "in_kernel", check_special_values)


def check_large(comm: Communicator, codecs: tuple[str | None, ...], size: int) -> None:
    """Arrays of many rounds, again and again: what one call leaves in the boxes is the next one's business."""
    for seed in range(3):
        inputs = random_inputs("float32", size, comm.world_size, seed)
        for spec in codecs:
            x = inputs[comm.rank].copy()
            comm.all_reduce(x, codec=spec)
            expected = reference.all_reduce(inputs, "sum", spec, spec)
            assert_same_bits(x, expected, (spec, seed))
        x = inputs[comm.rank].copy()
        comm.broadcast(x, comm.world_size - 1)
        assert_same_bits(x, inputs[-1], "broadcast")
        assert_same_bits(
            comm.all_gather(inputs[comm.rank]).reshape(-1), np.concatenate(inputs), "all_gather"
        )


@pytest.mark.parametrize("how", ["threads", "processes"])
def test_large_arrays(device: str, pools: Pools, how: str) -> None:
    size = 3_000_017 if device == "cuda" else 20_011
    args = (check_large, (None, "bf16", "int8"), size)
    if how == "threads":
        worlds = pools(device, **places.of_threads(device, 2))
        worlds.run_threads(2, places.mirrored, "in_kernel", *args, deadline=100)
    else:
        pools(device).run(2, places.mirrored, "stepped", *args, deadline=100)


def check_back_to_back(comm: Communicator, calls: int) -> list[bytes]:
    """Nobody waits for the GPU between calls; results are the input of the next."""
    with places.own_stream():
        comm.use_device(places.name())
        start = random_inputs("float32", 10_007, comm.world_size, 0)[comm.rank]
        x = start.copy() if places.is_emulated() else places.put(start)
        for number in range(calls):
            comm.all_reduce(x, op="avg", codec=(None, "int8")[number % 2])
        comm.synchronize()
        result = x if places.is_emulated() else places.fetch(x)
    return [result.tobytes()]


def test_calls_queue_up_on_the_stream(device: str, pools: Pools) -> None:
    calls = 200 if device == "cuda" else 6
    worlds = pools(device, **places.of_threads(device, 2))
    first, second = worlds.run_threads(2, check_back_to_back, calls)
    assert first == second
    inputs = random_inputs("float32", 10_007, 2, 0)
    for number in range(calls):
        spec = (None, "int8")[number % 2]
        inputs = [reference.all_reduce(inputs, "avg", spec, spec)] * 2
    assert first == [inputs[0].tobytes()]


QUEUED = threading.Event()  # between the ranks of check_garbage, which are threads


def check_garbage(comm: Communicator) -> None:
    """What an old communicator leaves is freed by a rank that another's kernel waits for."""
    with places.own_stream():
        comm.use_device(places.name())
        old = comm.split(0)
        old.use_device(places.name())
        gc.disable()
        try:
            values = np.full(1000, comm.rank, np.float32)
            x = values if places.is_emulated() else places.put(values)
            old.all_reduce(x)
            old.synchronize()
            old.close()
            del old  # a cycle: only the collector finds it
            comm.barrier()
            if comm.rank == 0:
                assert QUEUED.wait(20)
                gc.collect()
            comm.all_reduce(x)
            QUEUED.set()
            comm.synchronize()
            total = x if places.is_emulated() else places.fetch(x)
            assert (total == 2).all()
        finally:
            gc.enable()


def test_the_garbage_collector_waits_for_no_kernel(device: str, pools: Pools) -> None:
    pools(device, **places.of_threads(device, 2)).run_threads(2, check_garbage)


def check_first_array_chooses(comm: Communicator) -> None:
    """ringcomm.init() and then an array on a GPU: nothing else is needed."""
    import torch

    with places.own_stream():
        x = torch.full((1000,), float(comm.rank + 1), device="cuda")
        assert comm.device is None
        assert comm.all_reduce(x) is x
        assert comm.device == "cuda:0"
        total = comm.world_size * (comm.world_size + 1) / 2
        assert (x == total).all()
        host = torch.full((1000,), 1.0)
        comm.all_reduce(host)  # the CPU's arrays go on as before
        assert (host == comm.world_size).all()


def test_the_first_array_on_a_gpu_sets_a_communicator_up(cuda: None, pools: Pools) -> None:
    pools("cuda").run_threads(
        2, check_first_array_chooses
    )  # in steps, as processes: nothing vouches for streams
    pools("cuda").run(2, check_first_array_chooses)
