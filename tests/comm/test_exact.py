"""Exact collectives: the oracle's bits on every rank, whatever the dtype, op, algorithm and size."""

import random
import time
import zlib

import numpy as np
import pytest

from ringcomm import Communicator, reference
from ringcomm.errors import UsageError
from tests.comm.oracle import (
    assert_same_bits,
    expected_all_reduce,
    factor_of,
    premultiplied,
    random_input,
    random_inputs,
)
from tests.dtypes import FLOAT8, NUMPY, REDUCED, SCALED
from tests.worlds import Worlds

WORLD_SIZES = (1, 2, 3, 4)
# With 4 KiB buffers the last one takes several segments of every algorithm.
SIZES = (0, 1, 2, 17, 31, 257, 1021, 4001)
STAGING_KIB = 16
INLINE_BYTES = 32 * 1024


def ops_of(dtype: str) -> tuple[str, ...]:
    return (*reference.ops_of(NUMPY[dtype]), *(("premul_sum",) if dtype in SCALED else ()))


def extra(comm: Communicator, op: str) -> dict[str, float]:
    """Arguments that an operator asks for."""
    return {"factor": factor_of(comm.rank)} if op == "premul_sum" else {}


def check_all_reduce(comm: Communicator, dtype: str, algo: str | None) -> set[str]:
    checked = set()
    for seed, size in enumerate(SIZES):
        inputs = random_inputs(dtype, size, comm.world_size, seed)
        if algo == "one_shot" and inputs[0].nbytes > INLINE_BYTES:
            continue
        for op in ops_of(dtype):
            x = inputs[comm.rank].copy()
            comm.all_reduce(x, op, algo=algo, **extra(comm, op))
            expected = expected_all_reduce(inputs, op, algo)
            assert_same_bits(x, expected, (dtype, algo, op, size))
            if size > 1000:
                checked.add(op)
    return checked


@pytest.mark.parametrize("algo", [None, "one_shot", "two_shot", "ring"])
@pytest.mark.parametrize("dtype", REDUCED)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_all_reduce_gives_the_oracles_bits(
    worlds: Worlds, world_size: int, dtype: str, algo: str | None
) -> None:
    checked = worlds.run(world_size, check_all_reduce, dtype, algo, staging_kib=STAGING_KIB)
    assert checked == [set(ops_of(dtype))] * world_size


def check_data_movement(comm: Communicator, dtype: str) -> None:
    n, rank = comm.world_size, comm.rank
    kind = NUMPY[dtype]
    # 3 * 4001 elements are several segments; 9001 bytes also with one-byte elements.
    for seed, size in enumerate((*SIZES, 9001)):
        inputs = random_inputs(dtype, size, n, seed)
        for root in range(n):
            x = inputs[rank].copy()
            assert comm.broadcast(x, root) is x
            assert_same_bits(x, reference.broadcast(inputs, root), ("broadcast", size, root))
        got = comm.all_gather(inputs[rank])
        assert got.shape == (n, size)
        assert_same_bits(got.reshape(-1), reference.all_gather(inputs), ("all_gather", size))
        out = np.empty(n * size, kind)
        assert comm.all_gather(inputs[rank], out) is out
        assert_same_bits(out, reference.all_gather(inputs), ("all_gather out", size))
        comm.barrier()


@pytest.mark.parametrize("dtype", [*REDUCED, *FLOAT8])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_broadcast_and_all_gather_give_the_oracles_bits(
    worlds: Worlds, world_size: int, dtype: str
) -> None:
    worlds.run(world_size, check_data_movement, dtype, staging_kib=STAGING_KIB)


def check_reduce(comm: Communicator, dtype: str) -> None:
    n, rank = comm.world_size, comm.rank
    for seed, size in enumerate((*SIZES, 20_011)):  # the last two do not fit beside the flag
        inputs = random_inputs(dtype, size, n, seed)
        for op in ops_of(dtype):
            root = (seed + len(op)) % n
            x = inputs[rank].copy()
            x.flags.writeable = rank == root  # elsewhere it is only read
            got = comm.reduce(x, root, op, **extra(comm, op))
            assert got is (x if rank == root else None)
            scaled, plain = (premultiplied(inputs), "sum") if op == "premul_sum" else (inputs, op)
            expected = reference.reduce_to_root(scaled, plain, root) if n > 1 else scaled
            wanted = expected[rank] if rank == root else inputs[rank]
            assert_same_bits(x, wanted, ("reduce", op, size, root))


@pytest.mark.parametrize("dtype", REDUCED)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_reduce_gives_the_oracles_bits_on_the_root_alone(
    worlds: Worlds, world_size: int, dtype: str
) -> None:
    worlds.run(world_size, check_reduce, dtype, staging_kib=STAGING_KIB)


