"""Messages that cannot be: bad arguments, disagreement and deadlines; and what comes of messages at the end."""

import time
from typing import Any

import numpy as np
import pytest

import ringcomm
from ringcomm import Communicator
from ringcomm.errors import AbortedError, DeadlineError, MismatchError, UsageError
from ringcomm.store import TCPStore
from tests.comm.messages import content, everybody_to_everybody
from tests.worlds import Worlds


def bad_arguments(comm: Communicator) -> None:
    x = np.ones(3)
    n = comm.world_size
    for call in (comm.send, comm.recv):
        role = "dst" if call == comm.send else "src"
        for peer in (-1, n, 2**40):
            with pytest.raises(UsageError, match=f"{role} must be 0 to {n - 1}, not"):
                call(x, peer)
        for tag in (-1, 2**31, 2**70):
            with pytest.raises(UsageError, match="tag of a message must be 0 to 2147483647"):
                call(x, 0, tag)
        with pytest.raises(UsageError, match=r"tag of a message must be a whole number.*'step'"):
            call(x, 0, tag="step")
        with pytest.raises(UsageError, match=f"{role} of a message must be a whole number"):
            call(x, 0.5)
        with pytest.raises(UsageError, match="x: "):
            call("text", 0)
        with pytest.raises(UsageError, match="not supported"):
            call(np.ones(3, "datetime64[s]"), 0)
    frozen = np.ones(3)
    frozen.flags.writeable = False
    with pytest.raises(UsageError, match="read-only"):
        comm.recv(frozen, 0)
    with pytest.raises(UsageError, match="dst must be 0 to"):
        comm._core.send(0, 0, n, 0)
    with pytest.raises(UsageError, match="num_bytes must not be negative"):
        comm._core.send(0, -1, 0, 0)
    with pytest.raises(UsageError, match="tag of a message must not be negative"):
        comm._core.recv(0, 0, 0, -1)
    with pytest.raises(UsageError, match="or -1 for any rank"):
        comm._core.recv(0, 0, -2, 0)
    peer = (comm.rank + 1) % n
    work = comm.recv(x, np.int64((comm.rank - 1) % n), np.uint8(3), async_op=True)
    comm.send(np.zeros(3), np.int32(peer), np.int64(3))
    work.wait()
    assert (x == 0).all()


@pytest.mark.parametrize("world_size", [1, 2])
def test_bad_arguments_are_usage_errors_and_cost_nothing(worlds: Worlds, world_size: int) -> None:
    worlds.run(world_size, bad_arguments)


# ---- disagreement, deadline, the end -------------------------------------------------------------


def receive_wrongly(comm: Communicator, num_bytes: int, how: str) -> None:
    got = np.ones(num_bytes, np.uint8)
    if how == "posted":
        comm.recv(got, 1, 3)
    elif how == "any":
        comm.recv(got, tag=3, async_op=True).wait()
    else:  # the message is here before its receive
        other = comm.recv(np.ones(1), 1, 4, async_op=True)
        with pytest.raises(TimeoutError):
            other.wait(0.05)
        comm.recv(got, 1, 3)


def wrong_size(comm: Communicator, sent: int, expected: int, how: str) -> str:
    def send_and_wait() -> None:
        comm.send(np.ones(sent, np.uint8), 0, 3)
        comm.barrier()

    # Rank 2 is in a collective that the others never finish.
    calls = [lambda: receive_wrongly(comm, expected, how), send_and_wait, comm.barrier]
    with pytest.raises(MismatchError) as caught:
        calls[comm.rank]()
    with pytest.raises(MismatchError):  # for ever, and for everything
        comm.send(np.ones(1), 2)
    return str(caught.value)


@pytest.mark.parametrize("how", ["posted", "any", "late"])
@pytest.mark.parametrize(("sent", "expected"), [(400, 404), (100_000, 0), (0, 100_000)])
def test_a_receive_of_another_size_is_a_mismatch_on_all_ranks(
    worlds: Worlds, sent: int, expected: int, how: str
) -> None:
    texts = worlds.run(3, wrong_size, sent, expected, how)
    assert len(set(texts)) == 1
    source = "any rank" if how == "any" else "rank 1"
    assert f"rank 1 called send of {sent} bytes with tag 3 to rank 0" in texts[0]
    assert f"rank 0 called recv of {expected} bytes with tag 3 from {source}" in texts[0]
    assert "The communicator is lost" in texts[0]


def wrong_size_to_itself(comm: Communicator) -> None:
    work = comm.send(np.ones(3), 0, async_op=True)
    with pytest.raises(MismatchError, match="rank 0 called send of 24 bytes with tag 0 to rank 0"):
        comm.recv(np.ones(2), 0)
    with pytest.raises(MismatchError):
        work.wait()


def test_a_message_to_itself_of_another_size_is_a_mismatch(worlds: Worlds) -> None:
    worlds.run(1, wrong_size_to_itself)


