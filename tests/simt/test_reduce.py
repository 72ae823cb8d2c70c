"""The CUDA reductions give the CPU's bits for every dtype and operator, and the detector has nothing to say.

Any NaN is as good as another: its sign and payload are the device's.
"""

import ctypes
import itertools
from typing import Any

import numpy as np
import pytest

from ringcomm import _core
from tests.dtypes import NUMPY, PAIRS, SCALED, assert_same_numbers, random_array
from tests.simt.emulator import PLANS, Emulator, EmulatorError, Plan, pointers

SIZES = (1, 3, 16, 255, 1000 + 7)

Array = Any


def inputs_of(dtype: str, num_elems: int, num_inputs: int) -> list[Array]:
    return [random_array(dtype, num_elems, seed, special=True) for seed in range(num_inputs)]


def zeros(dtype: str, num_elems: int) -> Array:
    return np.zeros(num_elems, NUMPY[dtype])


def ids(dtype: str, op: str) -> tuple[int, int]:
    return _core.DTYPES[dtype], _core.REDUCE_OPS[op]


def reduced_on_the_cpu(dtype: str, op: str, inputs: list[Array]) -> Array:
    output = np.zeros_like(inputs[0])
    addresses = [values.ctypes.data for values in inputs]
    _core.reduce(*ids(dtype, op), addresses, output.size, output.ctypes.data)
    return output


def reduce(simt: Emulator, dtype: str, op: str, inputs: list[Array], outputs: list[Array]) -> None:
    """Queues the reduction of arrays that are in device memory."""
    simt.call(
        "simt_reduce",
        *(*ids(dtype, op), pointers(inputs), len(inputs), inputs[0].size),
        *(outputs[0], pointers(outputs[1:]), len(outputs) - 1, simt.stream(0)),
    )


def on_device(simt: Emulator, arrays: list[Array], name: str, shift: int = 0) -> list[Array]:
    return [simt.array(array, f"{name} {k}", shift) for k, array in enumerate(arrays)]


def check_reduction(
    simt: Emulator, dtype: str, op: str, num_inputs: int, num_elems: int, plan: Plan
) -> None:
    inputs = inputs_of(dtype, num_elems, num_inputs)
    expected = reduced_on_the_cpu(dtype, op, inputs)
    outputs = on_device(simt, [np.zeros_like(expected)] * (1 + num_inputs % 3), "output")
    reduce(simt, dtype, op, on_device(simt, inputs, "input"), outputs)
    what = (dtype, op, num_inputs, num_elems, plan)
    assert simt.run(*plan) == [], what
    for output in outputs:
        assert_same_numbers(output, expected, what)
    simt.release_all()


def check_hops(
    simt: Emulator, dtype: str, op: str, num_inputs: int, num_elems: int, plan: Plan
) -> None:
    wide = "float32" if dtype in ("float16", "bfloat16") else dtype
    inputs = inputs_of(dtype, num_elems, num_inputs)
    totals = on_device(simt, [zeros(wide, num_elems)] * 2, "accumulator")
    output = simt.array(zeros(dtype, num_elems), "output")
    before = None
    # The last hop is in place.
    for hop, values in enumerate(on_device(simt, inputs, "input")):
        total = totals[1 if hop == num_inputs - 1 else hop % 2]
        simt.call(
            "simt_reduce_hop",
            *(*ids(dtype, op), before, values, total, num_elems, simt.stream(0)),
        )
        before = total
    simt.call(
        "simt_finish_hops",
        *(*ids(dtype, op), before, num_inputs, output, num_elems, simt.stream(0)),
    )
    what = (dtype, op, num_inputs, num_elems, plan)
    assert simt.run(*plan) == [], what
    assert_same_numbers(output, reduced_on_the_cpu(dtype, op, inputs), what)
    simt.release_all()


def check_scaling(
    simt: Emulator,
    dtype: str,
    num_elems: int,
    plan: Plan,
    in_place: bool = False,
    shifts: tuple[int, int] = (0, 0),
) -> None:
    """``shifts``: where values and results begin, in elements past an aligned address."""
    values = inputs_of(dtype, num_elems, 1)[0]
    expected = np.zeros_like(values)
    factor = 1 / 3
    _core.scale(_core.DTYPES[dtype], values.ctypes.data, factor, expected.ctypes.data, num_elems)
    bytes_in, bytes_out = (shift * values.itemsize for shift in shifts)
    given = simt.array(values, "values", bytes_in)
    scaled = given if in_place else simt.array(np.zeros_like(values), "scaled", bytes_out)
    simt.call(
        "simt_scale", _core.DTYPES[dtype], given, ctypes.c_double(factor), scaled, num_elems, None
    )
    what = (dtype, num_elems, plan, in_place, shifts)
    assert simt.run(*plan) == [], what
    assert_same_numbers(scaled, expected, what)
    simt.release_all()


