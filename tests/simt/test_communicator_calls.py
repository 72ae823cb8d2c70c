"""Communicators on arrays of emulated GPUs: calls that are queued, what they tell of themselves, and their set-up."""

import gc
import threading
from collections import deque
from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator, _core, reference
from ringcomm.errors import MismatchError, UsageError
from ringcomm.store import TCPStore
from tests.comm.oracle import assert_same_bits, random_inputs
from tests.simt import emulated
from tests.simt.communicators import MODES, SLAB, Pools, check_small
from tests.worlds import Worlds, environment

runtime: Any = getattr(_core, "simt", None)  # in the processes that these tests start


def check_async(comm: Communicator, mode: str) -> None:
    """Works of many calls, waited for out of order, between synchronous ones; and messages beside them."""
    comm.use_device("simt")
    n, rank = comm.world_size, comm.rank
    calls = []
    for seed in range(8):
        inputs = random_inputs("float32", 1000 * seed + 1, n, seed)
        x, y = inputs[rank].copy(), inputs[rank].copy()
        calls.append((comm.all_reduce(x, async_op=True), reference.all_reduce(inputs, "sum")))
        comm.all_reduce(y, "max")
        calls.append((comm.all_gather(inputs[rank], async_op=True), np.stack(inputs)))
    view = np.zeros((8, 6), np.float32)[:, ::2]
    calls.append((comm.all_reduce(view, async_op=True), np.zeros((8, 3), np.float32)))
    received = np.empty(9000, np.float64)
    message = comm.recv(received, (rank - 1) % n, async_op=True)
    comm.send(np.full(9000, float(rank)), (rank + 1) % n)
    assert message.wait() == (rank - 1) % n
    assert (received == (rank - 1) % n).all()
    for work, expected in reversed(calls):
        result = work.wait()
        comm.synchronize()
        assert work.done()
        assert_same_bits(result, expected, mode)


@pytest.mark.parametrize("mode", MODES)
def test_asynchronous_calls(pools: Pools, mode: str) -> None:
    pools(mode).run(2, check_async, mode)


def check_queued(comm: Communicator, port: int) -> tuple[bool, bool]:
    """A call returns before its peer has come, and so does wait()."""
    comm.use_device("simt")
    store = TCPStore(port=port, is_server=False)
    x = np.ones(50_000, np.float32)
    if comm.rank == 1:
        store.get("queued")
        comm.all_reduce(x)
        comm.synchronize()
        return True, (x == 2).all()
    work = comm.all_reduce(x, async_op=True)
    work.wait()
    done = work.done()
    store.set("queued", b"")
    comm.synchronize()
    assert work.done()
    return done, (x == 2).all()


def test_in_kernel_calls_return_when_they_are_queued(pools: Pools) -> None:
    store = TCPStore(is_server=True, timeout=20)
    outcomes = pools("in_kernel").run(2, check_queued, store.port)
    store.close()
    assert outcomes == [(False, True), (True, True)]


def check_owned(comm: Communicator) -> list[tuple[int, int]]:
    host = comm.owned(100_000)
    comm.use_device("simt")
    assert comm.owned(100_000, on_device=False) == host
    x = np.ones(100_000, np.float32)
    kept = np.full(100_000, 7, np.float32)
    comm.all_reduce(x, codec="int4/4", owner_residual=kept)
    comm.synchronize()
    owned = comm.owned(100_000)
    mask = np.ones(100_000, bool)
    for begin, end in owned:
        mask[begin:end] = False
    assert (kept[mask] == 7).all()
    assert (kept[~mask] != 7).all()
    return owned


@pytest.mark.parametrize("mode", MODES)
def test_owned_says_where_owner_residuals_change(pools: Pools, mode: str) -> None:
    first, second = pools(mode).run(2, check_owned)
    assert sorted(first + second)[0][0] == 0
    assert sum(end - begin for begin, end in first + second) == 100_000


def check_about(comm: Communicator) -> tuple[list[str], dict[str, Any], list[dict[str, Any]]]:
    with pytest.raises(UsageError, match="has not been set up"):
        comm.explain(4000, on_device=True)
    comm.use_device("simt")
    comm.use_device("simt")
    with pytest.raises(UsageError, match="empty"):
        comm.empty(10)
    with pytest.raises(UsageError, match="algo='staged' does not do all_reduce|algo must be"):
        comm.all_reduce(np.ones(4), algo="staged")
    for _ in range(3):
        comm.all_reduce(np.ones(1000, np.float32), tag="step")
    comm.synchronize()
    plans = [
        str(comm.explain(size, op))
        for size in (4000, 1 << 24)
        for op in ("all_reduce", "all_gather")
    ]
    return plans, comm.stats()["all_reduce"], comm.flight_recorder()[-3:]


def test_plans_statistics_and_the_recorder_tell_of_gpus(pools: Pools) -> None:
    for mode in MODES:
        for plans, stats, calls in pools(mode).run(2, check_about):
            assert all("on GPUs" in plan for plan in plans), plans
            assert stats["calls"] == 3
            assert stats["bytes"] == 12_000
            assert stats["bytes_sent"] == 12_000
            assert [call["state"] for call in calls] == ["completed"] * 3
            assert {call["tag"] for call in calls} == {"step"}
        assert ("one_shot" in plans[0]) == (mode != "stepped")


def make_split(comm: Communicator) -> str:
    comm.use_device("simt")
    child = comm.split(comm.rank % 2)
    assert child is not None
    with child:
        x = np.full(5000, comm.rank, np.float32)
        child.all_reduce(x)
        child.synchronize()
        assert (x == comm.rank % 2 * 2 + 2).all()
        return str(child.device)


