"""all_reduce with a codec on emulated GPUs has the bits of encode, decode_add, encode and decode on the CPU, residuals
included, however the array is cut."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ringcomm import _core, reference
from tests.codec import codec_calls as cpu
from tests.codec.codec_calls import CODECS, DTYPE_OF, awkward_values
from tests.dtypes import assert_same_numbers
from tests.simt import collectives
from tests.simt.collectives import MODES, Call, Group
from tests.simt.emulator import PLANS, Emulator, Plan

WORLD_SIZES = (1, 2, 3, 4)
PAIRS = tuple(itertools.product(CODECS, CODECS))
# With boxes of 512 bytes a piece has 256 values (bf16, fp16), 480 (int8) or 896 (int4).
SIZES = (0, 1, 31, 33, 480, 1025, 2999, 5003)
BLOCK = 32

Array = Any


@dataclasses.dataclass
class Case:
    """What an all_reduce is of; lists go by rank."""

    up: str
    down: str
    inputs: list[Array]
    op: str = "sum"
    draw: reference.Draw | None = None
    residuals: list[Array] | None = None
    owner_residuals: list[Array] | None = None  # each rank's whole array

    @property
    def world_size(self) -> int:
        return len(self.inputs)

    def owned(self, rank: int) -> slice:
        chunk = -(-len(self.inputs[0]) // self.world_size)
        chunk = -(-chunk // BLOCK) * BLOCK
        return slice(rank * chunk, (rank + 1) * chunk)


def random_residuals(count: int, world_size: int, seed: int) -> list[Array]:
    rng = np.random.default_rng(seed)
    numbers = rng.standard_normal((world_size, count)) * 0.01
    return list(numbers.astype(np.float32))


def case_of(
    up: str, down: str, dtype: str, count: int, world_size: int, seed: int, residuals: bool
) -> Case:
    ranks = range(world_size)
    inputs = [awkward_values(count, DTYPE_OF[dtype], seed + rank) for rank in ranks]
    case = Case(up, down, inputs, "avg" if seed % 2 else "sum")
    if seed % 3 == 0 and up.startswith("int") and down.startswith("int"):
        case.draw = reference.Draw(seed=2**63 + seed, step=seed)
    if residuals:
        case.residuals = random_residuals(count, world_size, seed)
        case.owner_residuals = random_residuals(count, world_size, seed + 1)
    return case


def on_the_cpu(case: Case) -> Array:
    """What every rank gets. Residuals are updated in place."""
    num_elems = len(case.inputs[0])
    total = np.zeros(num_elems, np.float32)
    for rank, values in enumerate(case.inputs):
        draw = None if case.draw is None else case.draw._replace(rank=rank)
        residual = None if case.residuals is None else case.residuals[rank]
        wire = cpu.encode(case.up, values, residual, draw)
        cpu.decode_add(case.up, wire, total, first=rank == 0)
    if case.op == "avg":
        _core.divide(total.ctypes.data, num_elems, float(case.world_size))
    draw = None if case.draw is None else case.draw._replace(rank=case.world_size)
    residual = None
    if case.owner_residuals is not None:
        ranks = range(case.world_size)
        residual = np.concatenate([case.owner_residuals[r][case.owned(r)] for r in ranks])
    wire = cpu.encode(case.down, total, residual, draw)
    if case.owner_residuals is not None:
        for rank in range(case.world_size):
            case.owner_residuals[rank][case.owned(rank)] = residual[case.owned(rank)]
    return cpu.decode(case.down, wire, num_elems, case.inputs[0].dtype)


class OnDevice:
    """The arrays of a case in device memory."""

    def __init__(
        self, simt: Emulator, case: Case, in_place: bool = False, shifts: Sequence[int] = (0,) * 4
    ) -> None:
        self.case = case
        self.inputs = [simt.array(array, "input", shifts[0]) for array in case.inputs]
        self.outputs = (
            self.inputs
            if in_place
            else [simt.array(np.zeros_like(a), "output", shifts[1]) for a in case.inputs]
        )
        self.residuals = [simt.array(a, "residual", shifts[2]) for a in case.residuals or ()]
        self.owner_residuals = [
            simt.array(a, "owner residual", shifts[3]) for a in case.owner_residuals or ()
        ]
        self.given = [array.copy() for array in case.inputs]
        self.in_place = in_place

    def calls(self) -> list[Call]:
        case, draw = self.case, self.case.draw or reference.Draw()
        return [
            collectives.call(
                *("all_reduce", "two_shot", self.inputs[0].dtype.name, self.inputs[0].size),
                input=self.inputs[rank],
                output=self.outputs[rank],
                residual=self.residuals[rank] if self.residuals else None,
                owner_residual=self.owner_residuals[rank] if self.owner_residuals else None,
                reduce_op=_core.REDUCE_OPS[case.op],
                codec_up=_core.CODECS[case.up],
                codec_down=_core.CODECS[case.down],
                stochastic=int(case.draw is not None),
                seed=draw.seed,
                step=draw.step,
            )
            for rank in range(case.world_size)
        ]

    def check(self, what: object) -> None:
        """After what the CPU makes of the case."""
        expected = on_the_cpu(self.case)
        pairs = [(output, expected) for output in self.outputs]
        if not self.in_place:
            pairs += list(zip(self.inputs, self.given, strict=True))
        pairs += list(zip(self.residuals, self.case.residuals or (), strict=True))
        pairs += list(zip(self.owner_residuals, self.case.owner_residuals or (), strict=True))
        for actual, wanted in pairs:
            assert_same_numbers(actual, wanted, what)
        for output in self.outputs[1:]:
            assert output.tobytes() == self.outputs[0].tobytes(), what


def run_case(
    simt: Emulator, case: Case, mode: str, plan: Plan, num_blocks: int = 2, **how: Any
) -> None:
    group = Group(simt, case.world_size, mode, num_blocks)
    arrays = OnDevice(simt, case, **how)
    what = (dataclasses.replace(case, inputs=[]), len(case.inputs[0]), mode, plan, how)
    assert group.run([arrays.calls()], *plan) == [], what
    arrays.check(what)
    simt.release_all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("up", "down"), [("int4", "int8"), ("bf16", "int4"), ("int8", "fp16")])
def test_the_cpus_bits_under_every_schedule(
    simt: Emulator, up: str, down: str, world_size: int, mode: str
) -> None:
    dtypes = itertools.cycle(DTYPE_OF)
    for seed, (plan, count) in enumerate(itertools.product(PLANS, SIZES)):
        case = case_of(up, down, next(dtypes), count, world_size, seed, residuals=seed % 5 != 0)
        how = {"in_place": seed % 7 < 3, "num_blocks": 2 + seed % 2}
        run_case(simt, case, mode, plan, **how)


@pytest.mark.parametrize("dtype", DTYPE_OF)
def test_arrays_may_start_at_any_element(simt: Emulator, dtype: str) -> None:
    size = DTYPE_OF[dtype].itemsize
    for which, (up, down) in itertools.product(range(4), (("int4", "int8"), ("fp16", "bf16"))):
        shifts = [(size, size, 4, 4)[k] * (k == which) for k in range(4)]
        case = case_of(up, down, dtype, 1001, 2, which, residuals=True)
        run_case(simt, case, "in_kernel", ("priority", which), shifts=shifts)


def test_some_ranks_own_nothing(simt: Emulator) -> None:
    for count, mode in itertools.product((1, 32, 65, 96), MODES):
        case = case_of("int8", "int8", "float32", count, 4, 1, residuals=True)
        assert case.owned(3).start >= count
        run_case(simt, case, mode, PLANS[2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_one_follows_the_other_on_the_same_slabs(
    simt: Emulator, world_size: int, mode: str
) -> None:
    """Also where the epochs wrap around."""
    for plan, first_epoch in itertools.product(PLANS, (0, 2**32 - 5)):
        group = Group(simt, world_size, mode, num_blocks=3, first_epoch=first_epoch)
        pairs = (("int4", "int8"), ("bf16", "bf16"), ("int4", "int4"), ("fp16", "int8"))
        row = [
            OnDevice(simt, case_of(*pair, "float32", (2000, 1, 700, 1500)[k], world_size, k, True))
            for k, pair in enumerate(pairs)
        ]
        assert group.run([arrays.calls() for arrays in row], *plan) == [], plan
        for arrays in row:
            arrays.check((arrays.case.up, arrays.case.down, plan))
        simt.release_all()


def test_residuals_carry_over(simt: Emulator) -> None:
    """Three steps with the same residuals, and no wait of the host between them."""
    case = case_of("int4", "int4", "float32", 1500, 3, 0, residuals=True)
    group = Group(simt, 3, "in_kernel")
    first = OnDevice(simt, case)
    later = [OnDevice(simt, dataclasses.replace(case)) for _ in range(2)]
    for arrays in later:
        arrays.residuals, arrays.owner_residuals = first.residuals, first.owner_residuals
    assert group.run([arrays.calls() for arrays in (first, *later)], "random", 2) == []
    results = [on_the_cpu(case) for _ in range(3)]
    for arrays, expected in zip((first, *later), results, strict=True):
        for output in arrays.outputs:
            assert_same_numbers(output, expected, "output")
    for actual, wanted in zip(first.residuals, case.residuals or (), strict=True):
        assert_same_numbers(actual, wanted, "residual")


def test_sixteen_ranks(simt: Emulator) -> None:
    case = case_of(
        "int4", "int8", "bfloat16" if "bfloat16" in DTYPE_OF else "float16", 1999, 16, 3, True
    )
    run_case(simt, case, "in_kernel", ("random", 0), num_blocks=1)


def test_the_cut_changes_no_bit(simt: Emulator) -> None:
    results = set()
    for num_blocks, box_bytes in ((1, 512), (3, 512), (2, 1024), (3, 65536)):
        case = case_of("int4", "int8", "float32", 5003, 3, 3, residuals=True)
        group = Group(simt, 3, "in_kernel", num_blocks, box_bytes)
        arrays = OnDevice(simt, case)
        assert group.run([arrays.calls()], "random", 1) == []
        parts = (*arrays.outputs, *arrays.residuals, *arrays.owner_residuals)
        results.add(b"".join(array.tobytes() for array in parts))
        simt.release_all()
    assert len(results) == 1


def test_a_late_rank_ends_the_kernels_of_all_others(simt: Emulator) -> None:
    for plan in PLANS:
        group = Group(simt, 3, "in_kernel")
        calls = OnDevice(simt, case_of("int8", "int8", "float32", 3000, 3, 1, True)).calls()
        rounds, _ = group.plan(calls)
        group.views = group.views[1:]
        group.queue(calls[1:], 0, rounds)
        assert simt.run(*plan) == [], plan
        assert group.late_ranks() == [1, 1], plan
        simt.release_all()
