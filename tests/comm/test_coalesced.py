"""all_reduce of a list: the bits of one all_reduce per array, whatever is packed with what."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator
from ringcomm.errors import MismatchError, UsageError
from tests.comm.oracle import assert_same_bits, expected_all_reduce, factor_of, random_inputs
from tests.comm.test_exact import STAGING_KIB, extra, ops_of
from tests.dtypes import NUMPY, REDUCED, SCALED
from tests.worlds import Worlds

WORLD_SIZES = (1, 2, 3, 4)
# In elements: scalars, odd, empty; one that travels alone on CPUs whatever its dtype.
COUNTS = (1, 0, 7, 256, 1, 1021, 4, 33_001, 3, 0, 2)
MANY = 300  # more than one launch packs, on GPUs
MOST_BYTES = 16 * 1024  # of an array that is packed, with two ranks
CALL_BYTES = 512 * 1024

Array = Any


def lists(dtypes: Sequence[str], counts: Sequence[int], world_size: int, seed: int) -> list[list]:
    """By array: every rank's input."""
    return [
        random_inputs(dtypes[k % len(dtypes)], count, world_size, 1000 * seed + k)
        for k, count in enumerate(counts)
    ]


def assert_reduced(arrays: Sequence[Array], inputs: list[list[Array]], op: str) -> None:
    for k, (array, of_ranks) in enumerate(zip(arrays, inputs, strict=True)):
        expected = expected_all_reduce(of_ranks, op, None)
        assert_same_bits(array, expected, (op, k, array.dtype, array.size))


def check_ops(comm: Communicator, dtype: str) -> None:
    for seed, op in enumerate(ops_of(dtype)):
        inputs = lists((dtype,), COUNTS, comm.world_size, seed)
        arrays = [of_ranks[comm.rank].copy() for of_ranks in inputs]
        result = comm.all_reduce_coalesced(arrays, op, **extra(comm, op))
        assert result is arrays
        assert_reduced(arrays, inputs, op)


@pytest.mark.parametrize("dtype", REDUCED)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_list_gives_the_oracles_bits(worlds: Worlds, world_size: int, dtype: str) -> None:
    worlds.run(world_size, check_ops, dtype, staging_kib=STAGING_KIB)


def check_mixture(comm: Communicator) -> None:
    """Dtypes in turn, many arrays, in a tuple, asynchronously, one after the other."""
    dtypes = [name for name in REDUCED if name in SCALED]
    pending = []
    for seed, op in enumerate(("sum", "premul_sum", "sum")):
        inputs = lists(dtypes, [k * 37 % 101 for k in range(MANY)], comm.world_size, seed)
        arrays = tuple(of_ranks[comm.rank].copy() for of_ranks in inputs)
        work = comm.all_reduce_coalesced(arrays, op, async_op=True, **extra(comm, op))
        pending.append((work, arrays, inputs, op))
    for work, arrays, inputs, op in pending:
        assert work.wait() is arrays
        assert_reduced(arrays, inputs, op)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_dtypes_may_be_mixed_and_lists_long(worlds: Worlds, world_size: int) -> None:
    worlds.run(world_size, check_mixture)


def check_views(comm: Communicator) -> None:
    """Odd addresses, columns, reversed, 0-dim."""
    memory = np.zeros(4096, np.uint8)
    odd = memory[1 : 1 + 4 * 33].view(np.float32)
    columns = np.zeros((9, 5), np.float32)[:, 1:4]
    backwards = np.zeros(11, np.float32)[::-1]
    single = np.zeros((), np.float32)
    arrays = [odd, columns, backwards, single, odd[:0]]
    for k, array in enumerate(arrays):
        array[...] = np.arange(array.size, dtype=np.float32).reshape(array.shape) + k + comm.rank
    befores = [array.copy() - comm.rank for array in arrays]
    comm.all_reduce_coalesced(arrays)
    n = comm.world_size
    for array, before in zip(arrays, befores, strict=True):
        assert (array == n * before + sum(range(n))).all()
    assert not memory[0] and not memory[1 + 4 * 33 :].any()


def test_arrays_may_be_views(worlds: Worlds) -> None:
    worlds.run(2, check_views)


