"""Graphs of emulated GPUs: what is captured runs when it is launched, and what may not be captured says so."""

from functools import partial

import numpy as np
import pytest

from ringcomm import Communicator, reference
from ringcomm.errors import DeviceError, UsageError
from tests.comm.oracle import assert_same_bits, random_inputs
from tests.simt.communicators import MODES, Pools
from tests.simt.test_runtime import Desk, gpus, inside, new_stream, runtime, seen_by_the_gpu
from tests.worlds import Worlds

__all__ = ["gpus"]  # a fixture


# ---- the runtime ---------------------------------------------------------------------------------


def capture_and_launch() -> None:
    """What is captured runs when the graph is launched, on streams that joined as well."""
    desk = Desk()
    copy = np.zeros_like(desk.values)
    first, second = new_stream(), new_stream()
    fork, join = runtime.Event(0), runtime.Event(0)
    runtime.begin_capture(first)
    desk.launch(first)
    fork.record(first)
    fork.hold_back(second)
    assert runtime.is_capturing(second)
    runtime.copy_async(copy.ctypes.data, desk.values.ctypes.data, copy.nbytes, second)
    join.record(second)
    join.hold_back(first)
    graph = runtime.end_capture(first)
    assert not runtime.is_capturing(first) and not runtime.is_capturing(second)
    desk.word[0] = 1
    seen_by_the_gpu()
    assert desk.state() == "waits"
    graph.launch()
    runtime.synchronize(first)
    assert desk.state() == "came"
    assert (copy == 1).all()


def test_a_captured_graph_runs_when_it_is_launched(gpus: Worlds) -> None:
    inside(gpus, capture_and_launch)


def spoil(what: str) -> None:
    stream, other = new_stream(), new_stream()
    event = runtime.Event(0)
    event.record(other)
    runtime.begin_capture(stream)
    captured = runtime.Event(0)
    captured.record(stream)
    calls = {
        "synchronize": lambda: runtime.synchronize(stream),
        "wait outside": lambda: event.hold_back(stream),
        "query": captured.passed,
    }
    with pytest.raises(DeviceError, match="a capture does not permit"):
        calls[what]()
    with pytest.raises(DeviceError, match="the capture is no good"):
        runtime.end_capture(stream)


@pytest.mark.parametrize("what", ["synchronize", "wait outside", "query"])
def test_what_a_capture_does_not_permit_spoils_it(gpus: Worlds, what: str) -> None:
    inside(gpus, spoil, what)


# ---- communicators -------------------------------------------------------------------------------


def capture_calls(comm: Communicator, mode: str) -> None:
    """A graph of calls, launched after others; or an error that leaves capture and communicator as they were."""
    comm.use_device("simt")
    inputs = random_inputs("float32", 3000, comm.world_size, 1)
    x, y, parts = inputs[comm.rank].copy(), inputs[comm.rank].copy(), np.empty((2, 3000), "float32")
    comm.all_reduce(np.ones(10))
    comm.synchronize()
    with runtime.DeviceGuard(comm.rank if mode != "stepped" else 0):
        runtime.begin_capture(0)
        if mode == "in_kernel":
            comm.all_reduce(x)
            comm.all_reduce(y, codec="int8", async_op=True).wait()
            comm.all_gather(inputs[comm.rank], parts)
        else:
            for call in (comm.all_reduce, partial(comm.all_reduce, codec="int8"), comm.broadcast):
                for options in ({}, {"async_op": True}):
                    with pytest.raises(UsageError, match=f"cannot be captured .* mode is {mode} "):
                        call(x, **options)
        with pytest.raises(UsageError, match="a message .* cannot be captured"):
            comm.send(x, 1 - comm.rank)
        comm.synchronize()
        graph = runtime.end_capture(0)
        for seed in range(3):
            own = random_inputs("float32", 100, comm.world_size, seed)
            z = own[comm.rank].copy()
            comm.all_reduce(z)
            comm.synchronize()
            assert_same_bits(z, reference.all_reduce(own, "sum"), seed)
        if mode != "in_kernel":
            return
        assert_same_bits(x, inputs[comm.rank], "not launched yet")
        graph.launch()
        runtime.synchronize(0)
    assert_same_bits(x, reference.all_reduce(inputs, "sum"), "all_reduce")
    assert_same_bits(y, reference.all_reduce(inputs, "sum", "int8", "int8"), "int8")
    assert_same_bits(parts, np.stack(inputs), "all_gather")


@pytest.mark.parametrize("mode", MODES)
def test_calls_are_captured_into_a_graph_or_say_why_not(pools: Pools, mode: str) -> None:
    pools(mode).run(2, capture_calls, mode)
