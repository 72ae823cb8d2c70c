"""Ranks that disagree: the same MismatchError everywhere, both sides shown, never a wrong sum."""

import time
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from ringcomm import Communicator
from ringcomm.errors import MismatchError, PeerLostError
from tests.worlds import Outcome, Worlds


def f32(count: int = 100) -> Any:
    return np.ones(count, np.float32)


def scatter(comm: Communicator, root: int, count: int) -> Any:
    x = f32(count * comm.world_size) if comm.rank == root else None
    return comm.scatter(x, root, f32(count))


BIG = 100_000  # several segments
CALLS: dict[str, Callable[[Communicator], Any]] = {
    "plain": lambda c: c.all_reduce(f32()),
    "dtype": lambda c: c.all_reduce(np.ones(100, np.int32)),
    "wider dtype, same bytes": lambda c: c.all_reduce(np.ones(50, np.float64)),
    "count": lambda c: c.all_reduce(f32(99)),
    "nothing": lambda c: c.all_reduce(f32(0)),
    "reduce op": lambda c: c.all_reduce(f32(), "max"),
    "avg": lambda c: c.all_reduce(f32(), "avg"),
    "premul sum": lambda c: c.all_reduce(f32(), "premul_sum", factor=2.0),
    "same width": lambda c: c.all_reduce(np.ones(100, np.uint32)),
    "algo": lambda c: c.all_reduce(f32(), algo="two_shot"),
    "ring": lambda c: c.all_reduce(f32(), algo="ring"),
    "tag": lambda c: c.all_reduce(f32(), tag="other"),
    "codec": lambda c: c.all_reduce(f32(), codec="int8"),
    "other codec": lambda c: c.all_reduce(f32(), codec="int4"),
    "stochastic": lambda c: c.all_reduce(f32(), codec="int8[rounding=stochastic]"),
    "owner residual": lambda c: c.all_reduce(f32(), codec="int8", owner_residual=f32()),
    "big": lambda c: c.all_reduce(f32(BIG)),
    "bigger": lambda c: c.all_reduce(f32(BIG + 1)),
    "big codec": lambda c: c.all_reduce(f32(BIG), codec="int8"),
    "big broadcast": lambda c: c.broadcast(f32(BIG), 0),
    "big gather": lambda c: c.all_gather(f32(BIG)),
    "big scatter": lambda c: c.reduce_scatter(f32(BIG * c.world_size)),
    "broadcast": lambda c: c.broadcast(f32(), 0),
    "broadcast from 1": lambda c: c.broadcast(f32(), 1),
    "broadcast less": lambda c: c.broadcast(f32(7), 0),
    "gather": lambda c: c.all_gather(f32()),
    "scatter": lambda c: c.reduce_scatter(f32(100 * c.world_size)),
    "reduce": lambda c: c.reduce(f32(), 0),
    "reduce to 1": lambda c: c.reduce(f32(), 1),
    "big reduce": lambda c: c.reduce(f32(BIG), 0),
    "bigger reduce": lambda c: c.reduce(f32(BIG), 0, "max"),
    "gather to root": lambda c: c.gather(f32(), 0),
    "gather to 1": lambda c: c.gather(f32(), 1),
    "gather ints": lambda c: c.gather(np.ones(100, np.int32), 0),
    "scatter from root": lambda c: scatter(c, 0, 100),
    "big scatter from root": lambda c: scatter(c, 0, BIG),
    "all_to_all": lambda c: c.all_to_all(f32(100 * c.world_size)),
    "big all_to_all": lambda c: c.all_to_all(f32(BIG * c.world_size)),
    "all_to_all of ints": lambda c: c.all_to_all(np.ones(100 * c.world_size, np.int32)),
    "all_to_all with tag": lambda c: c.all_to_all(f32(100 * c.world_size), tag="here"),
    "monitored_barrier": lambda c: c.monitored_barrier(),
    "barrier": lambda c: c.barrier(),
    "barrier with tag": lambda c: c.barrier(tag="here"),
}