def check_calls(comm: Communicator) -> list[int]:
    """How many collectives lists become."""
    calls = []
    for counts in ((256,) * 64, (1,), (), (0, 0), (1, 0), (MOST_BYTES // 4,) * 33, (4097,) * 3):
        before = comm.stats().get("all_reduce", {"calls": 0})["calls"]
        comm.all_reduce_coalesced([np.ones(count, np.float32) for count in counts])
        calls.append(comm.stats()["all_reduce"]["calls"] - before)
    return calls


def test_small_arrays_share_calls(worlds: Worlds) -> None:
    two_calls = -(-33 * MOST_BYTES // CALL_BYTES)
    assert worlds.run(2, check_calls) == [[1, 1, 1, 1, 1, two_calls, 3]] * 2


def check_statistics(comm: Communicator) -> dict[str, float]:
    comm.all_reduce_coalesced([np.ones(3, np.float32), np.ones(5, np.float32)])
    record = comm.flight_recorder()[-1]
    assert (record["op"], record["count"], record["root"]) == ("all_reduce", 12, None)
    return comm.stats()["all_reduce"]


def test_zeros_between_arrays_do_not_count_as_the_callers(worlds: Worlds) -> None:
    assert [row["bytes"] for row in worlds.run(2, check_statistics)] == [32, 32]


def check_symmetric(comm: Communicator) -> None:
    """A large array in symmetric memory goes where it is; a small one is packed like others."""
    large, small = comm.empty(20_000), comm.empty(5)
    plain = np.ones(9, np.float32)
    for array in (large, small):
        array[:] = comm.rank + 1
    comm.all_reduce_coalesced([small, large, plain])
    total = comm.world_size * (comm.world_size + 1) / 2
    assert (large == total).all() and (small == total).all() and (plain == comm.world_size).all()
    assert "direct" in [record["algo"] for record in comm.flight_recorder()]


def test_symmetric_memory_is_used_where_it_is(worlds: Worlds) -> None:
    worlds.run(3, check_symmetric)


def check_refusals(comm: Communicator) -> None:
    x = np.ones(10, np.float32)
    for arrays, kwargs, text in (
        (x, {}, "arrays must be a list of arrays, not ndarray"),
        ([x, x], {}, "arrays 0 and 1 of the list share memory"),
        ([x[:4], np.ones(2), x[3:]], {}, "arrays 0 and 2 of the list share memory"),
        ([x, np.ones(3, NUMPY["float32"])], {"op": "bor"}, "bitwise operators take integers"),
        ([x, np.ones(3, bool)], {"op": "avg"}, "bool"),
        ([x, None], {}, "NoneType"),
        ([x], {"op": "mean"}, "op must be one of"),
        ([x], {"tag": "x" * 25}, "a tag has at most 24 bytes"),
        ([x], {"op": "premul_sum"}, "needs factor"),
    ):
        with pytest.raises(UsageError, match=text):
            comm.all_reduce_coalesced(arrays, **kwargs)
    with pytest.raises(TypeError):
        comm.all_reduce_coalesced([x], codec="int8")  # type: ignore[call-arg]
    assert (x == 1).all()
    comm.all_reduce_coalesced([x[:3], x[3:]])  # nothing was sent, and neighbours are no overlap
    assert (x == comm.world_size).all()


@pytest.mark.parametrize("world_size", [1, 2])
def test_bad_arguments_are_refused_before_anything_is_sent(worlds: Worlds, world_size: int) -> None:
    worlds.run(world_size, check_refusals)


def f32(*counts: int) -> list[Array]:
    return [np.ones(count, np.float32) for count in counts]


# What rank 0 and what the last rank passes, and pieces of the sentence.
DIFFERENT = {
    "one array more": (f32(4, 4), f32(4, 4, 4), ("of a list of 2 arrays", "of a list of 3 arrays")),
    "another cut of the same bytes": (f32(8, 4), f32(4, 8), ("x 12", "of 2 arrays, sizes #")),
    "sizes that hide in the gaps": (f32(3, 4), f32(4, 3), ("of 2 arrays, sizes #",)),
    "an empty array more": (f32(4, 4, 0), f32(4, 4), ("of 3 arrays", "of 2 arrays")),
    "another dtype of the second call": (
        [*f32(4, 4), np.ones(3)],
        [*f32(4, 4), np.ones(3, np.int64)],
        ("float32 x 8", "of 3 arrays, sizes #"),
    ),
    "dtypes in another order": (
        [*f32(4), np.ones(3, np.int32)],
        [np.ones(4, np.int32), *f32(3)],
        ("float32", "int32"),
    ),
    "a large array more": (f32(4, 5), f32(4, 5, 9000), ("of 2 arrays", "of 3 arrays")),
    "nothing": ([], f32(4, 5), ("of a list of 0 arrays", "of a list of 2 arrays")),
    "a list of one and an array": (f32(4), None, ("of a list of 1 array,", "all_reduce #")),
}


def check_mismatch(comm: Communicator, which: str, async_op: bool) -> str:
    mine = DIFFERENT[which][1 if comm.rank == comm.world_size - 1 else 0]

    def call() -> None:
        if mine is None:
            comm.all_reduce(np.ones(4, np.float32))
            return
        done = comm.all_reduce_coalesced([x.copy() for x in mine], async_op=async_op)
        if async_op:
            done.wait()

    with pytest.raises(MismatchError, match="called different operations") as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("which", DIFFERENT)
def test_lists_that_differ_are_a_mismatch(worlds: Worlds, which: str, async_op: bool) -> None:
    texts = worlds.run(3, check_mismatch, which, async_op)
    assert len(set(texts)) == 1
    for piece in DIFFERENT[which][2]:
        assert piece in texts[0]


def check_factors(comm: Communicator) -> None:
    """Every rank's own factor, on arrays that are packed and one that is not."""
    arrays = f32(5, 3, 9000)
    comm.all_reduce_coalesced(arrays, "premul_sum", factor=factor_of(comm.rank))
    single = np.ones(1, np.float32)
    comm.all_reduce(single, "premul_sum", factor=factor_of(comm.rank))
    assert all((array == single).all() for array in arrays)


def test_factors_are_every_ranks_own(worlds: Worlds) -> None:
    worlds.run(2, check_factors)
