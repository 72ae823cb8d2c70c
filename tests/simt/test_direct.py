"""Collectives on arrays of emulated GPUs that all ranks have mapped: the CPU's bits, and never memory that is gone."""

import ctypes
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator, _core, reference
from ringcomm.errors import DeadlineError, UsageError
from ringcomm.store import TCPStore
from tests.comm.oracle import assert_same_bits, random_inputs
from tests.dtypes import NUMPY
from tests.simt import emulated
from tests.worlds import Worlds

ALL = {"RINGCOMM_CUDA_SLAB_MIB": "1", "RINGCOMM_CUDA_DIRECT_KIB": "0"}
MODES = {
    "in_kernel": {**ALL, "RINGCOMM_SIMT_DEVICES": "4"},
    "stepped": {**ALL, "RINGCOMM_SIMT_DEVICES": "1"},
    "host": {**ALL, "RINGCOMM_SIMT_DEVICES": "4", "RINGCOMM_SIMT_PEERS": "0"},
}
MODES_AND_SIZES = [("in_kernel", 2), ("in_kernel", 4), ("stepped", 3)]

Array = Any
Pools = Callable[[str], Worlds]


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    emulated.require()
    made: dict[str, Worlds] = {}

    def pool(mode: str) -> Worlds:
        if mode not in made:
            made[mode] = Worlds(package=emulated.PACKAGE, **MODES[mode])
        return made[mode]

    yield pool
    for worlds in made.values():
        worlds.close()


class UserMemory:
    """What an allocator of the user's has taken of a GPU; other processes can map it if it is ``shared``."""

    def __init__(self, num_bytes: int, shared: bool = True) -> None:
        runtime = _core.simt
        device = 0
        self._memory = (
            runtime.SharedMemory.allocate(device, num_bytes)
            if shared
            else runtime.DeviceMemory(device, num_bytes)
        )
        self._bytes = np.asarray((ctypes.c_uint8 * num_bytes).from_address(self._memory.address))

    def array(self, dtype: str, count: int, offset: int = 0) -> Array:
        """``offset`` in bytes."""
        num_bytes = count * NUMPY[dtype].itemsize
        return self._bytes[offset : offset + num_bytes].view(NUMPY[dtype])

    def free(self) -> None:
        self._memory.close()


def placed(values: Array, offset: int = 0) -> Array:
    """A copy in memory of its own that lives as long as the process."""
    memory = UserMemory(values.nbytes + offset + 16)
    KEPT.append(memory)
    array = memory.array(str(values.dtype), values.size, offset)
    array[:] = values.reshape(-1)
    return array.reshape(values.shape)


KEPT: list[UserMemory] = []


def of_the_communicator(comm: Communicator, values: Array) -> Array:
    array = comm.empty(values.shape, str(values.dtype), device="simt")
    array[:] = values
    return array


