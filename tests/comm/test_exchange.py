"""gather, scatter and all_to_all: the oracle's bytes, even and uneven, in every form of argument."""

import mmap
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator, reference
from tests.comm.oracle import assert_same_bits, random_input
from tests.worlds import Worlds

WORLD_SIZES = (1, 2, 3, 4)
STAGING_KIB = 16  # buffers of 4 KiB
# Beside the flag, just too large for that with few ranks, and many segments.
COUNTS = (0, 1, 7, 1021, 4001, 40_009)


def part(count: int, sender: int, receiver: int, dtype: str = "float32") -> Any:
    """What one rank has for another: no two alike."""
    return random_input(dtype, count, 100 * sender + receiver, count)


def check_even(comm: Communicator, dtype: str) -> None:
    n, rank = comm.world_size, comm.rank
    for count in COUNTS:
        parts = [[part(count, s, r, dtype) for r in range(n)] for s in range(n)]
        received = reference.all_to_all(parts)[rank]
        x = np.stack(parts[rank])
        got = comm.all_to_all(x)
        assert got.shape == x.shape
        assert_same_bits(got, np.stack(received), ("all_to_all", count))
        out = np.zeros(n * count, dtype)
        assert comm.all_to_all(x, out) is out
        assert_same_bits(out, np.concatenate(received), ("all_to_all out", count))
        assert_same_bits(x, np.stack(parts[rank]), "x is not modified")
        for root in range(n):
            got = comm.gather(parts[rank][0], root)
            sent = reference.gather([parts[s][0] for s in range(n)])
            if rank == root:
                assert_same_bits(got, np.stack(sent), ("gather", count, root))
            else:
                assert got is None
            out = np.zeros(count, dtype)
            x = np.stack(parts[root]) if rank == root else None
            assert comm.scatter(x, root, out) is out
            assert_same_bits(out, reference.scatter(parts[root])[rank], ("scatter", count, root))


