"""Reductions give the bits of reference.py for every dtype, operator and number of inputs."""

import numpy as np
import pytest

from ringcomm import _core, errors, reference

DTYPES = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
}
OPS = ("sum", "avg", "min", "max", "product")
SIZES = (0, 1, 15, 64, 1000, 2048 + 7)
ACCUMULATOR = {"float16": np.float32, "bfloat16": np.float32}

pytestmark = pytest.mark.usefixtures("simd_level")


def random_input(dtype, num_elems, seed):
    rng = np.random.default_rng(seed)
    if dtype in ("int32", "int64", "uint8"):
        info = np.iinfo(DTYPES[dtype])
        return rng.integers(info.min, info.max, num_elems, DTYPES[dtype], endpoint=True)
    values = rng.standard_normal(num_elems) * 10.0 ** rng.integers(-3, 4, num_elems)
    values[rng.random(num_elems) < 0.05] = 0.0
    for special in (np.nan, np.inf, -np.inf, -0.0, 1e-40, 6e4, -6e4):
        values[rng.random(num_elems) < 0.02] = special
    if dtype == "float64":
        return values
    with np.errstate(all="ignore"):
        return reference.narrow(values.astype(np.float32), DTYPES[dtype])


def pointers(arrays):
    return [array.ctypes.data for array in arrays]


def assert_same_numbers(actual, expected):
    """Equal bits, but any NaN for a NaN."""
    assert actual.dtype == expected.dtype
    wide = reference.widen(expected) if expected.dtype == np.uint16 else expected
    nan = np.isnan(wide)
    assert actual[~nan].tobytes() == expected[~nan].tobytes()
    wide_actual = reference.widen(actual) if actual.dtype == np.uint16 else actual
    assert np.isnan(wide_actual[nan]).all()


@pytest.mark.parametrize("num_inputs", range(1, 7))
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduce_matches_the_reference(dtype, op, num_inputs):
    for num_elems in SIZES:
        inputs = [random_input(dtype, num_elems, seed) for seed in range(num_inputs)]
        before = [values.tobytes() for values in inputs]
        output = np.full(num_elems + 8, 77, DTYPES[dtype])
        second = output.copy()
        _core.reduce(
            _core.DTYPES[dtype],
            _core.REDUCE_OPS[op],
            pointers(inputs),
            num_elems,
            output.ctypes.data,
            second.ctypes.data,
        )
        assert_same_numbers(output[:num_elems], reference.reduce(inputs, op))
        assert output.tobytes() == second.tobytes()
        assert (output[num_elems:] == 77).all()
        assert [values.tobytes() for values in inputs] == before


@pytest.mark.parametrize("num_inputs", [2, 3, 4, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_may_be_any_of_the_inputs(dtype, num_inputs):
    for which in range(num_inputs):
        inputs = [random_input(dtype, 3000, seed) for seed in range(num_inputs)]
        expected = reference.reduce(inputs, "avg")
        target = inputs[which].ctypes.data
        _core.reduce(_core.DTYPES[dtype], _core.REDUCE_OPS["avg"], pointers(inputs), 3000, target)
        assert_same_numbers(inputs[which], expected)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("num_inputs", [1, 2, 5])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hops_end_with_the_bits_of_one_reduction(dtype, op, num_inputs, in_place):
    dtype_id, op_id = _core.DTYPES[dtype], _core.REDUCE_OPS[op]
    accumulator_type = ACCUMULATOR.get(dtype, DTYPES[dtype])
    for num_elems in SIZES:
        inputs = [random_input(dtype, num_elems, seed) for seed in range(num_inputs)]
        total = np.zeros(num_elems, accumulator_type)
        for hop, values in enumerate(inputs):
            after = total if in_place else np.zeros(num_elems, accumulator_type)
            before = total.ctypes.data if hop else 0
            _core.reduce_hop(
                dtype_id, op_id, before, values.ctypes.data, after.ctypes.data, num_elems
            )
            total = after
        share = in_place and accumulator_type == DTYPES[dtype]
        output = total if share else np.zeros(num_elems, DTYPES[dtype])
        _core.finish_hops(
            dtype_id, op_id, total.ctypes.data, num_inputs, output.ctypes.data, num_elems
        )
        assert_same_numbers(output, reference.reduce(inputs, op))


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_may_start_at_any_address(dtype):
    size = np.dtype(DTYPES[dtype]).itemsize
    inputs = [random_input(dtype, 1500, seed) for seed in range(3)]
    shifted = [np.zeros(1500 * size + 1, np.uint8) for _ in range(4)]
    for buffer, values in zip(shifted, inputs, strict=False):
        buffer[1:] = values.view(np.uint8)
    addresses = [buffer.ctypes.data + 1 for buffer in shifted]
    _core.reduce(_core.DTYPES[dtype], 0, addresses[:3], 1500, addresses[3])
    assert_same_numbers(shifted[3][1:].copy().view(DTYPES[dtype]), reference.reduce(inputs, "sum"))


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
    with pytest.raises(errors.UsageError, match=r"dtype id must be in 0..6, not 9"):
        _core.reduce(9, 0, [address], 4, address)
    with pytest.raises(errors.UsageError, match=r"reduce op id must be in 0..4, not 5"):
        _core.reduce(0, 5, [address], 4, address)
    with pytest.raises(errors.UsageError, match="not be negative"):
        _core.reduce_hop(0, 0, 0, address, address, -1)
