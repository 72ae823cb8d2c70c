"""kill -9: every survivor raises the same PeerLostError within a second, and nothing is left."""

import os
import signal
import threading
import time

import numpy as np
import pytest

import ringcomm
from ringcomm import Communicator
from ringcomm.errors import DeadlineError, PeerLostError
from ringcomm.store import TCPStore
from tests.faults import control_page, kill_rounds
from tests.worlds import Worlds, join

SEED = 20240607
ROUNDS = 40


@pytest.mark.timeout(240)
def test_killed_at_random_moments(worlds: Worlds) -> None:
    print(f"kill rounds with seed {SEED}")
    summary = kill_rounds.play(worlds, ROUNDS, SEED, print)
    assert summary.failures == []
    assert summary.passed == ROUNDS
    assert summary.survivors >= ROUNDS


CALLS = {
    "one_shot": lambda c: c.all_reduce(np.ones(100)),
    "two_shot": lambda c: c.all_reduce(np.ones(300_000)),
    "ring": lambda c: c.all_reduce(np.ones(300_000), algo="ring"),
    "codec": lambda c: c.all_reduce(np.ones(300_000, np.float32), codec="int8"),
    "async": lambda c: c.all_reduce(np.ones(300_000), async_op=True).wait(),
    "broadcast": lambda c: (c.broadcast(np.ones(300_000), 0), c.barrier()),
    "all_gather": lambda c: c.all_gather(np.ones(300_000)),
    "reduce_scatter": lambda c: c.reduce_scatter(np.ones((c.world_size, 300_000))),
    "reduce": lambda c: (c.reduce(np.ones(300_000), 1), c.barrier()),
    "gather": lambda c: c.gather(np.ones(300_000), 0),
    "scatter": lambda c: c.scatter(None, 1, np.ones(10)),
    "all_to_all": lambda c: c.all_to_all(np.ones((c.world_size, 100_000))),
    "monitored_barrier": lambda c: c.monitored_barrier(),
    "split": lambda c: c.split(0),
    "barrier": lambda c: c.barrier(),
}


def wait_for_the_dead(comm: Communicator, what: str, port: int) -> tuple[str, int | None, float]:
    comm.barrier()
    if comm.rank == 1:
        control_page.wait_until_entered(comm, 0, 2)
        control_page.wait_until_entered(comm, 2, 2)
        store = TCPStore(port=port, is_server=False)
        store.set("killed", str(time.monotonic()).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerLostError) as caught:
        CALLS[what](comm)
    return str(caught.value), caught.value.rank, time.monotonic()


def join_and_wait(
    rank: int, world_size: int, port: int, what: str
) -> tuple[str, int | None, float]:
    control_page.keep_pages()
    with join(rank, world_size, port) as comm:
        return wait_for_the_dead(comm, what, port)


@pytest.mark.parametrize("what", CALLS)
def test_ranks_blocked_in_a_collective_learn_of_a_death_at_once(
    worlds: Worlds, what: str, deadline: float
) -> None:
    store = TCPStore(is_server=True, timeout=20)
    ranks = [worlds.take() for _ in range(3)]
    for rank, process in enumerate(ranks):
        process.start(join_and_wait, rank, 3, store.port, what)
    killed = float(store.get("killed"))
    until = time.monotonic() + deadline
    outcomes = [process.outcome(until) for process in ranks]
    for process, outcome in zip(ranks, outcomes, strict=True):
        worlds.give_back(process, outcome.kind != "gone")
    store.close()
    assert [o.kind for o in outcomes] == ["value", "gone", "value"], outcomes
    (text, culprit, when), (other_text, other_culprit, other_when) = (
        outcomes[0].value,
        outcomes[2].value,
    )
    assert text == other_text
    assert culprit == other_culprit == 1
    assert f"rank 1 (pid {ranks[1].pid}) of group 'world' died after collective #1" in text
    assert max(when, other_when) - killed < 1


def long_call(comm: Communicator, what: str) -> None:
    """A call of thousands of segments of 4 KiB."""
    x = np.ones(1_000_003 + 7 * comm.rank)
    outs = [np.empty(1_000_003 + 7 * rank) for rank in range(3)]
    if what == "gather":
        comm.gather(x, 0, outs if comm.rank == 0 else None)
    elif what == "all_to_all":
        comm.all_to_all([x] * 3, outs)
    else:
        comm.reduce(np.ones(3_000_000), 0)
    comm.barrier()


def die_in_the_middle(rank: int, port: int, what: str) -> tuple[str, int | None, float]:
    def die() -> None:
        while control_page.step(1) < 100:
            time.sleep(0.0005)
        TCPStore(port=port, is_server=False).set("killed", str(time.monotonic()).encode())
        os.kill(os.getpid(), signal.SIGKILL)

    control_page.keep_pages()
    with join(rank, 3, port, staging_kib=16) as comm:
        comm.barrier()
        if rank == 1:
            threading.Thread(target=die, daemon=True).start()
        with pytest.raises(PeerLostError) as caught:
            long_call(comm, what)
        return str(caught.value), caught.value.rank, time.monotonic()


