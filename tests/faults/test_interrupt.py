"""Ctrl-C, other signals and abort(): a waiting rank can be freed, and the others learn of it."""

import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator
from ringcomm.errors import AbortedError, RingcommError
from ringcomm.store import TCPStore
from tests.faults import control_page
from tests.worlds import Outcome, Worlds, join


def wait_behind_async(comm: Communicator) -> None:
    comm.all_reduce(np.ones(10), async_op=True)
    comm.barrier()


WAITS: dict[str, Callable[[Communicator], Any]] = {
    "all_reduce": lambda c: c.all_reduce(np.ones(10)),
    "two_shot": lambda c: c.all_reduce(np.ones(100_000)),
    "barrier": lambda c: c.barrier(),
    "Work.wait": lambda c: c.all_reduce(np.ones(10), async_op=True).wait(),
    "behind async": wait_behind_async,
    "recv": lambda c: c.recv(np.ones(10), 1),
    "recv from anyone": lambda c: c.recv(np.ones(10)),
    "send": lambda c: c.send(np.ones(100_000), 1, async_op=c.rank == 1),
    "Work.wait of recv": lambda c: c.recv(np.ones(10), 1, async_op=True).wait(),
}


def wait_for_a_signal(rank: int, port: int, what: str) -> None:
    """Rank 0 waits and gets the signal, rank 2 waits for it, too, rank 1 comes afterwards."""
    control_page.keep_pages(slabs=True)
    store = TCPStore(port=port, is_server=False, timeout=20)
    with join(rank, 3, port, timeout=60.0) as comm:
        comm.barrier()
        if rank == 1:
            control_page.wait_until_inside(comm, 0, 2)
            control_page.wait_until_inside(comm, 2, 2)
            store.set("inside", b"")
            store.get("freed")
        try:
            WAITS[what](comm)
        finally:
            if rank == 0:
                store.set("freed", b"")
                with pytest.raises(AbortedError, match="rank 0"):
                    comm.barrier()


def interrupt(worlds: Worlds, what: str, number: int) -> tuple[list[Outcome], float]:
    store = TCPStore(is_server=True, timeout=20)
    ranks = [worlds.take() for _ in range(3)]
    for rank, process in enumerate(ranks):
        process.start(wait_for_a_signal, rank, store.port, what)
    store.get("inside")
    begin = time.monotonic()
    ranks[0].kill(number)
    outcomes = [process.outcome(begin + 20) for process in ranks]
    for process in ranks:
        worlds.give_back(process, True)
    store.close()
    return outcomes, begin


@pytest.mark.parametrize("what", WAITS)
def test_ctrl_c_frees_a_waiting_rank_and_tells_the_others(worlds: Worlds, what: str) -> None:
    outcomes, begin = interrupt(worlds, what, signal.SIGINT)
    assert isinstance(outcomes[0].error, KeyboardInterrupt), outcomes[0]
    others = [outcomes[1], outcomes[2]]
    assert {type(o.error) for o in others} == {AbortedError}, others
    assert len({str(o.error) for o in others}) == 1
    text = str(others[0].error)
    assert "rank 0" in text
    assert "interrupted (KeyboardInterrupt)" in text
    assert [o.culprit for o in others] == [0, 0]
    assert outcomes[0].when - begin < 1
    assert outcomes[2].when - begin < 1.5


def close_with_pending(rank: int, port: int) -> str:
    control_page.keep_pages()
    store = TCPStore(port=port, is_server=False, timeout=20)
    comm = join(rank, 2, port, timeout=60.0)
    comm.barrier()
    if rank == 1:
        control_page.wait_until_entered(comm, 0, 2)
        store.set("inside", b"")
        control_page.wait_for_fault()
        with pytest.raises(AbortedError) as caught:
            comm.barrier()
        return str(caught.value)
    work = comm.all_reduce(np.ones(100_000), async_op=True)
    with pytest.raises(KeyboardInterrupt):
        comm.close()
    with pytest.raises(RingcommError):
        work.wait()
    return ""


def test_handlers_that_do_not_raise_run_while_a_rank_waits(worlds: Worlds) -> None:
    store = TCPStore(is_server=True, timeout=20)
    ranks = [worlds.take() for _ in range(2)]
    for rank, process in enumerate(ranks):
        process.start(handle_quietly, rank, store.port)
    store.get("inside")
    ranks[0].kill(signal.SIGUSR1)
    outcomes = [process.outcome(time.monotonic() + 20) for process in ranks]
    for process in ranks:
        worlds.give_back(process, True)
    store.close()
    assert [o.kind for o in outcomes] == ["value", "value"], outcomes
    assert outcomes[0].value == 2


