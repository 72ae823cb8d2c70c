"""What else could do the same on a GPU as the kernels of bench/kernel_cases.py: torch's operations, Triton's kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from bench.devices import widened
from bench.kernel_cases import BLOCK, INPUTS, PIECES, Entry, Setting, Wrong, windows
from ringcomm import _core

__all__ = ["peers"]

ROUNDED = {"rtol": 2e-2, "atol": 2e-2}  # of what a peer rounds to 16 bits, perhaps more than once


def peers(setting: Setting, note: Callable[[str], None]) -> Iterator[Entry]:
    """torch's eager operations, and Triton kernels where Triton can be had; ``note`` is told what is missing."""
    if setting.device.name != "cuda":
        return
    yield from _torch(setting)
    try:
        from bench import triton_kernels
    except ImportError as error:
        note(f"no rows of Triton: {error}")
        return
    yield from _triton(setting, triton_kernels)


def _torch(s: Setting) -> Iterator[Entry]:
    import torch

    x, count = s.inputs[0], s.count
    decoded = np.empty(count, np.float32)
    int8 = s.encoded["int8"]
    _core.decode(_core.CODECS["int8"], int8.ctypes.data, count, decoded.ctypes.data, 0)
    kept: dict[str, Any] = {}

    def encode() -> None:
        blocks = x.view(-1, BLOCK).float()
        scale = (blocks.abs().amax(1, keepdim=True) * (1 / 127)).bfloat16()
        codes = (blocks / scale.float()).round_().clamp_(-127, 127).to(torch.int8)
        kept["codes"], kept["scale"] = codes, scale

    def check_encode() -> None:
        again = s.floats(kept["codes"].float() * kept["scale"].float(), "float32")
        s.expect_close(again, lambda window: decoded[window], "torch's int8 encode", atol=0.1)

    yield Entry(
        *("encode", "int8", "torch", count * s.item + s.wire_bytes["int8"]), *(encode, check_encode)
    )

    codes = torch.from_numpy(int8[:count].view(np.int8).copy()).cuda().view(-1, BLOCK)
    scales = s.put(int8[count:].view(np.uint16).copy(), "bfloat16").view(-1, 1)
    sums = s.put(s.start, "float32")

    def decode_add() -> None:
        sums.view(-1, BLOCK).add_(codes.float() * scales.float())

    def check_decode_add() -> None:
        def expected(window: slice) -> Any:
            return s.start[window] + decoded[window]

        s.expect_close(s.floats(sums, "float32"), expected, "torch's int8 decode_add", atol=1e-5)

    moved = count * 8 + s.wire_bytes["int8"]
    yield Entry("decode_add", "int8", "torch", moved, decode_add, check_decode_add)

    half = torch.empty(count, dtype=torch.bfloat16, device="cuda")
    yield Entry(
        *("encode", "bf16", "torch", count * (s.item + 2)),
        *(lambda: half.copy_(x) and None, lambda: None),
    )
    out = torch.empty_like(x)

    def reduce() -> None:
        torch.add(s.inputs[0], s.inputs[1], out=out)
        for one in s.inputs[2:]:
            out.add_(one)

    yield Entry(
        *(f"reduce of {INPUTS}", None, "torch", (INPUTS + 1) * count * s.item),
        *(reduce, lambda: s.expect_close(s.floats(out, s.dtype), s.sum, "torch's sum", **ROUNDED)),
    )
    sizes = [end - begin for begin, end in pairwise(s.cuts())]
    whole, split = torch.empty_like(x), x.split(sizes)
    yield Entry(
        *(f"pack of {PIECES}", None, "torch", 2 * count * s.item),
        lambda: torch.cat(split, out=whole),
        lambda: s.expect(whole, s.raw[0], "torch's cat"),
    )
    parts = torch.empty_like(x)
    to, given_parts = parts.split(sizes), s.inputs[1].split(sizes)
    yield Entry(
        *(f"unpack of {PIECES}", None, "torch", 2 * count * s.item),
        lambda: torch._foreach_copy_(to, given_parts),
        lambda: s.expect(parts, s.raw[1], "torch's copies"),
    )
    product = torch.empty_like(x)

    def third(window: slice) -> Any:
        return widened(s.raw[0][window], s.dtype) / 3

    yield Entry(
        *("scale", None, "torch", 2 * count * s.item),
        *(lambda: torch.mul(x, 1 / 3, out=product) and None,),
        lambda: s.expect_close(s.floats(product, s.dtype), third, "torch's product", **ROUNDED),
    )


def _triton(s: Setting, kernels: Any) -> Iterator[Entry]:
    x, count = s.inputs[0], s.count
    wire = s.empty(s.wire_bytes["int8"], "uint8")

    def check_encode() -> None:
        for window in windows(s.wire_bytes["int8"], s.whole):
            found, wanted = s.device.fetch(wire, window), s.encoded["int8"][window]
            codes = max(0, count - window.start)  # in this window; then scales
            off = found[:codes].view(np.int8).astype(np.int16) - wanted[:codes].view(np.int8)
            if np.abs(off).max(initial=0) > 1 or not np.array_equal(found[codes:], wanted[codes:]):
                raise Wrong("Triton's int8 encode: not ringcomm's codes and scales")

    moved = count * s.item + s.wire_bytes["int8"]
    yield Entry(
        *("encode", "int8", "triton", moved),
        *(lambda: kernels.encode_int8(x, wire), check_encode),
    )
    given = s.put(s.encoded["int8"], "uint8")
    sums = s.put(s.start, "float32")
    decoded = np.empty(count, np.float32)
    source = s.encoded["int8"].ctypes.data
    _core.decode(_core.CODECS["int8"], source, count, decoded.ctypes.data, 0)

    def check_decode_add() -> None:
        def expected(window: slice) -> Any:
            return s.start[window] + decoded[window]

        s.expect_close(s.floats(sums, "float32"), expected, "Triton's int8 decode_add", atol=1e-5)

    yield Entry(
        *("decode_add", "int8", "triton", count * 8 + s.wire_bytes["int8"]),
        *(lambda: kernels.decode_add_int8(given, sums), check_decode_add),
    )
    out = s.empty(count, s.dtype)
    yield Entry(
        *(f"reduce of {INPUTS}", None, "triton", (INPUTS + 1) * count * s.item),
        lambda: kernels.reduce_four(s.inputs, out),
        lambda: s.expect_close(s.floats(out, s.dtype), s.sum, "Triton's sum", **ROUNDED),
    )
