"""split(): sub-groups that work on their own, at the same time, from many threads."""

import gc
import os
import threading
from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator
from ringcomm.errors import AbortedError, PeerLostError, UsageError
from tests.comm.oracle import assert_same_bits, random_input
from tests.worlds import Worlds, open_descriptors

WORLD_SIZES = (1, 2, 3, 4)


def check_colors(comm: Communicator) -> None:
    n, rank = comm.world_size, comm.rank
    with comm.split(rank % 2) as half:
        members = list(range(rank % 2, n, 2))
        assert (half.rank, half.world_size) == (members.index(rank), len(members))
        assert half.name == f"world/{rank % 2}"
        assert half.timeout == comm.timeout
        x = np.full(5000, rank + 1.0)
        half.all_reduce(x)
        assert (x == sum(members) + len(members)).all()
        with half.split(0) as again:  # of a sub-group
            assert (again.rank, again.world_size) == (half.rank, half.world_size)
            assert again.name == f"world/{rank % 2}/0"
            again.barrier()
    with comm.split(7, key=-rank, name="backwards") as backwards:
        assert backwards.rank == n - 1 - rank
        assert backwards.name == "backwards"
        got = backwards.all_gather(np.array([rank]))
        assert got.ravel().tolist() == list(range(n))[::-1]
    with comm.split(np.int64(2**62), key=5) as same:  # equal keys: by rank
        assert same.rank == rank
    nobody = comm.split(None)
    assert nobody is None
    alone = comm.split(1 if rank == n - 1 else None)
    assert (alone is not None) == (rank == n - 1)
    if alone is not None:
        assert alone.world_size == 1
        alone.barrier()
        alone.close()
    with comm.split(rank) as single:
        assert single.world_size == 1
    comm.barrier()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_of_one_color_make_a_group_ordered_by_key(worlds: Worlds, world_size: int) -> None:
    worlds.run(world_size, check_colors, staging_kib=16)


def test_ranks_that_are_threads_may_split(worlds: Worlds) -> None:
    worlds.run_threads(3, check_colors, staging_kib=16)


def check_nothing_is_left(comm: Communicator) -> list[tuple[int, int]]:
    counts = []
    for _ in range(8):
        with comm.split(comm.rank // 2) as part:
            part.all_reduce(np.ones(20_000))
            part.all_reduce(np.ones(10), async_op=True)
        comm.barrier()  # the leader has closed its store
        gc.collect()
        counts.append((open_descriptors(), len(os.listdir("/proc/self/task"))))
    return counts


def test_closed_groups_leave_no_descriptor_and_no_thread(worlds: Worlds) -> None:
    for counts in worlds.run(4, check_nothing_is_left):
        descriptors = [count for count, _ in counts]
        # A thread that has just served the store may take a moment to end.
        assert max(descriptors[2:]) <= min(descriptors[:2]) + 1, counts
        assert max(threads for _, threads in counts[2:]) <= counts[0][1] + 2, counts


def check_names(comm: Communicator) -> None:
    part = comm
    groups = []
    for _ in range(12):
        part = part.split(123456)
        groups.append(part)
    assert len(part.name.encode()) == 64
    assert part.name.endswith("/123456")
    for group in groups:
        group.close()
    for bad, pieces in (
        (lambda: comm.split(1.5), "color must be a whole number, not 1.5"),
        (lambda: comm.split(2**63), "color must fit into 64 bits"),
        (lambda: comm.split(0, key="a"), "key must be a whole number, not 'a'"),
        (lambda: comm.split(0, name="n" * 65), "name has 65 bytes, at most 64"),
    ):
        with pytest.raises(UsageError, match=pieces):
            bad()
    comm.barrier()  # nothing was sent


def test_names_are_made_short_and_bad_arguments_refused(worlds: Worlds) -> None:
    worlds.run(2, check_names, staging_kib=16)


def eight_groups(comm: Communicator) -> int:
    """Eight groups of changing members, each used by a thread of its own, all at once."""
    n, rank = comm.world_size, comm.rank
    groups = [comm.split((rank + k) % (1 + k % 3), name=f"group {k}") for k in range(8)]
    failures: list[BaseException] = []
    calls = [0] * 8

    def use(k: int, group: Communicator) -> None:
        try:
            size, own = group.world_size, group.rank
            for call in range(25):
                count = (10, 3000, 9001)[call % 3]
                x = np.full(count, own + k, np.float32)
                group.all_reduce(x, tag=f"thread {k}")
                assert (x == sum(range(size)) + k * size).all()
                parts = [random_input("float32", count, 10 * own + r, call) for r in range(size)]
                got = group.all_to_all(np.stack(parts), async_op=call % 2 == 0)
                got = got.wait() if call % 2 == 0 else got
                for sender in range(size):
                    expected = random_input("float32", count, 10 * sender + own, call)
                    assert_same_bits(got[sender], expected, (k, call, sender))
                total = group.reduce(np.full(count, k, np.int64), call % size)
                assert total is None or (total == k * size).all()
                calls[k] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=item) for item in enumerate(groups)]
    for thread in threads:
        thread.start()
    comm.barrier()  # the parent is used meanwhile
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    assert (comm.all_gather(np.array([rank])).ravel() == np.arange(n)).all()
    for group in groups:
        group.close()
    return sum(calls)


