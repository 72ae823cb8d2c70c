"""Codecs, reductions and packing on a GPU have the CPU's bytes, whatever the values."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

import ringcomm
from ringcomm import _core
from ringcomm.errors import UsageError, WireError
from tests.codec.codec_calls import CODECS, DTYPE_OF, awkward_values
from tests.dtypes import NUMPY, PAIRS, SCALED, assert_same_numbers, random_array
from tests.gpu import places
from tests.gpu.conftest import Pools
from tests.worlds import RankFailure

SIZES = {"cuda": (1, 31, 32, 33, 1000, 100_003, 5_000_011), "simt": (1, 33, 3001)}
EMULATED_PAIRS = [pair for pair in PAIRS if pair[1] in ("sum", "avg")][::5]

Array = Any


def inside(pools: Pools, device: str, function: Any, *args: Any) -> Any:
    """What the function returns in a process with that GPU."""
    worlds = pools(device)
    process = worlds.take()
    process.start(function, *args)
    outcome = process.outcome(time.monotonic() + 100)
    worlds.give_back(process, outcome.kind != "gone")
    if outcome.kind != "value":
        raise RankFailure(outcome.trace or outcome.kind)
    return outcome.value


def check_codec(spec: str, dtype: str, sizes: tuple[int, ...]) -> None:
    codec = ringcomm.codec(spec)
    kind = DTYPE_OF[dtype]
    for seed, size in enumerate(sizes):
        values = awkward_values(size, kind, seed)
        expected = codec.encode(values)
        there = places.put(values)
        wire = places.put(np.zeros(codec.wire_bytes(size), np.uint8))
        assert codec.encode(there, out=wire) is wire
        assert np.array_equal(places.fetch(wire), expected), (spec, dtype, size)

        out = places.put(np.zeros(size, kind))
        codec.decode(wire, size, out=out)
        assert_same_numbers(places.fetch(out), codec.decode(expected, size, dtype), (spec, size))

        start = random_array("float32", size, seed)
        sums = places.put(start)
        codec.decode_add(wire, sums)
        assert_same_numbers(places.fetch(sums), codec.decode_add(expected, start.copy()), size)


def check_residual(spec: str, dtype: str, sizes: tuple[int, ...]) -> None:
    codec = ringcomm.codec(spec)
    for seed, size in enumerate(sizes):
        values = awkward_values(size, DTYPE_OF[dtype], seed)
        residual = random_array("float32", size, seed) * np.float32(1e-3)
        there, kept = places.put(values), places.put(residual)
        wire = places.put(np.zeros(codec.wire_bytes(size), np.uint8))
        for step in range(3):
            expected = codec.encode(values, residual, step=step, rank=1, first_elem=64)
            codec.encode(there, kept, step=step, rank=1, first_elem=64, out=wire)
            found = places.fetch(wire)
            if spec == "fp16":  # a NaN's payload is the device's
                found, expected = codec.decode(found, size), codec.decode(expected, size)
            assert_same_numbers(found, expected, (spec, dtype, size, step))
            assert_same_numbers(places.fetch(kept), residual, (spec, dtype, size, step))


@pytest.mark.parametrize("dtype", DTYPE_OF)
@pytest.mark.parametrize("spec", ["none", *CODECS, "int8[rounding=stochastic,seed=7]"])
def test_codecs_have_the_cpus_bytes(device: str, pools: Pools, spec: str, dtype: str) -> None:
    inside(pools, device, check_codec, spec, dtype, SIZES[device])


@pytest.mark.parametrize("dtype", DTYPE_OF)
@pytest.mark.parametrize("spec", [*CODECS, "int4[rounding=stochastic,seed=7]"])
def test_residuals_have_the_cpus_bytes(device: str, pools: Pools, spec: str, dtype: str) -> None:
    inside(pools, device, check_residual, spec, dtype, SIZES[device])


def check_reductions(pairs: list[tuple[str, str]], sizes: tuple[int, ...]) -> None:
    for dtype, op in pairs:
        for num_inputs in (1, 2, 4):
            for seed, size in enumerate(sizes):
                inputs = [random_array(dtype, size, (seed, k), True) for k in range(num_inputs)]
                expected = np.zeros_like(inputs[0])
                ids = (_core.DTYPES[dtype], _core.REDUCE_OPS[op])
                given = [array.ctypes.data for array in inputs]
                _core.reduce(*ids, given, size, expected.ctypes.data)
                there = [places.put(array) for array in inputs]
                outputs = [places.put(np.zeros_like(expected)) for _ in range(2)]
                _core.reduce(
                    *ids,
                    [places.pointer(array) for array in there],
                    size,
                    places.pointer(outputs[0]),
                    [places.pointer(outputs[1])],
                    stream=places.stream(),
                )
                for output in outputs:
                    assert_same_numbers(places.fetch(output), expected, (dtype, op, size))


def test_reductions_have_the_cpus_bytes(device: str, pools: Pools) -> None:
    pairs = PAIRS if device == "cuda" else EMULATED_PAIRS
    inside(
        pools, device, check_reductions, pairs, (1, 255, 100_003)[: 3 if device == "cuda" else 2]
    )


def check_hops_scale_and_divide() -> None:
    size, stream, point = 1003, places.stream(), places.pointer
    for dtype in SCALED:
        code, op = _core.DTYPES[dtype], _core.REDUCE_OPS["avg"]
        wide = "float32" if dtype in ("float16", "bfloat16") else dtype
        inputs = [random_array(dtype, size, k) for k in range(2)]
        total, result = np.zeros(size, NUMPY[wide]), np.zeros(size, NUMPY[dtype])
        _core.reduce_hop(code, op, 0, inputs[0].ctypes.data, total.ctypes.data, size)
        _core.reduce_hop(
            code, op, total.ctypes.data, inputs[1].ctypes.data, total.ctypes.data, size
        )
        _core.finish_hops(code, op, total.ctypes.data, 2, result.ctypes.data, size)
        there = [places.put(array) for array in inputs]
        sums, out = places.put(np.zeros_like(total)), places.put(np.zeros_like(result))
        _core.reduce_hop(code, op, 0, point(there[0]), point(sums), size, stream)
        _core.reduce_hop(code, op, point(sums), point(there[1]), point(sums), size, stream)
        _core.finish_hops(code, op, point(sums), 2, point(out), size, stream=stream)
        assert_same_numbers(places.fetch(out), result, dtype)
        _core.scale(code, inputs[0].ctypes.data, 1 / 3, result.ctypes.data, size)
        _core.scale(code, point(there[0]), 1 / 3, point(out), size, stream=stream)
        assert_same_numbers(places.fetch(out), result, dtype)
    values = random_array("float32", size, 0)
    there = places.put(values)
    _core.divide(point(there), size, 3.0, stream=stream)
    assert_same_numbers(places.fetch(there), values / np.float32(3), "divide")


def test_hops_scaling_and_division_have_the_cpus_bytes(device: str, pools: Pools) -> None:
    inside(pools, device, check_hops_scale_and_divide)


def check_packing() -> None:
    """Any lengths at any addresses, more pieces than one launch takes, one much longer than the others."""
    stream, point = places.stream(), places.pointer
    longest = 1 << 12 if places.is_emulated() else 1 << 24
    sizes = [*range(250), longest + 5, 0, 4096, 3, *(128,) * 250]
    for shift in (0, 1, 4, 8):
        rng = np.random.default_rng(shift)
        begins = np.cumsum([shift, *(size + shift for size in sizes)])
        values = rng.integers(1, 256, int(begins[-1]), np.uint8)
        pieces = [(int(begin), size) for begin, size in zip(begins[:-1], sizes, strict=True)]
        packed = np.full(sum(-(-size // 16) * 16 for size in sizes), 0xA5, np.uint8)
        base = values.ctypes.data
        _core.pack([(base + begin, size) for begin, size in pieces], packed.ctypes.data)

        there, buffer = places.put(values), places.put(np.full_like(packed, 0xA5))
        given = [(point(there) + begin, size) for begin, size in pieces]
        _core.pack(given, point(buffer), stream)
        assert np.array_equal(places.fetch(buffer), packed), shift

        expected = np.full_like(values, 0xA5)
        base = expected.ctypes.data
        _core.unpack([(base + begin, size) for begin, size in pieces], packed.ctypes.data)
        out = places.put(np.full_like(values, 0xA5))
        given = [(point(out) + begin, size) for begin, size in pieces]
        _core.unpack(given, point(buffer), stream)
        assert np.array_equal(places.fetch(out), expected), shift


def test_packing_has_the_cpus_bytes(device: str, pools: Pools) -> None:
    inside(pools, device, check_packing)


def check_packing_of_more_than_2_gib() -> None:
    import torch

    sizes = (5, 2**31 + 4099, 1000)
    pieces = [torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda") for size in sizes]
    given = [(piece.data_ptr(), piece.numel()) for piece in pieces]
    num_bytes = sum(-(-size // 16) * 16 for size in sizes)
    buffer = torch.full((num_bytes,), 0xA5, dtype=torch.uint8, device="cuda")
    _core.pack(given, buffer.data_ptr(), places.stream())
    begin = 0
    for piece in pieces:
        end = begin + piece.numel()
        assert torch.equal(buffer[begin:end], piece)
        begin = -(-end // 16) * 16
        assert not buffer[end:begin].any()
    copies = [piece.clone() for piece in pieces]
    for piece in pieces:
        piece.zero_()
    _core.unpack(given, buffer.data_ptr(), places.stream())
    assert all(map(torch.equal, copies, pieces))


def test_pieces_of_more_than_2_gib_are_packed(cuda: None, pools: Pools) -> None:
    inside(pools, "cuda", check_packing_of_more_than_2_gib)


def check_refusals() -> None:
    codec, values = ringcomm.codec("int8"), np.ones(64, np.float32)
    there = places.put(values)
    wire = places.put(np.zeros(68, np.uint8))
    with pytest.raises(UsageError, match=r"x is on cuda:0, out on cpu; all must be on one device"):
        codec.encode(there, out=np.zeros(68, np.uint8))
    with pytest.raises(UsageError, match="residual on cpu"):
        codec.encode(there, values.copy(), out=wire)
    with pytest.raises(UsageError, match="acc on cpu"):
        codec.decode_add(wire, values.copy())
    with pytest.raises(WireError, match="buf has 68 bytes"):
        codec.decode(wire, 96, out=places.put(np.zeros(96, np.float32)))
    with pytest.raises(UsageError, match="out has 68 bytes"):
        codec.encode(places.put(np.ones(96, np.float32)), out=wire)
    with pytest.raises(UsageError, match="codec id"):
        _core.decode(99, places.pointer(wire), 64, places.pointer(there), 0, stream=places.stream())
    if not places.is_emulated():
        host = np.zeros(64, np.float32)
        with pytest.raises(UsageError, match="is not in a GPU's memory"):
            _core.divide(host.ctypes.data, 64, 2.0, stream=0)
        assert codec.encode(there).device == there.device
        assert codec.decode(wire, 64, "bfloat16").device == there.device


def test_what_cannot_work_says_why(device: str, pools: Pools) -> None:
    inside(pools, device, check_refusals)