def check_reduce_of_views(comm: Communicator) -> None:
    base = np.arange(4000, dtype=np.float32).reshape(40, 100)
    for cut in (base[:, ::3], base.T, base[::-1]):
        x = cut.copy(order="K") * (comm.rank + 1)
        whole = base.copy()
        view = np.lib.stride_tricks.as_strided(whole, cut.shape, cut.strides)
        if cut.strides[0] < 0:
            view = whole[::-1]
        view[...] = x
        untouched = whole.copy()
        comm.reduce(view, 1)
        if comm.rank == 1:
            np.testing.assert_array_equal(
                view, cut * (comm.world_size * (comm.world_size + 1) // 2)
            )
        else:
            np.testing.assert_array_equal(whole, untouched)


def test_reduce_of_views_writes_back_on_the_root_alone(worlds: Worlds) -> None:
    worlds.run(3, check_reduce_of_views, staging_kib=STAGING_KIB)


def check_lists(comm: Communicator, dtype: str) -> None:
    n, rank = comm.world_size, comm.rank
    for seed, size in enumerate((*SIZES, 20_011)):
        inputs = random_inputs(dtype, size, n, seed)
        outs = [np.zeros(size, dtype) for _ in range(n)]
        assert comm.all_gather(inputs[rank], outs) is outs
        for r in range(n):
            assert_same_bits(outs[r], inputs[r], ("all_gather into a list", size))
        whole = random_inputs(dtype, size * n, n, seed)
        for op in ("sum", "max"):
            shares = reference.reduce_scatter(whole, op) if n > 1 else whole
            got = comm.reduce_scatter(np.split(whole[rank], n), op)
            assert_same_bits(got, shares[rank], ("reduce_scatter of a list", op, size))


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_lists_of_arrays_give_the_same_bits(worlds: Worlds, world_size: int, dtype: str) -> None:
    worlds.run(world_size, check_lists, dtype, staging_kib=STAGING_KIB)


def check_reduce_scatter(comm: Communicator, dtype: str) -> None:
    n, rank = comm.world_size, comm.rank
    for seed, size in enumerate((*SIZES, 9001)):
        whole = random_inputs(dtype, size * n, n, seed)
        before = whole[rank].tobytes()
        for op in ops_of(dtype):
            inputs, plain = (premultiplied(whole), "sum") if op == "premul_sum" else (whole, op)
            shares = reference.reduce_scatter(inputs, plain) if n > 1 else inputs
            got = comm.reduce_scatter(whole[rank], op, **extra(comm, op))
            assert_same_bits(got, shares[rank], ("reduce_scatter", op, size))
            out = np.empty(size, NUMPY[dtype])
            assert comm.reduce_scatter(whole[rank], op, out, **extra(comm, op)) is out
            assert_same_bits(out, shares[rank], ("reduce_scatter out", op, size))
        assert whole[rank].tobytes() == before


@pytest.mark.parametrize("dtype", REDUCED)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_reduce_scatter_gives_the_oracles_bits(worlds: Worlds, world_size: int, dtype: str) -> None:
    worlds.run(world_size, check_reduce_scatter, dtype, staging_kib=STAGING_KIB)


def check_premul_sum_async(comm: Communicator) -> None:
    """Scratch memory and factors of several pending calls do not get in each other's way."""
    n, rank = comm.world_size, comm.rank
    calls = []
    for seed in range(6):
        inputs = random_inputs("float16", n * (seed * 700 + 1), n, seed)
        x, whole = inputs[rank].copy(), inputs[rank].copy()
        factor = factor_of(rank + seed)
        scaled = [reference.scale(v, factor_of(r + seed)) for r, v in enumerate(inputs)]
        total = reference.reduce(scaled)
        calls += [
            (comm.all_reduce(x, "premul_sum", async_op=True, factor=factor), total),
            (
                comm.reduce_scatter(whole, "premul_sum", async_op=True, factor=factor),
                np.split(total, n)[rank],
            ),
        ]
    for work, expected in calls:
        assert_same_bits(work.wait(), expected, "async")


def test_asynchronous_premul_sums(worlds: Worlds) -> None:
    worlds.run(3, check_premul_sum_async, staging_kib=STAGING_KIB)


def check_default_buffers(comm: Communicator) -> None:
    for algo in (None, "two_shot", "ring"):
        inputs = random_inputs("float32", 300_007, comm.world_size, 5)
        x = inputs[comm.rank].copy()
        comm.all_reduce(x, algo=algo)
        expected = expected_all_reduce(inputs, "sum", algo)
        assert_same_bits(x, expected, algo)
    inputs = random_inputs("uint8", 1_000_003, comm.world_size, 6)
    for root in range(comm.world_size):
        x = inputs[comm.rank].copy()
        comm.broadcast(x, root)
        assert_same_bits(x, inputs[root], root)
    assert_same_bits(
        comm.all_gather(inputs[comm.rank]).reshape(-1), reference.all_gather(inputs), "all_gather"
    )


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_messages_larger_than_the_default_buffers(worlds: Worlds, world_size: int) -> None:
    worlds.run(world_size, check_default_buffers)


# Elements of a ring: less than a granule; chunks that are empty, or end in the last piece but one; many pieces.
RING_SIZES = (5, 97, 1021, 2053, 20_011, 100_003)


def ring_bits(comm: Communicator, dtype: str) -> list[bytes]:
    results = []
    for seed, size in enumerate(RING_SIZES):
        inputs = random_inputs(dtype, size, comm.world_size, seed)
        x = inputs[comm.rank].copy()
        comm.all_reduce(x, algo="ring")
        assert_same_bits(x, reference.all_reduce_ring(inputs, "sum"), size)
        results.append(x.tobytes())
    return results


@pytest.mark.parametrize("dtype", [d for d in ("float32", "bfloat16", "float16") if d in NUMPY])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_staging_buffers_change_no_bit_of_a_ring(
    worlds: Worlds, world_size: int, dtype: str
) -> None:
    runs = [worlds.run(world_size, ring_bits, dtype, staging_kib=kib) for kib in (16, 112, 1024)]
    assert all(bits == runs[0][0] for run in runs for bits in run)


def checksums_with_delays(comm: Communicator, seed: int) -> list[int]:
    jitter = random.Random((seed << 8) + comm.rank)
    sums = []
    for call in range(40):
        algo = ("one_shot", "two_shot", "ring")[call % 3]
        codec = "int4[rounding=stochastic,seed=3]" if call % 6 == 1 else None
        x = random_input("float32", 3000, comm.rank, call)
        if jitter.random() < 0.5:
            time.sleep(jitter.random() * 0.004)  # the delay that is injected, not a wait
        comm.all_reduce(x, codec=codec, algo=algo)
        sums.append(zlib.crc32(x.tobytes()))
    return sums


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_same_bits_on_all_ranks_and_runs_under_random_delays(
    worlds: Worlds, world_size: int
) -> None:
    runs = [
        worlds.run(world_size, checksums_with_delays, seed, staging_kib=16) for seed in (1, 2, 3)
    ]
    assert all(rank_sums == runs[0][0] for run in runs for rank_sums in run)


def check_special_values(comm: Communicator) -> None:
    x = np.array([np.nan, 1, np.inf, -np.inf, 0.0], np.float32)
    if comm.rank:
        x = np.array([1, np.nan, np.inf, np.inf, -0.0], np.float32)
    for op in ("sum", "min", "max"):
        for algo in ("one_shot", "two_shot", "ring"):
            got = x.copy()
            comm.all_reduce(got, op, algo=algo)
            assert np.isnan(got[:2]).all(), (op, algo, got)
            assert np.isnan(got[3]) if op == "sum" else np.isinf(got[3]), (op, algo, got)
            assert got[2] == np.inf, (op, algo, got)


def test_nan_and_infinity_reach_every_rank(worlds: Worlds) -> None:
    worlds.run(2, check_special_values)


def check_one_shot_limit(comm: Communicator) -> str:
    with pytest.raises(UsageError) as error:
        comm.all_reduce(np.zeros(INLINE_BYTES // 4 + 1, np.float32), algo="one_shot")
    fits = np.ones(INLINE_BYTES // 4, np.float32)
    comm.all_reduce(fits, algo="one_shot")
    assert (fits == comm.world_size).all()
    return str(error.value)


def test_one_shot_refuses_what_does_not_fit_and_takes_what_just_does(worlds: Worlds) -> None:
    for message in worlds.run(2, check_one_shot_limit):
        assert "one_shot" in message
        assert str(INLINE_BYTES) in message


def check_in_threads(comm: Communicator) -> None:
    for seed in range(20):
        inputs = random_inputs("float32", 2000, comm.world_size, seed)
        for algo in (None, "two_shot", "ring"):
            x = inputs[comm.rank].copy()
            comm.all_reduce(x, algo=algo)
            assert_same_bits(x, expected_all_reduce(inputs, "sum", algo), algo)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_may_be_threads_of_one_process(worlds: Worlds, world_size: int) -> None:
    worlds.run_threads(world_size, check_in_threads, staging_kib=16)


def wake_up_times(comm: Communicator) -> list[float]:
    """Seconds from the moment at which the last rank comes to the return of one that slept."""
    times = []
    came = np.zeros(1)
    dice = random.Random(1)
    for _ in range(60):
        comm.barrier()
        if comm.rank == 1:
            time.sleep(
                0.002 + 0.02 * dice.random()
            )  # long enough for rank 0 to go to sleep in the kernel
            came[0] = time.monotonic()
        comm.broadcast(came, 1)
        times.append(time.monotonic() - came[0])
    return sorted(times)


def test_a_sleeping_rank_is_woken_and_does_not_wait_for_its_next_look(worlds: Worlds) -> None:
    # Without the wake-up it takes what is left of 20 ms, the longest sleep: 6 ms or more in two of
    # three rounds. The best third counts: on a busy machine the others say more about the machine.
    assert worlds.run(2, wake_up_times)[0][20] < 0.003