@pytest.mark.parametrize("dtype", ["float32", "uint8", "float64"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_equal_parts_arrive_as_they_were_sent(worlds: Worlds, world_size: int, dtype: str) -> None:
    worlds.run(world_size, check_even, dtype, staging_kib=STAGING_KIB)


def uneven_counts(seed: int, world_size: int) -> Any:
    """counts[s][r] from nothing to several segments, with whole rows and columns of nothing."""
    rng = np.random.default_rng(seed)
    counts = rng.choice([0, 0, 1, 5, 63, 800, 5003, 60_001], (world_size, world_size))
    if seed % 4 == 1:
        counts[rng.integers(world_size)] = 0
    if seed % 4 == 2:
        counts[:, rng.integers(world_size)] = 0
    if seed % 4 == 3:  # one pair alone has something, and a lot
        counts[:] = 0
        counts[0, world_size - 1] = 100_003
    return counts


def check_uneven(comm: Communicator, first_seed: int) -> None:
    n, rank = comm.world_size, comm.rank
    for seed in range(first_seed, first_seed + 24):
        counts = uneven_counts(seed, n)
        parts = [[part(counts[s, r], s, r) for r in range(n)] for s in range(n)]
        received = reference.all_to_all(parts)[rank]
        outs = [np.zeros(count, np.float32) for count in counts[:, rank]]
        assert comm.all_to_all(parts[rank], outs) is outs
        for sender in range(n):
            assert_same_bits(outs[sender], received[sender], (seed, sender))
        got = comm.all_to_all(
            np.concatenate(parts[rank]), send_counts=counts[rank], receive_counts=counts[:, rank]
        )
        assert_same_bits(got, np.concatenate(received), (seed, "counts"))
        root = seed % n
        for source, out in zip(received if rank == root else [None] * n, outs, strict=True):
            out[...] = -1
            assert source is None or not source.size or (source != out).any()
        comm.gather(parts[rank][root], root, outs if rank == root else None)
        for sender in range(n if rank == root else 0):
            assert_same_bits(outs[sender], received[sender], (seed, sender, "gather"))
        out = np.zeros(counts[root, rank], np.float32)
        comm.scatter(parts[root] if rank == root else None, root, out)
        assert_same_bits(out, parts[root][rank], (seed, "scatter"))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_pair_of_ranks_may_have_its_own_count(worlds: Worlds, world_size: int) -> None:
    worlds.run(world_size, check_uneven, 0, staging_kib=STAGING_KIB)


def check_default_buffers(comm: Communicator) -> None:
    n, rank = comm.world_size, comm.rank
    for count in (400_003, 100_000):
        parts = [[part(count + s + 3 * r, s, r) for r in range(n)] for s in range(n)]
        outs = [np.zeros(count + s + 3 * rank, np.float32) for s in range(n)]
        comm.all_to_all(parts[rank], outs)
        for sender in range(n):
            assert_same_bits(outs[sender], parts[sender][rank], (count, sender))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_parts_larger_than_the_default_buffers(worlds: Worlds, world_size: int) -> None:
    worlds.run(world_size, check_default_buffers)


def check_mixed_calls(comm: Communicator) -> None:
    """Exchanges between collectives that use the same buffers, without a pause."""
    n, rank = comm.world_size, comm.rank
    for seed in range(30):
        counts = uneven_counts(seed, n)
        parts = [[part(counts[s, r], s, r) for r in range(n)] for s in range(n)]
        outs = [np.zeros(count, np.float32) for count in counts[:, rank]]
        x = np.full(5000, rank + 1, np.float32)
        before = ("broadcast", "all_reduce", "all_gather", "reduce_scatter")[seed % 4]
        if before == "broadcast":
            comm.broadcast(x, seed % n)
            assert (x == seed % n + 1).all()
        elif before == "all_reduce":
            comm.all_reduce(x, algo=("ring", "two_shot")[seed % 8 // 4])
            assert (x == n * (n + 1) // 2).all()
        elif before == "all_gather":
            assert (comm.all_gather(x) == np.arange(1, n + 1)[:, None]).all()
        else:
            total = comm.reduce_scatter(np.tile(x, n))
            assert (total == n * (n + 1) // 2).all()
        comm.all_to_all(parts[rank], outs)
        for sender in range(n):
            assert_same_bits(outs[sender], parts[sender][rank], (seed, sender))


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("first_seq", [0, 2**32 - 9, 2**31 - 40])
def test_exchanges_take_turns_with_other_collectives(
    worlds: Worlds, world_size: int, first_seq: int
) -> None:
    worlds.run(world_size, check_mixed_calls, staging_kib=STAGING_KIB, first_seq=first_seq)


def test_ranks_may_be_threads_of_one_process(worlds: Worlds) -> None:
    worlds.run_threads(3, check_mixed_calls, staging_kib=STAGING_KIB)


def check_in_place(comm: Communicator) -> None:
    n, rank = comm.world_size, comm.rank
    for count in (100, 20_000):
        whole = np.zeros((n, count), np.float32)
        whole[rank] = rank + 1
        expected = np.repeat(np.arange(1, n + 1, dtype=np.float32), count).reshape(n, count)
        comm.gather(whole[rank], 0, whole if rank == 0 else None)
        if rank == 0:
            np.testing.assert_array_equal(whole, expected)
            whole[:] = 0
            whole[0] = 1
        comm.all_gather(whole[rank], whole)
        np.testing.assert_array_equal(whole, expected)
        comm.all_gather(whole[rank], [whole[r] for r in reversed(range(n))][::-1])
        np.testing.assert_array_equal(whole, expected)
        if rank == 0:
            assert comm.scatter(whole, 0, whole[0]) is not None
        else:
            comm.scatter(None, 0, whole[rank])
        np.testing.assert_array_equal(whole, expected)
        comm.reduce_scatter(whole, "sum", whole[rank])
        np.testing.assert_array_equal(whole[rank], np.full(count, n * (rank + 1)))
        own = whole[rank].copy()
        outs = [np.zeros(count, np.float32) for _ in range(n)]
        outs[rank] = own  # what goes to itself is already there
        comm.all_to_all([own] * n, outs)
        for sender in range(n):
            np.testing.assert_array_equal(outs[sender], np.full(count, n * (sender + 1)))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_ranks_own_part_may_stay_in_place(worlds: Worlds, world_size: int) -> None:
    worlds.run(world_size, check_in_place, staging_kib=STAGING_KIB)


def check_forms(comm: Communicator) -> None:
    n, rank = comm.world_size, comm.rank
    grid = np.arange(n * 12, dtype=np.int64).reshape(n * 2, 6) + 1000 * rank
    got = comm.all_to_all(grid[:, ::2])  # not contiguous
    assert got.shape == (2 * n, 3)
    for sender in range(n):
        expected = (grid[2 * rank : 2 * rank + 2, ::2] % 1000) + 1000 * sender
        np.testing.assert_array_equal(got[2 * sender : 2 * sender + 2], expected)
    outs = [np.zeros((2, 6), np.int64) for _ in range(n)]
    comm.all_to_all(grid, outs)  # an array in, a list out
    back = np.zeros_like(grid)
    comm.all_to_all(outs, back)  # and the other way
    np.testing.assert_array_equal(back, grid)
    pieces = comm.all_to_all([grid[r].T for r in range(n)])
    assert [piece.shape for piece in pieces] == [(6,)] * n
    got = comm.gather(grid[::-1, 0], n - 1)
    if rank == n - 1:
        assert got.shape == (n, 2 * n)
        np.testing.assert_array_equal(got[0], grid[::-1, 0] % 1000)
    own = comm.scatter(grid.T if rank == 0 and n in (1, 2, 3) else None, 0) if n == 1 else None
    assert own is None or own.shape == (6, 2)
    assert comm.gather(np.array(float(rank))) is None or rank == 0  # 0-dimensional
    empty = comm.all_to_all(np.zeros((n, 0)))
    assert empty.shape == (n, 0)
    rows = [1 + r for r in range(n)]
    uneven = comm.all_to_all(
        np.full((sum(rows), 2, 3), rank), send_counts=rows, receive_counts=[1 + rank] * n
    )
    assert uneven.shape == (n * (1 + rank), 2, 3)
    assert (uneven[:: 1 + rank, 0, 0] == np.arange(n)).all()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_arrays_lists_and_views_may_be_mixed(worlds: Worlds, world_size: int) -> None:
    worlds.run(world_size, check_forms)


def check_async(comm: Communicator) -> None:
    n, rank = comm.world_size, comm.rank
    works: list[Any] = []
    for count in (10, 30_000):
        works.append(comm.all_to_all(np.full((n, count), rank), async_op=True))
        works.append(comm.gather(np.full(count, rank), 1 % n, async_op=True))
        source = np.arange(n * count).reshape(n, count) if rank == 0 else None
        works.append(comm.scatter(source, 0, np.zeros(count, np.int64), async_op=True))
        works.append(comm.reduce(np.full(count, 1.0), 0, async_op=True))
        works.append(comm.barrier(async_op=True))
    comm.barrier()
    assert all(work.done() for work in works)
    for count, (a, g, s, r, b) in ((10, works[:5]), (30_000, works[5:])):
        assert (a.wait() == np.arange(n)[:, None]).all()
        gathered = g.wait()
        assert (gathered == np.arange(n)[:, None]).all() if rank == 1 % n else gathered is None
        np.testing.assert_array_equal(s.wait(), np.arange(count) + rank * count)
        reduced = r.wait()
        assert (reduced == n).all() if rank == 0 else reduced is None
        assert b.wait() is None


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_asynchronous_calls_give_the_same(worlds: Worlds, world_size: int) -> None:
    worlds.run(world_size, check_async, staging_kib=STAGING_KIB)


def check_torch(comm: Communicator) -> None:
    import torch

    n, rank = comm.world_size, comm.rank
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        got = comm.all_to_all(torch.arange(n * 3, dtype=dtype).reshape(n, 3) + 10 * rank)
        assert isinstance(got, torch.Tensor)
        assert got[:, 0].tolist() == [3 * rank + 10 * sender for sender in range(n)]
        gathered = comm.gather(torch.full((2,), rank, dtype=dtype))
        assert gathered is None or gathered.tolist() == [[r, r] for r in range(n)]
        parts = [torch.full((r + 1,), r, dtype=dtype) for r in range(n)]
        outs = [torch.zeros(rank + 1, dtype=dtype) for _ in range(n)]
        comm.all_to_all(parts, outs)
        assert all(out.tolist() == [rank] * (rank + 1) for out in outs)
        own = comm.scatter(parts if rank == 0 else None, 0, outs[0])
        assert own is outs[0]
        lists = [torch.zeros(4, dtype=dtype) for _ in range(n)]
        comm.all_gather(torch.full((4,), rank, dtype=dtype), lists)
        assert [one.tolist() for one in lists] == [[r] * 4 for r in range(n)]
        total = comm.reduce_scatter([torch.full((2, 2), r, dtype=dtype) for r in range(n)])
        assert total.tolist() == [[n * rank] * 2] * 2


def test_torch_tensors(worlds: Worlds) -> None:
    pytest.importorskip("torch")
    worlds.run(2, check_torch)


def check_slow_reader(comm: Communicator) -> None:
    """The root is done with a call long before its reader, which meets untouched pages."""
    count, calls = 900_000, 40  # two segments, of which only the first lies in an input buffer
    parts = [np.full(count, call + 1, np.uint8) for call in range(calls)]
    outs = [np.frombuffer(mmap.mmap(-1, count), np.uint8) for _ in range(calls)]
    empty = np.empty(0, np.uint8)
    for part, out in zip(parts, outs, strict=True):
        if comm.rank == 0:
            comm.scatter([empty, part], 0)
        else:
            comm.scatter(None, 0, out)
            assert (out == part).all()


def test_a_reader_that_is_behind_still_finds_what_was_sent(worlds: Worlds) -> None:
    worlds.run(2, check_slow_reader)


HUGE = 2**31 + 2**26 + 8  # bytes


def check_huge(comm: Communicator) -> None:
    """Rank 0 sends all that rank 1 receives: zeros, which cost no memory, and now and then a number."""
    marks = np.arange(5, HUGE // 8, 30_011)  # two or more in every segment, also the last place
    marks[-1] = HUGE // 8 - 1
    if comm.rank == 0:
        pages = mmap.mmap(-1, HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_NOHUGEPAGE)
        x = np.frombuffer(pages, np.uint8)
        x.view(np.int64)[marks] = marks
        got = comm.all_to_all(x, send_counts=[0, HUGE], receive_counts=[0, 8])
        assert got.tolist() == [1] * 8
        return
    out = np.empty(HUGE, np.uint8)
    comm.all_to_all(np.ones(8, np.uint8), out, send_counts=[8, 0], receive_counts=[HUGE, 0])
    block, found = 2**22, []
    for place in range(0, HUGE // 8, block):
        values = out.view(np.int64)[place : place + block]
        found.append(np.flatnonzero(values) + place)
    assert np.array_equal(np.concatenate(found), marks)
    assert np.array_equal(out.view(np.int64)[marks], marks)


def test_one_part_of_more_than_two_gibibytes(worlds: Worlds) -> None:
    available = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    if available < 4 * 2**20:
        pytest.skip(f"needs 4 GiB of memory, {available / 2**20:.1f} GiB are available")
    worlds.run(2, check_huge, timeout=60.0)
