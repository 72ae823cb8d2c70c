"""Communicators on arrays of emulated GPUs: the CPU's bits in every mode, and no failure that hangs."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator, reference
from ringcomm.errors import (
    AbortedError,
    DeadlineError,
    MismatchError,
    PeerLostError,
    UsageError,
)
from ringcomm.store import TCPStore
from tests.comm import test_coalesced, test_codec, test_exact, test_exchange
from tests.comm.oracle import assert_same_bits, random_inputs
from tests.dtypes import NUMPY
from tests.simt import emulated
from tests.worlds import Outcome, Worlds, environment

# What makes a group choose a mode.
MODES = {
    "in_kernel": {"RINGCOMM_SIMT_DEVICES": "4"},
    "stepped": {"RINGCOMM_SIMT_DEVICES": "1"},
    "host": {"RINGCOMM_SIMT_DEVICES": "4", "RINGCOMM_SIMT_PEERS": "0"},
}
SLAB = {"RINGCOMM_CUDA_SLAB_MIB": "1"}  # small: several rounds


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[[str], Worlds]]:
    """Rank processes whose groups choose the mode."""
    emulated.require()
    made: dict[str, Worlds] = {}

    def pool(mode: str) -> Worlds:
        if mode not in made:
            made[mode] = Worlds(package=emulated.PACKAGE, **MODES[mode], **SLAB)
        return made[mode]

    yield pool
    for worlds in made.values():
        left = worlds.leftovers()
        worlds.close()
        assert left == []


Pools = Callable[[str], Worlds]


# ---- the CPU's bits ------------------------------------------------------------------------------


class Settled:
    """A communicator whose collectives have come to their end when they return."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if name not in COLLECTIVES:
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            self._target.synchronize()
            return result

        return call


COLLECTIVES = ("all_reduce", "broadcast", "reduce", "all_gather", "reduce_scatter")
COLLECTIVES += ("gather", "scatter", "all_to_all", "all_reduce_coalesced")


def settled(comm: Communicator, mode: str, body: Callable[..., Any], *args: Any) -> Any:
    comm.use_device("simt")
    assert comm.device_mode == mode
    return body(Settled(comm), *args)


BODIES: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (test_exact.check_all_reduce, ("float32", None)),
    (test_exact.check_all_reduce, ("float16", "two_shot")),
    (test_exact.check_all_reduce, ("int64", None)),
    (test_exact.check_all_reduce, ("complex64", "two_shot")),
    (test_exact.check_data_movement, ("uint8",)),
    (test_exact.check_data_movement, ("float64",)),
    (test_exact.check_reduce, ("float32",)),
    (test_exact.check_reduce, ("bool",)),
    (test_exact.check_reduce_of_views, ()),
    (test_exact.check_lists, ("float16",)),
    (test_exact.check_reduce_scatter, ("float32",)),
    (test_exchange.check_even, ("float32",)),
    (test_exchange.check_uneven, (0,)),
    *((test_coalesced.check_ops, (dtype,)) for dtype in ("float32", "bfloat16", "bool", "int8")),
    (test_coalesced.check_ops, ("complex128",)),
    (test_coalesced.check_mixture, ()),
    (test_coalesced.check_views, ()),
    (test_codec.check_codec, ("int8", True, "float32")),
    (test_codec.check_codec, ("int4[rounding=stochastic,seed=5]", True, "float32")),
    (test_codec.check_codec, ("bf16", False, "float16")),
    (test_codec.check_non_finite, ()),
]


@pytest.mark.parametrize("number", range(len(BODIES)), ids=lambda n: f"{BODIES[n][0].__name__}-{n}")
@pytest.mark.parametrize(
    ("mode", "world_size"), [("in_kernel", 2), ("in_kernel", 4), ("stepped", 3), ("host", 2)]
)
def test_gpus_give_the_oracles_bits(pools: Pools, mode: str, world_size: int, number: int) -> None:
    body, args = BODIES[number]
    pools(mode).run(world_size, settled, mode, body, *args)