@pytest.mark.parametrize(("dtype", "op"), PAIRS)
def test_reductions_have_the_cpus_bits(simt: Emulator, dtype: str, op: str) -> None:
    plans = itertools.cycle(PLANS)
    for num_inputs, num_elems in itertools.product((1, 2, 3, 5), SIZES):
        check_reduction(simt, dtype, op, num_inputs, num_elems, next(plans))


@pytest.mark.parametrize(("dtype", "op"), PAIRS)
def test_hops_have_the_cpus_bits(simt: Emulator, dtype: str, op: str) -> None:
    plans = itertools.cycle(PLANS)
    for num_inputs, num_elems in itertools.product((1, 4), (1, 255, 1000 + 7)):
        check_hops(simt, dtype, op, num_inputs, num_elems, next(plans))


@pytest.mark.parametrize("dtype", SCALED)
def test_scaling_has_the_cpus_bits(simt: Emulator, dtype: str) -> None:
    plans = itertools.cycle(PLANS)
    for num_elems in SIZES:
        check_scaling(simt, dtype, num_elems, next(plans), in_place=True)
        for shifts in ((0, 0), (1, 0), (0, 1)):
            check_scaling(simt, dtype, num_elems, next(plans), shifts=shifts)


@pytest.mark.parametrize("dtype", sorted({dtype for dtype, _ in PAIRS}))
def test_any_array_may_start_at_any_element(simt: Emulator, dtype: str) -> None:
    op = "bxor" if dtype == "bool" else "sum"
    wide = "float32" if dtype in ("float16", "bfloat16") else dtype
    size, wide_size = NUMPY[dtype].itemsize, NUMPY[wide].itemsize
    inputs = inputs_of(dtype, 333, 2)
    expected = reduced_on_the_cpu(dtype, op, inputs)
    # One array that is out of line is enough to leave vectors.
    for which in range(4):
        shifts = [size * (k == which) for k in range(4)]
        sources = [simt.array(array, "input", shifts[k]) for k, array in enumerate(inputs)]
        outputs = [simt.array(np.zeros_like(expected), "output", shifts[k]) for k in (2, 3)]
        reduce(simt, dtype, op, sources, outputs)
        assert simt.run() == [], which
        for output in outputs:
            assert_same_numbers(output, expected, which)
        simt.release_all()
    for which in range(4):
        shifts = [wide_size * (k == which) for k in (0, 1)] + [size * (k == which) for k in (2, 3)]
        totals = [simt.array(zeros(wide, 333), "accumulator", shift) for shift in shifts[:2]]
        sources = [simt.array(array, "input", shifts[2]) for array in inputs]
        output = simt.array(zeros(dtype, 333), "output", shifts[3])
        hops = ((None, sources[0], totals[0]), (totals[0], sources[1], totals[1]))
        for hop in hops:
            simt.call("simt_reduce_hop", *ids(dtype, op), *hop, 333, simt.stream(0))
        simt.call("simt_finish_hops", *ids(dtype, op), totals[1], 2, output, 333, simt.stream(0))
        assert simt.run() == [], which
        assert_same_numbers(output, expected, which)
        simt.release_all()


def test_the_output_and_its_copies_may_be_inputs(simt: Emulator) -> None:
    for plan, which in zip(PLANS, itertools.cycle(range(3)), strict=False):
        inputs = inputs_of("bfloat16" if "bfloat16" in NUMPY else "float16", 777, 3)
        dtype = inputs[0].dtype.name
        expected = reduced_on_the_cpu(dtype, "avg", inputs)
        arrays = on_device(simt, inputs, "array")
        reduce(simt, dtype, "avg", arrays, arrays[which:] + arrays[:which])
        assert simt.run(*plan) == [], plan
        for array in arrays:
            assert_same_numbers(array, expected, plan)
        simt.release_all()


def test_bad_arguments_are_refused(simt: Emulator) -> None:
    place = simt.array(np.zeros(64, np.float32), "place")
    with pytest.raises(EmulatorError, match="bitwise operators take integers and bool"):
        reduce(simt, "float32", "bor", [place], [place])
    with pytest.raises(EmulatorError, match="at least one input, got 0"):
        simt.call(
            "simt_reduce",
            *(*ids("float32", "sum"), pointers([]), 0, 1, place, pointers([]), 0, None),
        )
    with pytest.raises(
        EmulatorError, match="at most 64 arrays are reduced at once on a GPU, got 65"
    ):
        reduce(simt, "float32", "sum", [place] * 65, [place])
    with pytest.raises(EmulatorError, match="must lie at a multiple of 4 bytes on a GPU"):
        reduce(simt, "float32", "sum", [place.view(np.uint8)[2:62].view(np.float32)], [place])
    assert simt.run() == []
