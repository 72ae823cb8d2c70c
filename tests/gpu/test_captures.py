"""What one thread does with its communicator spoils no graph that another one captures, in CUDA's strictest mode."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from ringcomm import Communicator
from ringcomm.errors import UsageError
from tests.gpu import places
from tests.gpu.conftest import Pools

CAPTURED = threading.Event()  # between the ranks of set_up_and_call, which are threads


def set_up_and_call(comm: Communicator) -> None:
    """All that a communicator allocates, maps, queries, waits for and frees, while rank 0's stream is captured."""
    import torch

    problems: list[BaseException] = []

    def live(stream: torch.cuda.Stream, y: torch.Tensor) -> None:
        try:
            with torch.cuda.stream(stream):
                comm.use_device(places.name())
                comm.all_reduce(y)
                comm.all_reduce(y, async_op=True).wait()
                comm.synchronize()
                comm.close()
        except BaseException as problem:
            problems.append(problem)

    def beside() -> None:
        comm.barrier()
        thread = threading.Thread(target=live, args=arguments)
        thread.start()
        thread.join()

    with places.own_stream():
        x, y = torch.zeros(100, device="cuda"), torch.ones(100, device="cuda")
        arguments = (torch.cuda.Stream(), y)
        torch.cuda.synchronize()
        CAPTURED.clear()
        comm.barrier()  # from here on, only the capture and the communicators use the GPU
        if comm.rank == 0:
            try:
                with places.captured("global") as graph:
                    x.add_(1)
                    beside()
                    x.add_(1)
            finally:
                CAPTURED.set()
            graph.replay()
            assert (places.fetch(x) == 2).all()
        else:
            beside()
            assert CAPTURED.wait(40)
        for problem in problems:
            raise problem
        assert (places.fetch(y) == comm.world_size**2).all()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_communicator_s_life_beside_a_capture(cuda: None, pools: Pools, world_size: int) -> None:
    pools("cuda", **places.IN_KERNEL).run_threads(world_size, set_up_and_call)


def capture_in_steps(comm: Communicator) -> None:
    """Refused before anything is queued: the capture goes on."""
    import torch

    with places.own_stream():
        comm.use_device(places.name())
        x = torch.ones(100, device="cuda")
        with places.captured() as graph:
            x.add_(1)
            for call in (comm.all_reduce, comm.broadcast):
                with pytest.raises(UsageError, match="cannot be captured .* mode is stepped"):
                    call(x)
            with pytest.raises(UsageError, match="a message .* cannot be captured"):
                comm.send(x, 1 - comm.rank)
        graph.replay()
        comm.all_reduce(x)
        comm.synchronize()
        assert (places.fetch(x) == np.float32(4)).all()


def test_stepped_calls_are_refused_in_a_capture(cuda: None, pools: Pools) -> None:
    pools("cuda", RINGCOMM_CUDA_MODE="stepped").run_threads(2, capture_in_steps)
