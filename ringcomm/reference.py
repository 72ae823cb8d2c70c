"""What every codec and collective must compute, in NumPy, written for reading rather than speed.

The C++ and CUDA kernels are tested against this file to the byte. It needs neither of them.

bfloat16 and float8 arrays are those of the package ``ml_dtypes``, since NumPy has no such types; they
are recognised by the dtype's name, so nothing else needs the package. "Rank order" is
``((x[0] op x[1]) op x[2]) ...``. The byte layout of the codecs is described in
``csrc/wire/codec_format.h``.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "BLOCK_ELEMS",
    "Draw",
    "all_gather",
    "all_reduce",
    "all_reduce_ring",
    "all_to_all",
    "bfloat16_to_float32",
    "broadcast",
    "decode",
    "encode",
    "float32_to_bfloat16",
    "float32_to_float16",
    "gather",
    "narrow",
    "ops_of",
    "reduce",
    "reduce_scatter",
    "reduce_to_root",
    "ring_chunks",
    "scale",
    "scatter",
    "uniform",
    "widen",
    "wire_bytes",
]

Array: TypeAlias = npt.NDArray[Any]
Float32: TypeAlias = npt.NDArray[np.float32]
Bytes: TypeAlias = npt.NDArray[np.uint8]

BLOCK_ELEMS = 32
RING_GRANULE = 64  # bytes; chunks of a ring are a multiple of it (csrc/base/partition.h)
LARGEST_CODE = {"int8": 127, "int4": 7}
BLOCK_BYTES = {"int8": 32, "int4": 16}
NAN_SCALE = 0x7FC0
SMALLEST_NORMAL_SCALE = 0x0080
MASK32 = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF


# --- Number formats -------------------------------------------------------------------------------


def is_bfloat16(dtype: npt.DTypeLike) -> bool:
    """Whether it is the bfloat16 of ml_dtypes."""
    return str(np.dtype(dtype)) == "bfloat16"


def bfloat16_to_float32(bits: npt.NDArray[np.uint16]) -> Float32:
    """Widens bfloat16 bit patterns; exact."""
    widened: Float32 = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return widened


def float32_to_bfloat16(values: Array) -> npt.NDArray[np.uint16]:
    """bfloat16 bit patterns, rounded to nearest even. Every NaN becomes 0x7FC0."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def float32_to_float16(values: Array) -> npt.NDArray[np.float16]:
    """float16, rounded to nearest even. A NaN keeps its sign and upper payload bits and becomes quiet."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    quiet_nan = ((bits >> 16) & 0x8000) | 0x7E00 | ((bits >> 13) & 0x03FF)
    with np.errstate(all="ignore"):
        rounded = values.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16).view(np.float16)


def widen(values: Array) -> Float32:
    """float32 from float32, float16 or bfloat16; exact."""
    if is_bfloat16(values.dtype):
        return bfloat16_to_float32(values.view(np.uint16))
    return values.astype(np.float32)


def narrow(values: Float32, dtype: npt.DTypeLike) -> Array:
    """Rounds float32 to float32, float16 or bfloat16, to nearest even."""
    if is_bfloat16(dtype):
        return float32_to_bfloat16(values).view(dtype)
    return float32_to_float16(values) if dtype == np.float16 else values.astype(dtype)


# --- Codecs ---------------------------------------------------------------------------------------


class Draw(NamedTuple):
    """Where the random numbers of stochastic rounding come from."""

    seed: int = 0
    step: int = 0
    rank: int = 0
    first_elem: int = 0


def mix64(value: int) -> int:
    """The finaliser of SplitMix64."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


