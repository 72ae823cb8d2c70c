"""Every kernel of csrc, under every schedule, among every number of ranks: the CPU's bits, and the detector is silent.

A kernel is what nvcc makes a kernel of: each instance of a template, so one for every dtype and operator and one for
every codec and dtype. All of them run

- under every plan: the schedules forward, reverse, random and priority, of which the last two draw and have three
  seeds each;
- in a collective: among 1, 2, 3 and 4 ranks (one_shot also 8); in one launch that waits for the peers inside and, but
  for one_shot, which cannot, in a launch for each round;
- in a reduction of arrays of one rank: of 1, 2, 3 and 4 arrays;

with the sizes of `NUM_BYTES` and `NUM_ELEMS`. The other files of this folder have the further sizes, addresses,
sequences, residuals, ends and errors, each with some kernels.

What has run is not taken from these tables but from the emulator, which knows the kernels whose launches came to their
end; what there is to run, from the symbols of the library.
"""

import ctypes
import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence

import pytest

from tests.codec import codec_calls as cpu
from tests.codec.codec_calls import CODECS, DTYPE_OF, awkward_values
from tests.dtypes import NUMPY, PAIRS, SCALED
from tests.simt import test_codec, test_encoded, test_move, test_reduce
from tests.simt.build import ROOT
from tests.simt.collectives import MODES, Group
from tests.simt.emulator import PLANS, Emulator, Plan
from tests.simt.packing import Pieces
from tests.simt.reductions import Reduction

# Of a chunk or part: two blocks, of which one has several pieces in its boxes of 512 bytes; whole vectors, and a rest.
# Of half of it one_shot makes two blocks whose threads go round.
NUM_BYTES = 1100
# Several blocks, whole vectors, whole blocks of a codec, and a rest of each.
NUM_ELEMS = 1007


@dataclasses.dataclass(frozen=True)
class Case:
    """What a run of a family is asked for."""

    simt: Emulator
    world_size: int
    mode: str
    plan: Plan
    seed: int

    def group(self, **layout: int) -> Group:
        return Group(self.simt, self.world_size, self.mode, **{"num_blocks": 2, **layout})


@dataclasses.dataclass(frozen=True)
class Family:
    """Kernels that come to their end in ``run``: the names, without what a template has in its brackets."""

    kernels: Sequence[str]
    run: Callable[[Case], None]
    modes: Sequence[str] = MODES
    world_sizes: Sequence[int] = (1, 2, 3, 4)

    def left_out(self, simt: Emulator) -> set[str]:
        """Those that have not, since somebody asked."""
        return {
            name for name in simt.kernels.values() if without_arguments(name) in self.kernels
        } - simt.kernels_ended()


def without_arguments(name: str) -> str:
    return name.partition("<")[0] + ("<>" if "<" in name else "")


def all_reduces(kind: str) -> Callable[[Case], None]:
    def run(case: Case) -> None:
        num_bytes = NUM_BYTES // 2 if kind == "one_shot" else NUM_BYTES * case.world_size
        for dtype, op in (*PAIRS, *((dtype, "premul_sum") for dtype in SCALED if kind != "direct")):
            count = num_bytes // NUMPY[dtype].itemsize | 1
            group = case.group(packets_per_box=80)
            made = Reduction(case.simt, kind, case.world_size, dtype, op, count, case.seed)
            assert group.run([made.calls], *case.plan) == [], (dtype, op, case.plan)
            made.check()
            case.simt.release_all()

    return run


def encoded(case: Case) -> None:
    for number, (up, down, dtype) in enumerate(itertools.product(CODECS, CODECS, DTYPE_OF)):
        seed = case.seed + number
        count = NUM_BYTES * case.world_size // DTYPE_OF[dtype].itemsize | 1
        made = test_encoded.case_of(up, down, dtype, count, case.world_size, seed, seed % 4 != 0)
        test_encoded.run_case(case.simt, made, case.mode, case.plan)


def moves(*names: str) -> Callable[[Case], None]:
    def run(case: Case) -> None:
        for move, dtype in itertools.product(names, test_move.DTYPES):
            maker = test_move.Maker(case.simt, case.world_size, dtype, case.seed)
            count = NUM_BYTES // NUMPY[dtype].itemsize | 1
            test_move.run_one(case.simt, case.group(), move, maker, count, case.plan)

    return run


def formats(case: Case) -> None:
    group = case.group()
    for view in group.views:
        case.simt.call("simt_format", ctypes.byref(view), case.simt.stream(view.rank))
    assert case.simt.run(*case.plan) == []
    boxes = 2 * case.world_size * 2 * 512  # halves, writers, blocks, bytes
    assert not any(slab[:-boxes].any() for slab in group.slabs)
    assert all((slab[-boxes:] == 0xA5).all() for slab in group.slabs)


