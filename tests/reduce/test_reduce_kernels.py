"""Reductions give the bits of reference.py for every dtype, operator and number of inputs."""

import itertools

import numpy as np
import pytest

from ringcomm import _core, errors, reference
from tests.dtypes import FLOAT8, NUMPY, PAIRS, REDUCED, SCALED, assert_same_numbers, random_array

SIZES = (0, 1, 15, 64, 1000, 2048 + 7)
ACCUMULATOR = {"float16": np.float32, "bfloat16": np.float32}

pytestmark = pytest.mark.usefixtures("simd_level")


def pointers(arrays):
    return [array.ctypes.data for array in arrays]


def random_inputs(dtype, num_elems, num_inputs):
    return [random_array(dtype, num_elems, seed, special=True) for seed in range(num_inputs)]


def untouched(dtype, num_elems):
    """An array of other contents than any test expects."""
    return np.full(num_elems * NUMPY[dtype].itemsize, 77, np.uint8).view(NUMPY[dtype])


@pytest.mark.parametrize(("dtype", "op"), PAIRS)
def test_reduce_matches_the_reference(dtype, op):
    for num_inputs, num_elems in itertools.product(range(1, 7), SIZES):
        inputs = random_inputs(dtype, num_elems, num_inputs)
        before = [values.tobytes() for values in inputs]
        output, second, third = (untouched(dtype, num_elems + 8) for _ in range(3))
        _core.reduce(
            _core.DTYPES[dtype],
            _core.REDUCE_OPS[op],
            pointers(inputs),
            num_elems,
            output.ctypes.data,
            [second.ctypes.data, third.ctypes.data][: num_inputs % 3],
        )
        what = (num_inputs, num_elems)
        assert_same_numbers(output[:num_elems], reference.reduce(inputs, op), what)
        for k, copy in enumerate((second, third)):
            written = output if k < num_inputs % 3 else untouched(dtype, num_elems + 8)
            assert copy.tobytes() == written.tobytes(), what
        assert output[num_elems:].tobytes() == untouched(dtype, 8).tobytes(), what
        assert [values.tobytes() for values in inputs] == before, what


@pytest.mark.parametrize("num_inputs", [2, 3, 4, 6])
@pytest.mark.parametrize("dtype", REDUCED)
def test_output_and_its_copies_may_be_the_inputs(dtype, num_inputs):
    op = "bxor" if dtype == "bool" else "avg"
    for which in range(num_inputs):
        inputs = random_inputs(dtype, 3000, num_inputs)
        expected = reference.reduce(inputs, op)
        target, *others = np.roll(pointers(inputs), -which).tolist()
        _core.reduce(
            _core.DTYPES[dtype], _core.REDUCE_OPS[op], pointers(inputs), 3000, target, others
        )
        for values in inputs:
            assert_same_numbers(values, expected)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("dtype", "op"), PAIRS)
def test_hops_end_with_the_bits_of_one_reduction(dtype, op, in_place):
    dtype_id, op_id = _core.DTYPES[dtype], _core.REDUCE_OPS[op]
    accumulator_type = ACCUMULATOR.get(dtype, NUMPY[dtype])
    for num_inputs, num_elems in itertools.product((1, 2, 5), SIZES):
        inputs = random_inputs(dtype, num_elems, num_inputs)
        total = np.zeros(num_elems, accumulator_type)
        for hop, values in enumerate(inputs):
            after = total if in_place else np.zeros(num_elems, accumulator_type)
            before = total.ctypes.data if hop else 0
            _core.reduce_hop(
                dtype_id, op_id, before, values.ctypes.data, after.ctypes.data, num_elems
            )
            total = after
        share = in_place and accumulator_type == NUMPY[dtype]
        output = total if share else np.zeros(num_elems, NUMPY[dtype])
        _core.finish_hops(
            dtype_id, op_id, total.ctypes.data, num_inputs, output.ctypes.data, num_elems
        )
        assert_same_numbers(output, reference.reduce(inputs, op), (num_inputs, num_elems))


@pytest.mark.parametrize(("dtype", "op"), PAIRS)
def test_arrays_may_start_at_any_address(dtype, op):
    size = NUMPY[dtype].itemsize
    inputs = random_inputs(dtype, 1500, 3)
    shifted = [np.zeros(1500 * size + 1, np.uint8) for _ in range(4)]
    for buffer, values in zip(shifted, inputs, strict=False):
        buffer[1:] = values.view(np.uint8)
    addresses = [buffer.ctypes.data + 1 for buffer in shifted]
    _core.reduce(_core.DTYPES[dtype], _core.REDUCE_OPS[op], addresses[:3], 1500, addresses[3])
    result = shifted[3][1:].copy().view(NUMPY[dtype])
    assert_same_numbers(result, reference.reduce(inputs, op))