@pytest.mark.parametrize("world_size", [2, 4])
def test_eight_groups_at_once_from_eight_threads(worlds: Worlds, world_size: int) -> None:
    assert worlds.run(world_size, eight_groups, staging_kib=16) == [200] * world_size


def one_dies(comm: Communicator) -> tuple[str, str]:
    group = comm.split(comm.rank // 2, name="pair")
    group.barrier()
    if comm.rank == 3:
        os._exit(1)
    texts = []
    for lost in (comm, group):
        if lost is group and comm.rank < 2:
            group.all_reduce(np.ones(10_000))  # this pair is whole
            texts.append("")
            continue
        with pytest.raises(PeerLostError) as caught:
            lost.barrier()
        texts.append(str(caught.value))
    return texts[0], texts[1]


def test_a_death_ends_the_groups_of_the_dead_and_no_other(worlds: Worlds) -> None:
    outcomes = worlds.outcomes(4, one_dies)
    assert [o.kind for o in outcomes] == ["value", "value", "value", "gone"], outcomes
    assert len({o.value[0] for o in outcomes[:3]}) == 1
    assert "rank 3 (pid " in outcomes[0].value[0]
    assert "rank 1 (pid " in outcomes[2].value[1]
    assert "group 'pair'" in outcomes[2].value[1]


def dies_in_split(comm: Communicator) -> str:
    comm.barrier()
    if comm.rank == 1:
        os._exit(1)
    with pytest.raises(PeerLostError) as caught:
        comm.split(0)
    return str(caught.value)


def test_a_death_during_split_is_an_error_on_all_others(worlds: Worlds) -> None:
    outcomes = worlds.outcomes(3, dies_in_split)
    assert [o.kind for o in outcomes] == ["value", "gone", "value"], outcomes
    assert "rank 1 (pid " in outcomes[0].value


def in_forked_child(comm: Communicator) -> int:
    group: Any = comm.split(0)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for call in (
                group.barrier,
                lambda: comm.split(0),
                lambda: group.all_to_all(np.ones(2)),
            ):
                with pytest.raises(AbortedError, match="belongs to the parent process"):
                    call()
            group.close()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    group.barrier()  # the parent's still works
    group.close()
    return os.waitstatus_to_exitcode(status)


def test_a_forked_child_can_neither_split_nor_use_a_part(worlds: Worlds) -> None:
    assert worlds.run(2, in_forked_child) == [0, 0]