def uniform(draw: Draw, num_elems: int) -> Float32:
    """The numbers in [0, 1), 24 bits each, that belong to elements first_elem, first_elem + 1, ..."""
    index = np.arange(num_elems, dtype=np.uint64) + np.uint64(draw.first_elem)
    result = np.empty(num_elems, np.float32)
    for high in np.unique(index >> np.uint64(32)):
        key = mix64((draw.seed + 0x9E3779B97F4A7C15) & MASK64)
        key = mix64(key ^ ((draw.step + 0x9E3779B97F4A7C15) & MASK64))
        key = mix64(key ^ (int(high) << 32) ^ draw.rank)
        here = (index >> np.uint64(32)) == high
        bits = (index[here] & np.uint64(MASK32)).astype(np.uint32) ^ np.uint32(key & MASK32)
        bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x7FEB352D)
        bits = bits + np.uint32(key >> 32)
        bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(0x846CA68B)
        bits = bits ^ (bits >> np.uint32(16))
        result[here] = (bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
    return result


def wire_bytes(codec: str, num_elems: int) -> int:
    """Bytes that ``num_elems`` values take on the wire."""
    if codec in LARGEST_CODE:
        return -(-num_elems // BLOCK_ELEMS) * (BLOCK_BYTES[codec] + 2)
    return num_elems * 2


def encode(
    codec: str, values: Array, residual: Float32 | None = None, draw: Draw | None = None
) -> Bytes:
    """Encodes a flat array.

    Args:
        codec: "bf16", "fp16", "int8" or "int4".
        values: float32, float16 or bfloat16, shape (n,).
        residual: float32 of shape (n,) or None. It is added before encoding; afterwards it holds what
            the encoding lost. Where NaN or infinity comes out it is left as it was.
        draw: rounds stochastically (int8 and int4 only); None rounds to nearest even.

    Returns:
        uint8 array of ``wire_bytes(codec, n)`` bytes.
    """
    with np.errstate(all="ignore"):
        wanted = widen(values) if residual is None else widen(values) + residual
        wire = (
            encode_blocks(codec, wanted, draw)
            if codec in LARGEST_CODE
            else encode_cast(codec, wanted)
        )
        if residual is not None:
            got = decode(codec, wire, len(wanted))
            residual[:] = np.where(np.isfinite(got), wanted - got, residual)
    return wire


def encode_cast(codec: str, values: Float32) -> Bytes:
    bits = float32_to_bfloat16(values) if codec == "bf16" else float32_to_float16(values)
    return bits.view(np.uint8)


def encode_blocks(codec: str, values: Float32, draw: Draw | None) -> Bytes:
    largest_code = np.float32(LARGEST_CODE[codec])
    num_blocks = -(-len(values) // BLOCK_ELEMS)
    blocks = np.zeros((num_blocks, BLOCK_ELEMS), np.float32)
    blocks.reshape(-1)[: len(values)] = values

    # One scale per block; 0 if it would be below the smallest normal number, NaN if a value is not finite.
    absmax = np.abs(blocks).max(axis=1, initial=0)  # a NaN comes out as NaN
    scale_bits = float32_to_bfloat16(absmax * (np.float32(1) / largest_code))
    scale_bits[scale_bits < SMALLEST_NORMAL_SCALE] = 0
    finite = np.isfinite(absmax)
    scale_bits[~finite] = NAN_SCALE

    scale = bfloat16_to_float32(scale_bits)[:, None]
    target = blocks * np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    if draw is None:
        codes = np.rint(target)
    else:
        codes = np.floor(target + uniform(draw, num_blocks * BLOCK_ELEMS).reshape(blocks.shape))
    codes = np.where(finite[:, None], np.clip(codes, -largest_code, largest_code), 0).astype(
        np.int8
    )

    code_bytes = codes.view(np.uint8)
    if codec == "int4":
        code_bytes = (code_bytes[:, :16] & np.uint8(15)) | (code_bytes[:, 16:] << np.uint8(4))
    return np.concatenate([code_bytes.reshape(-1), scale_bits.view(np.uint8)])


def decode(codec: str, wire: Bytes, num_elems: int, dtype: npt.DTypeLike = np.float32) -> Array:
    """The ``num_elems`` values of an encoded array, rounded to ``dtype``."""
    if codec in LARGEST_CODE:
        values = decode_blocks(codec, wire, num_elems)
    elif codec == "bf16":
        values = bfloat16_to_float32(wire.view(np.uint16))
    else:
        values = widen(wire.view(np.float16))
    return narrow(values, dtype)


def decode_blocks(codec: str, wire: Bytes, num_elems: int) -> Float32:
    num_blocks = -(-num_elems // BLOCK_ELEMS)
    scales_offset = num_blocks * BLOCK_BYTES[codec]
    codes = wire[:scales_offset].reshape(num_blocks, BLOCK_BYTES[codec])
    if codec == "int4":
        nibbles = np.concatenate([codes & np.uint8(15), codes >> np.uint8(4)], axis=1).astype(
            np.int8
        )
        signed = np.where(nibbles >= 8, nibbles - np.int8(16), nibbles)
    else:
        signed = codes.view(np.int8)
    scale = bfloat16_to_float32(wire[scales_offset:].copy().view(np.uint16))[:, None]
    return (signed.astype(np.float32) * scale).reshape(-1)[:num_elems]


# --- Reductions -----------------------------------------------------------------------------------


def multiply(a: Array, b: Array) -> Array:
    """The product; of complex numbers (a0 b0 - a1 b1) + (a0 b1 + a1 b0) i, each operation rounded."""
    if a.dtype.kind != "c":
        return np.multiply(a, b)
    product = np.empty_like(a)
    product.real = a.real * b.real - a.imag * b.imag
    product.imag = a.real * b.imag + a.imag * b.real
    return product


# Of bool, + is `or` and * is `and`, as in NumPy.
OPS: dict[str, Callable[[Array, Array], Array]] = {
    "sum": lambda a, b: a + b,
    "avg": lambda a, b: a + b,
    "min": lambda a, b: np.where((a < b) | np.isnan(a), a, b),
    "max": lambda a, b: np.where((a > b) | np.isnan(a), a, b),
    "product": multiply,
    "band": lambda a, b: a & b,
    "bor": lambda a, b: a | b,
    "bxor": lambda a, b: a ^ b,
}
FLOATING_OPS = ("sum", "avg", "min", "max", "product")
OPS_OF_KIND: dict[str, tuple[str, ...]] = {
    "f": FLOATING_OPS,
    "i": (*FLOATING_OPS, "band", "bor", "bxor"),
    "u": (*FLOATING_OPS, "band", "bor", "bxor"),
    "b": ("sum", "min", "max", "product", "band", "bor", "bxor"),
    "c": ("sum", "avg", "product"),
}


def ops_of(dtype: npt.DTypeLike) -> tuple[str, ...]:
    """The operators that reduce a dtype, none for float8.

    Floating-point and complex dtypes have ``premul_sum`` as well: the sum of what :func:`scale` returns.
    """
    if str(np.dtype(dtype)).startswith("float8"):
        return ()
    return OPS_OF_KIND["f" if is_bfloat16(dtype) else np.dtype(dtype).kind]


def to_accumulator(values: Array) -> Array:
    """float16 and bfloat16 accumulate in float32, everything else in its own type."""
    return widen(values) if is_16_bit_float(values.dtype) else values


def is_16_bit_float(dtype: npt.DTypeLike) -> bool:
    return dtype == np.float16 or is_bfloat16(dtype)


def parts_of(values: Array) -> Array:
    """The real and imaginary parts of complex numbers in turn, everything else as it is."""
    return values.view(values.real.dtype) if values.dtype.kind == "c" else values


def divide(total: Array, divisor: int) -> Array:
    """``total / divisor``; integers truncate towards zero, complex numbers are divided part by part."""
    parts = parts_of(total)
    quotient: Array
    if parts.dtype.kind == "f":
        quotient = parts / parts.dtype.type(divisor)
    else:
        wide = parts.astype(np.int64 if parts.dtype.kind == "i" else np.uint64)
        floor = wide // wide.dtype.type(divisor)
        quotient = (floor + ((wide < 0) & (floor * divisor != wide))).astype(parts.dtype)
    return quotient.view(total.dtype)


def scale(values: Array, factor: float) -> Array:
    """``values * factor`` in their own dtype, 16-bit floats by way of float32: what ``premul_sum`` adds up."""
    with np.errstate(all="ignore"):
        parts = parts_of(to_accumulator(values))
        scaled: Array = parts * parts.dtype.type(factor)
        if is_16_bit_float(values.dtype):
            return narrow(scaled, values.dtype)
        return scaled.view(values.dtype)


def reduce(inputs: Sequence[Array], op: str = "sum") -> Array:
    """Element-wise ``op``, one of :func:`ops_of`, over equally long arrays, in rank order."""
    dtype = inputs[0].dtype
    with np.errstate(all="ignore"):
        total = to_accumulator(inputs[0])
        for values in inputs[1:]:
            total = OPS[op](total, to_accumulator(values))
        if op == "avg":
            total = divide(total, len(inputs))
        return narrow(total, dtype) if is_16_bit_float(dtype) else total


# --- Collectives: a list of what each rank passes in, and what every rank gets -----------------------


def sum_decoded(
    inputs: Sequence[Array],
    op: str,
    codec: str,
    residuals: Sequence[Float32] | None,
    draw: Draw | None,
) -> Float32:
    """The float32 sum, in rank order, of what each rank's encoded array decodes to."""
    if op not in ("sum", "avg"):
        raise ValueError(f"a codec needs op 'sum' or 'avg', not {op!r}")
    num_elems = len(inputs[0])
    total = np.zeros(num_elems, np.float32)
    with np.errstate(all="ignore"):
        for rank, values in enumerate(inputs):
            residual = None if residuals is None else residuals[rank]
            rank_draw = None if draw is None else draw._replace(rank=rank)
            decoded = decode(codec, encode(codec, values, residual, rank_draw), num_elems)
            total = decoded if rank == 0 else total + decoded
        return total / np.float32(len(inputs)) if op == "avg" else total


def all_reduce(
    inputs: Sequence[Array],
    op: str = "sum",
    codec_up: str | None = None,
    codec_down: str | None = None,
    residuals: Sequence[Float32] | None = None,
    owner_residual: Float32 | None = None,
    draw: Draw | None = None,
) -> Array:
    """What every rank holds afterwards.

    Without codecs: the reduction in rank order. With them: every rank encodes its whole array
    (``codec_up``), the decoded arrays are summed in float32 in rank order and divided for avg, the
    result is encoded once more (``codec_down``) and decoded. Nothing depends on who owns which part.

    Args:
        inputs: one flat array per rank.
        op: with a codec "sum" or "avg".
        codec_up: how contributions travel, None: exact.
        codec_down: how the result travels, None: exact.
        residuals: one float32 array per rank, updated in place; or None for no error feedback.
        owner_residual: residual of the second encoding, float32 of the same length, updated in place.
        draw: stochastic rounding; the rank of a contribution is its own, that of the result the
            number of ranks.
    """
    if codec_up is None and codec_down is None:
        return reduce(inputs, op)
    num_elems = len(inputs[0])
    total = (
        widen(reduce(inputs, op))
        if codec_up is None
        else sum_decoded(inputs, op, codec_up, residuals, draw)
    )
    if codec_down is None:
        return narrow(total, inputs[0].dtype)
    owner_draw = None if draw is None else draw._replace(rank=len(inputs))
    return decode(
        codec_down,
        encode(codec_down, total, owner_residual, owner_draw),
        num_elems,
        inputs[0].dtype,
    )


def ring_chunks(num_elems: int, world_size: int, itemsize: int) -> list[tuple[slice, list[int]]]:
    """In which order a ring combines the elements, on CPUs and GPUs alike.

    Returns:
        For every rank the chunk that it owns, which may be short or empty, and the ranks in the order in
        which their elements are combined there. Together the chunks cover the array once.
    """
    granule = RING_GRANULE // itemsize
    chunk = -(-num_elems // (world_size * granule)) * granule
    return [
        (
            slice(min(owner * chunk, num_elems), min((owner + 1) * chunk, num_elems)),
            [(owner + 1 + step) % world_size for step in range(world_size)],
        )
        for owner in range(world_size)
    ]


def all_reduce_ring(inputs: Sequence[Array], op: str) -> Array:
    """What every rank gets from an all-reduce with ``algo="ring"``.

    Args:
        inputs: one flat array per rank.
        op: as in :func:`reduce`.
    """
    result = np.empty_like(inputs[0])
    for chunk, order in ring_chunks(result.size, len(inputs), result.itemsize):
        result[chunk] = reduce([inputs[rank][chunk] for rank in order], op)
    return result


def broadcast(inputs: Sequence[Array], root: int) -> Array:
    """What every rank holds afterwards: the array of ``root``."""
    received: Array = inputs[root].copy()
    return received


def all_gather(inputs: Sequence[Array]) -> Array:
    """What every rank holds afterwards: all arrays, one behind the other in rank order."""
    return np.concatenate(list(inputs))


def reduce_scatter(inputs: Sequence[Array], op: str = "sum") -> list[Array]:
    """What each rank holds afterwards: its share of the reduction, cut into equal parts in rank order."""
    return np.split(reduce(inputs, op), len(inputs))


def reduce_to_root(inputs: Sequence[Array], op: str, root: int) -> list[Array]:
    """What each rank holds afterwards: the root the reduction in rank order, the others what they had."""
    return [
        reduce(inputs, op) if rank == root else values.copy() for rank, values in enumerate(inputs)
    ]


def gather(inputs: Sequence[Array]) -> list[Array]:
    """What the root holds afterwards: every rank's array, in rank order. They may differ in length."""
    return [values.copy() for values in inputs]


def scatter(parts: Sequence[Array]) -> list[Array]:
    """What each rank holds afterwards, ``parts`` being what the root has for each."""
    return [values.copy() for values in parts]


def all_to_all(parts: Sequence[Sequence[Array]]) -> list[list[Array]]:
    """What each rank holds afterwards.

    Args:
        parts: ``parts[s][r]`` goes from rank ``s`` to rank ``r``; of any length.

    Returns:
        ``received[r][s]``: the same, by receiver.
    """
    ranks = range(len(parts))
    return [[parts[sender][receiver].copy() for sender in ranks] for receiver in ranks]
