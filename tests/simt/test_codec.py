"""The CUDA codecs write and read the CPU's bytes, bit for bit, and the detector has nothing to say."""

import itertools
from typing import Any

import numpy as np
import pytest

from ringcomm import _core, reference
from tests.codec import codec_calls as cpu
from tests.codec.codec_calls import CODECS, DTYPE_OF, awkward_values
from tests.simt.emulator import PLANS, Emulator, EmulatorError, Plan

GUARD = 0xA5
SIZES = (1, 15, 31, 32, 33, 63, 257, 1000, 4096 + 7)
MANY = 1_000_000 - 3

Array = Any
Draw = reference.Draw


def dtype_id(array: Array) -> int:
    return int(_core.DTYPES[array.dtype.name])


def check(simt: Emulator, plan: Plan = ("forward", 0)) -> None:
    assert simt.run(*plan) == [], plan


def encode(
    simt: Emulator,
    codec: str,
    values: Array,
    residual: Array | None = None,
    draw: Draw | None = None,
    plan: Plan = ("forward", 0),
    wire_shift: int = 0,
    array_shift: int = 0,
    residual_shift: int = 0,
) -> tuple[Array, Array]:
    """The bytes and the new residual. Shifts are bytes past an aligned address."""
    num_bytes = _core.wire_bytes(_core.CODECS[codec], values.size)
    wire = simt.array(np.full(num_bytes, GUARD, np.uint8), "wire", wire_shift)
    kept = None if residual is None else simt.array(residual, "residual", residual_shift)
    given = simt.array(values, "input", array_shift)
    source = draw or Draw()
    simt.call(
        "simt_encode",
        *(_core.CODECS[codec], given, dtype_id(values), values.size, wire),
        *(kept, int(draw is not None), source.seed, source.step, source.rank, source.first_elem),
        simt.stream(0),
    )
    check(simt, plan)
    result = wire.copy(), None if kept is None else kept.copy()
    simt.release_all()
    return result


def decode(
    simt: Emulator,
    codec: str,
    wire: Array,
    num_elems: int,
    dtype: Any,
    plan: Plan = ("forward", 0),
    wire_shift: int = 0,
    array_shift: int = 0,
) -> Array:
    filled = np.full(num_elems * dtype.itemsize, GUARD, np.uint8).view(dtype)
    output = simt.array(filled, "output", array_shift)
    source = simt.array(wire, "wire", wire_shift)
    arguments = (source, num_elems, output, dtype_id(output), simt.stream(0))
    simt.call("simt_decode", _core.CODECS[codec], *arguments)
    check(simt, plan)
    result = output.copy()
    simt.release_all()
    return result


def decode_add(
    simt: Emulator,
    codec: str,
    wire: Array,
    accumulator: Array,
    first: bool = False,
    plan: Plan = ("forward", 0),
    wire_shift: int = 0,
    array_shift: int = 0,
) -> Array:
    total = simt.array(accumulator, "accumulator", array_shift)
    source = simt.array(wire, "wire", wire_shift)
    arguments = (source, total.size, total, int(first), simt.stream(0))
    simt.call("simt_decode_add", _core.CODECS[codec], *arguments)
    check(simt, plan)
    result = total.copy()
    simt.release_all()
    return result


def residual_for(values: Array, seed: int = 3) -> Array:
    return (np.random.default_rng(seed).standard_normal(values.size) * 0.01).astype(np.float32)


def draws(codec: str) -> list[Draw | None]:
    """Nearest, and where the codec has it stochastic rounding, also across a change of the index's upper half."""
    if codec not in ("int8", "int4"):
        return [None]
    return [None, Draw(seed=7, step=11, rank=3, first_elem=2**32 - 64)]


def compare_encoding(
    simt: Emulator, codec: str, values: Array, draw: Draw | None, **how: Any
) -> None:
    for residual in (None, residual_for(values)):
        expected_residual = None if residual is None else residual.copy()
        expected = cpu.encode(codec, values, expected_residual, draw)
        wire, new_residual = encode(simt, codec, values, residual, draw, **how)
        what = (values.size, draw, residual is not None, how)
        assert wire.tobytes() == expected.tobytes(), what
        if new_residual is not None and expected_residual is not None:
            assert new_residual.tobytes() == expected_residual.tobytes(), what


def compare_decoding(
    simt: Emulator, codec: str, wire: Array, num_elems: int, dtype: Any, **how: Any
) -> None:
    expected = cpu.decode(codec, wire, num_elems, dtype)
    assert decode(simt, codec, wire, num_elems, dtype, **how).tobytes() == expected.tobytes()
    if dtype != np.float32:
        return
    for first in (False, True):
        before = residual_for(expected, 5)
        after = before.copy()
        cpu.decode_add(codec, wire, after, first)
        actual = decode_add(simt, codec, wire, before, first, **how)
        assert actual.tobytes() == after.tobytes(), (num_elems, first, how)


