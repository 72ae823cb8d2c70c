"""The kernels' codec functions on NumPy arrays, and inputs to try them on."""

import numpy as np

from ringcomm import _core, reference
from tests.dtypes import NUMPY

CODECS = ("bf16", "fp16", "int8", "int4")
DTYPE_OF = {name: NUMPY[name] for name in ("float32", "float16", "bfloat16") if name in NUMPY}
GUARD = 0xA5


def dtype_id(array):
    return _core.DTYPES[array.dtype.name]


def encode(codec, values, residual=None, draw=None):
    """Encodes into a buffer with guard bytes behind it, which must survive."""
    num_bytes = _core.wire_bytes(_core.CODECS[codec], len(values))
    wire = np.full(num_bytes + 64, GUARD, np.uint8)
    source = draw or reference.Draw()
    _core.encode(
        _core.CODECS[codec],
        values.ctypes.data,
        dtype_id(values),
        len(values),
        wire.ctypes.data,
        residual_ptr=0 if residual is None else residual.ctypes.data,
        stochastic=draw is not None,
        seed=source.seed,
        step=source.step,
        rank=source.rank,
        first_elem=source.first_elem,
    )
    assert (wire[num_bytes:] == GUARD).all()
    return wire[:num_bytes]


def decode(codec, wire, num_elems, dtype=np.float32):
    output = np.empty(num_elems + 16, dtype)
    output.view(np.uint8)[:] = GUARD
    guard = output[num_elems:].copy()
    _core.decode(
        _core.CODECS[codec], wire.ctypes.data, num_elems, output.ctypes.data, dtype_id(output)
    )
    assert output[num_elems:].tobytes() == guard.tobytes()
    return output[:num_elems]


def decode_add(codec, wire, accumulator, first=False):
    _core.decode_add(
        _core.CODECS[codec],
        wire.ctypes.data,
        len(accumulator),
        accumulator.ctypes.data,
        first=first,
    )


def awkward_values(num_elems, dtype, seed=0):
    """Blocks of ordinary, tiny, subnormal, huge, zero and non-finite values."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(num_elems).astype(np.float32)
    block = np.arange(num_elems) // 32 % 16
    with np.errstate(all="ignore"):
        for which, factor in (
            (1, 1e-20),
            (2, 2e-38),
            (3, 1e-41),
            (4, 1e38),
            (5, 0.0),
            (6, 1e-5),
            (7, 3e4),
        ):
            values[block == which] *= np.float32(factor)
        rounded = reference.narrow(values, dtype)
    wide = reference.widen(rounded)
    wide[(block == 4) & (rng.random(num_elems) < 0.5)] = reference.widen(rounded)[:1].max(initial=1)
    result = reference.narrow(wide, dtype)
    patterns = {
        "float32": (0x7F800000, 0xFF800000, 0x7FC01234, 0x7F7FFFFF, 0xFF7FFFFF),
        "float16": (0x7C00, 0xFC00, 0x7E12, 0x7BFF, 0x8001),
        "bfloat16": (0x7F80, 0xFF80, 0x7FC3, 0x7F7F, 0x8001),
    }[result.dtype.name]
    bits = result.view(f"u{result.itemsize}")
    for which, pattern in zip((8, 9, 10, 11, 12), patterns, strict=True):
        bits[(block == which) & (rng.random(num_elems) < 0.1)] = pattern
    if num_elems > 9:
        bits[num_elems // 2] = patterns[seed % 5]
    return result
