"""Messages between two ranks: every byte, in order, whatever the size, tag, source and timing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator
from ringcomm.errors import UsageError
from ringcomm.store import TCPStore
from tests.comm.messages import EAGER_BYTES, SIZES, SLOTS, content, everybody_to_everybody
from tests.worlds import Worlds

# ---- order, tags, sources ------------------------------------------------------------------------


def one_after_the_other(comm: Communicator) -> None:
    """Sizes on both sides of every threshold, up and down, alone in flight and not."""
    sizes = [*SIZES, *reversed(SIZES)] * 2
    for number, size in enumerate(sizes):
        if comm.rank == 0:
            x = content(0, 1, 7, number, size)
            assert comm.send(x, 1, 7) is x
        else:
            got = np.full(size, 255, np.uint8)
            assert comm.recv(got, 0, 7) == 0
            np.testing.assert_array_equal(got, content(0, 1, 7, number, size))


@pytest.mark.parametrize("staging_kib", [None, 16])
def test_messages_arrive_in_the_order_in_which_they_were_sent(
    worlds: Worlds, staging_kib: int | None
) -> None:
    worlds.run(2, one_after_the_other, staging_kib=staging_kib)
    worlds.run_threads(2, one_after_the_other, staging_kib=staging_kib)


def tags_backwards(comm: Communicator) -> None:
    """60 messages of 5 tags: the receiver takes the tag that was sent last first."""
    tags, each = (3, 0, 2**31 - 1, 9, 4), 12
    if comm.rank == 1:
        works = [
            comm.send(content(1, 0, tag, n, SIZES[n % 7]), 0, tag, async_op=True)
            for tag in tags
            for n in range(each)
        ]
        for work in works:
            work.wait()
        return
    for tag in reversed(tags):
        for n in range(each):
            got = np.empty(SIZES[n % 7], np.uint8)
            assert comm.recv(got, 1, tag) == 1
            np.testing.assert_array_equal(got, content(1, 0, tag, n, SIZES[n % 7]))


def test_tags_may_be_received_in_any_order(worlds: Worlds) -> None:
    worlds.run(2, tags_backwards)


def receives_in_order(comm: Communicator) -> None:
    """Receives that match the same messages get them in the order in which they were posted."""
    count = 40
    if comm.rank == 0:
        got = np.full((count, 6000), -1, np.int32)
        works = [comm.recv(got[n], 1 if n % 2 else None, async_op=True) for n in range(count)]
        comm.barrier()
        assert [work.wait() for work in reversed(works)] == [1] * count
        assert (got == np.arange(count)[:, None]).all()
        return
    comm.barrier()
    for n in range(count):
        comm.send(np.full(6000, n, np.int32), 0)


def test_pending_receives_match_in_the_order_in_which_they_were_posted(worlds: Worlds) -> None:
    worlds.run(2, receives_in_order)


def from_anyone(comm: Communicator) -> list[int]:
    each = 200
    n = comm.world_size
    if comm.rank:
        # Enough in flight that rank 0 always has a choice.
        works = [comm.send(np.array([comm.rank, k]), 0, 5, async_op=True) for k in range(each)]
        comm.barrier()
        for work in works:
            work.wait()
        return []
    comm.barrier()
    order, seen = [], [0] * n
    got = np.empty(2, np.int64)
    for _ in range(each * (n - 1)):
        source = comm.recv(got, tag=5)
        assert got.tolist() == [source, seen[source]]
        seen[source] += 1
        order.append(source)
    return order


def test_receives_from_anyone_say_whom_and_serve_all(worlds: Worlds) -> None:
    order = worlds.run(4, from_anyone)[0]
    assert [order.count(rank) for rank in range(4)] == [0, 200, 200, 200]
    # While all have messages waiting, as many as there are slots at first, they take turns.
    assert order[: 3 * SLOTS] == [1, 2, 3] * SLOTS


def first_who_comes(comm: Communicator, port: int) -> None:
    store = TCPStore(port=port, is_server=False)
    got = np.empty(100_000, np.int64)
    if comm.rank == 0:
        work = comm.recv(got, tag=1, async_op=True)
        other = comm.recv(got[:1], 1, 2, async_op=True)
        comm.barrier()
        assert work.wait() == 2
        assert (got == 2).all()
        store.set("got", b"")
        assert other.wait() == 1
        assert got[0] == 77
        return
    comm.barrier()
    if comm.rank == 2:
        comm.send(np.full_like(got, 2), 0, 1)
    else:
        store.get("got")
        comm.send(np.array([77]), 0, 2)


def test_a_receive_from_anyone_takes_whoever_comes_first(worlds: Worlds) -> None:
    store = TCPStore(is_server=True)
    worlds.run(3, first_who_comes, store.port)
    store.close()


# ---- many at once --------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("first_seq", [0, 2**32 - 5])
def test_everybody_sends_to_everybody_in_any_order(
    worlds: Worlds, world_size: int, first_seq: int
) -> None:
    worlds.run(world_size, everybody_to_everybody, 1, 4, 3 << 20, first_seq=first_seq)


@pytest.mark.parametrize("first_seq", [2**32 - 3, 2**31 - 3])
def test_everybody_sends_to_everybody_through_tiny_buffers_across_wrap_around(
    worlds: Worlds, first_seq: int
) -> None:
    options = {"first_seq": first_seq, "staging_kib": 16}
    worlds.run(3, everybody_to_everybody, 2, 6, 60_000, **options)
    worlds.run_threads(3, everybody_to_everybody, 3, 4, 60_000, **options)


def more_than_slots(comm: Communicator) -> None:
    """Eight short messages go out with nobody there to receive them; the ninth waits."""
    if comm.rank == 0:
        for k in range(SLOTS):
            comm.send(np.full(EAGER_BYTES // 8, k), 1, k)
        ninth = comm.send(np.array([99]), 1, 99, async_op=True)
        with pytest.raises(TimeoutError, match="still running"):
            ninth.wait(timeout=0.01)
        comm.barrier()
        ninth.wait()
        return
    comm.barrier()
    got = np.empty(EAGER_BYTES // 8, np.int64)
    last = np.zeros(1, np.int64)
    comm.recv(last, 0, 99)  # eight others have to be moved away first
    assert last[0] == 99
    for k in reversed(range(SLOTS)):
        comm.recv(got, 0, k)
        assert (got == k).all()


def test_short_messages_wait_in_slots_and_never_stop_a_later_one(worlds: Worlds) -> None:
    worlds.run(2, more_than_slots)


def many_pending(comm: Communicator) -> None:
    count = 600
    peer = 1 - comm.rank
    got = np.full((count, 2000), -1, np.float64)
    receives = [comm.recv(got[k], peer, k, async_op=True) for k in reversed(range(count))]
    sends = [comm.send(np.full(2000, float(k)), peer, k, async_op=True) for k in range(count)]
    for work in (*sends, *receives):
        work.wait()
    assert (got == np.arange(count, dtype=float)[:, None]).all()
    assert not comm._messages  # the arrays are not kept any longer


def test_hundreds_may_be_pending(worlds: Worlds) -> None:
    worlds.run(2, many_pending)


def dropped(comm: Communicator) -> None:
    """A Work may be dropped: its arrays live until the message is done, and not much longer."""
    if comm.rank == 0:
        for k in range(200):
            comm.send(np.full(10_000, k), 1, async_op=True)
            comm.recv(np.empty(1), 1)
        assert len(comm._messages) <= 20, "the arrays of finished messages are released"
        return
    got = np.empty(10_000, np.int64)
    for k in range(200):
        comm.recv(got, 0)
        assert (got == k).all()
        comm.send(np.zeros(1), 0)


def test_a_work_may_be_dropped(worlds: Worlds) -> None:
    worlds.run(2, dropped)


# ---- to itself -----------------------------------------------------------------------------------


def to_itself(comm: Communicator) -> None:
    for size in SIZES:
        x = content(comm.rank, comm.rank, 0, 0, size)
        for source in (comm.rank, None):
            got = np.full(size, 255, np.uint8)
            receive = comm.recv(got, source, 1, async_op=True)
            comm.send(x, comm.rank, 1)
            assert receive.wait() == comm.rank
            np.testing.assert_array_equal(got, x)
            got[:] = 255
            send = comm.send(x, comm.rank, 1, async_op=True)
            assert not send.done()
            assert comm.recv(got, source, 1) == comm.rank
            assert send.wait() is x
            np.testing.assert_array_equal(got, x)
    with pytest.raises(UsageError, match=r"call recv\(async_op=True\) first"):
        comm.send(np.ones(3), comm.rank, 1)
    waits = comm.recv(np.ones(3), comm.rank, 2, async_op=True)
    with pytest.raises(UsageError, match="sends to itself with tag 1 but no matching recv"):
        comm.send(np.ones(3), comm.rank, 1)
    comm.send(np.ones(3), comm.rank, 2)
    waits.wait()
    comm.barrier()  # the communicator is as good as before


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_rank_may_send_to_itself(worlds: Worlds, world_size: int) -> None:
    worlds.run(world_size, to_itself)


# ---- arrays --------------------------------------------------------------------------------------


def kinds_of_arrays(comm: Communicator) -> None:
    import torch

    peer = 1 - comm.rank
    matrix = np.arange(600, dtype=np.float64).reshape(20, 30)
    frozen = matrix.copy()
    frozen.flags.writeable = False
    tensor = torch.arange(600, dtype=torch.bfloat16).reshape(20, 30)
    scalar = np.array(3, np.int32)
    for async_op in (False, True):

        def exchange(x: Any, y: Any, async_op: bool = async_op) -> None:
            work = comm.recv(y, peer, 4, async_op=True)
            sent = comm.send(x, peer, 4, async_op)
            assert (sent.wait() if async_op else sent) is x
            assert work.wait() == peer
            assert work.wait() == peer

        got = np.zeros((30, 20))
        exchange(matrix.T, got)
        np.testing.assert_array_equal(got, matrix.T)
        got = np.zeros((30, 20))
        exchange(frozen, got.T)
        np.testing.assert_array_equal(got.T, matrix)
        wide = np.zeros((20, 60))
        exchange(matrix, wide[:, ::2])
        np.testing.assert_array_equal(wide[:, ::2], matrix)
        assert (wide[:, 1::2] == 0).all()
        other = torch.zeros(30, 20, dtype=torch.bfloat16)
        exchange(tensor.T, other)
        assert torch.equal(other, tensor.T)
        number = np.array(0, np.int32)
        exchange(scalar, number)
        assert number == 3
        exchange(np.empty((0, 4)), np.empty(0))
        # bytes count, not dtypes
        numbers = np.zeros(4, np.uint8)
        exchange(np.array([1], np.int32), numbers)
        assert numbers.tolist() == [1, 0, 0, 0]
    wide = np.zeros((20, 60))
    if comm.rank == 0:
        comm.send(matrix, 1)
    else:
        assert comm.recv(wide[:, ::2], 0) == 0  # synchronous, into a strided array
        np.testing.assert_array_equal(wide[:, ::2], matrix)


def test_all_kinds_of_arrays(worlds: Worlds) -> None:
    worlds.run(2, kinds_of_arrays)


def counts(comm: Communicator) -> None:
    if comm.rank == 0:
        comm.send(np.ones(1000), 1)
        comm.send(np.ones(10_000), 1)
    else:
        comm.recv(np.ones(1000), 0)
        comm.recv(np.ones(10_000), 0)
        work = comm.recv(np.ones(10), 1, async_op=True)
        comm.send(np.ones(10), 1)
        work.wait()
    stats = comm.stats()
    own = 80 * comm.rank
    if comm.rank == 0:
        assert set(stats) == {"send"}
        assert stats["send"]["calls"] == 2
        assert stats["send"]["bytes"] == stats["send"]["bytes_sent"] == 88_000
    else:
        assert stats["send"]["bytes"] == own
        assert stats["send"]["bytes_sent"] == 0  # nobody else has them
        assert stats["recv"]["calls"] == 3
        assert stats["recv"]["bytes"] == 88_000 + own
        assert stats["recv"]["bytes_sent"] == 0
        assert stats["recv"]["seconds"] > 0
    comm.reset_stats()
    assert comm.stats() == {}


def test_stats_count_messages(worlds: Worlds) -> None:
    worlds.run(2, counts)


HUGE = 2**31 + 12_345


def huge(comm: Communicator) -> None:
    places = [0, 2**31 - 1, 2**31, HUGE - 1]
    if comm.rank == 0:
        x = np.zeros(HUGE, np.uint8)  # pages that are only read cost no memory
        x[places] = [1, 2, 3, 4]
        comm.send(x, 1)
    else:
        got = np.empty(HUGE, np.uint8)
        comm.recv(got, 0)
        assert got[places].tolist() == [1, 2, 3, 4]
        assert np.count_nonzero(got) == 4


def test_more_than_two_gigabytes(worlds: Worlds) -> None:
    available = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    if available < 5 << 20:  # KiB
        pytest.skip("needs 5 GiB of free memory")
    worlds.run(2, huge, timeout=60.0, deadline=90.0)
