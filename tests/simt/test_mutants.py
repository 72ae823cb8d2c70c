"""Collectives with a mistake put in: the detector reports it, or bytes are wrong, under every schedule."""

from collections.abc import Callable

import numpy as np
import pytest

from tests.dtypes import assert_same_numbers, random_array
from tests.simt import build
from tests.simt.build import Mutant
from tests.simt.collectives import Group, call
from tests.simt.collectives import where_they_are as make_direct
from tests.simt.emulator import PLANS, Emulator, Plan
from tests.simt.packing import Pieces
from tests.simt.reductions import Reduction, sum_of
from tests.simt.test_encoded import OnDevice, case_of
from tests.simt.test_move import Maker, check

MOVE = "algo/move_cuda.cu"
ENCODED = "algo/encoded_cuda.cu"
TWO_SHOT = "algo/two_shot_cuda.cu"
ONE_SHOT = "algo/one_shot_cuda.cu"
RING = "algo/ring_cuda.cu"
DIRECT = "algo/direct_cuda.cu"
ROUNDS = "algo/rounds.h"
PACK = "algo/pack_cuda.cu"

ONE_HALF = (
    ("static_cast<int>(epoch_ & 1u)", "0"),
    ("static_cast<int>(~epoch_ & 1u)", "0"),
)
# What is wrong, and from what to what the source is changed for it.
IN_ROUNDS = {
    "one half for all rounds": ONE_HALF,
    "reads before the wait": (
        ("epoch_reached(load_acquire_system(theirs), target)", "target == target"),
    ),
    "releases before all have written": (
        ("bool failed = false;\n    __syncthreads();", "bool failed = false;"),
    ),
    "no release": (("store_release_system(&line", "store_relaxed_system(&line"),),
    "no acquire": (("load_acquire_system(theirs)", "load_relaxed_system(theirs)"),),
    "who does not wait for a peer goes on": (("__syncthreads_or(failed) == 0", "!failed"),),
}


def all_gather(simt: Emulator, mode: str, plan: Plan) -> tuple[list[str], bool]:
    """Reports, and whether the bytes were right."""
    calls, expected = Maker(simt, 3, "float32", 1).all_gather(700)
    reports = Group(simt, 3, mode).run([calls], *plan)
    return reports, passes(lambda: check(expected, plan))


def all_reduce(simt: Emulator, mode: str, plan: Plan) -> tuple[list[str], bool]:
    arrays = OnDevice(simt, case_of("bf16", "int8", "float32", 5003, 3, 1, residuals=True))
    reports = Group(simt, 3, mode).run([arrays.calls()], *plan)
    return reports, passes(lambda: arrays.check(plan))


def passes(check_bytes: Callable[[], None]) -> bool:
    try:
        check_bytes()
    except AssertionError:
        return False
    return True


def is_race(reports: list[str]) -> bool:
    return any("race: " in report and "'slab of rank" in report for report in reports)


@pytest.mark.parametrize(
    ("source", "mistake"),
    [(MOVE, mistake) for mistake in IN_ROUNDS] + [(ENCODED, "one half for all rounds")],
)
def test_a_mistake_in_the_rounds_is_found(
    built_emulator: Emulator, source: str, mistake: str
) -> None:
    mutant = Mutant(source, ROUNDS, IN_ROUNDS[mistake], one_kernel=source == ENCODED)
    simt = Emulator(build.library(mutant))
    races = 0
    for plan in PLANS:
        reports, right = (all_gather if source == MOVE else all_reduce)(simt, "in_kernel", plan)
        # A wait that comes so late that it sees a later epoch orders what is written too early, and finds it.
        assert is_race(reports) or not right, plan
        races += is_race(reports)
        simt.release_all()
    assert races > len(PLANS) / 2


def test_a_piece_in_the_wrong_round_is_wrong_bytes(built_emulator: Emulator) -> None:
    change = ("collect(args, block, round - 1)", "collect(args, block, round)")
    simt = Emulator(build.library(Mutant(MOVE, MOVE, (change,))))
    for plan in PLANS:
        for mode in ("in_kernel", "stepped"):
            assert not all_gather(simt, mode, plan)[1], (mode, plan)
            simt.release_all()


def test_another_order_of_summation_is_wrong_bytes(built_emulator: Emulator) -> None:
    changes = (
        ("block_.box_from(0)", "block_.box_from(world_size_ - 1)"),
        ("block_.box_from(peer)", "block_.box_from(world_size_ - 1 - peer)"),
    )
    simt = Emulator(build.library(Mutant(ENCODED, ENCODED, changes, one_kernel=True)))
    for mode in ("in_kernel", "stepped"):
        assert all_reduce(simt, mode, PLANS[0]) == ([], False), mode
        simt.release_all()


