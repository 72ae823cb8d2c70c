"""Stopped, slow and missing ranks: never a death, and after the deadline the right rank is named."""

import random
import signal
import time
from collections.abc import Callable

import numpy as np
import pytest

from ringcomm import Communicator
from ringcomm.errors import DeadlineError
from ringcomm.store import TCPStore
from tests.worlds import Worlds


def compute_for(comm: Communicator, port: int, seconds: float) -> int:
    """Collectives with checked results until rank 0 says that time is up."""
    store = TCPStore(port=port, is_server=False)
    end = time.monotonic() + seconds
    calls = 0
    go_on = np.array([1])
    while go_on[0]:
        for algo, codec in ((None, None), ("ring", None), ("two_shot", None), (None, "int8")):
            x = np.full((200, 20_000)[calls % 2], comm.rank + 1, np.float32)
            comm.all_reduce(x, codec=codec, algo=algo)
            assert (abs(x - comm.world_size * (comm.world_size + 1) / 2) < 0.2).all()
            calls += 1
        if calls == 4:
            store.set(f"running/{comm.rank}", b"")
        go_on[0] = comm.rank == 0 and time.monotonic() < end
        comm.broadcast(go_on, 0)
    return calls


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_pauses_shorter_than_the_deadline_change_nothing(
    worlds: Worlds, world_size: int, deadline: float
) -> None:
    signals = TCPStore(is_server=True, timeout=20)
    running = worlds.start(world_size, compute_for, signals.port, 2.0, timeout=20.0)
    for rank in range(world_size):
        signals.get(f"running/{rank}")
    dice = random.Random(world_size)
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        rank = dice.choice(running.ranks)
        rank.kill(signal.SIGSTOP)
        time.sleep(dice.random() * 0.15)  # the pause that is injected
        rank.kill(signal.SIGCONT)
        time.sleep(dice.random() * 0.02)
    outcomes = running.outcomes(deadline)
    signals.close()
    assert [o.kind for o in outcomes] == ["value"] * world_size, outcomes
    assert len({o.value for o in outcomes}) == 1


ENDLESS: dict[str, Callable[[Communicator], object]] = {
    "one_shot": lambda c: c.all_reduce(np.ones(100)),
    "two_shot": lambda c: c.all_reduce(np.ones(50_000)),
    "ring": lambda c: c.all_reduce(np.ones(50_000), algo="ring"),
    "codec": lambda c: c.all_reduce(np.ones(50_000, np.float32), codec="int4"),
    "all_gather": lambda c: c.all_gather(np.ones(50_000)),
    "broadcast": lambda c: c.broadcast(np.ones(50_000), 1),
    "reduce": lambda c: c.reduce(np.ones(50_000), 1),
    "all_to_all": lambda c: c.all_to_all(np.ones((c.world_size, 20_000))),
    "gather": lambda c: c.gather(np.ones(50_000), 1),
}


def for_ever(comm: Communicator, what: str, port: int) -> None:
    ENDLESS[what](comm)
    TCPStore(port=port, is_server=False).set(f"running/{comm.rank}", b"")
    while True:
        ENDLESS[what](comm)


@pytest.mark.parametrize("what", ENDLESS)
def test_a_rank_stopped_beyond_the_deadline_is_named_on_all_ranks(
    worlds: Worlds, what: str, deadline: float
) -> None:
    signals = TCPStore(is_server=True, timeout=20)
    running = worlds.start(4, for_ever, what, signals.port, timeout=0.7)
    for rank in range(4):
        signals.get(f"running/{rank}")
    stopped = running.ranks[2]
    stopped.kill(signal.SIGSTOP)
    begin = time.monotonic()
    others = [rank.outcome(begin + deadline) for i, rank in enumerate(running.ranks) if i != 2]
    elapsed = time.monotonic() - begin
    stopped.kill(signal.SIGCONT)
    last = stopped.outcome(time.monotonic() + deadline)
    for rank in running.ranks:
        worlds.give_back(rank, True)
    running._store.close()
    signals.close()
    assert {type(o.error) for o in (*others, last)} == {DeadlineError}, (others, last)
    sentences = {str(o.error) for o in (*others, last)}
    assert len(sentences) == 1, "the stopped rank raises the same sentence when it goes on"
    sentence = sentences.pop()
    assert f"rank 2 (pid {stopped.pid}) did not come within 0.7 s" in sentence
    assert "the process is stopped" in sentence
    assert {o.culprit for o in (*others, last)} == {2}
    assert elapsed < 0.7 + 1


def one_is_missing(comm: Communicator, what: str, port: int) -> None:
    if what != "first":
        comm.barrier()
    if comm.rank != 1:
        with pytest.raises(DeadlineError) as caught:
            comm.all_reduce(np.ones(10), tag="step 3")
        TCPStore(port=port, is_server=False).set(f"done/{comm.rank}", b"")
        raise caught.value
    store = TCPStore(port=port, is_server=False)
    for rank in (0, 2):
        store.get(f"done/{rank}")
    with pytest.raises(DeadlineError) as caught:  # it comes too late: the same sentence
        comm.all_reduce(np.ones(10), tag="step 3")
    raise caught.value


@pytest.mark.parametrize(
    ("what", "piece"),
    [
        ("first", "it has not called any collective yet"),
        ("later", "its last call, barrier #1, is complete"),
    ],
)
def test_a_rank_that_does_not_come_is_named_with_what_it_did_last(
    worlds: Worlds, what: str, piece: str
) -> None:
    signals = TCPStore(is_server=True, timeout=20)
    outcomes = worlds.outcomes(3, one_is_missing, what, signals.port, timeout=0.5)
    signals.close()
    assert {type(o.error) for o in outcomes} == {DeadlineError}, outcomes
    assert len({str(o.error) for o in outcomes}) == 1
    text = str(outcomes[0].error)
    assert "rank 1 (pid " in text
    assert "did not come within 0.5 s" in text
    assert "tag 'step 3'" in text
    assert "group 'world'" in text
    assert piece in text
    assert {o.culprit for o in outcomes} == {1}


def with_late_async(comm: Communicator) -> str:
    if comm.rank == 1:
        comm.close()
        return ""
    work = comm.all_reduce(np.ones(10), async_op=True)
    with pytest.raises(RuntimeError) as caught:
        work.wait()
    return str(caught.value)


def test_an_asynchronous_call_raises_in_wait(worlds: Worlds) -> None:
    outcomes = worlds.run(2, with_late_async)
    assert "closed group 'world'" in outcomes[0]
