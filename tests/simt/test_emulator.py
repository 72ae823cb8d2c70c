"""The emulator reports every seeded bug, under every schedule, and nothing about the kernels without them."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from tests.simt.emulator import PLANS, Emulator, pointers

KERNELS = Path(__file__).parent / "kernels"

# What the only report of a kernel of kernels/misuse.cu begins with, and what it names.
MISUSES = {
    "past_the_end": ("out of bounds", "thread 63 writes 4 bytes at buffer 'place' + 256"),
    "before_the_start": ("out of bounds", "reads 4 bytes at buffer 'place' - 4"),
    "far_away": ("out of bounds", "no GPU can reach"),
    "past_dynamic_shared": (
        "out of bounds",
        "thread 63 writes 4 bytes at dynamic shared memory + 252",
    ),
    "past_an_array": ("out of bounds", "takes element 64"),
    "misaligned_vector": (
        "misaligned",
        "'place' + 4 (of 256 bytes), which is not a multiple of 16",
    ),
    "misaligned_word": ("misaligned", "'place' + 2"),
    "unwritten_shared": ("uninitialised", "thread 5 reads"),
    "same_place": ("race", "'place' + 0"),
    "barrier_for_half": ("divergent barrier", "32 threads of its block have ended"),
    "two_barriers": ("divergent barrier", "at another one"),
    "barrier_against_warp": ("deadlock", "thread 5 waits for the other lanes"),
    "foreign_mask": ("warp operation", "its own lane is not in the mask"),
    "shuffle_from_outside": ("warp operation", "outside of the mask"),
    "ended_lanes": ("warp operation", "has ended"),
    "mixed_operations": ("warp operation", "different operations"),
    "flag_that_never_comes": ("deadlock", "another value than 0 in buffer 'place' + 36"),
    "clock_without_deadline": ("deadlock", "another value than 0 in buffer 'place' + 40"),
    "grid_barrier": ("deadlock", "2 blocks of kernel grid_barrier, rank 0, have not started"),
    "loop_without_end": ("endless", "a loop that does not end?"),
}


def misuse(simt: Emulator, name: str, plan: tuple[str, int]) -> list[str]:
    place = simt.array(np.zeros(64, np.int32), "place")
    simt.call("simt_misuse", name.encode(), place)
    return simt.run(*plan, max_resident_blocks=2)


@pytest.mark.parametrize("name", MISUSES)
def test_each_mistake_is_reported_with_its_place(simt: Emulator, name: str) -> None:
    kind, detail = MISUSES[name]
    # A loop without end takes its time, so it runs under one schedule.
    for plan in PLANS if name != "loop_without_end" else PLANS[:1]:
        reports = misuse(simt, name, plan)
        assert reports, plan
        assert any(report.startswith(f"{kind}: ") for report in reports), (plan, reports)
        assert f"kernel {name}, rank 0, block " in reports[0], plan
        if plan == ("forward", 0):
            assert any(detail in report for report in reports), reports
            assert any("misuse.cu:" in report for report in reports) or kind == "deadlock", reports
        simt.release_all()


def test_every_kernel_of_misuse_has_a_test(simt: Emulator) -> None:
    source = (KERNELS / "misuse.cu").read_text()
    names = {
        line.split()[2].split("(")[0] for line in source.splitlines() if "__global__ void" in line
    }
    assert names == {*MISUSES, "nothing_wrong"}
    for plan in PLANS:
        assert misuse(simt, "nothing_wrong", plan) == []


BLOCK_SUM_BUGS = ("right", "no first barrier", "no barrier in the tree", "no __syncwarp")


@pytest.mark.parametrize("bug", BLOCK_SUM_BUGS)
def test_block_sum(simt: Emulator, bug: str) -> None:
    values = np.arange(3001, dtype=np.int32)
    for plan in PLANS:
        sums = simt.array(np.zeros(3, np.int32), "sums")
        number = BLOCK_SUM_BUGS.index(bug)
        simt.call("simt_block_sum", number, simt.array(values, "values"), values.size, sums, 3)
        reports = simt.run(*plan)
        if bug == "right":
            assert reports == [], plan
            assert sums.sum() == values.sum(), plan
        else:
            assert any(report.startswith("race: ") for report in reports), (plan, reports)
        simt.release_all()


GRID_SUM_BUGS = ("right", "no fence before the ticket", "no fence after the ticket")


@pytest.mark.parametrize("bug", GRID_SUM_BUGS)
def test_grid_sum(simt: Emulator, bug: str) -> None:
    values = np.arange(1000, dtype=np.int32)
    for plan in PLANS:
        total = simt.array(np.zeros(1, np.int32), "total")
        block_sums = simt.array(np.zeros(6, np.int32), "sums of blocks")
        ticket = simt.array(np.zeros(1, np.uint32), "ticket")
        number = GRID_SUM_BUGS.index(bug)
        simt.call(
            "simt_grid_sum",
            *(number, simt.array(values, "values"), values.size, block_sums, ticket, total, 6),
        )
        reports = simt.run(*plan)
        if bug == "right":
            assert reports == [], plan
            assert total[0] == values.sum(), plan
        else:
            assert any("race: " in report and "'sums of blocks'" in report for report in reports), (
                plan,
                reports,
            )
        simt.release_all()


EXCHANGE_KINDS = (
    "release",
    "early flag",
    "no wait",
    "no barrier after the wait",
    "no fence",
    "fences",
)


def exchange(
    simt: Emulator,
    plan: tuple[str, int],
    kind: str,
    world_size: int,
    num_elems: int = 301,
    num_buffers: int = 2,
    num_epochs: int = 3,
) -> tuple[list[str], bool]:
    """Queues all epochs on all ranks. Returns the reports, and whether all sums are right."""
    num_blocks = 2
    inputs = [np.arange(num_epochs * num_elems, dtype=np.int32) * 3 + r for r in range(world_size)]
    staging, flags, outputs, sources = [], [], [], []
    for rank in range(world_size):
        staged = np.zeros(num_buffers * num_elems, np.int32)
        staging.append(simt.array(staged, f"staging of rank {rank}"))
        words = np.zeros(world_size * num_blocks, np.uint32)
        flags.append(simt.array(words, f"flags of rank {rank}"))
        outputs.append(simt.array(np.zeros_like(inputs[rank]), f"output of rank {rank}"))
        sources.append(simt.array(inputs[rank], f"input of rank {rank}"))
    for rank, epoch in itertools.product(range(world_size), range(num_epochs)):
        piece = slice(epoch * num_elems, (epoch + 1) * num_elems)
        simt.call(
            "simt_exchange",
            *(EXCHANGE_KINDS.index(kind), pointers(staging), pointers(flags)),
            *(sources[rank][piece], outputs[rank][piece], rank, world_size, num_elems),
            *(num_buffers, epoch + 1, num_blocks, simt.stream(rank)),
        )
    reports = simt.run(*plan)
    right = all((output == sum(inputs)).all() for output in outputs)
    simt.release_all()
    return reports, right


@pytest.mark.parametrize("kind", ["release", "fences"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_ranks_exchange_through_flags(simt: Emulator, world_size: int, kind: str) -> None:
    for plan in PLANS:
        assert exchange(simt, plan, kind, world_size) == ([], True), plan


@pytest.mark.parametrize(
    "kind", [kind for kind in EXCHANGE_KINDS if kind not in ("release", "fences")]
)
def test_a_broken_exchange_is_reported(simt: Emulator, kind: str) -> None:
    for plan in PLANS:
        reports, _ = exchange(simt, plan, kind, 3)
        assert any("race: " in report and "'staging of rank" in report for report in reports), plan


def test_one_buffer_for_two_epochs_is_caught(simt: Emulator) -> None:
    raced = 0
    for plan in PLANS:
        reports, right = exchange(simt, plan, "release", 3, num_buffers=1)
        found = any("race: " in report and "'staging of rank" in report for report in reports)
        # Who waits so long that it sees the next epoch's flag is ordered, but reads the next epoch's values.
        assert found or not right, plan
        raced += found
    assert raced > len(PLANS) / 2


@pytest.mark.parametrize("number", [0, 1])
def test_only_launches_of_one_stream_are_ordered(simt: Emulator, number: int) -> None:
    for plan in PLANS:
        values = simt.array(np.zeros(1000, np.float32), "values")
        simt.call("simt_divide", values, values.size, 2.0, simt.stream(0, 0))
        simt.call("simt_divide", values, values.size, 2.0, simt.stream(0, number))
        reports = simt.run(*plan)
        assert any("race: kernel divide" in report for report in reports) == (number != 0), plan
        simt.release_all()


def test_a_run_repeats_itself(simt: Emulator) -> None:
    def steps(seed: int) -> tuple[int, int]:
        before = simt.counts()
        assert exchange(simt, ("random", seed), "release", 3) == ([], True)
        after = simt.counts()
        return after[0] - before[0], after[1] - before[1]

    assert steps(1) == steps(1)
    assert steps(1) != steps(2)
