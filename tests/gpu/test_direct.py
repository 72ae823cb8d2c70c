"""Arrays on GPUs that all ranks map are used where they are, with the oracle's bits: comm.empty()'s and torch's.

At length on the emulated GPU: tests/simt/test_direct.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator, reference
from tests.comm.oracle import assert_same_bits, random_inputs
from tests.gpu import places
from tests.gpu.conftest import Pools

ALL = {"RINGCOMM_CUDA_DIRECT_KIB": "0"}
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
SIZE = 40_004

Array = Any


def of_the_communicator(comm: Communicator, values: Array) -> Array:
    dtype: Any = str(values.dtype)
    if not places.is_emulated():
        import torch

        dtype = getattr(torch, dtype)
    x = comm.empty(values.shape, dtype, device=places.name())
    refill(x, values)
    return x


def refill(x: Array, values: Array) -> None:
    if places.is_emulated():
        x[:] = values
    else:
        x.copy_(places.tensor_of(values))


def check(comm: Communicator, make: str, mode: str) -> int:
    """How many of four calls were direct."""
    with places.own_stream():
        comm.use_device(places.name())
        assert comm.device_mode == mode
        n, rank = comm.world_size, comm.rank
        before = comm.direct_calls
        for dtype in ("float32", "float16"):
            inputs = random_inputs(dtype, SIZE, n, 1)
            if make == "empty":
                x = of_the_communicator(comm, inputs[rank])
                whole = of_the_communicator(comm, np.zeros(SIZE * n, inputs[0].dtype))
            else:
                x = places.tensor_of(inputs[rank])
                whole = places.tensor_of(np.zeros(SIZE * n, inputs[0].dtype))
            comm.all_gather(x, whole)
            comm.all_reduce(x, algo="direct")
            comm.synchronize()
            total, together = (
                one.copy() if places.is_emulated() else places.fetch(one) for one in (x, whole)
            )
            assert_same_bits(total, reference.all_reduce(inputs, "sum"), dtype)
            assert_same_bits(together, np.concatenate(inputs), dtype)
        return comm.direct_calls - before


def test_arrays_of_the_communicator(device: str, pools: Pools) -> None:
    threads = pools(device, **ALL, **places.of_threads(device, 2))
    assert threads.run_threads(2, check, "empty", "in_kernel") == [4, 4]
    assert pools(device, **ALL).run(2, check, "empty", "stepped") == [4, 4]


def why_nothing_is_shared(comm: Communicator) -> str:
    """Why CUDA gives no other process a handle of torch's memory, or ""."""
    import torch

    try:
        torch.zeros(SIZE, device="cuda").untyped_storage()._share_cuda_()
    except RuntimeError as error:
        return str(error).strip().partition("\n")[0] or "no reason"
    return ""


def test_torchs_arrays(cuda: None, pools: Pools) -> None:
    threads = pools("cuda", **ALL, **places.IN_KERNEL)
    assert threads.run_threads(2, check, "torch", "in_kernel") == [4, 4]
    processes = pools("cuda", **ALL)
    found = processes.run(2, check, "torch", "stepped")
    assert found[0] == found[1]
    if reason := "".join(processes.run(1, why_nothing_is_shared)):
        pytest.skip(f"processes cannot map each other's memory of torch here: {reason}")
    assert found == [4, 4]


def test_torchs_arrays_in_expandable_segments(cuda: None, pools: Pools) -> None:
    """Whether they can be mapped or not: all ranks see the same."""
    processes = pools("cuda", **ALL, **EXPANDABLE)
    first, second = processes.run(2, check, "torch", "stepped")
    assert first == second
    assert processes.run(2, check, "empty", "stepped") == [4, 4]


def check_memory_that_comes_and_goes(comm: Communicator) -> None:
    import torch

    with places.own_stream():
        comm.use_device(places.name())
        for turn in range(20):
            inputs = random_inputs(
                "float32", 1_000_000 + 500_000 * (turn % 3), comm.world_size, turn
            )
            x = places.tensor_of(inputs[comm.rank])
            comm.all_reduce(x)
            assert_same_bits(places.fetch(x), reference.all_reduce(inputs, "sum"), turn)
            del x
            if turn % 2 == comm.rank or turn % 3 == 0:
                torch.cuda.empty_cache()


def test_freed_memory_is_never_used(cuda: None, pools: Pools) -> None:
    pools("cuda", **ALL).run(2, check_memory_that_comes_and_goes, deadline=100)


def check_graph(comm: Communicator) -> tuple[int, int]:
    """Direct calls among two that were captured: of an array that is registered, and of one that is not."""
    import torch

    with places.own_stream():
        comm.use_device(places.name())
        known, unknown = (
            torch.zeros(SIZE, device="cuda"),
            torch.zeros(8 * 1024 * 1024, device="cuda"),
        )
        comm.all_reduce(known, algo="direct")
        comm.synchronize()
        counts = []
        with places.captured() as graph:
            for x in (known, unknown):
                before = comm.direct_calls
                comm.all_reduce(x, algo="direct")
                counts.append(comm.direct_calls - before)
        for seed in range(5):
            inputs = random_inputs("float32", SIZE, comm.world_size, seed)
            refill(known, inputs[comm.rank])
            unknown.fill_(comm.rank + seed)
            graph.replay()
            assert_same_bits(places.fetch(known), reference.all_reduce(inputs, "sum"), seed)
            assert (unknown == sum(range(comm.world_size)) + seed * comm.world_size).all()
        comm.synchronize()
        return counts[0], counts[1]


def test_a_graph_of_direct_collectives_is_replayed(cuda: None, pools: Pools) -> None:
    """An array that is not registered cannot be during a capture, and goes through the slab."""
    assert pools("cuda", **ALL, **places.IN_KERNEL).run_threads(2, check_graph) == [(1, 0)] * 2