# (what rank 0 calls, what the last rank calls, pieces of the sentence)
PAIRS = [
    ("plain", "dtype", ("float32 x 100", "int32 x 100")),
    ("plain", "wider dtype, same bytes", ("float32 x 100", "float64 x 50")),
    ("plain", "count", ("x 100", "x 99")),
    ("plain", "nothing", ("x 100", "x 0")),
    ("plain", "reduce op", ("sum", "max")),
    ("plain", "avg", ("sum", "avg")),
    ("plain", "premul sum", (", sum", "premul_sum")),
    ("plain", "same width", ("float32 x 100", "uint32 x 100")),
    ("plain", "algo", ("one_shot", "two_shot")),
    ("algo", "ring", ("two_shot", "ring")),
    ("plain", "tag", ("tag 'other'",)),
    ("plain", "codec", ("codec",)),
    ("codec", "other codec", ("int8 up, int8 down", "int4 up, int8 down")),
    ("codec", "stochastic", ("codec",)),
    ("codec", "owner residual", ("codec",)),
    ("big", "bigger", ("x 100000", "x 100001")),
    ("big", "big codec", ("codec",)),
    ("big", "big broadcast", ("all_reduce", "broadcast")),
    ("big gather", "big scatter", ("all_gather", "reduce_scatter")),
    ("big", "plain", ("x 100000", "x 100")),
    ("plain", "broadcast", ("all_reduce", "broadcast", "root 0")),
    ("broadcast", "broadcast from 1", ("root 0", "root 1")),
    ("broadcast", "broadcast less", ("x 100", "x 7")),
    ("broadcast", "big broadcast", ("one_shot", "staged")),
    ("gather", "scatter", ("all_gather", "reduce_scatter")),
    ("gather", "plain", ("all_gather", "all_reduce")),
    ("barrier", "plain", ("barrier", "all_reduce")),
    ("barrier", "barrier with tag", ("tag 'here'",)),
    ("broadcast", "barrier", ("barrier", "broadcast")),
    ("reduce", "reduce to 1", ("root 0", "root 1")),
    ("reduce", "big reduce", ("x 100", "x 100000")),
    ("big reduce", "bigger reduce", ("sum", "max")),
    ("gather to root", "gather to 1", ("root 0", "root 1")),
    ("gather to root", "gather ints", ("float32", "int32")),
    ("all_to_all", "all_to_all of ints", ("float32", "int32")),
    ("all_to_all", "all_to_all with tag", ("tag 'here'",)),
]


def disagree(comm: Communicator, first: str, last: str) -> float:
    x = f32()
    comm.all_reduce(x)  # not the very first call
    call = CALLS[last if comm.rank == comm.world_size - 1 else first]
    begin = time.monotonic()

    def call_and_meet() -> None:
        call(comm)
        comm.barrier()  # a small broadcast returns on its root before anybody can object

    with pytest.raises(MismatchError) as caught:
        call_and_meet()
    elapsed = time.monotonic() - begin
    for again in (
        lambda: comm.all_reduce(x),
        comm.barrier,
    ):  # lost for good, with the same sentence
        with pytest.raises(MismatchError) as later:
            again()
        assert str(later.value) == str(caught.value)
    assert (x == comm.world_size).all()
    raise AssertionError(f"{elapsed:.3f}|{caught.value}")


def sentences(outcomes: list[Outcome]) -> set[str]:
    found = set()
    for outcome in outcomes:
        elapsed, _, sentence = str(outcome.error).partition("|")
        assert sentence, outcome.trace or outcome.kind
        assert float(elapsed) < 2, "an error, not the deadline"
        found.add(sentence)
    return found


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("first", "last", "pieces"), PAIRS, ids=[f"{a}-{b}" for a, b, _ in PAIRS])
def test_disagreeing_calls_raise_the_same_sentence_with_both_sides_on_all_ranks(
    worlds: Worlds, world_size: int, first: str, last: str, pieces: tuple[str, ...]
) -> None:
    both = sentences(worlds.outcomes(world_size, disagree, first, last, timeout=15.0))
    assert len(both) == 1
    sentence = both.pop()
    assert "ranks of group 'world' called different operations" in sentence
    assert f"rank {world_size - 1} called" in sentence
    assert "#2" in sentence
    for piece in pieces:
        assert piece in sentence
    backwards = sentences(worlds.outcomes(world_size, disagree, last, first, timeout=15.0))
    assert len(backwards) == 1
    for piece in pieces:
        assert piece in backwards.copy().pop()


SMALL_OF_EACH_OP = (
    "plain",
    "broadcast",
    "gather",
    "scatter",
    "reduce",
    "gather to root",
    "scatter from root",
    "all_to_all",
    "barrier",
    "monitored_barrier",
)
LARGE_OF_EACH_OP = (
    "big",
    "big broadcast",
    "big gather",
    "big scatter",
    "big reduce",
    "big scatter from root",
    "big all_to_all",
)


@pytest.mark.parametrize(
    ("first", "last"),
    [*combinations(SMALL_OF_EACH_OP, 2), *combinations(LARGE_OF_EACH_OP, 2)],
)
def test_no_two_operations_are_ever_taken_for_one(worlds: Worlds, first: str, last: str) -> None:
    assert len(sentences(worlds.outcomes(2, disagree, first, last, timeout=15.0))) == 1


