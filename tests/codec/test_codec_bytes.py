"""The kernels write and read exactly the bytes of reference.py and of csrc/wire/codec_format.h."""

import itertools

import numpy as np
import pytest

from ringcomm import _core, errors, reference
from tests.codec import codec_calls
from tests.codec.codec_calls import CODECS, DTYPE_OF, awkward_values

SIZES = (0, 1, 31, 32, 33, 1000, 4096 + 7)
BLOCK_CODECS = ("int8", "int4")

pytestmark = pytest.mark.usefixtures("simd_level")


def assert_same(actual, expected, what=""):
    assert actual.dtype == expected.dtype
    different = np.flatnonzero(actual.view(np.uint8) != expected.view(np.uint8))
    assert different.size == 0, (
        f"{what}: first of {different.size} differing bytes is {different[0]}"
    )


@pytest.mark.parametrize("num_elems", SIZES)
@pytest.mark.parametrize("dtype", DTYPE_OF)
@pytest.mark.parametrize("codec", CODECS)
def test_encode_writes_the_bytes_of_the_reference(codec, dtype, num_elems):
    for seed in range(3):
        values = awkward_values(num_elems, DTYPE_OF[dtype], seed)
        assert_same(codec_calls.encode(codec, values), reference.encode(codec, values))


@pytest.mark.parametrize("num_elems", SIZES)
@pytest.mark.parametrize("dtype", DTYPE_OF)
@pytest.mark.parametrize("codec", CODECS)
def test_residual_is_added_before_and_stored_after(codec, dtype, num_elems):
    values = awkward_values(num_elems, DTYPE_OF[dtype], 1)
    residual = np.random.default_rng(2).standard_normal(num_elems).astype(np.float32) * np.float32(
        0.1
    )
    expected = residual.copy()
    for _ in range(3):
        wire = codec_calls.encode(codec, values, residual)
        assert_same(wire, reference.encode(codec, values, expected), "wire")
        assert_same(residual, expected, "residual")
    assert np.isfinite(residual).all()


@pytest.mark.parametrize("num_elems", SIZES)
@pytest.mark.parametrize("dtype", DTYPE_OF)
@pytest.mark.parametrize("codec", BLOCK_CODECS)
def test_stochastic_rounding_draws_the_numbers_of_the_reference(codec, dtype, num_elems):
    values = awkward_values(num_elems, DTYPE_OF[dtype], 3)
    for draw in (
        reference.Draw(),
        reference.Draw(seed=2**64 - 1, step=7, rank=3, first_elem=64),
        reference.Draw(seed=5, step=2**40, rank=2**32 - 1, first_elem=2**32 - 32),
    ):
        if num_elems > 1000:
            values[:1] = np.inf if dtype == "bfloat16" else np.nan
        residual = np.zeros(num_elems, np.float32)
        expected = residual.copy()
        wire = codec_calls.encode(codec, values, residual, draw)
        assert_same(wire, reference.encode(codec, values, expected, draw), "wire")
        assert_same(residual, expected, "residual")


@pytest.mark.parametrize("num_elems", SIZES)
@pytest.mark.parametrize("codec", CODECS)
def test_decode_and_decode_add_read_any_bytes_like_the_reference(codec, num_elems):
    # Random bytes hold every code and, in the scales, every kind of number.
    wire = np.random.default_rng(4).integers(
        0, 256, reference.wire_bytes(codec, num_elems), np.uint8
    )
    with np.errstate(all="ignore"):
        decoded = reference.decode(codec, wire, num_elems)
        for dtype in DTYPE_OF.values():
            expected = reference.decode(codec, wire, num_elems, dtype)
            actual = codec_calls.decode(codec, wire, num_elems, dtype)
            nan = np.isnan(reference.widen(expected))
            assert_same(actual[~nan], expected[~nan])
            assert np.isnan(reference.widen(actual))[nan].all()
        before = np.random.default_rng(5).standard_normal(num_elems).astype(np.float32)
        total = before.copy()
        codec_calls.decode_add(codec, wire, total)
        np.testing.assert_array_equal(total, before + decoded)
        codec_calls.decode_add(codec, wire, total, first=True)
        np.testing.assert_array_equal(total, decoded)