def test_sub_groups_have_gpus_of_their_own(pools: Pools) -> None:
    assert pools("in_kernel").run(4, make_split) == ["simt"] * 4


# ---- set-up --------------------------------------------------------------------------------------


def set_up_differently(comm: Communicator, variable: str, values: tuple[str, str]) -> str:
    with environment(**{variable: values[comm.rank]}), pytest.raises(UsageError) as caught:
        comm.use_device("simt")
    x = np.ones(4)
    comm.all_reduce(x)  # on the CPU
    assert (x == 2).all()
    comm.use_device("simt")
    return str(caught.value)


@pytest.mark.parametrize(
    ("mode", "variable", "values", "piece"),
    [
        (
            "in_kernel",
            "RINGCOMM_CUDA_MODE",
            ("stepped", "auto"),
            "is stepped on rank 0 and auto on rank 1",
        ),
        ("in_kernel", "RINGCOMM_CUDA_SLAB_MIB", ("1", "2"), "is 1 on rank 0 and 2 on rank 1"),
        (
            "host",
            "RINGCOMM_CUDA_MODE",
            ("in_kernel", "in_kernel"),
            "cannot be: the GPU of rank 0 does not reach",
        ),
    ],
)
def test_ranks_that_want_different_things_are_told_so(
    pools: Pools, mode: str, variable: str, values: tuple[str, str], piece: str
) -> None:
    texts = pools(mode).run(2, set_up_differently, variable, values)
    assert texts[0] == texts[1]
    assert piece in texts[0]


def choose_mode(comm: Communicator, mode: str) -> str:
    with environment(RINGCOMM_CUDA_MODE=mode):
        return check_small(comm)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_can_be_forced(pools: Pools, mode: str) -> None:
    assert pools("in_kernel").run(2, choose_mode, mode) == [mode] * 2


def count_events(comm: Communicator) -> int:
    """Events that are made by many asynchronous calls, at most three of which are held at a time."""
    comm.use_device("simt")
    works: deque[Any] = deque(maxlen=3)

    def call() -> None:
        works.append(comm.all_reduce(np.ones(10, np.float32), async_op=True))
        works[-1].wait()
        comm.synchronize()

    for _ in range(10):
        call()
    before = int(runtime.num_events_made())
    for _ in range(20):
        call()
    return int(runtime.num_events_made()) - before


def test_asynchronous_calls_use_their_events_again(pools: Pools) -> None:
    assert pools("in_kernel").run(2, count_events) == [0, 0]


def use_own_device_only(comm: Communicator, mode: str) -> tuple[list[int], int]:
    """A communicator's life, with calls in a thread of their own, as a garbage collector's or torch's are."""
    problems: list[BaseException] = []

    def live() -> None:
        try:
            comm.use_device("simt")
            assert comm.device_mode == mode
            x = np.ones(3000, np.float32)
            comm.all_reduce(x)
            comm.all_reduce(x, async_op=True).wait()
            comm.all_gather(x)
            work = comm.recv(np.empty(10), 1 - comm.rank, async_op=True)
            comm.send(np.ones(10), 1 - comm.rank)
            work.wait()
            comm.synchronize()
            assert runtime.current_device() == 0
        except BaseException as problem:
            problems.append(problem)

    for body in (live, comm.close):
        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
    for problem in problems:
        raise problem
    gc.collect()
    return runtime.devices_with_context(), runtime.current_device()


@pytest.mark.parametrize("mode", ["in_kernel", "host"])
def test_a_communicator_uses_no_other_gpu_and_leaves_the_current_one(mode: str) -> None:
    emulated.require()
    with Worlds(package=emulated.PACKAGE, **MODES[mode], **SLAB) as worlds:  # that used none before
        assert worlds.run(2, use_own_device_only, mode) == [([0], 0), ([1], 0)]


def check_lists_in_a_row(comm: Communicator) -> None:
    """Packed calls share one buffer, on streams of the caller's and of the communicator's."""
    comm.use_device("simt")
    n, rank = comm.world_size, comm.rank
    calls = []
    for seed in range(6):
        inputs = [random_inputs("float32", count, n, 10 * seed + count) for count in (3000, 7, 500)]
        arrays = [of_ranks[rank].copy() for of_ranks in inputs]
        comm.all_reduce_coalesced(arrays, async_op=seed % 2 == 0)
        calls.append((arrays, inputs))
    comm.synchronize()
    for seed, (arrays, inputs) in enumerate(calls):
        for array, of_ranks in zip(arrays, inputs, strict=True):
            assert_same_bits(array, reference.all_reduce(of_ranks, "sum"), (seed, array.size))


@pytest.mark.parametrize("mode", MODES)
def test_lists_in_a_row_take_turns_with_their_buffer(pools: Pools, mode: str) -> None:
    pools(mode).run(2, check_lists_in_a_row)


def check_different_lists(comm: Communicator) -> str:
    """As on CPUs, whatever is packed: here, or in the next call."""
    comm.use_device("simt")
    x = [np.ones(count + comm.rank, np.float32) for count in (5, 9 - 2 * comm.rank)]

    def call() -> None:
        comm.all_reduce_coalesced(x)
        comm.synchronize()
        comm.barrier()

    with pytest.raises(MismatchError, match="called different operations") as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("mode", MODES)
def test_lists_that_differ_are_a_mismatch(pools: Pools, mode: str) -> None:
    first, second = pools(mode).run(2, check_different_lists)
    assert first == second
    assert first.count("of a list of 2 arrays, sizes #") == 2
