"""Collectives with a mistake put in: the detector reports it, or bytes are wrong, under every schedule."""

from collections.abc import Callable

import pytest

from tests.simt import build
from tests.simt.build import Mutant
from tests.simt.collectives import Group
from tests.simt.emulator import PLANS, Emulator
from tests.simt.test_encoded import OnDevice, case_of
from tests.simt.test_move import Maker, check

MOVE = "algo/move_cuda.cu"
ENCODED = "algo/encoded_cuda.cu"
ROUNDS = "algo/rounds.h"

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


def all_gather(simt: Emulator, mode: str, plan: tuple[str, int]) -> tuple[list[str], bool]:
    """Reports, and whether the bytes were right."""
    calls, expected = Maker(simt, 3, "float32", 1).all_gather(700)
    reports = Group(simt, 3, mode).run([calls], *plan)
    return reports, passes(lambda: check(expected, plan))


def all_reduce(simt: Emulator, mode: str, plan: tuple[str, int]) -> tuple[list[str], bool]:
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
    simt = Emulator(build.library(Mutant(source, ROUNDS, IN_ROUNDS[mistake])))
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
    simt = Emulator(build.library(Mutant(ENCODED, ENCODED, changes)))
    for mode in ("in_kernel", "stepped"):
        assert all_reduce(simt, mode, PLANS[0]) == ([], False), mode
        simt.release_all()