@pytest.mark.parametrize("what", ["all_to_all", "gather", "reduce"])
def test_a_death_in_the_middle_of_many_segments(worlds: Worlds, what: str, deadline: float) -> None:
    store = TCPStore(is_server=True, timeout=20)
    ranks = [worlds.take() for _ in range(3)]
    for rank, process in enumerate(ranks):
        process.start(die_in_the_middle, rank, store.port, what)
    killed = float(store.get("killed"))
    outcomes = [process.outcome(killed + deadline) for process in ranks]
    for process, outcome in zip(ranks, outcomes, strict=True):
        worlds.give_back(process, outcome.kind != "gone")
    store.close()
    assert [o.kind for o in outcomes] == ["value", "gone", "value"], outcomes
    (text, culprit, when), (other_text, _, other_when) = outcomes[0].value, outcomes[2].value
    assert text == other_text
    assert culprit == 1
    assert f"rank 1 (pid {ranks[1].pid}) of group 'world' died inside collective #2" in text
    assert "Output buffers of unfinished calls are undefined" in text
    assert max(when, other_when) - killed < 1


def reporter_dies(rank: int, port: int) -> tuple[str, str]:
    control_page.keep_pages()
    with join(rank, 3, port) as comm:
        comm.barrier()
        if rank == 1:
            control_page.wait_until_entered(comm, 0, 2)
            control_page.claim_fault(1)
            TCPStore(port=port, is_server=False).set("killed", str(time.monotonic()).encode())
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            comm.barrier()
        except ringcomm.errors.RingcommError as error:
            return type(error).__name__, str(error)
    return "", ""


def test_a_rank_killed_while_it_reports_a_failure_is_named_within_a_second(
    worlds: Worlds, deadline: float
) -> None:
    store = TCPStore(is_server=True, timeout=20)
    ranks = [worlds.take() for _ in range(3)]
    for rank, process in enumerate(ranks):
        process.start(reporter_dies, rank, store.port)
    killed = float(store.get("killed"))
    outcomes = [process.outcome(killed + deadline) for process in ranks]
    for process, outcome in zip(ranks, outcomes, strict=True):
        worlds.give_back(process, outcome.kind != "gone")
    store.close()
    assert outcomes[0].value == outcomes[2].value
    name, text = outcomes[0].value
    assert name == PeerLostError.__name__
    assert f"rank 1 (pid {ranks[1].pid}) died while it reported another failure" in text
    assert max(outcomes[0].when, outcomes[2].when) - killed < 1


def reporter_stops(rank: int, port: int) -> tuple[str, str]:
    control_page.keep_pages()
    with join(rank, 2, port) as comm:
        comm.barrier()
        if rank == 1:
            control_page.wait_until_entered(comm, 0, 2)
            control_page.claim_fault(1)
            os.kill(os.getpid(), signal.SIGSTOP)
            return "", ""
        try:
            comm.barrier()
        except ringcomm.errors.RingcommError as error:
            return type(error).__name__, str(error)
    return "", ""


def test_a_rank_stopped_while_it_reports_a_failure_is_not_called_dead(
    worlds: Worlds, deadline: float
) -> None:
    store = TCPStore(is_server=True, timeout=20)
    ranks = [worlds.take() for _ in range(2)]
    for rank, process in enumerate(ranks):
        process.start(reporter_stops, rank, store.port)
    outcome = ranks[0].outcome(time.monotonic() + deadline)
    worlds.give_back(ranks[0], True)
    worlds.give_back(ranks[1], False)
    store.close()
    name, text = outcome.value
    assert name == DeadlineError.__name__
    assert f"rank 1 (pid {ranks[1].pid})" in text
    assert "stopped" in text


def exit_normally(comm: Communicator) -> None:
    comm.barrier()
    if comm.rank == 0:
        os._exit(3)  # neither a signal nor close()
    comm.barrier()


def test_a_rank_that_exits_without_close_counts_as_dead(worlds: Worlds) -> None:
    outcomes = worlds.outcomes(3, exit_normally)
    assert [type(o.error) for o in outcomes] == [type(None), PeerLostError, PeerLostError]
    assert str(outcomes[1].error) == str(outcomes[2].error)
    assert [o.culprit for o in outcomes[1:]] == [0, 0]


def everybody_dies(comm: Communicator) -> None:
    comm.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def test_nothing_is_left_when_all_ranks_are_killed(worlds: Worlds) -> None:
    outcomes = worlds.outcomes(4, everybody_dies)
    assert {o.kind for o in outcomes} == {"gone"}
    assert worlds.leftovers() == []