def sums(simt: Emulator, kind: str, mode: str, plan: Plan) -> tuple[list[str], bool]:
    """Several, one after the other."""
    group = Group(simt, 3, mode, num_blocks=2, packets_per_box=1264)
    made = [Reduction(simt, kind, 3, "float32", "sum", count) for count in (5, 700, 64, 300, 700)]
    reports = group.run([reduction.calls for reduction in made], *plan)
    return reports, all(passes(reduction.check) for reduction in made)


@pytest.mark.parametrize(
    ("kind", "source", "mistake"),
    [("two_shot", TWO_SHOT, mistake) for mistake in list(IN_ROUNDS)[:4]]
    + [("ring", RING, "one half for all rounds")],
)
def test_a_mistake_in_the_rounds_of_a_reduction_is_found(
    built_emulator: Emulator, kind: str, source: str, mistake: str
) -> None:
    simt = Emulator(build.library(Mutant(source, ROUNDS, IN_ROUNDS[mistake], one_kernel=True)))
    races = 0
    for plan in PLANS:
        reports, right = sums(simt, kind, "in_kernel", plan)
        assert is_race(reports) or not right, plan
        races += is_race(reports)
        simt.release_all()
    assert races > len(PLANS) / 2


LOAD = "load_relaxed_system(packet(rank_, rank, item, k))"
STORE = "store_relaxed_system(packet(peer, rank_, item, k), make_packet(data[k], epoch_))"
IN_PACKETS = {
    "a plain load": (LOAD, "*packet(rank_, rank, item, k)"),
    "a plain store": (STORE, "*packet(peer, rank_, item, k) = make_packet(data[k], epoch_)"),
    "any epoch is taken": ("if (epoch_of(packets[i][k]) != epoch_) missing = rank;", ""),
    "the epoch is counted while others read it": (
        "__syncthreads_or(!shot.sum()) != 0",
        "!shot.sum()",
    ),
    "one half for all calls": ("static_cast<int>(epoch_ & 1u)", "0"),
}


@pytest.mark.parametrize("mistake", IN_PACKETS)
def test_a_mistake_in_packets_is_found(built_emulator: Emulator, mistake: str) -> None:
    mutant = Mutant(ONE_SHOT, ONE_SHOT, (IN_PACKETS[mistake],), one_kernel=True)
    simt = Emulator(build.library(mutant))
    found = 0
    for plan in PLANS:
        reports, right = sums(simt, "one_shot", "in_kernel", plan)
        found += is_race(reports) or not right
        simt.release_all()
    # A single half is overwritten only where somebody is late enough.
    assert found > (0 if mistake == "one half for all calls" else len(PLANS) / 2)


WHOLE = "if (pieces[k] == nullptr || left[k] < kVectorBytes || !is_aligned"
IN_PACKING = {
    "a last unit that is not cut short": tuple(
        (f"{WHOLE}(pieces[k], kVectorBytes)) continue;\n      {next_line}", replacement)
        for next_line, replacement in (
            ("vectors[k] =", "if (pieces[k] == nullptr) continue;\n      vectors[k] ="),
            ("(kPacks ?", "if (pieces[k] == nullptr) continue;\n      (kPacks ?"),
        )
    ),
    "gaps that keep what was there": (
        ("bytes[i] = i < num_bytes ? piece[i] : 0;", "if (i < num_bytes) bytes[i] = piece[i];"),
    ),
    "the end of a piece is the next one's": (
        ("unit * kVectorBytes < args.ends", "unit * kVectorBytes <= args.ends"),
    ),
    "tiles that overlap": (
        (
            "static_cast<int64_t>(gridDim.x) * kTileUnits",
            "static_cast<int64_t>(gridDim.x) * kTileUnits - 1",
        ),
    ),
    "the second launch begins where the first did": (("args.buffer += packed_bytes(end);", ""),),
}


def packs(simt: Emulator, plan: tuple[str, int]) -> tuple[list[str], bool]:
    pieces = Pieces(simt, (5, 32, 70_000, 0, *range(1, 250)), (0, 0, 1, 0, 4))
    reports, buffer = pieces.packed(plan)
    found, arrays = pieces.unpacked(plan)
    right = buffer.tobytes() == pieces.buffer.tobytes()
    right &= b"".join(map(bytes, arrays)) == b"".join(map(bytes, pieces.values))
    return reports + found, right