def exchange(comm: Communicator, what: str, sizes: tuple[int, int]) -> Any:
    """A call in which rank 1 sends ``sizes[0]`` elements to rank 0, which expects ``sizes[1]``."""
    n, rank = comm.world_size, comm.rank
    if what == "all_to_all":
        sends = [f32(sizes[0] if (rank, peer) == (1, 0) else 10) for peer in range(n)]
        outs = [np.zeros(sizes[1] if (rank, peer) == (0, 1) else 10, "f4") for peer in range(n)]
        return comm.all_to_all(sends, outs)
    if what == "gather":
        outs = [np.zeros(sizes[1] if peer == 1 else 10, "f4") for peer in range(n)]
        return comm.gather(f32(sizes[0] if rank == 1 else 10), 0, outs if rank == 0 else None)
    parts = [f32(sizes[0] if peer == 0 else 10) for peer in range(n)]
    out = np.zeros(sizes[1] if rank == 0 else 10, "f4")
    return comm.scatter(parts if rank == 1 else None, 1, out)


def disagree_about_counts(comm: Communicator, what: str, sizes: tuple[int, int]) -> str:
    comm.barrier()
    begin = time.monotonic()
    with pytest.raises(MismatchError) as caught:
        exchange(comm, what, sizes)  # in this very call, on ranks that agree as well
    assert time.monotonic() - begin < 2
    with pytest.raises(MismatchError) as later:
        comm.barrier()
    assert str(later.value) == str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("sizes", [(5, 7), (7, 5), (0, 1), (BIG, 0), (0, BIG), (BIG, BIG + 1)])
@pytest.mark.parametrize("what", ["all_to_all", "gather", "scatter"])
def test_counts_that_differ_are_shown_from_both_sides_on_all_ranks(
    worlds: Worlds, what: str, sizes: tuple[int, int]
) -> None:
    both = set(worlds.run(3, disagree_about_counts, what, sizes, timeout=15.0))
    assert len(both) == 1
    text = both.pop()
    assert f"disagree in {what} #2 (float32" in text
    assert f"rank 1 sends {sizes[0]} elements to rank 0, which expects {sizes[1]}." in text
    assert "Nothing was received" in text


def one_ahead(comm: Communicator, root: int) -> None:
    """Rank 0 skips one of several equal broadcasts; only the tag gives it away."""
    for call in range(4):
        if comm.rank == 0 and call == 1:
            continue
        comm.broadcast(np.array([call]), root, tag=f"call {call}")
    comm.barrier()


@pytest.mark.parametrize("root", [0, 1, 2])
def test_a_skipped_broadcast_is_found_by_its_tag(worlds: Worlds, root: int) -> None:
    outcomes = worlds.outcomes(3, one_ahead, root, timeout=15.0)
    assert {type(o.error) for o in outcomes} == {MismatchError}
    assert len({str(o.error) for o in outcomes}) == 1
    assert "tag 'call 1'" in str(outcomes[0].error)
    assert "tag 'call 2'" in str(outcomes[0].error)


def one_skips(comm: Communicator, late: int) -> None:
    for call in range(3):
        if comm.rank == late and call == 1:
            continue
        x = f32(5000)
        comm.all_reduce(x, tag=f"bucket {call}")
        assert (x == comm.world_size).all()


def test_a_skipped_equal_shaped_call_is_found_by_its_tag(worlds: Worlds) -> None:
    outcomes = worlds.outcomes(3, one_skips, 1, timeout=15.0)
    assert {type(o.error) for o in outcomes} == {MismatchError}
    assert len({str(o.error) for o in outcomes}) == 1


def leave_early(comm: Communicator, leaver: int, what: str) -> None:
    comm.barrier()
    if comm.rank == leaver:
        comm.close()
        return
    CALLS[what](comm)
    comm.barrier()


@pytest.mark.parametrize(
    "what", ["plain", "big", "ring", "codec", "big gather", "broadcast", "barrier"]
)
def test_close_of_one_rank_while_others_wait_is_a_lost_peer_that_says_so(
    worlds: Worlds, what: str
) -> None:
    begin = time.monotonic()
    outcomes = worlds.outcomes(3, leave_early, 1, what, timeout=15.0)
    assert time.monotonic() - begin < 2
    assert outcomes[1].kind == "value"
    lost = [outcomes[0], outcomes[2]]
    assert {type(o.error) for o in lost} == {PeerLostError}
    assert len({str(o.error) for o in lost}) == 1
    assert [o.culprit for o in lost] == [1, 1]
    text = str(lost[0].error)
    assert "rank 1 (pid " in text
    assert "closed group 'world' after 1 collectives" in text
    assert "same calls before it closes" in text


def close_after_the_same_calls(comm: Communicator) -> None:
    for call in range(5):
        comm.all_reduce(f32(4000))
        comm.broadcast(np.array([call]), comm.world_size - 1)  # its root leaves first


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_closing_after_the_same_calls_is_never_an_error(worlds: Worlds, world_size: int) -> None:
    for _ in range(30):
        worlds.run(world_size, close_after_the_same_calls)
