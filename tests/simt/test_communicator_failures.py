"""Communicators on arrays of emulated GPUs: every failure is named, by all ranks alike, and nothing hangs."""

import itertools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator
from ringcomm.errors import AbortedError, DeadlineError, MismatchError, PeerLostError
from ringcomm.store import TCPStore
from tests.comm.oracle import assert_same_bits, random_inputs
from tests.simt.communicators import MODES, Pools
from tests.worlds import Outcome


def call_and_settle(comm: Communicator, call: Callable[[Communicator], Any]) -> None:
    call(comm)
    comm.synchronize()


DISAGREEMENTS: dict[str, Callable[[Communicator], Any]] = {
    "sizes": lambda c: c.all_reduce(np.ones(1000 + c.rank)),
    "operations": lambda c: c.all_reduce(np.ones(4)) if c.rank else c.broadcast(np.ones(4)),
    "counts": lambda c: c.gather(np.ones(4 + c.rank), 0),
    "codecs": lambda c: c.all_reduce(np.ones(4000, np.float32), codec="int8" if c.rank else "int4"),
}


def disagree(comm: Communicator, what: str) -> None:
    comm.use_device("simt")
    comm.all_reduce(np.ones(5))
    DISAGREEMENTS[what](comm)
    comm.synchronize()
    comm.all_reduce(np.ones(5))


def same_error(outcomes: list[Outcome], kind: type[Exception]) -> str:
    assert {type(outcome.error) for outcome in outcomes} == {kind}, outcomes
    texts = {str(outcome.error) for outcome in outcomes}
    assert len(texts) == 1, texts
    return texts.pop()


@pytest.mark.parametrize("mode", ["in_kernel", "stepped"])
@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_disagreeing_calls_raise_the_same_sentence_on_all_ranks(
    pools: Pools, mode: str, what: str
) -> None:
    outcomes = pools(mode).outcomes(2, disagree, what, timeout=8.0)
    text = same_error(outcomes, MismatchError)
    assert "rank 0" in text
    assert "rank 1" in text


def gpu_and_cpu(comm: Communicator) -> None:
    comm.use_device("simt")
    if comm.rank == 1:
        comm._devices._hosts_are_simt = False  # its array is the host's
    comm.all_reduce(np.ones(1000, np.float32), algo="two_shot")
    comm.synchronize()


def test_an_array_on_a_gpu_and_one_on_the_cpu_do_not_match(pools: Pools) -> None:
    text = same_error(pools("stepped").outcomes(2, gpu_and_cpu), MismatchError)
    assert text.count("on GPUs") == 1


CALLS: dict[str, Callable[[Communicator], Any]] = {
    "small": lambda c: c.all_reduce(np.ones(100)),
    "large": lambda c: c.all_reduce(np.ones(100_000)),
    "codec": lambda c: c.all_reduce(np.ones(100_000, np.float32), codec="int8"),
    "async": lambda c: c.all_reduce(np.ones(100_000), async_op=True).wait(),
    "broadcast": lambda c: c.broadcast(np.ones(100_000), 0),
    "gather": lambda c: c.gather(np.ones(1000), 0),
}


def wait_for(comm: Communicator, what: str, port: int, ends: str) -> tuple[str, float]:
    """Rank 1 ends, or does not come, when rank 0 waits for it."""
    comm.use_device("simt")
    for _ in range(3):
        comm.all_reduce(np.ones(1000))
    comm.synchronize()
    store = TCPStore(port=port, is_server=False)
    if comm.rank == 1:
        store.get("waits")
        if ends == "dies":
            store.set("ended", str(time.monotonic()).encode())
            os.kill(os.getpid(), signal.SIGKILL)
        store.get("failed")
        return "", 0.0
    kind = PeerLostError if ends == "dies" else DeadlineError
    store.set("waits", b"")
    with pytest.raises(kind) as caught:
        call_and_settle(comm, CALLS[what])
    when = time.monotonic()
    store.set("failed", b"")
    for call in (comm.synchronize, comm.barrier, lambda: comm.all_reduce(np.ones(5))):
        with pytest.raises(kind) as again:
            call()
        assert str(again.value) == str(caught.value)
    comm.close()
    assert time.monotonic() - when < 2, "close() ends kernels that wait"
    return str(caught.value), when


