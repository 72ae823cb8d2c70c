"""What one thread does with its communicator spoils no graph that another one captures, in CUDA's strictest mode."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from ringcomm import Communicator
from ringcomm.errors import UsageError
from tests.gpu import places
from tests.gpu.conftest import Pools


def set_up_and_call(comm: Communicator) -> None:
    """All that a communicator allocates, queries, waits for and frees, while this thread's stream is captured."""
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

    with places.own_stream():
        x, y = torch.zeros(100, device="cuda"), torch.ones(100, device="cuda")
        arguments = (torch.cuda.Stream(), y)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="global")
        x.add_(1)
        thread = threading.Thread(target=live, args=arguments)
        thread.start()
        thread.join()
        x.add_(1)
        graph.capture_end()
        for problem in problems:
            raise problem
        graph.replay()
        assert (places.fetch(x) == 2).all()
    assert (y.cpu().numpy() == 1).all()


def test_a_communicator_s_life_beside_a_capture(cuda: None, pools: Pools) -> None:
    pools("cuda").run(1, set_up_and_call)


def capture_in_steps(comm: Communicator) -> None:
    """Refused before anything is queued: the capture goes on."""
    import torch

    with places.own_stream():
        comm.use_device(places.name())
        x = torch.ones(100, device="cuda")
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        x.add_(1)
        for call in (comm.all_reduce, comm.broadcast):
            with pytest.raises(UsageError, match="cannot be captured .* mode is stepped"):
                call(x)
        with pytest.raises(UsageError, match="a message .* cannot be captured"):
            comm.send(x, 1 - comm.rank)
        graph.capture_end()
        graph.replay()
        comm.all_reduce(x)
        comm.synchronize()
        assert (places.fetch(x) == np.float32(4)).all()


def test_stepped_calls_are_refused_in_a_capture(cuda: None, pools: Pools) -> None:
    pools("cuda", RINGCOMM_CUDA_MODE="stepped").run_threads(2, capture_in_steps)
