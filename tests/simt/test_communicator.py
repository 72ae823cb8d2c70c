"""Communicators on arrays of emulated GPUs: the CPU's bits in every mode."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator, reference
from tests.comm import test_coalesced, test_codec, test_exact, test_exchange
from tests.comm.oracle import assert_same_bits, expected_all_reduce, random_inputs
from tests.dtypes import NUMPY
from tests.simt import emulated
from tests.simt.communicators import MODES, SLAB, Pools, check_small
from tests.worlds import Worlds


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
COLLECTIVES += ("gather", "scatter", "all_to_all", "all_reduce_coalesced")


def settled(comm: Communicator, mode: str, body: Callable[..., Any], *args: Any) -> Any:
    comm.use_device("simt")
    assert comm.device_mode == mode
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
    (test_exchange.check_even, ("float32",)),
    (test_exchange.check_uneven, (0,)),
    *((test_coalesced.check_ops, (dtype,)) for dtype in ("float32", "bfloat16", "bool", "int8")),
    (test_coalesced.check_ops, ("complex128",)),
    (test_coalesced.check_mixture, ()),
    (test_coalesced.check_views, ()),
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


def check_large(comm: Communicator) -> None:
    """Arrays of several rounds, in and out of place, with what the small ones leave in the boxes."""
    n, rank = comm.world_size, comm.rank
    for seed, (dtype, size) in enumerate((("float32", 400_007), ("uint8", 1_000_003))):
        inputs = random_inputs(dtype, size, n, seed)
        for algo in (None, "ring"):
            x = inputs[rank].copy()
            comm.all_reduce(x, algo=algo)
            assert_same_bits(x, expected_all_reduce(inputs, "sum", algo), (dtype, algo))
        for root in (0, n - 1):
            x = inputs[rank].copy()
            comm.broadcast(x, root)
            assert_same_bits(x, inputs[root], ("broadcast", root))
        whole = np.empty((n, size), NUMPY[dtype])
        whole[rank] = inputs[rank]
        comm.all_gather(whole[rank], whole)
        assert_same_bits(whole, np.stack(inputs), "all_gather in place")
        parts = [whole[r, : size // n * n].reshape(n, -1) for r in range(n)]
        expected = reference.reduce_scatter([part.reshape(-1) for part in parts], "max")[rank]
        own = whole[rank, rank * (size // n) : (rank + 1) * (size // n)]
        comm.reduce_scatter(whole[rank, : size // n * n], "max", own)
        assert_same_bits(own, expected, "reduce_scatter in place")
    residuals = random_inputs("float32", 300_007, n, 7)
    inputs = random_inputs("float32", 300_007, n, 8)
    mine, x = residuals[rank].copy(), inputs[rank].copy()
    comm.all_reduce(x, codec="int4", residual=mine)
    assert_same_bits(x, reference.all_reduce(inputs, "sum", "int4", "int8", residuals), "int4")
    assert_same_bits(mine, residuals[rank], "residual")


@pytest.mark.parametrize(
    ("mode", "world_size"), [("in_kernel", 2), ("in_kernel", 3), ("stepped", 4), ("host", 2)]
)
def test_arrays_larger_than_the_slab(pools: Pools, mode: str, world_size: int) -> None:
    pools(mode).run(world_size, settled, mode, check_large)


def check_rings(comm: Communicator) -> list[bytes]:
    """On the CPU, then on GPUs: the same bits, and as many bytes handed on."""
    n, rank = comm.world_size, comm.rank
    made = [
        random_inputs(dtype, size, n, size)
        for dtype in ("float32", "bfloat16", "float16")
        for size in (3, 1021, 20_011, n * 32 * 900)
        if dtype in NUMPY
    ]
    results: list[list[bytes]] = []
    for device in (None, "simt"):
        if device is not None:
            comm.use_device(device)
        results.append([])
        for inputs in made:
            x = inputs[rank].copy()
            comm.reset_stats()
            comm.all_reduce(x, algo="ring")
            if device is not None:
                comm.synchronize()
            what = (device, x.dtype, x.size)
            assert_same_bits(x, reference.all_reduce_ring(inputs, "sum"), what)
            if x.size % (n * 32) == 0:  # chunks of one length
                partial = x.size * 4
                sent = comm.stats()["all_reduce"]["bytes_sent"]
                assert sent == (n - 1) * (partial + x.nbytes) // n, what
            results[-1].append(x.tobytes())
    assert results[0] == results[1]
    return results[0]


@pytest.mark.parametrize(
    ("mode", "world_size"), [("in_kernel", 2), ("in_kernel", 3), ("in_kernel", 4), ("stepped", 3)]
)
def test_rings_of_cpus_and_gpus_have_the_same_bits(
    pools: Pools, mode: str, world_size: int
) -> None:
    """With one segment and with many, which the size of the staging buffers decides."""
    runs = [pools(mode).run(world_size, check_rings, staging_kib=kib) for kib in (16, 2048)]
    assert all(bits == runs[0][0] for run in runs for bits in run)


def test_ranks_may_be_threads_of_one_process_on_one_gpu(pools: Pools) -> None:
    assert pools("stepped").run_threads(2, check_small) == ["stepped"] * 2


def test_ranks_may_be_threads_of_one_process_on_gpus_of_their_own(pools: Pools) -> None:
    assert pools("in_kernel").run_threads(2, check_small) == ["in_kernel"] * 2


def test_processes_that_share_a_gpu_concurrently_wait_inside_kernels() -> None:
    emulated.require()
    shared = {**SLAB, "RINGCOMM_SIMT_CONCURRENT": "1"}
    with Worlds(package=emulated.PACKAGE, **shared) as worlds:
        assert worlds.run(2, check_small) == ["in_kernel"] * 2


def test_memory_without_descriptors_is_shared_too() -> None:
    emulated.require()
    legacy = {**MODES["in_kernel"], **SLAB, "RINGCOMM_SIMT_EXPORT": "legacy"}
    with Worlds(package=emulated.PACKAGE, **legacy) as worlds:
        assert worlds.run(2, check_small) == ["in_kernel"] * 2


def check_alone(comm: Communicator) -> None:
    comm.use_device("simt")
    x, out = np.arange(6, dtype=np.float32), np.empty((1, 6), np.float32)
    comm.all_reduce(x, codec="int4")
    comm.all_gather(x, out)
    comm.reduce_scatter(x.reshape(1, 6), "premul_sum", x2 := np.empty((1, 6), np.float32), factor=3)
    work = comm.all_to_all(x.reshape(1, 6), x3 := np.empty((1, 6), np.float32), async_op=True)
    assert work.wait() is x3
    comm.synchronize()
    for got, factor in ((x, 1), (out, 1), (x2, 3), (x3, 1)):
        assert_same_bits(
            got.reshape(-1), np.arange(6, dtype=np.float32) * np.float32(factor), factor
        )


def test_a_single_rank_copies_on_its_stream(pools: Pools) -> None:
    pools("in_kernel").run(1, check_alone)
