"""Asynchronous calls: order, results, errors, many threads."""

import threading
import time

import numpy as np
import pytest

from ringcomm import Communicator
from tests.worlds import Worlds


def check_order(comm: Communicator) -> None:
    # x -> sum -> sum of sums, asynchronous and synchronous calls taking turns.
    n = comm.world_size
    x = np.ones(5000, np.float32)
    works = [comm.all_reduce(x, async_op=True) for _ in range(5)]
    comm.all_reduce(x)  # waits for its turn: everything before it is done
    assert all(work.done() for work in works)
    assert (x == n**6).all()
    results = [work.wait() for work in works]
    assert all(result is x for result in results)
    first = comm.broadcast(np.full(10, comm.rank), n - 1, async_op=True)
    gathered = comm.all_gather(np.array([comm.rank]), async_op=True)
    scattered = comm.reduce_scatter(np.ones(2 * n, np.float32), async_op=True)
    comm.barrier()
    assert first.wait().tolist() == [n - 1] * 10
    assert gathered.wait().tolist() == [[r] for r in range(n)]
    assert scattered.wait().tolist() == [n, n]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_calls_run_in_the_order_in_which_they_were_made(worlds: Worlds, world_size: int) -> None:
    worlds.run(world_size, check_order)


def check_views(comm: Communicator) -> None:
    x = np.zeros((4, 6), np.float32)
    x[:, ::2] = 1
    work = comm.all_reduce(x[:, ::2], async_op=True)
    work.wait()
    work.wait()  # copies back once
    assert (x[:, ::2] == comm.world_size).all()
    assert (x[:, 1::2] == 0).all()


def test_a_non_contiguous_result_is_written_back_by_wait(worlds: Worlds) -> None:
    worlds.run(2, check_views)


def check_dropped(comm: Communicator) -> None:
    keep = np.ones(200_000, np.float32)
    for _ in range(5):
        comm.all_reduce(np.ones(200_000, np.float32), async_op=True)  # nobody holds the array
    comm.all_reduce(keep)
    assert (keep == comm.world_size).all()


def check_wait_timeout(comm: Communicator) -> None:
    x = np.ones(4, np.float32)
    if comm.rank == 0:
        work = comm.all_reduce(x, async_op=True)
        with pytest.raises(TimeoutError, match=r"still running after 0\.05 s"):
            work.wait(0.05)
        assert not work.done()
        comm._test_event.set()
        work.wait()
    else:
        comm._test_event.wait()
        comm.all_reduce(x)
    assert (x == 2).all()


_event = threading.Event()


def with_event(comm: Communicator) -> None:
    comm._test_event = _event
    check_wait_timeout(comm)


def test_wait_with_a_timeout_gives_up_waiting_and_not_the_call(worlds: Worlds) -> None:
    worlds.run_threads(2, with_event)


def check_threads(comm: Communicator) -> int:
    # Every thread makes its own kind of call; the tags make sure that ranks agree on the order.
    turn = threading.Condition()
    order = [0]
    failures: list[BaseException] = []

    def run(thread: int) -> None:
        try:
            for call in range(thread, 120, 6):
                x = np.full(10 + thread, call, np.float32)
                with turn:
                    turn.wait_for(lambda call=call: order[0] == call, 30)
                    work = comm.all_reduce(x, async_op=True, tag=f"call {call}")
                    order[0] += 1
                    turn.notify_all()
                work.wait()
                assert (x == call * comm.world_size).all()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return int(comm.stats()["all_reduce"]["calls"])


@pytest.mark.parametrize("world_size", [2, 3])
def test_many_threads_may_call_at_once(worlds: Worlds, world_size: int) -> None:
    assert worlds.run(world_size, check_threads) == [120] * world_size


def check_unordered_threads(comm: Communicator) -> None:
    # The same call from all threads: any order is the same order.
    totals = []

    def run() -> None:
        for _ in range(30):
            x = np.ones(3000, np.float32)
            comm.all_reduce(x)
            totals.append((x == comm.world_size).all())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(totals) == 120
    assert all(totals)


def test_synchronous_calls_of_many_threads_take_turns(worlds: Worlds) -> None:
    worlds.run(2, check_unordered_threads)
    worlds.run(2, check_dropped)


def close_with_pending(comm: Communicator) -> None:
    x = np.ones(100_000, np.float32)
    work = comm.all_reduce(x, async_op=True)
    comm.close()
    assert work.done()
    assert (work.wait() == comm.world_size).all()


def test_close_finishes_pending_calls(worlds: Worlds) -> None:
    worlds.run(3, close_with_pending)


def use_while_closing(comm: Communicator) -> None:
    from ringcomm.errors import AbortedError

    started = threading.Event()
    ended: list[str] = []

    def run() -> None:
        started.set()
        try:
            while True:
                comm.all_reduce(np.ones(10, np.float32), async_op=True)
        except AbortedError as error:
            ended.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    time.sleep(0.002 * comm.rank)  # another moment of the race each time
    comm.close()
    thread.join()
    assert "closed" in ended[0]


def test_closing_while_another_thread_calls_ends_that_thread_with_an_error(worlds: Worlds) -> None:
    for _ in range(20):
        worlds.run(1, use_while_closing)


def gil_is_free(comm: Communicator) -> float:
    """How long a thread that only counts is held up while the main thread waits."""
    if comm.rank == 1:
        time.sleep(0.3)  # what rank 0 waits for
        comm.barrier()
        return 0.0
    stop = threading.Event()
    longest = [0.0]

    def tick() -> None:
        last = time.monotonic()
        while not stop.is_set():
            time.sleep(0.001)
            now = time.monotonic()
            longest[0] = max(longest[0], now - last)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    comm.barrier()
    stop.set()
    thread.join()
    return longest[0]


def test_a_waiting_call_leaves_the_gil_to_other_threads(worlds: Worlds) -> None:
    assert worlds.run(2, gil_is_free)[0] < 0.2