# The root of a broadcast through the host waits for nobody.
WAITING = [pair for pair in itertools.product(MODES, CALLS) if pair != ("host", "broadcast")]


@pytest.mark.parametrize(("mode", "what"), WAITING)
def test_a_killed_peer_is_named_at_once(pools: Pools, mode: str, what: str) -> None:
    store = TCPStore(is_server=True, timeout=20)
    outcomes = pools(mode).outcomes(2, wait_for, what, store.port, "dies")
    assert [outcome.kind for outcome in outcomes] == ["value", "gone"], outcomes
    text, when = outcomes[0].value
    assert "rank 1 (pid" in text
    assert "died" in text
    assert when - float(store.get("ended")) < 2
    store.close()


def late(comm: Communicator, what: str, port: int) -> str:
    comm.use_device("simt")
    comm.all_reduce(np.ones(1000))
    comm.synchronize()
    store = TCPStore(port=port, is_server=False)
    if comm.rank == 1:
        store.get("failed")
        with pytest.raises(DeadlineError) as caught:
            CALLS[what](comm)
        return str(caught.value)
    with pytest.raises(DeadlineError) as caught:
        call_and_settle(comm, CALLS[what])
    store.set("failed", b"")
    assert caught.value.rank == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("mode", "what"), [("in_kernel", "small"), ("in_kernel", "large"), ("stepped", "codec")]
)
def test_a_late_rank_is_named_on_all_ranks(pools: Pools, mode: str, what: str) -> None:
    store = TCPStore(is_server=True, timeout=20)
    texts = pools(mode).run(2, late, what, store.port, timeout=1.0)
    store.close()
    assert texts[0] == texts[1]
    assert "rank 1 (pid" in texts[0]
    assert "did not come within 1 s" in texts[0]
    assert "of group 'world'" in texts[0]


def abort(comm: Communicator, port: int) -> float:
    comm.use_device("simt")
    comm.all_reduce(np.ones(1000))
    comm.synchronize()
    store = TCPStore(port=port, is_server=False)
    if comm.rank == 1:
        store.get("queued")
        store.set("aborted", str(time.monotonic()).encode())
        comm.abort("the loss is NaN")
        with pytest.raises(AbortedError, match="the loss is NaN"):
            comm.all_reduce(np.ones(4))
        return 0.0
    work = comm.all_reduce(np.ones(100_000), async_op=True)
    store.set("queued", b"")
    with pytest.raises(AbortedError, match="the loss is NaN"):
        call_and_settle(comm, lambda _: work.wait())
    return time.monotonic() - float(store.get("aborted"))


@pytest.mark.parametrize("mode", MODES)
def test_abort_frees_those_who_wait(pools: Pools, mode: str) -> None:
    store = TCPStore(is_server=True, timeout=20)
    assert pools(mode).run(2, abort, store.port)[0] < 1.5
    store.close()


def close_at_once(comm: Communicator, rounds: int) -> None:
    """Whoever closes first has got all, and takes nothing from the others."""
    comm.use_device("simt")
    inputs = random_inputs("float32", 20_000, comm.world_size, rounds)
    x = inputs[comm.rank].copy()
    for _ in range(rounds):
        comm.broadcast(x, 0)
    comm.close()
    assert_same_bits(x, inputs[0] if rounds else inputs[comm.rank], rounds)
    with pytest.raises(AbortedError):
        comm.synchronize()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rounds", [0, 1, 5])
def test_close_waits_for_the_gpu(pools: Pools, mode: str, rounds: int) -> None:
    for _ in range(3):
        pools(mode).run(2, close_at_once, rounds)


def leave_early(comm: Communicator) -> str:
    comm.use_device("simt")
    comm.all_reduce(np.ones(1000))
    if comm.rank == 1:
        comm.close()
        return ""
    with pytest.raises(PeerLostError) as caught:
        call_and_settle(comm, lambda c: [c.all_reduce(np.ones(1000)) for _ in range(3)])
    return str(caught.value)


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_that_closes_is_named_by_those_who_need_it(pools: Pools, mode: str) -> None:
    text = pools(mode).run(2, leave_early)[0]
    assert "rank 1 (pid" in text
    assert "closed group 'world' after" in text
