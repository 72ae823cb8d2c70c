"""Messages go on whatever else a rank does: in threads, beside collectives, and while nobody waits for them."""

import threading
import time

import numpy as np

from ringcomm import Communicator
from ringcomm.store import TCPStore
from tests.comm.messages import content, everybody_to_everybody
from tests.worlds import Worlds


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