def check_large(comm: Communicator) -> None:
    """Arrays of several rounds, in and out of place, with what the small ones leave in the boxes."""
    n, rank = comm.world_size, comm.rank
    for seed, (dtype, size) in enumerate((("float32", 400_007), ("uint8", 1_000_003))):
        inputs = random_inputs(dtype, size, n, seed)
        for algo in (
            (None, "ring") if n == 2 else (None,)
        ):  # longer rings sum in orders of their own
            x = inputs[rank].copy()
            comm.all_reduce(x, algo=algo)
            assert_same_bits(x, reference.all_reduce(inputs, "sum"), (dtype, algo))
        for root in (0, n - 1):
            x = inputs[rank].copy()
            comm.broadcast(x, root)
            assert_same_bits(x, inputs[root], ("broadcast", root))
        whole = np.empty((n, size), NUMPY[dtype])
        whole[rank] = inputs[rank]
        comm.all_gather(whole[rank], whole)
        assert_same_bits(whole, np.stack(inputs), "all_gather in place")
        parts = [whole[r, : size // n * n].reshape(n, -1) for r in range(n)]
        expected = reference.reduce_scatter([part.reshape(-1) for part in parts], "max")[rank]
        own = whole[rank, rank * (size // n) : (rank + 1) * (size // n)]
        comm.reduce_scatter(whole[rank, : size // n * n], "max", own)
        assert_same_bits(own, expected, "reduce_scatter in place")
    residuals = random_inputs("float32", 300_007, n, 7)
    inputs = random_inputs("float32", 300_007, n, 8)
    mine, x = residuals[rank].copy(), inputs[rank].copy()
    comm.all_reduce(x, codec="int4", residual=mine)
    assert_same_bits(x, reference.all_reduce(inputs, "sum", "int4", "int8", residuals), "int4")
    assert_same_bits(mine, residuals[rank], "residual")


@pytest.mark.parametrize(
    ("mode", "world_size"), [("in_kernel", 2), ("in_kernel", 3), ("stepped", 4), ("host", 2)]
)
def test_arrays_larger_than_the_slab(pools: Pools, mode: str, world_size: int) -> None:
    pools(mode).run(world_size, settled, mode, check_large)


def check_small(comm: Communicator) -> str:
    comm.use_device("simt")
    for seed in range(10):
        inputs = random_inputs("float32", 2000, comm.world_size, seed)
        for codec in (None, "int8"):
            x = inputs[comm.rank].copy()
            comm.all_reduce(x, codec=codec)
            comm.synchronize()
            assert_same_bits(x, reference.all_reduce(inputs, "sum", codec, codec), (seed, codec))
    return str(comm.device_mode)


def test_ranks_may_be_threads_of_one_process_on_one_gpu(pools: Pools) -> None:
    assert pools("stepped").run_threads(2, check_small) == ["stepped"] * 2


def test_ranks_may_be_threads_of_one_process_on_gpus_of_their_own(pools: Pools) -> None:
    assert pools("in_kernel").run_threads(2, check_small) == ["in_kernel"] * 2


def test_processes_that_share_a_gpu_concurrently_wait_inside_kernels() -> None:
    emulated.require()
    shared = {**SLAB, "RINGCOMM_SIMT_CONCURRENT": "1"}
    with Worlds(package=emulated.PACKAGE, **shared) as worlds:
        assert worlds.run(2, check_small) == ["in_kernel"] * 2


def test_memory_without_descriptors_is_shared_too() -> None:
    emulated.require()
    legacy = {**MODES["in_kernel"], **SLAB, "RINGCOMM_SIMT_EXPORT": "legacy"}
    with Worlds(package=emulated.PACKAGE, **legacy) as worlds:
        assert worlds.run(2, check_small) == ["in_kernel"] * 2


def check_alone(comm: Communicator) -> None:
    comm.use_device("simt")
    x, out = np.arange(6, dtype=np.float32), np.empty((1, 6), np.float32)
    comm.all_reduce(x, codec="int4")
    comm.all_gather(x, out)
    comm.reduce_scatter(x.reshape(1, 6), "premul_sum", x2 := np.empty((1, 6), np.float32), factor=3)
    work = comm.all_to_all(x.reshape(1, 6), x3 := np.empty((1, 6), np.float32), async_op=True)
    assert work.wait() is x3
    comm.synchronize()
    for got, factor in ((x, 1), (out, 1), (x2, 3), (x3, 1)):
        assert_same_bits(
            got.reshape(-1), np.arange(6, dtype=np.float32) * np.float32(factor), factor
        )


def test_a_single_rank_copies_on_its_stream(pools: Pools) -> None:
    pools("in_kernel").run(1, check_alone)


# ---- calls that are queued -----------------------------------------------------------------------


def check_async(comm: Communicator, mode: str) -> None:
    """Works of many calls, waited for out of order, between synchronous ones; and messages beside them."""
    comm.use_device("simt")
    n, rank = comm.world_size, comm.rank
    calls = []
    for seed in range(8):
        inputs = random_inputs("float32", 1000 * seed + 1, n, seed)
        x, y = inputs[rank].copy(), inputs[rank].copy()
        calls.append((comm.all_reduce(x, async_op=True), reference.all_reduce(inputs, "sum")))
        comm.all_reduce(y, "max")
        calls.append((comm.all_gather(inputs[rank], async_op=True), np.stack(inputs)))
    view = np.zeros((8, 6), np.float32)[:, ::2]
    calls.append((comm.all_reduce(view, async_op=True), np.zeros((8, 3), np.float32)))
    received = np.empty(9000, np.float64)
    message = comm.recv(received, (rank - 1) % n, async_op=True)
    comm.send(np.full(9000, float(rank)), (rank + 1) % n)
    assert message.wait() == (rank - 1) % n
    assert (received == (rank - 1) % n).all()
    for work, expected in reversed(calls):
        result = work.wait()
        comm.synchronize()
        assert work.done()
        assert_same_bits(result, expected, mode)


@pytest.mark.parametrize("mode", MODES)
def test_asynchronous_calls(pools: Pools, mode: str) -> None:
    pools(mode).run(2, check_async, mode)


def check_lists_in_a_row(comm: Communicator) -> None:
    """Packed calls share one buffer, on streams of the caller's and of the communicator's."""
    comm.use_device("simt")
    n, rank = comm.world_size, comm.rank
    calls = []
    for seed in range(6):
        inputs = [random_inputs("float32", count, n, 10 * seed + count) for count in (3000, 7, 500)]
        arrays = [of_ranks[rank].copy() for of_ranks in inputs]
        comm.all_reduce_coalesced(arrays, async_op=seed % 2 == 0)
        calls.append((arrays, inputs))
    comm.synchronize()
    for seed, (arrays, inputs) in enumerate(calls):
        for array, of_ranks in zip(arrays, inputs, strict=True):
            assert_same_bits(array, reference.all_reduce(of_ranks, "sum"), (seed, array.size))


@pytest.mark.parametrize("mode", MODES)
def test_lists_in_a_row_take_turns_with_their_buffer(pools: Pools, mode: str) -> None:
    pools(mode).run(2, check_lists_in_a_row)


def check_different_lists(comm: Communicator) -> str:
    """As on CPUs, whatever is packed: here, or in the next call."""
    comm.use_device("simt")
    x = [np.ones(count + comm.rank, np.float32) for count in (5, 9 - 2 * comm.rank)]

    def call() -> None:
        comm.all_reduce_coalesced(x)
        comm.synchronize()
        comm.barrier()

    with pytest.raises(MismatchError, match="called different operations") as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("mode", MODES)
def test_lists_that_differ_are_a_mismatch(pools: Pools, mode: str) -> None:
    first, second = pools(mode).run(2, check_different_lists)
    assert first == second
    assert first.count("of a list of 2 arrays, sizes #") == 2


def check_queued(comm: Communicator, port: int) -> tuple[bool, bool]:
    """A call returns before its peer has come, and so does wait()."""
    comm.use_device("simt")
    store = TCPStore(port=port, is_server=False)
    x = np.ones(50_000, np.float32)
    if comm.rank == 1:
        store.get("queued")
        comm.all_reduce(x)
        comm.synchronize()
        return True, (x == 2).all()
    work = comm.all_reduce(x, async_op=True)
    work.wait()
    done = work.done()
    store.set("queued", b"")
    comm.synchronize()
    assert work.done()
    return done, (x == 2).all()


def test_in_kernel_calls_return_when_they_are_queued(pools: Pools) -> None:
    store = TCPStore(is_server=True, timeout=20)
    outcomes = pools("in_kernel").run(2, check_queued, store.port)
    store.close()
    assert outcomes == [(False, True), (True, True)]


def check_owned(comm: Communicator) -> list[tuple[int, int]]:
    host = comm.owned(100_000)
    comm.use_device("simt")
    assert comm.owned(100_000, on_device=False) == host
    x = np.ones(100_000, np.float32)
    kept = np.full(100_000, 7, np.float32)
    comm.all_reduce(x, codec="int4/4", owner_residual=kept)
    comm.synchronize()
    owned = comm.owned(100_000)
    mask = np.ones(100_000, bool)
    for begin, end in owned:
        mask[begin:end] = False
    assert (kept[mask] == 7).all()
    assert (kept[~mask] != 7).all()
    return owned


@pytest.mark.parametrize("mode", MODES)
def test_owned_says_where_owner_residuals_change(pools: Pools, mode: str) -> None:
    first, second = pools(mode).run(2, check_owned)
    assert sorted(first + second)[0][0] == 0
    assert sum(end - begin for begin, end in first + second) == 100_000


def check_about(comm: Communicator) -> tuple[list[str], dict[str, Any], list[dict[str, Any]]]:
    with pytest.raises(UsageError, match="has not been set up"):
        comm.explain(4000, on_device=True)
    comm.use_device("simt")
    comm.use_device("simt")
    with pytest.raises(UsageError, match="empty"):
        comm.empty(10)
    with pytest.raises(UsageError, match="algo='staged' does not do all_reduce|algo must be"):
        comm.all_reduce(np.ones(4), algo="staged")
    for _ in range(3):
        comm.all_reduce(np.ones(1000, np.float32), tag="step")
    comm.synchronize()
    plans = [
        str(comm.explain(size, op))
        for size in (4000, 1 << 24)
        for op in ("all_reduce", "all_gather")
    ]
    return plans, comm.stats()["all_reduce"], comm.flight_recorder()[-3:]


def test_plans_statistics_and_the_recorder_tell_of_gpus(pools: Pools) -> None:
    for mode in MODES:
        for plans, stats, calls in pools(mode).run(2, check_about):
            assert all("on GPUs" in plan for plan in plans), plans
            assert stats["calls"] == 3
            assert stats["bytes"] == 12_000
            assert stats["bytes_sent"] == 12_000
            assert [call["state"] for call in calls] == ["completed"] * 3
            assert {call["tag"] for call in calls} == {"step"}
        assert ("one_shot" in plans[0]) == (mode != "stepped")


def make_split(comm: Communicator) -> str:
    comm.use_device("simt")
    child = comm.split(comm.rank % 2)
    assert child is not None
    with child:
        x = np.full(5000, comm.rank, np.float32)
        child.all_reduce(x)
        child.synchronize()
        assert (x == comm.rank % 2 * 2 + 2).all()
        return str(child.device)


def test_sub_groups_have_gpus_of_their_own(pools: Pools) -> None:
    assert pools("in_kernel").run(4, make_split) == ["simt"] * 4


# ---- set-up --------------------------------------------------------------------------------------


def set_up_differently(comm: Communicator, variable: str, values: tuple[str, str]) -> str:
    with environment(**{variable: values[comm.rank]}), pytest.raises(UsageError) as caught:
        comm.use_device("simt")
    x = np.ones(4)
    comm.all_reduce(x)  # on the CPU
    assert (x == 2).all()
    comm.use_device("simt")
    return str(caught.value)


@pytest.mark.parametrize(
    ("mode", "variable", "values", "piece"),
    [
        (
            "in_kernel",
            "RINGCOMM_CUDA_MODE",
            ("stepped", "auto"),
            "is stepped on rank 0 and auto on rank 1",
        ),
        ("in_kernel", "RINGCOMM_CUDA_SLAB_MIB", ("1", "2"), "is 1 on rank 0 and 2 on rank 1"),
        (
            "host",
            "RINGCOMM_CUDA_MODE",
            ("in_kernel", "in_kernel"),
            "cannot be: the GPU of rank 0 does not reach",
        ),
    ],
)
def test_ranks_that_want_different_things_are_told_so(
    pools: Pools, mode: str, variable: str, values: tuple[str, str], piece: str
) -> None:
    texts = pools(mode).run(2, set_up_differently, variable, values)
    assert texts[0] == texts[1]
    assert piece in texts[0]


def choose_mode(comm: Communicator, mode: str) -> str:
    with environment(RINGCOMM_CUDA_MODE=mode):
        return check_small(comm)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_can_be_forced(pools: Pools, mode: str) -> None:
    assert pools("in_kernel").run(2, choose_mode, mode) == [mode] * 2


# ---- failure -------------------------------------------------------------------------------------


def call_and_settle(comm: Communicator, call: Callable[[Communicator], Any]) -> None:
    call(comm)
    comm.synchronize()


DISAGREEMENTS: dict[str, Callable[[Communicator], Any]] = {
    "sizes": lambda c: c.all_reduce(np.ones(1000 + c.rank)),
    "operations": lambda c: c.all_reduce(np.ones(4)) if c.rank else c.broadcast(np.ones(4)),
    "counts": lambda c: c.gather(np.ones(4 + c.rank), 0),
    "codecs": lambda c: c.all_reduce(np.ones(4000, np.float32), codec="int8" if c.rank else "int4"),
}


def disagree(comm: Communicator, what: str) -> None:
    comm.use_device("simt")
    comm.all_reduce(np.ones(5))
    DISAGREEMENTS[what](comm)
    comm.synchronize()
    comm.all_reduce(np.ones(5))


def same_error(outcomes: list[Outcome], kind: type[Exception]) -> str:
    assert {type(outcome.error) for outcome in outcomes} == {kind}, outcomes
    texts = {str(outcome.error) for outcome in outcomes}
    assert len(texts) == 1, texts
    return texts.pop()


@pytest.mark.parametrize("mode", ["in_kernel", "stepped"])
@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_disagreeing_calls_raise_the_same_sentence_on_all_ranks(
    pools: Pools, mode: str, what: str
) -> None:
    outcomes = pools(mode).outcomes(2, disagree, what, timeout=8.0)
    text = same_error(outcomes, MismatchError)
    assert "rank 0" in text
    assert "rank 1" in text


def gpu_and_cpu(comm: Communicator) -> None:
    comm.use_device("simt")
    if comm.rank == 1:
        comm._devices._hosts_are_simt = False  # its array is the host's
    comm.all_reduce(np.ones(1000, np.float32), algo="two_shot")
    comm.synchronize()


def test_an_array_on_a_gpu_and_one_on_the_cpu_do_not_match(pools: Pools) -> None:
    text = same_error(pools("stepped").outcomes(2, gpu_and_cpu), MismatchError)
    assert text.count("on GPUs") == 1


CALLS: dict[str, Callable[[Communicator], Any]] = {
    "small": lambda c: c.all_reduce(np.ones(100)),
    "large": lambda c: c.all_reduce(np.ones(100_000)),
    "codec": lambda c: c.all_reduce(np.ones(100_000, np.float32), codec="int8"),
    "async": lambda c: c.all_reduce(np.ones(100_000), async_op=True).wait(),
    "broadcast": lambda c: c.broadcast(np.ones(100_000), 0),
    "gather": lambda c: c.gather(np.ones(1000), 0),
}


def wait_for(comm: Communicator, what: str, port: int, ends: str) -> tuple[str, float]:
    """Rank 1 ends, or does not come, when rank 0 waits for it."""
    comm.use_device("simt")
    for _ in range(3):
        comm.all_reduce(np.ones(1000))
    comm.synchronize()
    store = TCPStore(port=port, is_server=False)
    if comm.rank == 1:
        store.get("waits")
        if ends == "dies":
            store.set("ended", str(time.monotonic()).encode())
            os.kill(os.getpid(), signal.SIGKILL)
        store.get("failed")
        return "", 0.0
    kind = PeerLostError if ends == "dies" else DeadlineError
    store.set("waits", b"")
    with pytest.raises(kind) as caught:
        call_and_settle(comm, CALLS[what])
    when = time.monotonic()
    store.set("failed", b"")
    for call in (comm.synchronize, comm.barrier, lambda: comm.all_reduce(np.ones(5))):
        with pytest.raises(kind) as again:
            call()
        assert str(again.value) == str(caught.value)
    comm.close()
    assert time.monotonic() - when < 2, "close() ends kernels that wait"
    return str(caught.value), when


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", CALLS)
def test_a_killed_peer_is_named_at_once(pools: Pools, mode: str, what: str) -> None:
    if mode == "host" and what == "broadcast":
        pytest.skip("the root of a broadcast through the host does not wait for the others")
    store = TCPStore(is_server=True, timeout=20)
    outcomes = pools(mode).outcomes(2, wait_for, what, store.port, "dies")
    assert [outcome.kind for outcome in outcomes] == ["value", "gone"], outcomes
    text, when = outcomes[0].value
    assert "rank 1 (pid" in text
    assert "died" in text
    assert when - float(store.get("ended")) < 2
    store.close()


def late(comm: Communicator, what: str, port: int) -> str:
    comm.use_device("simt")
    comm.all_reduce(np.ones(1000))
    comm.synchronize()
    store = TCPStore(port=port, is_server=False)
    if comm.rank == 1:
        store.get("failed")
        with pytest.raises(DeadlineError) as caught:
            CALLS[what](comm)
        return str(caught.value)
    with pytest.raises(DeadlineError) as caught:
        call_and_settle(comm, CALLS[what])
    store.set("failed", b"")
    assert caught.value.rank == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("mode", "what"), [("in_kernel", "small"), ("in_kernel", "large"), ("stepped", "codec")]
)
def test_a_late_rank_is_named_on_all_ranks(pools: Pools, mode: str, what: str) -> None:
    store = TCPStore(is_server=True, timeout=20)
    texts = pools(mode).run(2, late, what, store.port, timeout=1.0)
    store.close()
    assert texts[0] == texts[1]
    assert "rank 1 (pid" in texts[0]
    assert "did not come within 1 s" in texts[0]
    assert "of group 'world'" in texts[0]


def abort(comm: Communicator, port: int) -> float:
    comm.use_device("simt")
    comm.all_reduce(np.ones(1000))
    comm.synchronize()
    store = TCPStore(port=port, is_server=False)
    if comm.rank == 1:
        store.get("queued")
        store.set("aborted", str(time.monotonic()).encode())
        comm.abort("the loss is NaN")
        with pytest.raises(AbortedError, match="the loss is NaN"):
            comm.all_reduce(np.ones(4))
        return 0.0
    work = comm.all_reduce(np.ones(100_000), async_op=True)
    store.set("queued", b"")
    with pytest.raises(AbortedError, match="the loss is NaN"):
        call_and_settle(comm, lambda _: work.wait())
    return time.monotonic() - float(store.get("aborted"))


@pytest.mark.parametrize("mode", MODES)
def test_abort_frees_those_who_wait(pools: Pools, mode: str) -> None:
    store = TCPStore(is_server=True, timeout=20)
    assert pools(mode).run(2, abort, store.port)[0] < 1.5
    store.close()


def close_at_once(comm: Communicator, rounds: int) -> None:
    """Whoever closes first has got all, and takes nothing from the others."""
    comm.use_device("simt")
    inputs = random_inputs("float32", 20_000, comm.world_size, rounds)
    x = inputs[comm.rank].copy()
    for _ in range(rounds):
        comm.broadcast(x, 0)
    comm.close()
    assert_same_bits(x, inputs[0] if rounds else inputs[comm.rank], rounds)
    with pytest.raises(AbortedError):
        comm.synchronize()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rounds", [0, 1, 5])
def test_close_waits_for_the_gpu(pools: Pools, mode: str, rounds: int) -> None:
    for _ in range(3):
        pools(mode).run(2, close_at_once, rounds)


def leave_early(comm: Communicator) -> str:
    comm.use_device("simt")
    comm.all_reduce(np.ones(1000))
    if comm.rank == 1:
        comm.close()
        return ""
    with pytest.raises(PeerLostError) as caught:
        call_and_settle(comm, lambda c: [c.all_reduce(np.ones(1000)) for _ in range(3)])
    return str(caught.value)


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_that_closes_is_named_by_those_who_need_it(pools: Pools, mode: str) -> None:
    text = pools(mode).run(2, leave_early)[0]
    assert "rank 1 (pid" in text
    assert "closed group 'world' after" in text
