"""Collectives in CUDA graphs: captured once, replayed with new values."""

from __future__ import annotations

import numpy as np
import pytest

from ringcomm import Communicator, reference
from tests.comm.oracle import assert_same_bits, random_inputs
from tests.gpu import places
from tests.gpu.conftest import Pools

REPLAYS = 20


def check_replays(comm: Communicator, spec: str | None, size: int) -> None:
    import torch

    with places.own_stream():
        comm.use_device(places.name())
        x = torch.zeros(size, device="cuda")
        comm.all_reduce(x, codec=spec)  # set up outside of the capture
        comm.synchronize()
        with places.captured() as graph:
            comm.all_reduce(x, codec=spec)
            comm.all_reduce(x, op="avg", codec=spec)
        for seed in range(REPLAYS):
            inputs = random_inputs("float32", size, comm.world_size, seed)
            x.copy_(torch.from_numpy(inputs[comm.rank]))
            graph.replay()
            if seed % 3 == 0:  # calls outside of the graph take their turns
                comm.all_reduce(torch.ones(5, device="cuda"))
            total = reference.all_reduce(inputs, "sum", spec, spec)
            total = reference.all_reduce([total] * comm.world_size, "avg", spec, spec)
            assert_same_bits(places.fetch(x), np.asarray(total), (spec, size, seed))
        comm.synchronize()


def check_replayed_lists(comm: Communicator) -> None:
    """Nothing is allocated while a graph is captured: packed arrays have their buffer already."""
    import torch

    counts = (3, 700, 5, 1, 40_000)
    with places.own_stream():
        comm.use_device(places.name())
        memory = torch.zeros(sum(counts) + 1, device="cuda")
        arrays = list(memory[1:].split(counts))  # not where 16 bytes are one access
        with places.captured() as graph:
            comm.all_reduce_coalesced(arrays)
        for seed in range(REPLAYS):
            inputs = [random_inputs("float32", count, comm.world_size, seed) for count in counts]
            for array, of_ranks in zip(arrays, inputs, strict=True):
                array.copy_(torch.from_numpy(of_ranks[comm.rank]))
            graph.replay()
            if seed % 3 == 0:
                comm.all_reduce_coalesced([torch.ones(5, device="cuda") for _ in range(3)])
            for array, of_ranks in zip(arrays, inputs, strict=True):
                total = reference.all_reduce(of_ranks, "sum")
                assert_same_bits(places.fetch(array), np.asarray(total), (seed, array.numel()))
        comm.synchronize()


def test_a_graph_of_a_list_is_replayed(cuda: None, pools: Pools) -> None:
    pools("cuda", **places.IN_KERNEL).run_threads(2, check_replayed_lists)


@pytest.mark.parametrize("size", [100, 100_003])
@pytest.mark.parametrize("spec", [None, "int8"])
def test_a_graph_of_collectives_is_replayed(
    cuda: None, pools: Pools, spec: str | None, size: int
) -> None:
    pools("cuda", **places.IN_KERNEL).run_threads(2, check_replays, spec, size)
