"""The reductions between emulated GPUs have the CPU's bits on every rank, and the detector has nothing to say.

Slabs are small, so that a collective has several pieces and blocks, and halves and epochs go round.
"""

import ctypes
import itertools

import numpy as np
import pytest

from ringcomm import _core, reference
from tests.dtypes import NUMPY
from tests.simt.collectives import Group, call
from tests.simt.emulator import PLANS, Emulator, EmulatorError, Plan
from tests.simt.reductions import KINDS, Reduction

WORLD_SIZES = (1, 2, 3, 4)
# Elements of float32: none, one, an odd number, several blocks, several pieces.
SIZES = (0, 1, 131, 1009, 2503)
KINDS_AND_MODES = [
    (kind, mode)
    for kind in KINDS
    for mode in ("in_kernel", "stepped")
    if (kind, mode) != ("one_shot", "stepped")
]


def group_of(simt: Emulator, world_size: int, mode: str = "in_kernel", **layout: int) -> Group:
    return Group(simt, world_size, mode, **{"num_blocks": 3, "packets_per_box": 1264, **layout})


def run_one(simt: Emulator, group: Group, made: Reduction, plan: Plan) -> None:
    what = (made.what, group.mode, plan)
    assert group.run([made.calls], *plan) == [], what
    made.check(what)
    simt.release_all()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("kind", "mode"), KINDS_AND_MODES)
def test_every_size_under_every_schedule(
    simt: Emulator, kind: str, mode: str, world_size: int
) -> None:
    dtypes = itertools.cycle(name for name in ("float32", "bfloat16", "int64") if name in NUMPY)
    for seed, (plan, size) in enumerate(itertools.product(PLANS, SIZES)):
        dtype = next(dtypes)
        count = size * 4 // NUMPY[dtype].itemsize
        if kind.startswith("reduce_scatter"):
            count //= world_size
        made = Reduction(simt, kind, world_size, dtype, "sum", count, seed)
        run_one(simt, group_of(simt, world_size, mode, num_blocks=2 + seed % 2), made, plan)


