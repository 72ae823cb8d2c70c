"""Messages between two ranks: every byte, in order, whatever the size, tag, source and timing."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ringcomm
from ringcomm import Communicator
from ringcomm.errors import AbortedError, DeadlineError, MismatchError, UsageError
from ringcomm.store import TCPStore
from tests.worlds import Worlds

SLOTS, EAGER_BYTES = 8, 4096
PIECE = 128 * 1024
SIZES = (0, 1, 1000, EAGER_BYTES, EAGER_BYTES + 1, PIECE, 5 * PIECE + 3)


def content(src: int, dst: int, tag: int, number: int, num_bytes: int) -> Any:
    """What a message holds; no two of a test are alike."""
    seed = [src, dst, tag, number, num_bytes]
    return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)


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


def everybody_to_everybody(comm: Communicator, seed: int, rounds: int, max_bytes: int) -> None:
    """Sizes and tags are a function of (src, dst, number); calls are in another order on each rank."""
    n = comm.world_size
    each = 4

    def size_of(src: int, dst: int, number: int) -> int:
        dice = np.random.default_rng([seed, src, dst, number])
        return int(max_bytes ** dice.random()) - 1 if dice.random() < 0.8 else 0

    for turn in range(rounds):
        dice = np.random.default_rng([seed, comm.rank, turn])
        sends, receives = [], []
        expected = {}
        calls = [("send", peer, k) for peer in range(n) for k in range(each)]
        calls += [("recv", peer, k) for peer in range(n) for k in range(each)]
        if turn % 2:  # all sends first: what every rank can do without a deadlock
            dice.shuffle(calls)
        for what, peer, k in calls:
            number = turn * each + k
            if what == "send":
                size = size_of(comm.rank, peer, number)
                x = content(comm.rank, peer, k, number, size)
                sends.append(comm.send(x, peer, k, async_op=True))
            else:
                got = np.full(size_of(peer, comm.rank, number), 255, np.uint8)
                expected[len(receives)] = (peer, k, number, got)
                receives.append(comm.recv(got, peer, k, async_op=True))
        order = list(expected)
        dice.shuffle(order)
        for i in order:
            peer, k, number, got = expected[i]
            assert receives[i].wait() == peer
            np.testing.assert_array_equal(got, content(peer, comm.rank, k, number, got.size))
        for work in sends:
            work.wait()


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


# ---- threads, collectives, the background --------------------------------------------------------


def one_tag_per_thread(comm: Communicator) -> None:
    errors: list[BaseException] = []
    others = [rank for rank in range(comm.world_size) if rank != comm.rank]

    def talk(tag: int) -> None:
        try:
            dice = np.random.default_rng([tag])
            for number in range(25):
                size = int(dice.integers(0, 20_000))
                for peer in others:  # the lower rank speaks first
                    x = content(comm.rank, peer, tag, number, size)
                    y = np.empty_like(x)
                    if comm.rank < peer:
                        comm.send(x, peer, tag)
                        comm.recv(y, peer, tag)
                    else:
                        comm.recv(y, peer, tag)
                        comm.send(x, peer, tag)
                    np.testing.assert_array_equal(y, content(peer, comm.rank, tag, number, size))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=talk, args=(tag,)) for tag in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_many_threads_may_send_and_receive(worlds: Worlds) -> None:
    worlds.run(2, one_tag_per_thread)
    worlds.run(3, one_tag_per_thread)


def beside_collectives(comm: Communicator) -> None:
    errors: list[BaseException] = []

    def reduce() -> None:
        try:
            for k in range(60):
                x = np.full((10, 50_000)[k % 2], comm.rank + k, np.float32)
                comm.all_reduce(x)
                assert (x == sum(range(comm.world_size)) + k * comm.world_size).all()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=reduce)
    thread.start()
    everybody_to_everybody(comm, 4, 6, 300_000)
    thread.join()
    if errors:
        raise errors[0]


def test_messages_run_beside_collectives_of_another_thread(worlds: Worlds) -> None:
    worlds.run(2, beside_collectives)
    worlds.run(3, beside_collectives)


def wait_for_each_other(comm: Communicator) -> None:
    """A pending receive holds up no collective, a pending collective no message."""
    big = np.zeros(100_000)
    if comm.rank == 0:
        work = comm.recv(big, 1, async_op=True)
        comm.all_reduce(np.ones(10))
        comm.all_reduce(np.ones(100_000))
        assert work.wait() == 1
        assert (big == 1).all()
        reduced = comm.all_reduce(np.ones(30_000), async_op=True)
        comm.send(np.full(100_000, 3.0), 1)  # rank 1 reduces only when it has this
        assert (reduced.wait() == 2).all()
        return
    comm.all_reduce(np.ones(10))
    comm.all_reduce(np.ones(100_000))
    comm.send(np.ones(100_000), 0)
    comm.recv(big, 0)
    assert (big == 3).all()
    assert (comm.all_reduce(np.ones(30_000)) == 2).all()


def test_messages_and_collectives_do_not_wait_for_each_other(worlds: Worlds) -> None:
    worlds.run(2, wait_for_each_other)


def nobody_waits(comm: Communicator, port: int) -> None:
    """Rank 0 never waits for its messages: they move by themselves."""
    store = TCPStore(port=port, is_server=False)
    if comm.rank == 0:
        got = np.zeros(500_000)
        receive = comm.recv(got, 1, async_op=True)
        send = comm.send(np.full(500_000, 5.0), 1, async_op=True)
        store.get("done")
        while not (receive.done() and send.done()):
            time.sleep(0.001)
        assert receive.wait() == 1
        assert (got == 6).all()
        return
    x = np.empty(500_000)
    comm.recv(x, 0)
    assert (x == 5).all()
    comm.send(np.full(500_000, 6.0), 0)
    store.set("done", b"")


def test_asynchronous_messages_move_while_nobody_waits_for_them(worlds: Worlds) -> None:
    store = TCPStore(is_server=True)
    worlds.run(2, nobody_waits, store.port)
    store.close()


def pass_around(comm: Communicator) -> float:
    """More ranks than cores, as a rule: all but one sleep."""
    token = np.zeros(1)
    n = comm.world_size
    laps = []
    comm.barrier()
    for _ in range(40):
        begin = time.monotonic()
        if comm.rank == 0:
            comm.send(token, 1)
            comm.recv(token, n - 1)
        else:
            comm.recv(token, comm.rank - 1)
            comm.send(token, (comm.rank + 1) % n)
        laps.append(time.monotonic() - begin)
    return sorted(laps)[10]


def test_a_message_wakes_the_rank_that_waits_for_it(worlds: Worlds) -> None:
    # Who sleeps without being woken looks every 20 ms, so that no lap takes less.
    assert max(worlds.run(6, pass_around)) < 0.014


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


# ---- arrays and arguments ------------------------------------------------------------------------


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