def reductions(case: Case) -> None:
    for dtype, op in PAIRS:
        test_reduce.check_reduction(case.simt, dtype, op, case.world_size, NUM_ELEMS, case.plan)


def hops(case: Case) -> None:
    for dtype, op in PAIRS:
        test_reduce.check_hops(case.simt, dtype, op, case.world_size, NUM_ELEMS, case.plan)
    for dtype in SCALED:
        test_reduce.check_scaling(case.simt, dtype, NUM_ELEMS, case.plan)


def codecs(case: Case) -> None:
    for codec, dtype in itertools.product(CODECS, DTYPE_OF):
        values = awkward_values(NUM_ELEMS, DTYPE_OF[dtype], case.seed)
        for draw in test_codec.draws(codec):
            test_codec.compare_encoding(case.simt, codec, values, draw, plan=case.plan)
        wire = cpu.encode(codec, values)
        test_codec.compare_decoding(
            case.simt, codec, wire, NUM_ELEMS, DTYPE_OF[dtype], plan=case.plan
        )
    test_codec.compare_division(case.simt, NUM_ELEMS, plan=case.plan)


def packs(case: Case) -> None:
    pieces = Pieces(case.simt, (5, NUM_BYTES, 0, NUM_ELEMS, 16 * NUM_BYTES), (0, 4, 1), case.seed)
    reports, buffer = pieces.packed(case.plan)
    assert reports == [], case.plan
    assert buffer.tobytes() == pieces.buffer.tobytes()
    reports, arrays = pieces.unpacked(case.plan)
    assert reports == [], case.plan
    assert list(map(bytes, arrays)) == list(map(bytes, pieces.values))
    case.simt.release_all()


PULLS = [move for move in test_move.MOVES if move.startswith("direct") and "broadcast" not in move]
STAGED_MOVES = [move for move in test_move.MOVES if not move.startswith(("direct", "ring"))]
ALONE = ("alone",)
FAMILIES = {
    "two_shot": Family(["two_shot_kernel<>"], all_reduces("two_shot")),
    "one_shot": Family(["one_shot_kernel<>"], all_reduces("one_shot"), MODES[:1], (1, 2, 3, 4, 8)),
    "ring": Family(["ring_kernel<>"], all_reduces("ring")),
    "direct": Family(["sum_kernel<>"], all_reduces("direct")),
    "direct broadcast": Family(["push_kernel"], moves("direct broadcast")),
    "direct moves": Family(["pull_kernel"], moves(*PULLS)),
    "encoded": Family(["encoded_kernel<>"], encoded),
    "ring broadcast": Family(["ring_kernel"], moves("ring broadcast")),
    "moves": Family(["staged_kernel"], moves(*STAGED_MOVES)),
    "format": Family(["format_kernel"], formats, ALONE),
    "pack": Family(["pack_kernel<>"], packs, ALONE, (1,)),
    "reduce": Family(["reduce_kernel<>"], reductions, ALONE),
    "hops": Family(["hop_kernel<>", "map_kernel<>"], hops, ALONE),
    "codecs": Family(["encode_kernel<>", "decode_kernel<>", "divide_kernel"], codecs, ALONE, (1,)),
}


CASES = [
    (name, mode, world_size)
    for name, family in FAMILIES.items()
    for mode, world_size in itertools.product(family.modes, family.world_sizes)
]


@pytest.mark.skipif("bfloat16" not in NUMPY, reason="ml_dtypes is not here, which has bfloat16")
@pytest.mark.parametrize(("name", "mode", "world_size"), CASES)
def test_every_kernel_runs_under_every_schedule(
    simt: Emulator, name: str, mode: str, world_size: int
) -> None:
    simt.kernels_ended()
    for seed, plan in enumerate(PLANS):
        FAMILIES[name].run(Case(simt, world_size, mode, plan, seed))
        assert FAMILIES[name].left_out(simt) == set(), plan


def test_every_kernel_is_in_one_family(simt: Emulator) -> None:
    names = [without_arguments(name) for name in simt.kernels.values()]
    in_families = [kernel for family in FAMILIES.values() for kernel in family.kernels]
    assert sorted(in_families) == sorted(set(names))
    assert len(set(simt.kernels.values())) == len(names)
    # And is called so, or simt.kernels would not have it.
    text = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.cu"))
    called = re.findall(
        r"^__global__ void __launch_bounds__\([^)]*\)\s+(\w+)\(", text, re.MULTILINE
    )
    assert len(called) == text.count("__global__ ")
    assert {name.rstrip("<>") for name in names} == set(called)