@pytest.mark.parametrize("codec", CODECS)
def test_wire_may_start_at_any_address(codec):
    values = awkward_values(1000, np.float32)
    expected = reference.encode(codec, values)
    for offset in range(1, 5):
        buffer = np.zeros(len(expected) + offset, np.uint8)
        wire = buffer[offset:]
        _core.encode(_core.CODECS[codec], values.ctypes.data, 0, 1000, wire.ctypes.data)
        assert_same(wire, expected)
        np.testing.assert_array_equal(
            codec_calls.decode(codec, wire, 1000), reference.decode(codec, expected, 1000)
        )


@pytest.mark.parametrize(
    ("codec", "stochastic"),
    [*((codec, False) for codec in CODECS), *((codec, True) for codec in BLOCK_CODECS)],
)
def test_cutting_at_multiples_of_32_changes_nothing(codec, stochastic):
    num_elems = 5000
    values = awkward_values(num_elems, np.float32, 6)
    draw = reference.Draw(seed=9, step=1, rank=2, first_elem=2**33)
    whole = codec_calls.encode(codec, values, draw=draw if stochastic else None)
    decoded = codec_calls.decode(codec, whole, num_elems)
    cuts = [0, 32, 96, 1024, 1056, 3200, num_elems]
    for begin, end in itertools.pairwise(cuts):
        part_draw = draw._replace(first_elem=draw.first_elem + begin) if stochastic else None
        part = codec_calls.encode(codec, values[begin:end], draw=part_draw)
        np.testing.assert_array_equal(
            codec_calls.decode(codec, part, end - begin), decoded[begin:end]
        )


def golden_values():
    """Two blocks and one value: a ramp, a block with a NaN, and 1/3."""
    ramp = np.arange(-16, 16, dtype=np.float32) * np.float32(0.5)
    broken = np.ones(32, np.float32)
    broken[5] = np.nan
    return np.concatenate([ramp, broken, np.array([1 / 3], np.float32)])


GOLDEN = {
    "int8": (
        "81899199a1a9b1b9c0c8d0d8e0e8f0f8000810182028303840474f575f676f77"
        "0000000000000000000000000000000000000000000000000000000000000000"
        "7f00000000000000000000000000000000000000000000000000000000000000"
        "813dc07f2c3b"
    ),
    "int4": (
        "09091a1a2b2b3c3c4c4d4d5e5e6f6f7000000000000000000000000000000000"
        "07000000000000000000000000000000923fc07f433d"
    ),
    "bf16": "00c180c000008040803f803f803f803fab3e",
    "fp16": "00c800c400000044003c003c003c003c5535",
}


@pytest.mark.parametrize("codec", CODECS)
def test_golden_bytes(codec):
    values = golden_values()[::8] if codec not in BLOCK_CODECS else golden_values()
    assert codec_calls.encode(codec, np.ascontiguousarray(values)).tobytes().hex() == GOLDEN[codec]


def test_golden_bytes_of_stochastic_rounding():
    values = np.full(32, 0.5, np.float32)
    values[0] = 7.0
    draw = reference.Draw(seed=1, step=2, rank=3, first_elem=32)
    assert codec_calls.encode("int4", values, draw=draw).tobytes().hex() == (
        "17110001000100000011100110011110803f"
    )


@pytest.mark.parametrize("codec", BLOCK_CODECS)
def test_one_nan_or_infinity_makes_its_block_nan_and_keeps_its_residual(codec):
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        values = np.ones(96, np.float32)
        values[40] = bad
        residual = np.full(96, 0.25, np.float32)
        decoded = codec_calls.decode(codec, codec_calls.encode(codec, values, residual), 96)
        assert np.isnan(decoded[32:64]).all()
        assert np.isfinite(decoded[:32]).all()
        assert np.isfinite(decoded[64:]).all()
        assert (residual[32:64] == 0.25).all()
        assert (residual[:32] != 0.25).all()