def compare_division(simt: Emulator, num_elems: int, plan: Plan = ("forward", 0)) -> None:
    values = awkward_values(num_elems, np.dtype(np.float32), 8)
    expected = values.copy()
    _core.divide(expected.ctypes.data, num_elems, 3.0)
    quotients = simt.array(values, "values")
    simt.call("simt_divide", quotients, num_elems, 3.0, simt.stream(0))
    check(simt, plan)
    assert quotients.tobytes() == expected.tobytes()
    simt.release_all()


@pytest.mark.parametrize("dtype", DTYPE_OF)
@pytest.mark.parametrize("codec", CODECS)
def test_bytes_are_the_cpus_under_every_schedule(simt: Emulator, codec: str, dtype: str) -> None:
    for num_elems, plan in itertools.product(SIZES, PLANS):
        values = awkward_values(num_elems, DTYPE_OF[dtype], num_elems)
        for draw in draws(codec):
            compare_encoding(simt, codec, values, draw, plan=plan)
        wire = cpu.encode(codec, values)
        compare_decoding(simt, codec, wire, num_elems, DTYPE_OF[dtype], plan=plan)


@pytest.mark.parametrize("dtype", DTYPE_OF)
@pytest.mark.parametrize("codec", CODECS)
def test_a_million_values(simt: Emulator, codec: str, dtype: str) -> None:
    values = awkward_values(MANY, DTYPE_OF[dtype], 1)
    residual = residual_for(values)
    for draw in draws(codec):
        expected_residual = residual.copy()
        expected = cpu.encode(codec, values, expected_residual, draw)
        wire, new_residual = encode(simt, codec, values, residual, draw)
        assert np.array_equal(wire, expected), draw
        assert np.array_equal(new_residual.view(np.uint32), expected_residual.view(np.uint32)), draw
    expected = cpu.decode(codec, wire, MANY, DTYPE_OF[dtype])
    assert decode(simt, codec, wire, MANY, DTYPE_OF[dtype]).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPE_OF)
@pytest.mark.parametrize("codec", CODECS)
def test_any_bits_decode_to_the_cpus_values(simt: Emulator, codec: str, dtype: str) -> None:
    num_bytes = _core.wire_bytes(_core.CODECS[codec], 5000)
    wire = np.random.default_rng(2).integers(0, 256, num_bytes, np.uint8)
    compare_decoding(simt, codec, wire, 5000, DTYPE_OF[dtype])


@pytest.mark.parametrize("shift", [1, 2, 4, 8])
@pytest.mark.parametrize("codec", CODECS)
def test_the_wire_may_start_anywhere(simt: Emulator, codec: str, shift: int) -> None:
    for dtype in DTYPE_OF:
        values = awkward_values(333, DTYPE_OF[dtype], 4)
        compare_encoding(simt, codec, values, None, wire_shift=shift)
        wire = cpu.encode(codec, values)
        compare_decoding(simt, codec, wire, 333, DTYPE_OF[dtype], wire_shift=shift)


@pytest.mark.parametrize("dtype", DTYPE_OF)
@pytest.mark.parametrize("codec", CODECS)
def test_arrays_may_start_at_any_element(simt: Emulator, codec: str, dtype: str) -> None:
    values = awkward_values(301, DTYPE_OF[dtype], 6)
    compare_encoding(simt, codec, values, None, array_shift=values.itemsize)
    compare_encoding(simt, codec, values, None, residual_shift=4)
    wire = cpu.encode(codec, values)
    compare_decoding(simt, codec, wire, 301, DTYPE_OF[dtype], array_shift=values.itemsize)


def test_division(simt: Emulator) -> None:
    for num_elems in SIZES:
        compare_division(simt, num_elems)


def test_nothing_is_launched_for_no_elements(simt: Emulator) -> None:
    before = simt.counts()
    for codec in CODECS:
        wire, _ = encode(simt, codec, np.zeros(0, np.float32))
        assert wire.size == 0
        assert decode(simt, codec, wire, 0, np.dtype(np.float32)).size == 0
    assert simt.counts() == before


def test_bad_arguments_are_refused(simt: Emulator) -> None:
    values = simt.array(np.zeros(64, np.float32), "values")
    wire = simt.array(np.zeros(256, np.uint8), "wire")

    def call(
        codec: str, source: Array, dtype: str, count: int, stochastic: int = 0, first: int = 0
    ) -> None:
        options = (None, stochastic, 0, 0, 0, first, None)
        simt.call(
            "simt_encode", _core.CODECS[codec], source, _core.DTYPES[dtype], count, wire, *options
        )

    with pytest.raises(EmulatorError, match="copy the values instead"):
        call("none", values, "float32", 64)
    with pytest.raises(EmulatorError, match="takes float32, bfloat16 or float16, not int32"):
        call("int8", values, "int32", 64)
    with pytest.raises(EmulatorError, match="must not be negative, got -1"):
        call("int8", values, "float32", -1)
    with pytest.raises(EmulatorError, match="cut arrays between blocks"):
        call("int8", values, "float32", 64, first=5)
    with pytest.raises(EmulatorError, match="rounds to nearest even only"):
        call("bf16", values, "float32", 64, stochastic=1)
    with pytest.raises(EmulatorError, match="must lie at a multiple of 4 bytes on a GPU"):
        call("int8", values.view(np.uint8)[2:], "float32", 32)
    assert simt.run() == []
