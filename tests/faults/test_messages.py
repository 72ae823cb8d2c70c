"""Messages when a peer dies, leaves, stops or aborts: everybody who waits says the same, at once."""

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator
from ringcomm.errors import AbortedError, DeadlineError, PeerLostError
from ringcomm.store import TCPStore
from tests.faults import control_page
from tests.worlds import Worlds, join

LONG = 2 << 20  # float64: 16 MiB, far more than is on its way at any time


# ---- kill -9 -------------------------------------------------------------------------------------


def kill_in_the_middle(comm: Communicator, pid: int, port: int) -> None:
    """Kills a process, maybe this one, when half of a message from rank 1 is there."""
    got = np.zeros(LONG)
    while True:
        got[:] = 0
        work = comm.recv(got, 1, async_op=True)
        while got[LONG // 2] == 0 and not work.done():
            pass
        if not work.done():  # else this process did not get to look in time
            break
        work.wait()
    TCPStore(port=port, is_server=False).set("killed", str(time.monotonic()).encode())
    os.kill(pid, signal.SIGKILL)
    work.wait()
    comm.recv(got, 1)


def send_for_ever(comm: Communicator) -> None:
    while True:
        comm.send(np.ones(LONG), 0)


def die_in_the_middle(comm: Communicator, victim: int, port: int) -> tuple[str, int | None, float]:
    """Rank 0 receives a long message from rank 1; one of them is killed when half of it is there."""
    pids = comm.all_gather(np.array([os.getpid()]))
    comm.barrier()
    calls: list[Callable[[], Any]] = [
        lambda: kill_in_the_middle(comm, int(pids[victim, 0]), port),
        lambda: send_for_ever(comm),
        lambda: comm.recv(np.ones(1)),
        comm.barrier,
    ]
    with pytest.raises(PeerLostError) as caught:
        calls[comm.rank]()
    return str(caught.value), caught.value.rank, time.monotonic()


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_in_the_middle_of_a_long_message(
    worlds: Worlds, victim: int, deadline: float
) -> None:
    signals = TCPStore(is_server=True, timeout=20)
    running = worlds.start(4, die_in_the_middle, victim, signals.port)
    killed = float(signals.get("killed"))
    pid = running.ranks[victim].pid
    outcomes = running.outcomes(deadline)
    signals.close()
    kinds = ["value"] * 4
    kinds[victim] = "gone"
    assert [o.kind for o in outcomes] == kinds, outcomes
    answers = [o.value for o in outcomes if o.kind == "value"]
    assert len({text for text, _, _ in answers}) == 1
    assert f"rank {victim} (pid {pid}) of group 'world' died" in answers[0][0]
    assert {rank for _, rank, _ in answers} == {victim}
    assert max(when for _, _, when in answers) - killed < 1


WAITS: dict[str, Callable[[Communicator], Any]] = {
    "recv": lambda c: c.recv(np.ones(10), 1, 3),
    "any": lambda c: c.recv(np.ones(10), tag=3),
    "send": lambda c: c.send(np.ones(10_000), 1, 3),
    "async": lambda c: c.recv(np.ones(10), 1, 3, async_op=True).wait(),
}


def wait_for_the_dead(rank: int, port: int, what: str) -> tuple[str, float]:
    control_page.keep_pages(slabs=True)
    with join(rank, 3, port) as comm:
        comm.barrier()
        if rank == 1:
            control_page.wait_until_inside(comm, 0, 2)
            control_page.wait_until_inside(comm, 2, 2)
            TCPStore(port=port, is_server=False).set("killed", str(time.monotonic()).encode())
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(PeerLostError) as caught:
            WAITS[what](comm)
        return str(caught.value), time.monotonic()


@pytest.mark.parametrize("what", WAITS)
def test_ranks_that_wait_for_a_message_learn_of_a_death_at_once(
    worlds: Worlds, what: str, deadline: float
) -> None:
    store = TCPStore(is_server=True, timeout=20)
    ranks = [worlds.take() for _ in range(3)]
    for rank, process in enumerate(ranks):
        process.start(wait_for_the_dead, rank, store.port, what)
    killed = float(store.get("killed"))
    outcomes = [process.outcome(killed + deadline) for process in ranks]
    for process, outcome in zip(ranks, outcomes, strict=True):
        worlds.give_back(process, outcome.kind != "gone")
    store.close()
    assert [o.kind for o in outcomes] == ["value", "gone", "value"], outcomes
    assert outcomes[0].value[0] == outcomes[2].value[0]
    assert max(outcomes[0].value[1], outcomes[2].value[1]) - killed < 1


# ---- leaving -------------------------------------------------------------------------------------


def left_alone(comm: Communicator, what: str, port: int) -> tuple[str, int | None, float]:
    """Rank 1 closes before, or while, rank 0 waits for it."""
    store = TCPStore(port=port, is_server=False)
    call, _, when = what.partition(" ")
    comm.barrier()
    if comm.rank == 1:
        if when == "before":
            store.set("left", b"")
        else:
            store.get("waits")
        comm.close()
        return "", None, 0.0
    if when == "before":
        store.get("left")
    else:
        store.set("waits", b"")
    begin = time.monotonic()
    with pytest.raises(PeerLostError) as caught:
        WAITS[call](comm)
    return str(caught.value), caught.value.rank, time.monotonic() - begin


@pytest.mark.parametrize("what", [f"{c} {w}" for c in WAITS for w in ("before", "while")])
def test_a_rank_that_closes_is_named_by_those_who_wait_for_it(worlds: Worlds, what: str) -> None:
    signals = TCPStore(is_server=True, timeout=20)
    running = worlds.start(2, left_alone, what, signals.port)
    pid = running.ranks[1].pid
    outcomes = running.outcomes(30)
    signals.close()
    assert [o.kind for o in outcomes] == ["value"] * 2, outcomes
    text, rank, seconds = outcomes[0].value
    call = what.split()[0]
    who = "every other rank" if call == "any" else f"rank 1 (pid {pid})"
    assert f"{who} closed group 'world'; rank 0 still waits in" in text
    assert {
        "recv": "recv of 80 bytes with tag 3 from rank 1.",
        "any": "recv of 80 bytes with tag 3 from any rank.",
        "send": "send of 80000 bytes with tag 3 to rank 1.",
        "async": "recv of 80 bytes with tag 3 from rank 1.",
    }[call] in text
    assert rank == (None if call == "any" else 1)
    assert seconds < 1


def one_is_left(comm: Communicator, port: int) -> None:
    """A receive from anyone goes on while anyone is there."""
    store = TCPStore(port=port, is_server=False)
    comm.barrier()
    if comm.rank == 1:
        comm.close()
        store.set("left", b"")
    elif comm.rank == 2:
        store.get("left")
        comm.send(np.full(10, 2.0), 0)
    else:
        got = np.zeros(10)
        work = comm.recv(got, async_op=True)
        store.get("left")
        assert work.wait() == 2
        assert (got == 2).all()


def test_a_receive_from_anyone_survives_the_first_who_leaves(worlds: Worlds) -> None:
    signals = TCPStore(is_server=True, timeout=20)
    worlds.run(3, one_is_left, signals.port)
    signals.close()


def both_close(comm: Communicator) -> float:
    """Each still has a long message for the other, who will never ask for it."""
    work = comm.send(np.ones(100_000), 1 - comm.rank, async_op=True)
    comm.barrier()
    begin = time.monotonic()
    comm.close()
    with pytest.raises(PeerLostError, match="still waits in send of 800000 bytes"):
        work.wait()
    return time.monotonic() - begin


def test_ranks_that_close_with_unreceived_messages_do_not_wait_for_each_other(
    worlds: Worlds,
) -> None:
    assert max(worlds.run(2, both_close)) < 1


# ---- stopping, aborting, forking -----------------------------------------------------------------


def wait_for_the_stopped(comm: Communicator, port: int) -> str:
    comm.barrier()
    if comm.rank == 1:
        TCPStore(port=port, is_server=False).set("stop me", b"")
    with pytest.raises(DeadlineError) as caught:
        comm.recv(np.ones(LONG), 1 - comm.rank)
    return str(caught.value)


def test_a_stopped_peer_is_named_at_the_deadline(worlds: Worlds, deadline: float) -> None:
    signals = TCPStore(is_server=True, timeout=20)
    running = worlds.start(2, wait_for_the_stopped, signals.port, timeout=0.7)
    signals.get("stop me")
    stopped = running.ranks[1]
    stopped.kill(signal.SIGSTOP)
    begin = time.monotonic()
    first = running.ranks[0].outcome(begin + deadline)
    stopped.kill(signal.SIGCONT)
    outcomes = [first, stopped.outcome(time.monotonic() + deadline)]
    for rank in running.ranks:
        worlds.give_back(rank, True)
    running._store.close()
    signals.close()
    assert [o.kind for o in outcomes] == ["value"] * 2, outcomes
    assert outcomes[0].value == outcomes[1].value
    assert f"rank 1 (pid {stopped.pid}) did not send it within 0.7 s" in first.value
    assert "the process is stopped" in first.value
    assert first.when - begin < 1.7


def abort_while_waiting(rank: int, port: int) -> tuple[str, float, float]:
    control_page.keep_pages(slabs=True)
    with join(rank, 3, port, timeout=60.0) as comm:
        comm.barrier()
        called = 0.0
        if rank == 2:
            for other in (0, 1):
                control_page.wait_until_inside(comm, other, 2)
            called = time.monotonic()
            comm.abort("the loss is NaN")
        pending = comm.recv(np.ones(10), 2, async_op=True) if rank == 0 else None
        with pytest.raises(AbortedError) as caught:
            WAITS[("any", "recv", "recv")[rank]](comm)
        freed = time.monotonic()
        if pending is not None:
            with pytest.raises(AbortedError):
                pending.wait()
        return str(caught.value), called, freed


def test_abort_frees_everybody_who_waits_for_a_message(worlds: Worlds) -> None:
    store = TCPStore(is_server=True, timeout=20)
    ranks = [worlds.take() for _ in range(3)]
    for rank, process in enumerate(ranks):
        process.start(abort_while_waiting, rank, store.port)
    outcomes = [process.outcome(time.monotonic() + 20) for process in ranks]
    for process in ranks:
        worlds.give_back(process, True)
    store.close()
    assert [o.kind for o in outcomes] == ["value"] * 3, outcomes
    assert len({o.value[0] for o in outcomes}) == 1
    assert "rank 2 aborted group 'world': the loss is NaN" in outcomes[0].value[0]
    for outcome in outcomes[:2]:
        assert outcome.value[2] - outcomes[2].value[1] < 0.5


def answer_in_a_handler(rank: int, port: int) -> None:
    control_page.keep_pages(slabs=True)
    store = TCPStore(port=port, is_server=False, timeout=20)
    with join(rank, 2, port, timeout=20.0) as comm:
        comm.barrier()
        big = np.zeros(50_000)
        if rank == 1:
            control_page.wait_until_inside(comm, 0, 2)
            store.set("inside", b"")
            comm.recv(big, 0)
            comm.send(big + 1, 0)
            return
        signal.signal(signal.SIGUSR1, lambda *_: comm.send(np.ones(50_000), 1))
        comm.recv(big, 1)
        assert (big == 2).all()


def test_a_signal_handler_may_send_while_its_rank_waits(worlds: Worlds) -> None:
    store = TCPStore(is_server=True, timeout=20)
    ranks = [worlds.take() for _ in range(2)]
    for rank, process in enumerate(ranks):
        process.start(answer_in_a_handler, rank, store.port)
    store.get("inside")
    ranks[0].kill(signal.SIGUSR1)
    outcomes = [process.outcome(time.monotonic() + 30) for process in ranks]
    for process in ranks:
        worlds.give_back(process, False)  # with a changed signal handler
    store.close()
    assert [o.kind for o in outcomes] == ["value", "value"], outcomes


def close_while_waiting(comm: Communicator) -> None:
    """close() in one thread ends the receive of another."""
    errors: list[BaseException] = []

    def receive() -> None:
        try:
            comm.recv(np.ones(10), 1 - comm.rank)
        except BaseException as error:
            errors.append(error)

    comm.barrier()
    pending = comm.recv(np.ones(10), comm.rank, 9, async_op=True)
    thread = threading.Thread(target=receive)
    thread.start()
    with pytest.raises(TimeoutError):
        pending.wait(0.05)  # long enough for the thread to get there, as a rule
    comm.close()
    thread.join()
    assert [type(error) for error in errors] == [AbortedError], errors


def test_close_ends_a_receive_of_another_thread(worlds: Worlds) -> None:
    worlds.run(2, close_while_waiting)


def in_forked_child(comm: Communicator) -> int:
    peer = 1 - comm.rank
    got = np.zeros(50_000)
    work = comm.recv(got, peer, async_op=True)  # and a thread that the child will not have
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            x = np.ones(3)
            for call in (work.wait, lambda: comm.recv(x, peer), lambda: comm.send(x, peer)):
                with pytest.raises(AbortedError, match=r"belongs to the parent process.*init\(\)"):
                    call()
            comm.close()  # nothing happens
            del comm, work
            gc.collect()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    comm.barrier()
    comm.send(np.ones(50_000), peer)
    assert work.wait() == peer  # the parent's still works
    assert (got == 1).all()
    return os.waitstatus_to_exitcode(status)


def test_a_forked_child_cannot_touch_its_parents_messages(worlds: Worlds) -> None:
    assert worlds.run(2, in_forked_child) == [0, 0]
