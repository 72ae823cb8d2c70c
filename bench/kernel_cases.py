"""The kernels of codecs, reductions and packing, and whether each did what it should."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from bench.devices import ITEM_BYTES, Array, Device, rounded, widened
from ringcomm import _core

__all__ = ["CODECS", "WHOLE", "Entry", "Setting", "Wrong", "entries", "windows"]

CODECS = ("bf16", "fp16", "int8", "int4")
INPUTS = 4  # of a reduction
PIECES = 64  # of what is packed
DIVISOR = 3.0
BLOCK = 32
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}  # raw elements

# Of a larger array, random values repeat and not every byte is compared: NumPy would take longer than the device.
WHOLE = 16 << 20
PERIOD = (
    4 << 20
) - 3  # elements; odd, so that a value's neighbours are the same in no two blocks of the array
EDGE, WINDOW, NUM_WINDOWS = 1 << 20, 32 << 10, 128  # at either end, and between


# float32 of a window of elements, on the host.
Values = Callable[[slice], Any]


class Wrong(Exception):
    """A result is not what it should be."""


@dataclass
class Entry:
    """One way to do one thing.

    Attributes:
        who: "ringcomm", "copy" (the device's own) or a peer.
        moved: Bytes that must be read and written, each once.
        work: Queues it.
        check: Raises Wrong if what ``work`` left is wrong. Called after one call of ``work``.
    """

    op: str
    codec: str | None
    who: str
    moved: int
    work: Callable[[], None]
    check: Callable[[], None]
    samples: list[float] = field(default_factory=list)


def windows(count: int, whole: bool) -> list[slice]:
    """What is compared of ``count`` bytes or elements: all, or both ends and windows at even distances between."""
    if whole or count <= 2 * EDGE + NUM_WINDOWS * WINDOW:
        return [slice(0, count)]
    step = (count - 2 * EDGE) // NUM_WINDOWS // 64 * 64
    begins = [EDGE + k * step for k in range(NUM_WINDOWS)]
    return [
        slice(0, EDGE),
        *(slice(begin, begin + WINDOW) for begin in begins),
        slice(count - EDGE, count),
    ]


class Setting:
    """The arrays of one dtype and size, and their twins on the host."""

    def __init__(self, device: Device, dtype: str, num_bytes: int) -> None:
        self.device, self.dtype = device, dtype
        self.item = ITEM_BYTES[dtype]
        self.count = num_bytes // self.item // BLOCK * BLOCK
        self.code = _core.DTYPES[dtype]
        rng = np.random.default_rng(0)
        self.whole = num_bytes <= WHOLE

        def values(kind: str) -> np.ndarray[Any, Any]:
            size = self.count if self.whole else min(PERIOD, self.count)
            some = rounded(rng.standard_normal(size, dtype=np.float32), kind)
            return some if self.whole else np.resize(some, self.count)

        self.raw = [values(dtype) for _ in range(INPUTS)]
        self._kept: list[Array] = []  # kernels have their addresses only
        self.inputs = [self.put(raw, dtype) for raw in self.raw]
        self.out = self.empty(self.count, dtype)
        self.start = values("float32")
        self._host = np.empty(self.start.nbytes, np.uint8)
        self.wire_bytes = {c: _core.wire_bytes(_core.CODECS[c], self.count) for c in CODECS}
        self.wires = {c: self.empty(size, "uint8") for c, size in self.wire_bytes.items()}
        self.encoded = {c: self.encoded_on_the_cpu(c) for c in CODECS}

    def put(self, raw: np.ndarray[Any, Any], dtype: str) -> Array:
        """A copy on the device that lives as long as the setting."""
        self._kept.append(self.device.put(raw, dtype))
        return self._kept[-1]

    def empty(self, count: int, dtype: str) -> Array:
        self._kept.append(self.device.empty(count, dtype))
        return self._kept[-1]

    def blank(self, like: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Memory for what is expected, until the next call: that of the host takes long to get when it is new."""
        return self._host[: like.nbytes].view(like.dtype)

    def encoded_on_the_cpu(self, codec: str, residual: Array = None) -> Array:
        wire = np.empty(self.wire_bytes[codec], np.uint8)
        kept = 0 if residual is None else residual.ctypes.data
        raw = self.raw[0]
        _core.encode(
            _core.CODECS[codec], raw.ctypes.data, self.code, self.count, wire.ctypes.data, kept
        )
        return wire

    def cuts(self) -> list[int]:
        """Where the pieces of an array begin, in elements, and where the last one ends: whole blocks."""
        share = -(-self.count // PIECES // BLOCK) * BLOCK
        return [min(k * share, self.count) for k in range(PIECES + 1)]

    def expect(self, array: Array, expected: np.ndarray[Any, Any], what: str) -> None:
        """The same bytes."""
        wanted = expected.view(np.uint8)
        for window in windows(len(wanted), self.whole):
            found = self.device.fetch(array, window)
            if not np.array_equal(found, wanted[window]):
                wrong = np.flatnonzero(found != wanted[window])
                raise Wrong(
                    f"{what}: {len(wrong)} bytes differ from the CPU's, "
                    f"the first is {window.start + wrong[0]}"
                )

    def expect_close(self, found: Values, expected: Values, what: str, **tolerance: float) -> None:
        """float32 of a peer, which may round elsewhere; both for a window of elements."""
        for window in windows(self.count, self.whole):
            if not np.allclose(found(window), expected(window), **tolerance):
                raise Wrong(f"{what}: far from the expected values")

    def floats(self, array: Array, dtype: str) -> Values:
        """An array on the device, of elements of that dtype."""
        item = ITEM_BYTES[dtype]

        def at(window: slice) -> np.ndarray[Any, Any]:
            found = self.device.fetch(array, slice(window.start * item, window.stop * item))
            return widened(found.view(NUMPY[dtype]), dtype)

        return at

    def sum(self, window: slice) -> Any:
        return sum(widened(raw[window], self.dtype) for raw in self.raw)


def entries(setting: Setting) -> Iterator[Entry]:
    """ringcomm's kernels, and the copy that they are compared with."""
    yield _copy(setting)
    for codec in CODECS:
        yield _encode(setting, codec)
        yield _encode_residual(setting, codec)
        yield _decode(setting, codec)
        yield _decode_add(setting, codec)
    yield _reduce(setting)
    yield _reduce_hop(setting)
    yield _scale(setting)
    yield _pack(setting)
    yield _unpack(setting)
    if setting.dtype == "float32":
        yield _divide(setting)


def _copy(s: Setting) -> Entry:
    def work() -> None:
        s.device.copy(s.out, s.inputs[0])

    return Entry(
        *("copy", None, "copy", 2 * s.count * s.item),
        *(work, lambda: s.expect(s.out, s.raw[0], "copy")),
    )


def _encode(s: Setting, codec: str) -> Entry:
    point = s.device.pointer
    wire = s.wires[codec]
    arguments = (_core.CODECS[codec], point(s.inputs[0]), s.code, s.count, point(wire))

    def work() -> None:
        _core.encode(*arguments, stream=s.device.stream)

    return Entry(
        *("encode", codec, "ringcomm", s.count * s.item + s.wire_bytes[codec]),
        *(work, lambda: s.expect(wire, s.encoded[codec], f"encode {codec}")),
    )


def _encode_residual(s: Setting, codec: str) -> Entry:
    wire = s.empty(s.wire_bytes[codec], "uint8")
    point = s.device.pointer
    arguments = (_core.CODECS[codec], point(s.inputs[0]), s.code, s.count, point(wire))
    first = np.multiply(s.start, np.float32(0.01), out=s.blank(s.start))
    residual = s.put(first, "float32")

    def work() -> None:
        _core.encode(*arguments, point(residual), stream=s.device.stream)

    def check() -> None:
        expected = np.multiply(s.start, np.float32(0.01), out=s.blank(s.start))
        s.expect(wire, s.encoded_on_the_cpu(codec, expected), f"encode {codec} with residual")
        s.expect(residual, expected, f"residual of {codec}")

    moved = s.count * (s.item + 8) + s.wire_bytes[codec]
    return Entry("encode+residual", codec, "ringcomm", moved, work, check)


def _decode(s: Setting, codec: str) -> Entry:
    wire = s.put(s.encoded[codec], "uint8")
    point = s.device.pointer
    arguments = (_core.CODECS[codec], point(wire), s.count, point(s.out), s.code)

    def work() -> None:
        _core.decode(*arguments, stream=s.device.stream)

    def check() -> None:
        expected = s.blank(s.raw[0])
        given = s.encoded[codec].ctypes.data
        _core.decode(_core.CODECS[codec], given, s.count, expected.ctypes.data, s.code)
        s.expect(s.out, expected, f"decode {codec}")

    return Entry(
        *("decode", codec, "ringcomm", s.count * s.item + s.wire_bytes[codec]), *(work, check)
    )


def _decode_add(s: Setting, codec: str) -> Entry:
    wire = s.put(s.encoded[codec], "uint8")
    sums = s.put(s.start, "float32")
    point = s.device.pointer
    arguments = (_core.CODECS[codec], point(wire), s.count, point(sums))

    def work() -> None:
        _core.decode_add(*arguments, stream=s.device.stream)

    def check() -> None:
        expected = s.blank(s.start)
        expected[:] = s.start
        given = s.encoded[codec].ctypes.data
        _core.decode_add(_core.CODECS[codec], given, s.count, expected.ctypes.data)
        s.expect(sums, expected, f"decode_add {codec}")

    return Entry("decode_add", codec, "ringcomm", s.count * 8 + s.wire_bytes[codec], work, check)


def _reduce(s: Setting) -> Entry:
    pointers = [s.device.pointer(x) for x in s.inputs]
    arguments = (s.code, _core.REDUCE_OPS["sum"], pointers, s.count, s.device.pointer(s.out))

    def work() -> None:
        _core.reduce(*arguments, stream=s.device.stream)

    def check() -> None:
        expected = s.blank(s.raw[0])
        given = [raw.ctypes.data for raw in s.raw]
        _core.reduce(s.code, _core.REDUCE_OPS["sum"], given, s.count, expected.ctypes.data)
        s.expect(s.out, expected, "reduce")

    return Entry(
        *(f"reduce of {INPUTS}", None, "ringcomm", (INPUTS + 1) * s.count * s.item), *(work, check)
    )


def _reduce_hop(s: Setting) -> Entry:
    op = _core.REDUCE_OPS["sum"]
    point = s.device.pointer
    wide = s.put(s.start, "float32")
    after = s.empty(s.count, "float32")
    arguments = (s.code, op, point(wide), point(s.inputs[0]), point(after), s.count)

    def work() -> None:
        _core.reduce_hop(*arguments, stream=s.device.stream)

    def check() -> None:
        expected = s.blank(s.start)
        given = (s.start.ctypes.data, s.raw[0].ctypes.data)
        _core.reduce_hop(s.code, op, *given, expected.ctypes.data, s.count)
        s.expect(after, expected, "reduce_hop")

    return Entry("reduce_hop", None, "ringcomm", s.count * (8 + s.item), work, check)


def _scale(s: Setting) -> Entry:
    point = s.device.pointer
    arguments = (s.code, point(s.inputs[0]), 1 / 3, point(s.out), s.count)

    def work() -> None:
        _core.scale(*arguments, stream=s.device.stream)

    def check() -> None:
        expected = s.blank(s.raw[0])
        _core.scale(s.code, s.raw[0].ctypes.data, 1 / 3, expected.ctypes.data, s.count)
        s.expect(s.out, expected, "scale")

    return Entry("scale", None, "ringcomm", 2 * s.count * s.item, work, check)


def _pieces(s: Setting, array: Array) -> list[tuple[int, int]]:
    base = s.device.pointer(array)
    return [(base + i * s.item, (j - i) * s.item) for i, j in pairwise(s.cuts())]


def _pack(s: Setting) -> Entry:
    pieces, out = _pieces(s, s.inputs[0]), s.device.pointer(s.out)

    def work() -> None:
        _core.pack(pieces, out, stream=s.device.stream)

    return Entry(
        *(f"pack of {PIECES}", None, "ringcomm", 2 * s.count * s.item),
        *(work, lambda: s.expect(s.out, s.raw[0], "pack")),
    )


def _unpack(s: Setting) -> Entry:
    pieces, given = _pieces(s, s.out), s.device.pointer(s.inputs[1])

    def work() -> None:
        _core.unpack(pieces, given, stream=s.device.stream)

    return Entry(
        *(f"unpack of {PIECES}", None, "ringcomm", 2 * s.count * s.item),
        *(work, lambda: s.expect(s.out, s.raw[1], "unpack")),
    )


def _divide(s: Setting) -> Entry:
    values = s.put(s.start, "float32")
    arguments = (s.device.pointer(values), s.count, DIVISOR)

    def work() -> None:
        _core.divide(*arguments, stream=s.device.stream)

    def check() -> None:
        expected = np.divide(s.start, np.float32(DIVISOR), out=s.blank(s.start))
        s.expect(values, expected, "divide")

    return Entry("divide", None, "ringcomm", 8 * s.count, work, check)