@pytest.mark.parametrize("num_inputs", [3, 5, 7, 128])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_an_average_of_integers_is_the_exact_quotient(dtype, num_inputs):
    info = np.iinfo(dtype)
    near = [k * num_inputs + d for k in range(-40, 40) for d in (-1, 0, 1)]
    top = info.max // num_inputs * num_inputs
    far = [top - 1, top, top + 1, info.max, info.max - 1, info.min, info.min + 1]
    totals = np.array([v for v in near + far if info.min <= v <= info.max], dtype)
    zeros = np.zeros_like(totals)
    output = np.empty_like(totals)
    addresses = pointers([totals] + [zeros] * (num_inputs - 1))
    op = _core.REDUCE_OPS["avg"]
    _core.reduce(_core.DTYPES[dtype], op, addresses, len(totals), output.ctypes.data)
    expected = [int(abs(v) // num_inputs) * (1 if v >= 0 else -1) for v in map(int, totals)]
    np.testing.assert_array_equal(output, np.array(expected, dtype))


def test_any_byte_but_zero_is_true_and_a_result_is_0_or_1():
    first = np.arange(256, dtype=np.uint8)
    second = np.roll(first, 1)
    for op, expected in {
        "sum": (first != 0) | (second != 0),
        "product": (first != 0) & (second != 0),
        "bxor": (first != 0) ^ (second != 0),
    }.items():
        output = np.full(256, 77, np.uint8)
        addresses = pointers([first, second])
        bool_id = _core.DTYPES["bool"]
        _core.reduce(bool_id, _core.REDUCE_OPS[op], addresses, 256, output.ctypes.data)
        np.testing.assert_array_equal(output, expected.astype(np.uint8), op)


@pytest.mark.parametrize("dtype", SCALED)
def test_scale_matches_the_reference_in_place_and_apart(dtype):
    dtype_id = _core.DTYPES[dtype]
    for num_elems, factor in itertools.product(SIZES, (0.3, -1.0, 0.0, 1e30, 1 / 3)):
        values = random_array(dtype, num_elems, 5, special=True)
        before = values.tobytes()
        expected = reference.scale(values, factor)
        output = untouched(dtype, num_elems + 8)
        _core.scale(dtype_id, values.ctypes.data, factor, output.ctypes.data, num_elems)
        assert_same_numbers(output[:num_elems], expected, (num_elems, factor))
        assert output[num_elems:].tobytes() == untouched(dtype, 8).tobytes()
        assert values.tobytes() == before
        _core.scale(dtype_id, values.ctypes.data, factor, values.ctypes.data, num_elems)
        assert_same_numbers(values, expected, (num_elems, factor))
        shifted = np.zeros(num_elems * NUMPY[dtype].itemsize + 1, np.uint8)
        shifted[1:] = np.frombuffer(before, np.uint8)
        address = shifted.ctypes.data + 1
        _core.scale(dtype_id, address, factor, address, num_elems)
        assert_same_numbers(shifted[1:].copy().view(NUMPY[dtype]), expected, "odd address")


@pytest.mark.parametrize("dtype", SCALED)
def test_premul_sum_is_the_sum_of_inputs_that_were_scaled(dtype):
    inputs = random_inputs(dtype, 1000, 3)
    output = np.empty_like(inputs[0])
    op = _core.REDUCE_OPS["premul_sum"]
    _core.reduce(_core.DTYPES[dtype], op, pointers(inputs), 1000, output.ctypes.data)
    assert_same_numbers(output, reference.reduce(inputs, "sum"))


def test_the_order_is_the_rank_order():
    inputs = [np.array([value], np.float32) for value in (1e8, 1.0, -1e8, 1.0)]
    output = np.zeros(1, np.float32)
    _core.reduce(0, _core.REDUCE_OPS["sum"], pointers(inputs), 1, output.ctypes.data)
    assert output[0] == 1.0


def test_sixteen_bit_sums_round_once():
    inputs = [np.array([value], np.float16) for value in (2048.0, 1.0, 1.0)]
    output = np.zeros(1, np.float16)
    _core.reduce(_core.DTYPES["float16"], 0, pointers(inputs), 1, output.ctypes.data)
    assert output[0] == 2050.0


def test_bad_arguments_raise_usage_errors():
    array = np.zeros(4, np.float32)
    address = array.ctypes.data
    with pytest.raises(errors.UsageError, match="at least one input"):
        _core.reduce(0, 0, [], 4, address)
    with pytest.raises(errors.UsageError, match=r"dtype id must be in 0..\d+, not 99"):
        _core.reduce(99, 0, [address], 4, address)
    with pytest.raises(errors.UsageError, match=r"reduce op id must be in 0..\d+, not 99"):
        _core.reduce(0, 99, [address], 4, address)
    with pytest.raises(errors.UsageError, match="not be negative"):
        _core.reduce_hop(0, 0, 0, address, address, -1)
    with pytest.raises(errors.UsageError, match="not be negative"):
        _core.scale(0, address, 1.0, address, -1)


ADVICE = {
    ("float32", "band"): "take integers and bool; pass an integer view",
    ("complex64", "max"): "no order; reduce their real view or their abs()",
    ("complex128", "bxor"): "integer view",
    ("bool", "avg"): "convert to float32",
    ("bool", "premul_sum"): "floating-point and complex",
    ("uint16", "premul_sum"): "scale and use op='sum'",
    ("float8_e5m2", "sum"): "only moved; convert to float16 or bfloat16",
}


@pytest.mark.parametrize("dtype", _core.DTYPES)
def test_every_pair_is_reduced_or_refused_with_advice(dtype):
    array = np.zeros(64, np.uint8)
    address = array.ctypes.data
    for op, op_id in _core.REDUCE_OPS.items():
        calls = [
            lambda op_id=op_id: _core.reduce(_core.DTYPES[dtype], op_id, [address], 4, address),
            lambda op_id=op_id: _core.reduce_hop(
                _core.DTYPES[dtype], op_id, 0, address, address, 4
            ),
            lambda op_id=op_id: _core.finish_hops(
                _core.DTYPES[dtype], op_id, address, 1, address, 4
            ),
        ]
        if op == "premul_sum":
            calls.append(lambda: _core.scale(_core.DTYPES[dtype], address, 1.0, address, 4))
        legal = dtype in SCALED if op == "premul_sum" else (dtype, op) in PAIRS
        if dtype not in NUMPY and dtype not in FLOAT8:
            continue  # bfloat16 without ml_dtypes
        for call in calls:
            if legal:
                call()
                continue
            with pytest.raises(errors.UsageError) as error:
                call()
            assert f"op='{op}' does not reduce {dtype}: " in str(error.value)
            assert ADVICE.get((dtype, op), "") in str(error.value)
