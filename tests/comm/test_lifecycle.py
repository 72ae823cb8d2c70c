"""Communicators over time: wrap-around, several at once, closing, forking, descriptors."""

import gc
import os
import pickle
import signal

import numpy as np
import pytest

import ringcomm
from ringcomm import Communicator
from ringcomm.errors import AbortedError, UsageError
from ringcomm.store import TCPStore
from tests.comm.oracle import assert_same_bits, expected_all_reduce, random_inputs
from tests.worlds import Worlds, open_descriptors


def many_mixed_calls(comm: Communicator) -> None:
    for call in range(40):
        algo = (None, "one_shot", "two_shot", "ring")[call % 4]
        inputs = random_inputs("float32", 3001, comm.world_size, call)
        x = inputs[comm.rank].copy()
        comm.all_reduce(x, algo=algo)
        assert_same_bits(x, expected_all_reduce(inputs, "sum", algo), call)
        y = np.full((1, 20_000)[call % 2], comm.rank)
        comm.broadcast(y, call % comm.world_size)
        assert (y == call % comm.world_size).all()
        got = comm.all_gather(np.full(5000, comm.rank, np.int64))
        assert (got == np.arange(comm.world_size)[:, None]).all()
        assert (
            comm.reduce_scatter(np.ones((comm.world_size, 3000), np.float32)) == comm.world_size
        ).all()
        z = np.ones(3001, np.float32)
        comm.all_reduce(z, codec="int8")
        comm.barrier()


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("first_seq", [2**32 - 7, 2**32 - 500, 2**31 - 7, 2**32 - 1])
def test_counters_may_wrap_around(worlds: Worlds, world_size: int, first_seq: int) -> None:
    worlds.run(world_size, many_mixed_calls, first_seq=first_seq, staging_kib=16)


def two_at_once(comm: Communicator, port: int) -> None:
    store = TCPStore(port=port, is_server=False)
    with (
        ringcomm.init(comm.rank, comm.world_size, store=store, timeout=20, name="second") as second,
        ringcomm.init(comm.rank, comm.world_size, store=store, timeout=20, name="third") as third,
    ):
        a, b, c = (np.full(5000, comm.rank + k, np.float32) for k in (0, 1, 2))
        # Pending at the same time, and waited for in another order than they were made.
        works = [comm.all_reduce(a, async_op=True), second.all_reduce(b, async_op=True)]
        third.all_reduce(c)
        works[1].wait()
        works[0].wait()
        base = sum(range(comm.world_size))
        for k, x in enumerate((a, b, c)):
            assert (x == base + k * comm.world_size).all()
    d = np.ones(10)
    comm.all_reduce(d)  # the first one does not mind
    assert (d == comm.world_size).all()


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_communicators_at_once(worlds: Worlds, world_size: int) -> None:
    store = TCPStore(is_server=True)
    try:
        worlds.run(world_size, two_at_once, store.port)
    finally:
        store.close()


def create_and_close(rank: int, world_size: int, port: int) -> tuple[int, int]:
    store = TCPStore(port=port, is_server=False)
    counts = []
    for _ in range(21):
        with ringcomm.init(rank, world_size, store=store, timeout=20) as comm:
            comm.all_reduce(np.ones(100_000, np.float32), async_op=True)
            comm.barrier()
        counts.append((open_descriptors(), len(os.listdir("/proc/self/task"))))
    assert counts[1:] == counts[:1] * 20, counts
    return counts[-1]


@pytest.mark.parametrize("world_size", [1, 3])
def test_twenty_communicators_leave_no_descriptor_and_no_thread(
    worlds: Worlds, world_size: int, deadline: float
) -> None:
    import time

    store = TCPStore(is_server=True)
    ranks = [worlds.take() for _ in range(world_size)]
    for rank, process in enumerate(ranks):
        process.start(create_and_close, rank, world_size, store.port)
    until = time.monotonic() + deadline
    outcomes = [process.outcome(until) for process in ranks]
    for process in ranks:
        worlds.give_back(process, True)
    store.close()
    assert [o.kind for o in outcomes] == ["value"] * world_size, outcomes


def check_closed(comm: Communicator) -> None:
    comm.barrier()
    comm.close()
    comm.close()
    x = np.ones(3, np.float32)
    for call in (
        lambda: comm.all_reduce(x),
        lambda: comm.all_reduce(x, async_op=True),
        lambda: comm.all_reduce(x, codec="int8"),
        lambda: comm.broadcast(x),
        lambda: comm.all_gather(x),
        comm.barrier,
    ):
        with pytest.raises(AbortedError, match=r"closed; init\(\) a new one"):
            call()
    assert (x == 1).all()
    assert "world" in repr(comm)
    comm.stats()


@pytest.mark.parametrize("world_size", [1, 2])
def test_use_after_close_says_so(worlds: Worlds, world_size: int) -> None:
    worlds.run(world_size, check_closed)


def in_forked_child(comm: Communicator) -> int:
    x = np.ones(1000, np.float32)
    comm.all_reduce(x, async_op=True).wait()  # a progress thread, which the child will not have
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for call in (lambda: comm.all_reduce(x), comm.barrier, lambda: comm.abort("no")):
                with pytest.raises(AbortedError, match=r"belongs to the parent process.*init\(\)"):
                    call()
            comm.close()  # nothing happens
            del comm
            gc.collect()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    comm.all_reduce(x)  # the parent's still works
    return os.waitstatus_to_exitcode(status)


def test_a_forked_child_cannot_use_its_parents_communicator(worlds: Worlds) -> None:
    assert worlds.run(2, in_forked_child) == [0, 0]


def fork_and_stay(comm: Communicator) -> int:
    """A child (like a DataLoader worker) outlives the rank; it must not hide the rank's death."""
    comm.barrier()
    if comm.rank == 1:
        pid = os.fork()
        if pid == 0:
            signal.pause()
        comm.all_gather(np.array([pid]))
        os.kill(os.getpid(), signal.SIGKILL)
    child = int(comm.all_gather(np.array([0]))[1, 0])
    try:
        with pytest.raises(ringcomm.errors.PeerLostError, match="rank 1"):
            comm.barrier()
    finally:
        os.kill(child, signal.SIGKILL)
    return child


def test_the_death_of_a_rank_is_seen_although_a_forked_child_lives_on(worlds: Worlds) -> None:
    outcomes = worlds.outcomes(2, fork_and_stay)
    assert [o.kind for o in outcomes] == ["value", "gone"], outcomes


def check_pickle(comm: Communicator) -> None:
    with pytest.raises(UsageError, match=r"cannot be pickled; init\(\) one in each process"):
        pickle.dumps(comm)


def test_a_communicator_cannot_be_pickled(worlds: Worlds) -> None:
    worlds.run(1, check_pickle)


def drop_without_close(comm: Communicator, port: int) -> None:
    store = TCPStore(port=port, is_server=False)
    other = ringcomm.init(comm.rank, comm.world_size, store=store, timeout=20)
    work = other.all_reduce(np.ones(50_000, np.float32), async_op=True)
    del other
    gc.collect()
    assert (work.wait() == comm.world_size).all()
    del work
    gc.collect()


def test_a_dropped_communicator_finishes_its_work_and_goes(worlds: Worlds) -> None:
    store = TCPStore(is_server=True)
    try:
        worlds.run(2, drop_without_close, store.port)
        worlds.run_threads(2, drop_without_close, store.port)
    finally:
        store.close()