class Counted:
    """Runs a call to its end, and says whether it was direct."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm

    def __call__(self, name: str, /, *args: Any, **kwargs: Any) -> bool:
        before = self.comm.direct_calls
        getattr(self.comm, name)(*args, **kwargs)
        self.comm.synchronize()
        return self.comm.direct_calls == before + 1


def check_every_operation(comm: Communicator, make: str, dtype: str, size: int) -> None:
    comm.use_device("simt")
    run, n, rank = Counted(comm), comm.world_size, comm.rank

    def new(values: Array) -> Array:
        return of_the_communicator(comm, values) if make == "empty" else placed(values, 16 * rank)

    inputs = random_inputs(dtype, size, n, 1)
    together = np.stack(inputs)
    total = reference.all_reduce(inputs, "sum")
    x = new(inputs[rank])
    assert run("all_reduce", x, algo="direct")
    assert_same_bits(x, total, "all_reduce")
    assert run("all_reduce", x, "max", algo="direct")
    assert_same_bits(x, total, "all_reduce of what one has written")
    for root in range(n):
        x = new(inputs[rank])
        assert run("broadcast", x, root)
        assert_same_bits(x, inputs[root], ("broadcast", root))
        x = new(inputs[rank])
        assert run("reduce", x, root)
        assert_same_bits(x, total if rank == root else inputs[rank], ("reduce", root))
    x = new(inputs[rank])
    whole = new(np.zeros_like(together))
    assert run("all_gather", x, whole)
    assert_same_bits(whole, together, "all_gather")
    assert_same_bits(x, inputs[rank], "its input")
    parts = [np.roll(together, r) for r in range(n)]
    expected = reference.reduce_scatter([part.reshape(-1) for part in parts], "sum")[rank]
    x, out = new(parts[rank]), new(inputs[rank])
    assert run("reduce_scatter", x, "sum", out)
    assert_same_bits(out, expected, "reduce_scatter")
    swapped = new(np.zeros_like(together))
    sent = new(np.stack([inputs[rank]] * n))
    assert run("all_to_all", sent, swapped)
    assert_same_bits(swapped, together, "all_to_all")


@pytest.mark.parametrize("make", ["empty", "user"])
@pytest.mark.parametrize(("mode", "world_size"), MODES_AND_SIZES)
@pytest.mark.parametrize(("dtype", "size"), [("float32", 12_000), ("float16", 36), ("int64", 1201)])
def test_every_operation_has_the_oracles_bits(
    pools: Pools, mode: str, world_size: int, make: str, dtype: str, size: int
) -> None:
    pools(mode).run(world_size, check_every_operation, make, dtype, size)


@pytest.mark.parametrize("make", ["empty", "user"])
@pytest.mark.parametrize("mode", ["in_kernel", "stepped"])
def test_ranks_may_be_threads(pools: Pools, mode: str, make: str) -> None:
    pools(mode).run_threads(3, check_every_operation, make, "float32", 1202)


def check_uneven(comm: Communicator) -> None:
    comm.use_device("simt")
    run, n, rank = Counted(comm), comm.world_size, comm.rank
    counts = np.random.default_rng(3).integers(0, 900, (n, n))
    counts[0, -1] = 0
    if n > 2:
        counts[-1, :] = 0
    values = [
        [np.full(count, 100 * s + r, np.int32) for r, count in enumerate(row)]
        for s, row in enumerate(counts)
    ]
    sent = placed(np.concatenate(values[rank]))
    cuts = np.cumsum(counts[rank])[:-1]
    received = [np.zeros(count, np.int32) for count in counts[:, rank]]
    assert run("all_to_all", list(np.split(sent, cuts)), received)
    for source in range(n):
        assert_same_bits(received[source], values[source][rank], source)
    # Parts with a gap between them.
    apart = [placed(part) for part in values[rank]]
    assert not run("all_to_all", apart, received)
    for source in range(n):
        assert_same_bits(received[source], values[source][rank], source)


@pytest.mark.parametrize(("mode", "world_size"), MODES_AND_SIZES)
def test_parts_of_any_length_that_lie_behind_one_another(
    pools: Pools, mode: str, world_size: int
) -> None:
    pools(mode).run(world_size, check_uneven)


def check_memory_that_comes_and_goes(comm: Communicator) -> None:
    """Freed on one rank, on all, and in another order; new memory often lies where old memory did."""
    comm.use_device("simt")
    run, n, rank = Counted(comm), comm.world_size, comm.rank
    arrays: dict[int, UserMemory] = {}
    rng = np.random.default_rng(5)
    for turn in range(60):
        key = int(rng.integers(4))
        if rng.random() < (0.6 if turn % n == rank else 0.2) and key in arrays:
            arrays.pop(key).free()
        if key not in arrays:
            arrays[key] = UserMemory(8192)
        inputs = random_inputs("float32", 1500, n, turn)
        x = arrays[key].array("float32", 1500, 16 * int(rng.integers(8)))
        x[:] = inputs[rank]
        assert run("all_reduce", x, algo="direct"), turn
        assert_same_bits(x, reference.all_reduce(inputs, "sum"), turn)
        rng = np.random.default_rng((5, turn, 0 if turn % 3 else rank))


@pytest.mark.parametrize(("mode", "world_size"), MODES_AND_SIZES)
def test_freed_memory_is_never_used(pools: Pools, mode: str, world_size: int) -> None:
    pools(mode).run(world_size, check_memory_that_comes_and_goes)


def check_more_arrays_than_slots(comm: Communicator) -> None:
    comm.use_device("simt")
    run, n, rank = Counted(comm), comm.world_size, comm.rank
    arrays = [UserMemory(512) for _ in range(70)]
    for turn in range(150):
        x = arrays[turn * 7 % 70 if turn < 140 else turn % 3].array("float32", 100)
        inputs = random_inputs("float32", 100, n, turn)
        x[:] = inputs[rank]
        assert run("all_reduce", x, algo="direct"), turn
        assert_same_bits(x, reference.all_reduce(inputs, "sum"), turn)


def test_more_arrays_than_slots(pools: Pools) -> None:
    pools("in_kernel").run(2, check_more_arrays_than_slots)


def check_what_cannot_be_mapped(comm: Communicator) -> list[bool]:
    comm.use_device("simt")
    run, n, rank = Counted(comm), comm.world_size, comm.rank
    inputs = random_inputs("float32", 2000, n, 1)
    total = reference.all_reduce(inputs, "sum")
    local = UserMemory(8064, shared=False)

    def one(odd: Array, even: Array, **options: Any) -> bool:
        x = even if rank else odd
        x[:] = inputs[rank]
        was_direct = run("all_reduce", x, **{"algo": "direct", **options})
        if "codec" not in options and "factor" not in options:
            assert_same_bits(x, total, "")
        return was_direct

    mapped, region = placed(inputs[rank]), comm.empty(2000, device="simt")
    shifted = placed(inputs[rank], 4)
    return [
        one(local.array("float32", 2000, 64), mapped),
        one(local.array("float32", 2000, 64), mapped),
        one(np.empty(2000, np.float32), region),
        one(shifted, region),
        one(mapped, region),
        one(region, region, algo="two_shot"),
        one(region, region, algo=None, codec="int8"),
        one(region, region, op="premul_sum", factor=2),
        one(region, mapped),
        one(mapped, mapped),
    ]


@pytest.mark.parametrize(("mode", "world_size"), MODES_AND_SIZES)
def test_what_cannot_be_mapped_goes_through_the_slabs(
    pools: Pools, mode: str, world_size: int
) -> None:
    """On all ranks alike: one array that is not mapped, an odd address, a region that another rank does not name."""
    said = pools(mode).run(world_size, check_what_cannot_be_mapped)
    assert said == [[False] * 9 + [True]] * world_size


def test_threads_of_one_process_reach_everything_on_their_gpu(pools: Pools) -> None:
    said = pools("stepped").run_threads(2, check_what_cannot_be_mapped)
    assert said == [[True, True, *[False] * 7, True]] * 2


def check_queued(comm: Communicator) -> None:
    """Calls that nobody waits for, on two arrays in turn, asynchronous and not."""
    comm.use_device("simt")
    n, rank = comm.world_size, comm.rank
    arrays = [placed(np.full(3000, rank + 1, np.int64)), comm.empty(3000, "int64", device="simt")]
    arrays[1][:] = rank + 1
    pending = []
    for turn in range(24):
        pending.append(
            comm.all_reduce(
                arrays[turn % 2],
                "max" if turn % 4 < 2 else "sum",
                algo="direct",
                async_op=turn % 3 == 0,
            )
        )
    for work in pending:
        if hasattr(work, "wait"):
            work.wait()
    comm.synchronize()
    assert comm.direct_calls == 24
    assert (arrays[0] == n**6 * n).all() and (arrays[1] == n**6 * n).all(), rank


@pytest.mark.parametrize(("mode", "world_size"), MODES_AND_SIZES)
def test_calls_may_be_queued(pools: Pools, mode: str, world_size: int) -> None:
    pools(mode).run(world_size, check_queued)


def check_captured(comm: Communicator) -> None:
    """What a graph uses stays mapped: the user's memory that was registered before, and the communicator's. What was
    not registered cannot be now, and goes through the slab. On one rank, that is enough for all.
    """
    comm.use_device("simt")
    run, n, rank = Counted(comm), comm.world_size, comm.rank
    inputs = random_inputs("float32", 3000, n, 1)
    known, unknown = placed(inputs[rank]), placed(inputs[rank])
    region = of_the_communicator(comm, inputs[rank])
    arrays = [known, unknown if rank == 0 else known.copy(), region]
    assert run("all_reduce", known, algo="direct")
    known[:] = inputs[rank]
    counts = []
    with _core.simt.DeviceGuard(rank):
        _core.simt.begin_capture(0)
        for x in arrays:
            before = comm.direct_calls
            comm.all_reduce(x, algo="direct")
            counts.append(comm.direct_calls - before)
        graph = _core.simt.end_capture(0)
        assert counts == [1, 0, 1]
        others = [
            UserMemory(512) for _ in range(70)
        ]  # so many that the slot of `known` would be given away
        for turn, other in enumerate(others):
            x = other.array("float32", 100)
            x[:] = rank + turn
            assert run("all_reduce", x, algo="direct")
            assert (x == sum(range(n)) + n * turn).all()
            assert (known == inputs[rank]).all()
        graph.launch()
        _core.simt.synchronize(0)
    total = reference.all_reduce(inputs, "sum")
    for x in arrays:
        assert_same_bits(x, total, "captured")


def test_calls_may_be_captured(pools: Pools) -> None:
    pools("in_kernel").run(2, check_captured)


def check_arrays(comm: Communicator) -> None:
    x = comm.empty((3, 5), "float16", device="simt")
    assert (x.shape, x.dtype) == ((3, 5), np.float16)
    for shape in ((0,), (4, 0), ()):
        assert comm.empty(shape, device="simt").shape == shape
    x[:] = comm.rank
    comm.all_reduce(x)
    comm.synchronize()
    assert (x == sum(range(comm.world_size))).all()
    with pytest.raises(UsageError, match="rank 0 of group .* asks for 400 bytes, rank 1 for 404"):
        comm.empty(100 + (comm.rank == 1), device="simt")
    with pytest.raises(UsageError, match="arrays of the host"):
        comm.empty(3)
    with pytest.raises(UsageError, match="has no CUDA"):
        comm.empty(3, device="cuda:0")


@pytest.mark.parametrize(("mode", "world_size"), [("in_kernel", 2), ("stepped", 3), ("host", 2)])
def test_arrays_of_the_communicator(pools: Pools, mode: str, world_size: int) -> None:
    pools(mode).run(world_size, check_arrays)


def test_arrays_of_a_single_rank(pools: Pools) -> None:
    pools("in_kernel").run(1, check_alone)


def check_alone(comm: Communicator) -> None:
    x = comm.empty(5, device="simt")
    x[:] = 2
    comm.all_reduce(x, "avg")
    comm.synchronize()
    assert (x == 2).all()


def check_arrays_that_are_dropped(comm: Communicator) -> None:
    """Also between a call and its end, and on one rank only."""
    n = comm.world_size
    kept = comm.empty(500, "int64", device="simt")
    for turn in range(12):
        x = comm.empty(500, "int64", device="simt")
        x[:] = comm.rank + turn
        comm.all_reduce(x)
        comm.synchronize()
        assert (x == sum(range(n)) + n * turn).all()
        kept[:] = x
        if turn % n == comm.rank:
            kept = x
        del x
        other = comm.empty(500, "int64", device="simt") if turn % 4 == 0 else kept
        del other
    comm.close()
    kept[:] = 1  # outlives the communicator


@pytest.mark.parametrize(("mode", "world_size"), MODES_AND_SIZES)
def test_arrays_may_be_dropped_at_any_time(pools: Pools, mode: str, world_size: int) -> None:
    pools(mode).run(world_size, check_arrays_that_are_dropped)


def check_limit(comm: Communicator, least_kib: int) -> None:
    comm.use_device("simt")
    run, n = Counted(comm), comm.world_size
    for kib, op in itertools.product((1, 2, 4), ("all_gather", "all_to_all")):
        x = placed(np.ones((n, kib * 256), np.float32))
        given = x[comm.rank] if op == "all_gather" else x
        least = least_kib if op == "all_gather" else least_kib / n
        assert run(op, given, np.empty_like(x)) == (0 <= least <= kib), (kib, op)
    plan = comm.explain(2048, "all_gather", on_device=True)
    assert (plan.algo == "direct") == (least_kib == 2), plan


def check_a_late_rank(comm: Communicator, port: int) -> None:
    comm.use_device("simt")
    store = TCPStore(port=port, is_server=False)
    run, x, out = Counted(comm), placed(np.ones(64, np.float32)), np.empty(128, np.float32)
    assert run("all_gather", x, out)
    if comm.rank == 0:
        store.get("failed")
        return
    with pytest.raises(DeadlineError, match=r"rank 0 \(pid"):
        run("all_gather", x, out)
    store.set("failed", b"1")


@pytest.mark.parametrize("mode", ["in_kernel", "stepped"])
def test_a_late_rank_is_named(pools: Pools, mode: str) -> None:
    store = TCPStore(is_server=True, timeout=20)
    pools(mode).run(2, check_a_late_rank, store.port, timeout=1.0)
    store.close()


@pytest.mark.parametrize("least_kib", [2, -1])
def test_small_arrays_go_through_the_slabs(least_kib: int) -> None:
    emulated.require()
    variables = {**MODES["in_kernel"], "RINGCOMM_CUDA_DIRECT_KIB": str(least_kib)}
    with Worlds(package=emulated.PACKAGE, **variables) as worlds:
        worlds.run(2, check_limit, least_kib)
