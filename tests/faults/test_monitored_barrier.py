"""monitored_barrier: every rank that does not come is named, within the call's own deadline."""

import os
import time
from datetime import timedelta

import numpy as np
import pytest

from ringcomm import Communicator
from ringcomm.errors import DeadlineError, MismatchError, UsageError
from ringcomm.store import TCPStore
from tests.worlds import Outcome, Worlds


def check_passes(comm: Communicator) -> None:
    for call in range(20):
        comm.monitored_barrier()
        comm.monitored_barrier(5.0, wait_all_ranks=True, tag=f"call {call}")
        comm.monitored_barrier(timedelta(seconds=5))
        x = np.ones(3000)
        work = comm.all_reduce(x, async_op=True)
        comm.monitored_barrier(5)  # waits for its turn
        assert work.done()
        assert (x == comm.world_size).all()
        if comm.rank == call % comm.world_size:
            time.sleep(0.002)  # somebody is a little late
    for bad in (0, -1, float("nan")):
        with pytest.raises(UsageError, match="timeout must be a positive number"):
            comm.monitored_barrier(bad)
    assert comm.stats()["monitored_barrier"]["calls"] == 80


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_it_is_a_barrier(worlds: Worlds, world_size: int) -> None:
    worlds.run(world_size, check_passes)


def some_are_late(
    comm: Communicator, late: tuple[int, ...], port: int, say_where: bool
) -> tuple[float, int]:
    """The late ranks come when all others have raised; everybody raises what it got."""
    store = TCPStore(port=port, is_server=False)
    store.set(f"pid/{comm.rank}", str(os.getpid()).encode())
    comm.barrier()
    if comm.rank in late:
        for rank in range(comm.world_size):
            if rank not in late:
                store.get(f"done/{rank}")
    begin = time.monotonic()
    try:
        comm.monitored_barrier(0.4, say_where, tag="step 7")
    except DeadlineError as error:
        elapsed = time.monotonic() - begin
        store.set(f"done/{comm.rank}", b"")
        if comm.rank not in late:
            assert 0.3 < elapsed < 1.4, elapsed
        with pytest.raises(DeadlineError, match="step 7"):
            comm.barrier()  # lost for good
        raise error
    raise AssertionError("nobody was missed")


def sentence_of(outcomes: list[Outcome], late: tuple[int, ...]) -> str:
    assert {type(o.error) for o in outcomes} == {DeadlineError}, outcomes
    assert len({str(o.error) for o in outcomes}) == 1
    assert {o.culprit for o in outcomes} == {late[0]}
    return str(outcomes[0].error)


@pytest.mark.parametrize("say_where", [False, True])
@pytest.mark.parametrize("late", [(1,), (0, 2), (1, 2, 3), (0, 1, 2)])
def test_all_late_ranks_are_named_on_all_ranks(
    worlds: Worlds, late: tuple[int, ...], say_where: bool
) -> None:
    signals = TCPStore(is_server=True, timeout=20)
    outcomes = worlds.outcomes(4, some_are_late, late, signals.port, say_where, timeout=20.0)
    pids = [signals.get(f"pid/{rank}").decode() for rank in range(4)]
    signals.close()
    text = sentence_of(outcomes, late)
    assert f"{len(late)} of 4 ranks did not come within 0.4 s to monitored_barrier #2" in text
    assert "tag 'step 7'" in text
    assert "group 'world'" in text
    for rank in range(4):
        assert (f"rank {rank} (pid {pids[rank]}" in text) == (rank in late), text
    assert text.count("its last call, barrier #1, is complete") == (len(late) if say_where else 1)


def missing_before(comm: Communicator, port: int) -> None:
    """Rank 2 has not even made the call before, for which nobody had to wait for it."""
    comm.barrier()
    if comm.rank == 2:
        store = TCPStore(port=port, is_server=False)
        for rank in (0, 1):
            store.get(f"done/{rank}")
    try:
        if comm.rank != 2:
            comm.broadcast(np.zeros(3), 0)
        comm.monitored_barrier(0.4, True)
    finally:
        if comm.rank != 2:
            TCPStore(port=port, is_server=False).set(f"done/{comm.rank}", b"")


def test_ranks_that_wait_for_the_late_one_are_not_called_late(worlds: Worlds) -> None:
    signals = TCPStore(is_server=True, timeout=20)
    outcomes = worlds.outcomes(3, missing_before, signals.port)
    signals.close()
    text = sentence_of(outcomes, (2,))
    assert "1 of 3 ranks did not come within 0.4 s to monitored_barrier #3" in text
    assert "its last call, barrier #1, is complete" in text
    assert "rank 1" not in text


def many_late(comm: Communicator, port: int) -> None:
    store = TCPStore(port=port, is_server=False)
    if comm.rank != 0:
        store.get("done/0")
    try:
        comm.monitored_barrier(0.4, True, tag="x" * 24)
    finally:
        store.set(f"done/{comm.rank}", b"")


def test_a_long_list_is_cut_and_what_to_do_is_not(worlds: Worlds) -> None:
    signals = TCPStore(is_server=True, timeout=20)
    outcomes = worlds.outcomes(12, many_late, signals.port, name="n" * 60)
    signals.close()
    text = sentence_of(outcomes, (1,))
    assert "11 of 12 ranks did not come" in text
    assert text.count("it has not called any collective yet") >= 5
    assert " more. Look for a rank" in text
    assert text.endswith("close it and init() a new one.")


def different_barriers(comm: Communicator) -> None:
    comm.barrier()
    if comm.rank == 1:
        comm.barrier()
    else:
        comm.monitored_barrier()


def test_a_plain_barrier_is_another_operation(worlds: Worlds) -> None:
    outcomes = worlds.outcomes(3, different_barriers)
    assert {type(o.error) for o in outcomes} == {MismatchError}
    assert len({str(o.error) for o in outcomes}) == 1
    assert "called monitored_barrier #2" in str(outcomes[0].error)
    assert "called barrier #2" in str(outcomes[0].error)
