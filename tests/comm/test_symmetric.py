"""Arrays of comm.empty(): the same bits as ordinary arrays, by the direct path."""

from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator, reference
from ringcomm.errors import MismatchError, UsageError
from tests.comm.oracle import assert_same_bits, random_inputs
from tests.worlds import Worlds

# Below and above what fits beside a flag; the last is several tiles per rank.
SIZES = (1, 17, 9001, 70_003)


def symmetric(comm: Communicator, values: Any) -> Any:
    x = comm.empty(values.shape, values.dtype)
    x[...] = values
    return x


def check_every_operation(comm: Communicator, dtype: str) -> None:
    n, rank = comm.world_size, comm.rank
    for seed, size in enumerate(SIZES):
        inputs = random_inputs(dtype, size, n, seed)
        for op in ("sum", "max"):
            x = symmetric(comm, inputs[rank])
            assert comm.all_reduce(x, op) is x
            assert_same_bits(x, reference.all_reduce(inputs, op), ("all_reduce", op, size))
            x = symmetric(comm, inputs[rank])
            comm.reduce(x, n - 1, op)
            expected = reference.reduce_to_root(inputs, op, n - 1)[rank]
            assert_same_bits(x, expected if rank == n - 1 else inputs[rank], ("reduce", op, size))
            whole = random_inputs(dtype, size * n, n, seed)
            x = symmetric(comm, whole[rank])
            got = comm.reduce_scatter(x, op)
            assert_same_bits(
                got, reference.reduce_scatter(whole, op)[rank], ("reduce_scatter", size)
            )
            assert_same_bits(x, whole[rank], "reduce_scatter left x alone")
            parts = [np.split(values, n) for values in whole]
            x = symmetric(comm, whole[rank])
            got = comm.all_to_all(x)
            assert_same_bits(
                got, np.concatenate(reference.all_to_all(parts)[rank]), ("all_to_all", size)
            )
            assert_same_bits(x, whole[rank], "all_to_all left x alone")
        x = symmetric(comm, inputs[rank])
        comm.broadcast(x, seed % n)
        assert_same_bits(x, inputs[seed % n], ("broadcast", size))
        x = symmetric(comm, inputs[rank])
        got = comm.all_gather(x)
        assert_same_bits(got.reshape(-1), reference.all_gather(inputs), ("all_gather", size))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int16", "complex64"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_gives_the_oracles_bits(worlds: Worlds, world_size: int, dtype: str) -> None:
    if dtype == "complex64":
        worlds.run(world_size, check_moves_of_complex)
    else:
        worlds.run(world_size, check_every_operation, dtype)


def check_moves_of_complex(comm: Communicator) -> None:
    inputs = random_inputs("complex64", 9001, comm.world_size, 3)
    x = symmetric(comm, inputs[comm.rank])
    comm.all_reduce(x)
    assert_same_bits(x, reference.all_reduce(inputs, "sum"), "sum")


def check_parts(comm: Communicator) -> None:
    n, rank = comm.world_size, comm.rank
    inputs = random_inputs("float32", 50_000, n, 7)
    memory = comm.empty(120_000)
    # Not at the same place on every rank.
    first = 1000 * rank
    memory[first : first + 50_000] = inputs[rank]
    before, after = memory[:first].copy(), memory[first + 50_000 :].copy()
    comm.all_reduce(memory[first : first + 50_000], algo="direct")
    assert_same_bits(
        memory[first : first + 50_000], reference.all_reduce(inputs, "sum"), "part of an array"
    )
    assert_same_bits(memory[:first], before, "before it")
    assert_same_bits(memory[first + 50_000 :], after, "behind it")
    # In place: every rank's own part of one array.
    part = comm.empty((n, 9000))
    part[rank] = inputs[rank][:9000]
    comm.all_gather(part[rank], part)
    assert_same_bits(part, np.stack([values[:9000] for values in inputs]), "all_gather in place")


@pytest.mark.parametrize("world_size", [2, 4])
def test_parts_of_an_array_may_lie_anywhere_in_it(worlds: Worlds, world_size: int) -> None:
    worlds.run(world_size, check_parts)


def check_many(comm: Communicator) -> None:
    n, rank = comm.world_size, comm.rank
    arrays = [comm.empty(20_000) for _ in range(6)]
    del arrays[1::2]  # of any age, at any time
    arrays.append(comm.empty((100, 200), "float64"))
    works = []
    for number, x in enumerate(arrays):
        x[...] = rank + number
        works.append(comm.all_reduce(x, async_op=True))
    expected = [sum(r + number for r in range(n)) for number in range(len(arrays))]
    if rank % 2:
        arrays.clear()  # the calls keep the memory
    for work, value in zip(works, expected, strict=True):
        assert np.all(work.wait() == value)
    assert comm.empty((3, 0)).shape == (3, 0)
    assert comm.explain(1 << 20, symmetric=True).algo == "direct"
    assert comm.explain(1 << 20).algo == "two_shot"


def test_arrays_come_and_go(worlds: Worlds) -> None:
    worlds.run(3, check_many)


def check_outlives(comm: Communicator) -> None:
    x = comm.empty(5000)
    x[:] = comm.rank
    comm.all_reduce(x)
    comm.close()
    assert np.all(x == sum(range(comm.world_size)))
    x[:] = 1


def test_an_array_outlives_its_communicator(worlds: Worlds) -> None:
    worlds.run(2, check_outlives)


def check_torch(comm: Communicator) -> None:
    import torch

    x = comm.empty((300, 100), torch.bfloat16)
    assert x.dtype == torch.bfloat16 and x.shape == (300, 100)
    x.fill_(comm.rank + 1)
    comm.all_reduce(x)
    assert torch.all(x == sum(range(1, comm.world_size + 1)))
    assert comm.empty((0, 2), torch.float32).shape == (0, 2)
    with pytest.raises(UsageError, match=r"torch\.qint8"):
        comm.empty(3, torch.qint8)


def test_torch_tensors(worlds: Worlds) -> None:
    pytest.importorskip("torch")
    worlds.run(2, check_torch)


def check_mistakes(comm: Communicator) -> None:
    for shape, dtype in ((-1, "float32"), ((2, 0.5), "float32"), (3, "float33"), (3, "O")):
        with pytest.raises(UsageError):
            comm.empty(shape, dtype)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"rank 0 .* asks for 400 bytes, rank 1 for 404"):
        comm.empty(100 + comm.rank)
    with pytest.raises(UsageError, match=r"comm\.empty"):
        comm.all_reduce(np.ones(100_000, "float32"), algo="direct")
    comm.barrier()  # nothing is lost
    x = comm.empty(100_000)
    with pytest.raises(MismatchError, match="direct in symmetric array"):
        comm.all_reduce(x if comm.rank else np.ones(100_000, "float32"))


def test_mistakes(worlds: Worlds) -> None:
    worlds.run(2, check_mistakes)