def handle_quietly(rank: int, port: int) -> int:
    control_page.keep_pages()
    store = TCPStore(port=port, is_server=False, timeout=20)
    with join(rank, 2, port, timeout=60.0) as comm:
        comm.barrier()
        if rank == 1:
            control_page.wait_until_entered(comm, 0, 2)
            store.set("inside", b"")
            store.get("handled")
        else:
            signal.signal(signal.SIGUSR1, lambda *_: store.set("handled", b""))
        x = np.ones(10)
        comm.all_reduce(x)
        return int(x[0])


def exit_on_sigterm(rank: int, port: int) -> str:
    control_page.keep_pages()
    store = TCPStore(port=port, is_server=False, timeout=20)
    with join(rank, 2, port, timeout=60.0) as comm:
        comm.barrier()
        if rank == 1:
            control_page.wait_until_entered(comm, 0, 2)
            store.set("inside", b"")
        else:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        try:
            if rank == 0:
                comm.all_reduce(np.ones(3))
            store.get("freed")
        except SystemExit as error:
            store.set("freed", b"")
            return f"exit {error.code}"
        with pytest.raises(AbortedError) as caught:
            comm.barrier()
        return str(caught.value)


def test_an_exception_of_any_handler_gets_through(worlds: Worlds) -> None:
    store = TCPStore(is_server=True, timeout=20)
    ranks = [worlds.take() for _ in range(2)]
    for rank, process in enumerate(ranks):
        process.start(exit_on_sigterm, rank, store.port)
    store.get("inside")
    ranks[0].kill(signal.SIGTERM)
    outcomes = [process.outcome(time.monotonic() + 20) for process in ranks]
    for process in ranks:
        worlds.give_back(process, False)  # with a changed signal handler
    store.close()
    assert outcomes[0].value == "exit 7", outcomes
    assert "interrupted (SystemExit)" in outcomes[1].value


def test_ctrl_c_frees_close(worlds: Worlds) -> None:
    store = TCPStore(is_server=True, timeout=20)
    ranks = [worlds.take() for _ in range(2)]
    for rank, process in enumerate(ranks):
        process.start(close_with_pending, rank, store.port)
    store.get("inside")
    begin = time.monotonic()
    ranks[0].kill(signal.SIGINT)
    outcomes = [process.outcome(begin + 20) for process in ranks]
    for process in ranks:
        worlds.give_back(process, True)
    store.close()
    assert [o.kind for o in outcomes] == ["value", "value"], outcomes
    assert outcomes[0].when - begin < 1.5
    assert "interrupted (KeyboardInterrupt) in close()" in outcomes[1].value


def join_and_abort(rank: int, world_size: int, port: int) -> tuple[str, float, float]:
    control_page.keep_pages()
    with join(rank, world_size, port, timeout=60.0) as comm:
        comm.barrier()
        called = 0.0
        if rank == 0:

            def run() -> None:
                nonlocal called
                for other in range(world_size - 1):
                    control_page.wait_until_entered(comm, other, 2)
                called = time.monotonic()
                comm.abort("the loss is NaN " + "é" * 900)  # longer than a fault record

            threading.Thread(target=run).start()
        if rank == world_size - 1:
            control_page.wait_for_fault()  # not in the collective that the others are in
        with pytest.raises(AbortedError) as caught:
            comm.barrier()
        freed = time.monotonic()
        with pytest.raises(AbortedError):
            comm.all_reduce(np.ones(2))
        return str(caught.value), called, freed


def test_abort_from_another_thread_frees_everybody_at_once(worlds: Worlds) -> None:
    store = TCPStore(is_server=True, timeout=20)
    ranks = [worlds.take() for _ in range(3)]
    for rank, process in enumerate(ranks):
        process.start(join_and_abort, rank, 3, store.port)
    outcomes = [process.outcome(time.monotonic() + 20) for process in ranks]
    for process in ranks:
        worlds.give_back(process, True)
    store.close()
    assert [o.kind for o in outcomes] == ["value"] * 3, outcomes
    assert len({o.value[0] for o in outcomes}) == 1
    text, called, _ = outcomes[0].value
    assert "rank 0 aborted group 'world': the loss is NaN é" in text
    for outcome in outcomes[:2]:
        assert outcome.value[2] - called < 0.5


def test_wait_after_interrupt_names_it(worlds: Worlds) -> None:
    """Ctrl-C inside Work.wait() ends the group although the call itself is still running."""
    outcomes, _ = interrupt(worlds, "Work.wait", signal.SIGINT)
    assert "while it waited for a call" in str(outcomes[1].error)