@pytest.mark.parametrize("mistake", [None, *IN_PACKING])
def test_a_mistake_in_packing_is_found(built_emulator: Emulator, mistake: str | None) -> None:
    mutant = Mutant(PACK, PACK, IN_PACKING[mistake] if mistake else ())
    simt = Emulator(build.library(mutant))
    for plan in PLANS:
        reports, right = packs(simt, plan)
        assert (reports == [] and right) == (mistake is None), plan
        simt.release_all()


IN_STEPS = {
    "two_shot": (TWO_SHOT, "shots.collect(round / 2 - 1)", "shots.collect(round / 2)"),
    "ring": (RING, "2 * world_size_ - 1 - hop", "2 * world_size_ - 2 - hop"),
}


@pytest.mark.parametrize("kind", IN_STEPS)
def test_a_step_of_another_chunk_is_wrong_bytes(built_emulator: Emulator, kind: str) -> None:
    source, *change = IN_STEPS[kind]
    simt = Emulator(build.library(Mutant(source, source, (tuple(change),), one_kernel=True)))
    for mode in ("in_kernel", "stepped"):
        assert not sums(simt, kind, mode, PLANS[0])[1], mode
        simt.release_all()


IN_DIRECT = {
    "reads before the others are there": (
        "constexpr int64_t kWorkRound = 1;",
        "constexpr int64_t kWorkRound = 0;",
    ),
    "goes on before the others are done": (
        "constexpr int64_t kNumRounds = 3;",
        "constexpr int64_t kNumRounds = 2;",
    ),
    "in another order": (
        "args.inputs[rank] + first_byte",
        "args.inputs[world_size - 1 - rank] + first_byte",
    ),
}


def where_they_are(simt: Emulator, plan: Plan) -> tuple[list[str], bool]:
    """A direct collective on arrays that others write before it and read after it."""
    inputs = [random_array("float32", 2100, rank, True).reshape(3, 700) for rank in range(3)]
    arrays = [simt.array(np.zeros(700, np.float32), f"array of rank {rank}") for rank in range(3)]
    before = [
        call(
            "reduce_scatter",
            "staged",
            "float32",
            700,
            input=simt.array(one.reshape(-1), "input"),
            output=x,
        )
        for one, x in zip(inputs, arrays, strict=True)
    ]
    direct, after = (
        [call("all_reduce", algo, "float32", 700, input=x, output=x) for x in arrays]
        for algo in ("direct", "two_shot")
    )
    make_direct(direct)
    reports = Group(simt, 3, "in_kernel").run([before, direct, after], *plan)
    parts = [sum_of("float32", "sum", [one[rank] for one in inputs]) for rank in range(3)]
    total = sum_of("float32", "sum", [sum_of("float32", "sum", parts)] * 3)
    return reports, passes(lambda: [assert_same_numbers(x.copy(), total, plan) for x in arrays])


@pytest.mark.parametrize("mistake", [None, *IN_DIRECT])
def test_a_mistake_in_direct_is_found(built_emulator: Emulator, mistake: str | None) -> None:
    changes = (IN_DIRECT[mistake],) if mistake else ()
    simt = Emulator(build.library(Mutant(DIRECT, DIRECT, changes, one_kernel=True)))
    races = 0
    for plan in PLANS:
        reports, right = where_they_are(simt, plan)
        raced = any("race: " in report and "'array of rank" in report for report in reports)
        assert right if mistake is None else raced or not right, plan
        races += raced
        simt.release_all()
    if mistake in (None, "in another order"):
        assert races == 0
    else:
        assert races > len(PLANS) / 2


@pytest.mark.parametrize(
    ("kind", "source"), [("two_shot", TWO_SHOT), ("one_shot", ONE_SHOT), ("ring", RING)]
)
def test_one_kernel_alone_is_right(built_emulator: Emulator, kind: str, source: str) -> None:
    """What mutants are made of."""
    simt = Emulator(build.library(Mutant(source, source, (), one_kernel=True)))
    for plan in PLANS:
        assert sums(simt, kind, "in_kernel", plan) == ([], True), plan
        simt.release_all()


def test_one_kernel_of_a_codec_alone_is_right(built_emulator: Emulator) -> None:
    simt = Emulator(build.library(Mutant(ENCODED, ENCODED, (), one_kernel=True)))
    for plan in PLANS:
        assert all_reduce(simt, "in_kernel", plan) == ([], True), plan
        simt.release_all()