def test_stochastic_rounding_floors_sums_that_round_to_an_integer():
    # Close to 127 a sum with a number just below 1 rounds up to an integer about once in 2^18 times.
    values = np.random.default_rng(9).uniform(126, 127, 1 << 20).astype(np.float32)
    values[::32] = 127
    draw = reference.Draw(seed=11)
    assert_same(
        codec_calls.encode("int8", values, draw=draw), reference.encode("int8", values, draw=draw)
    )


@pytest.mark.parametrize("codec", BLOCK_CODECS)
def test_the_largest_numbers_survive(codec):
    largest = np.finfo(np.float32).max
    values = np.array([largest, -largest] * 16, np.float32)
    residual = np.zeros(32, np.float32)
    draw = reference.Draw(seed=1)
    for chosen in (None, draw):
        decoded = codec_calls.decode(codec, codec_calls.encode(codec, values, residual, chosen), 32)
        assert np.isfinite(decoded).all()
        assert np.isfinite(residual).all()
        np.testing.assert_allclose(decoded, values, rtol=0.005)
        residual[:] = 0


def test_stochastic_rounding_is_unbiased():
    num_elems, rounds = 4096, 200
    rng = np.random.default_rng(8)
    values = rng.uniform(-1, 1, num_elems).astype(np.float32)
    values[::32] = 1.75  # 7 * 0.25: the scale is exact, so no code is clamped
    mean = np.zeros(num_elems)
    for step in range(rounds):
        wire = codec_calls.encode("int4", values, draw=reference.Draw(seed=3, step=step))
        mean += codec_calls.decode("int4", wire, num_elems)
    error = mean / rounds - values
    assert abs(error.mean()) < 4 * 0.25 * 0.41 / np.sqrt(rounds * num_elems)
    assert np.abs(error).max() < 6 * 0.125 / np.sqrt(rounds)


def test_codec_tables_agree():
    assert dict(_core.CODECS) == {"none": 0, "bf16": 1, "fp16": 2, "int8": 3, "int4": 4}
    bits = {_core.codec_name(i): _core.bits_per_value(i) for i in _core.CODECS.values()}
    assert bits == {"none": 32, "bf16": 16, "fp16": 16, "int8": 8.5, "int4": 4.5}
    for codec in CODECS:
        for num_elems in SIZES:
            assert _core.wire_bytes(_core.CODECS[codec], num_elems) == reference.wire_bytes(
                codec, num_elems
            )
    assert _core.wire_bytes(0, 5) == 20


def test_bad_arguments_raise_usage_errors():
    calls = {
        "codec 'none' encodes nothing": lambda: _core.encode(0, 0, 0, 0, 0),
        "codec id must be in 0..4, not 5": lambda: _core.wire_bytes(5, 1),
        "codec id must be in 0..4, not -1": lambda: _core.encode(-1, 0, 0, 0, 0),
        r"dtype id must be in 0..\d+, not 99": lambda: _core.encode(3, 0, 99, 0, 0),
        "takes float32, bfloat16 or float16, not float64": lambda: _core.encode(3, 0, 1, 0, 0),
        "num_elems must not be negative": lambda: _core.encode(3, 0, 0, -1, 0),
        "first_elem must be a multiple of 32": lambda: _core.encode(3, 0, 0, 1, 0, first_elem=5),
        "'bf16' rounds to nearest even only": lambda: _core.encode(1, 0, 0, 0, 0, stochastic=True),
        "not int64": lambda: _core.decode(3, 0, 0, 0, 5),
    }
    for message, call in calls.items():
        with pytest.raises(errors.UsageError, match=message):
            call()


def test_is_zero_sees_every_byte():
    array = np.zeros(10000, np.uint8)
    assert _core.is_zero(array.ctypes.data, 10000)
    assert _core.is_zero(array.ctypes.data, 0)
    for position in (0, 4095, 4096, 9999):
        array[position] = 1
        assert not _core.is_zero(array.ctypes.data, 10000)
        array[position] = 0


def test_divide_divides():
    values = np.random.default_rng(1).standard_normal(1003).astype(np.float32)
    expected = values / np.float32(3)
    _core.divide(values.ctypes.data, len(values), 3.0)
    assert_same(values, expected)