@pytest.mark.parametrize("mode", ["in_kernel", "stepped"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_one_follows_the_other_on_the_same_slabs(
    simt: Emulator, world_size: int, mode: str
) -> None:
    """With other sizes, grids and rounds, and across the wrap of the epochs; in kernels without a wait between."""
    kinds = [kind for kind, its_mode in KINDS_AND_MODES if its_mode == mode]
    for number, plan in enumerate(PLANS):
        group = group_of(simt, world_size, mode, first_epoch=0 if number % 2 else 2**32 - 9)
        order = [*itertools.product(kinds, (5, 700, 0, 1500))]
        np.random.default_rng(number).shuffle(order)
        made = [
            Reduction(simt, kind, world_size, "float32", "sum", int(count), seed)
            for seed, (kind, count) in enumerate(order)
        ]
        assert group.run([reduction.calls for reduction in made], *plan) == [], plan
        for reduction in made:
            reduction.check(plan)
        simt.release_all()


@pytest.mark.parametrize("world_size", [5, 8, 16])
def test_many_ranks(simt: Emulator, world_size: int) -> None:
    for number, kind in enumerate(KINDS):
        group = group_of(simt, world_size, num_blocks=2)
        made = Reduction(simt, kind, world_size, "float32", "sum", 611, number)
        run_one(simt, group, made, PLANS[number % len(PLANS)])


def test_one_shot_of_eight_ranks_under_every_schedule(simt: Emulator) -> None:
    for plan in PLANS:
        group = group_of(simt, 8)
        made = [
            Reduction(
                simt, "one_shot", 8, "bfloat16" if "bfloat16" in NUMPY else "float16", "avg", n
            )
            for n in (3, 600, 1, 261)
        ]
        assert group.run([reduction.calls for reduction in made], *plan) == [], plan
        for reduction in made:
            reduction.check(plan)
        simt.release_all()


@pytest.mark.parametrize(("kind", "mode"), KINDS_AND_MODES)
def test_in_place(simt: Emulator, kind: str, mode: str) -> None:
    for world_size, count in itertools.product((1, 2, 3), (33, 1500)):
        made = Reduction(simt, kind, world_size, "float32", "avg", count, count, in_place=True)
        run_one(simt, group_of(simt, world_size, mode), made, ("random", count))


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64", "complex64"])
@pytest.mark.parametrize("kind", KINDS)
def test_arrays_may_start_at_any_element(simt: Emulator, kind: str, dtype: str) -> None:
    other = "avg" if kind.startswith("direct") else "premul_sum"  # which direct does not do
    ops = itertools.cycle(("sum", "product" if dtype == "uint8" else other))
    for shifts in ((1, 0), (0, 1), (3, 1)):
        made = Reduction(simt, kind, 3, dtype, next(ops), 333, 1, shifts)
        run_one(simt, group_of(simt, 3), made, ("priority", shifts[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_late_rank_ends_the_kernels_of_all_others(simt: Emulator, kind: str) -> None:
    for plan, late in zip(PLANS, itertools.cycle(range(3)), strict=False):
        group = group_of(simt, 3)
        made = Reduction(simt, kind, 3, "float32", "sum", 700)
        rounds, _ = group.plan(made.calls)
        present = [rank for rank in range(3) if rank != late]
        group.views = [group.views[rank] for rank in present]
        group.queue([made.calls[rank] for rank in present], 0, rounds)
        assert simt.run(*plan) == [], plan
        assert group.late_ranks() == [late + 1, late + 1], plan
        simt.release_all()


@pytest.mark.parametrize("kind", KINDS)
def test_abort_ends_every_wait(simt: Emulator, kind: str) -> None:
    for plan in PLANS:
        group = group_of(simt, 3)
        made = Reduction(simt, kind, 3, "float32", "sum", 700)
        rounds, _ = group.plan(made.calls)
        for watch in group.watches:
            watch[0] = 1
        group.views = group.views[:2]
        group.queue(made.calls[:2], 0, rounds)
        assert simt.run(*plan) == [], plan
        assert group.late_ranks() == [0, 0], plan
        simt.release_all()


def test_a_rank_that_has_given_up_touches_no_array(simt: Emulator) -> None:
    """Although all peers have come: by then they may have their memory back."""
    (_, (chunk, _), _) = reference.ring_chunks(700, 3, 4)
    for plan in PLANS:
        group = group_of(simt, 3)
        made = Reduction(simt, "direct", 3, "float32", "sum", 700)
        outputs = [output for output, _ in made.expected[1::2]]
        untouched = [output[chunk].tobytes() for output in outputs]
        group.watches[1][0] = 1
        group.queue(made.calls, 0, group.plan(made.calls)[0])
        assert simt.run(*plan) == [], plan
        assert [output[chunk].tobytes() for output in outputs] == untouched, plan
        assert group.late_ranks()[0::2] == [2, 2], plan
        simt.release_all()


def test_format_makes_a_new_slab_of_an_old_one(simt: Emulator) -> None:
    group = group_of(simt, 2)
    slab = group.slabs[1]
    slab[:] = 0xA5
    simt.call("simt_format", ctypes.byref(group.views[1]), simt.stream(1))
    assert simt.run() == []
    boxes = 2 * 2 * 3 * 512  # halves, writers, blocks, bytes
    assert not slab[:-boxes].any()
    assert (slab[-boxes:] == 0xA5).all()


def test_plans_of_large_arrays(simt: Emulator) -> None:
    """Elements past 2 ** 31; nothing is allocated."""
    place = simt.array(np.zeros(64, np.uint8), "place")
    group = group_of(simt, 2, num_blocks=128, box_bytes=65536)
    for op, algo, rounds_of_piece in (
        ("all_reduce", "two_shot", 2),
        ("all_reduce", "ring", 2),
        ("reduce_scatter", "staged", 1),
    ):
        made = call(op, algo, "float32", 2**34, input=place, output=place)
        owners = 1 if op == "reduce_scatter" else 2
        pieces = 2**36 // owners // 128 // 65536
        assert group.plan([made, made]) == (pieces * rounds_of_piece + 1, 128), (op, algo)


def test_what_a_rank_owns_is_a_chunk(simt: Emulator) -> None:
    for count, world_size in ((0, 2), (1, 3), (1000, 3), (2**33, 4)):
        ends = []
        for rank in range(world_size):
            numbers = [ctypes.c_int64() for _ in range(2)]
            simt.library.simt_encoded_sums_of(
                *map(ctypes.c_int64, (rank, count, world_size)), *map(ctypes.byref, numbers)
            )
            assert numbers[0].value == (ends[-1] if ends else 0)
            ends.append(numbers[1].value)
            assert ends[-1] % 32 == 0 or ends[-1] == count
        assert ends[-1] == count


REFUSED = {
    "bitwise operators take integers and bool": {"reduce_op": _core.REDUCE_OPS["bor"]},
    "all_reduce cannot be done by staged on a GPU": {"algo": "staged"},
    "broadcast: root 2 is no rank of this group, expected 0 to 1": {"op": "broadcast", "root": 2},
    "count must not be negative, got -1": {"count": -1},
    "x: null, expected 4 elements on this rank's GPU": {"input": None},
    "out: an array of float32 must lie at a multiple of 4 bytes on a GPU": {"shift": 2},
    "one_shot takes at most 1536 bytes on a GPU, got 1540; use two_shot": {
        "algo": "one_shot",
        "count": 385,
    },
    "contributions and sums are both encoded, or neither is; got int8 and none": {"codec_up": 3},
    "all_reduce with a codec is done by two_shot on a GPU, got ring": {
        "algo": "ring",
        "codec_up": 3,
        "codec_down": 3,
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_calls_are_refused(simt: Emulator, message: str) -> None:
    place = simt.array(np.zeros(4096, np.uint8), "place")
    fields = {"op": "all_reduce", "algo": "two_shot", "dtype": "float32", "count": 4}
    fields |= {"input": place[:64], "root": -1} | REFUSED[message]
    shift = fields.pop("shift", 0)
    if fields["op"] == "broadcast":
        fields["algo"] = "staged"
    made = call(**fields, output=place[2048 + shift :])
    group = group_of(simt, 2, num_blocks=3, packets_per_box=128)
    with pytest.raises(EmulatorError, match=message):
        group.plan([made, made])


def test_one_shot_is_not_done_in_steps(simt: Emulator) -> None:
    group = group_of(simt, 2, "stepped")
    made = Reduction(simt, "one_shot", 2, "float32", "sum", 4)
    with pytest.raises(EmulatorError, match="cannot be run in steps; use two_shot"):
        group.run([made.calls])
    assert simt.run() == []
