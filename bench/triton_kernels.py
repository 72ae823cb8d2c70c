"""What a user would write in Triton instead: int8 encode and decode_add in ringcomm's wire format, and a reduction.

Values are finite, counts are multiples of 32. Each passes over memory once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["decode_add_int8", "encode_int8", "reduce_four"]

BLOCK = 32  # values with one scale
BLOCKS = 64  # of a program
RUN = 2048  # elements of a program of the reduction


@triton.jit
def _encode_int8(x, codes, scales, num_blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    place = block[:, None].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = block < num_blocks
    values = tl.load(x + place, mask=inside[:, None], other=0.0).to(tl.float32)
    scale = (tl.max(tl.abs(values), axis=1) * (1.0 / 127.0)).to(tl.bfloat16)
    wide = scale.to(tl.float32)
    normal = wide >= 1.1754943508222875e-38
    inverse = tl.where(normal, 1.0 / tl.where(normal, wide, 1.0), 0.0)
    target = values * inverse[:, None]
    nearest = (target + 12582912.0) - 12582912.0  # rounds to even below 2^22
    code = tl.minimum(tl.maximum(nearest, -127.0), 127.0).to(tl.int8)
    tl.store(codes + place, code, mask=inside[:, None])
    tl.store(scales + block, tl.where(normal, wide, 0.0).to(tl.bfloat16), mask=inside)


@triton.jit
def _decode_add_int8(codes, scales, sums, num_blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    place = block[:, None].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = block < num_blocks
    scale = tl.load(scales + block, mask=inside, other=0.0).to(tl.float32)
    code = tl.load(codes + place, mask=inside[:, None], other=0).to(tl.float32)
    total = tl.load(sums + place, mask=inside[:, None], other=0.0)
    tl.store(sums + place, total + code * scale[:, None], mask=inside[:, None])


@triton.jit
def _reduce_four(a, b, c, d, out, count, RUN: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * RUN + tl.arange(0, RUN)
    inside = place < count
    total = tl.load(a + place, mask=inside).to(tl.float32)
    total += tl.load(b + place, mask=inside).to(tl.float32)
    total += tl.load(c + place, mask=inside).to(tl.float32)
    total += tl.load(d + place, mask=inside).to(tl.float32)
    tl.store(out + place, total, mask=inside)


def _parts(wire: Any, count: int) -> tuple[Any, Any]:
    end = count + count // BLOCK * 2
    return wire[:count].view(torch.int8), wire[count:end].view(torch.bfloat16)


def encode_int8(x: Any, wire: Any) -> None:
    """Writes the codes and scales of ``x`` (float32 or 16 bits) to ``wire`` (uint8)."""
    num_blocks = x.numel() // BLOCK
    codes, scales = _parts(wire, x.numel())
    _encode_int8[(triton.cdiv(num_blocks, BLOCKS),)](x, codes, scales, num_blocks, BLOCK, BLOCKS)


def decode_add_int8(wire: Any, sums: Any) -> None:
    """Adds what ``wire`` holds to ``sums`` (float32)."""
    num_blocks = sums.numel() // BLOCK
    codes, scales = _parts(wire, sums.numel())
    _decode_add_int8[(triton.cdiv(num_blocks, BLOCKS),)](
        codes, scales, sums, num_blocks, BLOCK, BLOCKS
    )


def reduce_four(inputs: list[Any], out: Any) -> None:
    """``out`` = the sum of four arrays, in float32, rounded once."""
    _reduce_four[(triton.cdiv(out.numel(), RUN),)](*inputs, out, out.numel(), RUN)