def pending_beside_others(comm: Communicator, x: Any) -> None:
    """Nobody waits for the message to ``x``, and others go on."""
    comm.recv(x, 1, 6, async_op=True)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        comm.send(np.ones(1), 0, 1, async_op=True)
        comm.recv(np.ones(1), 0, 1)


NEVER = {
    "recv": lambda c, x: c.recv(x, 1, 6),
    "any": lambda c, x: c.recv(x, tag=6),
    "send": lambda c, x: c.send(x, 1, 6),
    "async": pending_beside_others,
}


def never_comes(comm: Communicator, what: str, port: int) -> str:
    store = TCPStore(port=port, is_server=False)
    if comm.rank == 1:
        store.get("late")
        with pytest.raises(DeadlineError) as caught:
            comm.recv(np.ones(1), 0)
        return str(caught.value)
    begin = time.monotonic()
    with pytest.raises(DeadlineError) as caught:
        NEVER[what](comm, np.ones(100_000))
    assert 0.5 <= time.monotonic() - begin < 1.5
    assert caught.value.rank == (None if what == "any" else 1)
    store.set("late", b"")
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "pieces"),
    [
        ("recv", ["did not send it within 0.5 s", "recv of 800000 bytes with tag 6 from rank 1"]),
        ("any", ["no rank sent it within 0.5 s", "recv of 800000 bytes with tag 6 from any rank"]),
        ("send", ["did not receive it within 0.5 s", "send of 800000 bytes with tag 6 to rank 1"]),
        ("async", ["did not send it within 0.5 s", "recv of 800000 bytes with tag 6 from rank 1"]),
    ],
)
def test_a_message_that_never_comes_is_named_at_the_deadline(
    worlds: Worlds, what: str, pieces: list[str]
) -> None:
    store = TCPStore(is_server=True)
    texts = worlds.run(2, never_comes, what, store.port, timeout=0.5)
    store.close()
    assert texts[0] == texts[1]
    for piece in pieces:
        assert piece in texts[0]
    assert ("it has not called any collective yet" in texts[0]) == (what != "any")


def gone_after_sending(comm: Communicator) -> None:
    """What a rank sent before it closed can still be received, to the last byte."""
    if comm.rank == 1:
        comm.barrier()
        for tag in range(4):
            comm.send(content(1, 0, tag, 0, 3000), 0, tag)
        comm.send(content(1, 0, 9, 0, 500_000), 0, 9, async_op=True)
        comm.close()  # finishes the pending one
        return
    comm.barrier()
    got = np.empty(500_000, np.uint8)
    assert comm.recv(got, 1, 9) == 1
    np.testing.assert_array_equal(got, content(1, 0, 9, 0, 500_000))
    for tag in reversed(range(4)):
        assert comm.recv(got[:3000], 1 if tag else None, tag) == 1
        np.testing.assert_array_equal(got[:3000], content(1, 0, tag, 0, 3000))


def test_messages_outlive_the_communicator_that_sent_them(worlds: Worlds) -> None:
    worlds.run(2, gone_after_sending)


def close_with_receives(comm: Communicator) -> None:
    """close() ends receives that nothing has come for, and lets what has begun finish."""
    others = np.zeros((6, 200_000))
    if comm.rank == 0:
        lonely = comm.recv(np.ones(10), async_op=True, tag=50)
        begun = [comm.recv(others[k], 1, k, async_op=True) for k in range(6)]
        to_itself = comm.send(np.ones(3), 0, 51, async_op=True)
        comm.barrier()
        comm.close()
        for work in begun:
            assert work.wait() == 1
        assert (others == np.arange(6)[:, None]).all()
        for work in (lonely, to_itself):
            assert work.done()
            with pytest.raises(AbortedError, match=r"rank 0 closed group 'world' before"):
                work.wait()
        with pytest.raises(AbortedError, match=r"closed; init\(\) a new one"):
            comm.recv(np.ones(1), 1)
        with pytest.raises(AbortedError, match=r"closed; init\(\) a new one"):
            comm.send(np.ones(1), 1, async_op=True)
        return
    works = [comm.send(np.full(200_000, float(k)), 0, k, async_op=True) for k in range(6)]
    comm.barrier()
    for work in works:
        work.wait()


def test_close_finishes_what_has_begun(worlds: Worlds) -> None:
    worlds.run(2, close_with_receives)


def many_communicators(comm: Communicator, port: int) -> None:
    store = TCPStore(port=port, is_server=False)
    for turn in range(6):
        with ringcomm.init(comm.rank, comm.world_size, store=store, timeout=20) as other:
            everybody_to_everybody(other, turn, 1, 30_000)


def test_communicators_with_messages_come_and_go(worlds: Worlds) -> None:
    store = TCPStore(is_server=True)
    worlds.run(2, many_communicators, store.port)
    worlds.run_threads(2, many_communicators, store.port)
    store.close()
