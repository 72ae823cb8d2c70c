"""Arrays of other libraries, through DLPack.

The protocol: https://dmlc.github.io/dlpack/latest/python_spec.html
"""

from typing import Any

import numpy as np

from ringcomm import _core
from ringcomm.arrays.array_view import (
    CPU,
    HOW_TO_WRITE,
    IMMUTABLE_LIBRARIES,
    ITEM_SIZES,
    ML_DTYPES,
    SUPPORTED,
    ArrayView,
    check_cuda,
    overlaps,
)
from ringcomm.arrays.numpy_arrays import numpy_dtype
from ringcomm.errors import UsageError

__all__ = ["DLPACK_DTYPES", "as_numpy", "view_dlpack"]

# DLPack device types whose memory the CPU may read (CPU, and page-locked host memory), and CUDA's.
_HOST_DEVICES = (1, 3)
_CUDA_DEVICES = (2, 13)
# Which has no stream of ours to offer: CUDA's legacy default stream, with which others are in order.
_DEFAULT_STREAM = 1
DLPACK_DTYPES: dict[tuple[int, int], str] = {
    (2, 32): "float32",
    (2, 64): "float64",
    (2, 16): "float16",
    (4, 16): "bfloat16",
    (0, 8): "int8",
    (0, 16): "int16",
    (0, 32): "int32",
    (0, 64): "int64",
    (1, 8): "uint8",
    (1, 16): "uint16",
    (1, 32): "uint32",
    (1, 64): "uint64",
    (5, 64): "complex64",
    (5, 128): "complex128",
    (6, 8): "bool",
    (10, 8): "float8_e4m3fn",
    (11, 8): "float8_e4m3fnuz",
    (12, 8): "float8_e5m2",
    (13, 8): "float8_e5m2fnuz",
    (14, 8): "float8_e8m0fnu",
}
_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}


class _Owner:
    """Keeps the exporting array and its capsule alive."""

    __slots__ = ("array", "capsule", "strides")

    def __init__(self, array: Any, capsule: Any, strides: tuple[int, ...]) -> None:
        self.array = array
        self.capsule = capsule
        self.strides = strides  # in elements


def view_dlpack(x: Any, writable: bool, role: str) -> ArrayView:
    library = type(x).__module__.partition(".")[0]
    name = f"{type(x).__module__}.{type(x).__name__}"
    if writable and library in IMMUTABLE_LIBRARIES:
        raise UsageError(
            f"{role}: arrays of {library} are immutable, so the result cannot be written in place; "
            f"pass a copy (numpy.array({role})) and use the result"
        )
    device_type, device_id = map(int, x.__dlpack_device__())
    device, stream = CPU, 0
    if device_type in _CUDA_DEVICES:
        device, stream = f"cuda:{device_id}", _DEFAULT_STREAM
        check_cuda(f"{name} on {device}", role)
    elif device_type not in _HOST_DEVICES:
        raise UsageError(
            f"{role}: a {name} on DLPack device ({device_type}, {device_id}), expected the CPU or a "
            "CUDA device; pass a CPU array"
        )
    options = {"stream": stream} if stream else {}
    try:
        try:
            capsule = x.__dlpack__(max_version=(1, 0), **options)
        except TypeError:
            capsule = x.__dlpack__(**options)
    except (BufferError, RuntimeError, ValueError) as error:
        raise UsageError(f"{role}: the {name} cannot be exported: {error}") from error
    ptr, code, bits, lanes, shape, strides, contiguous, read_only, _, _ = _core.dlpack_view(capsule)
    dtype_name = DLPACK_DTYPES.get((code, bits)) if lanes == 1 else None
    if dtype_name is None:
        kind = f"{_KINDS.get(code, f'DLPack type {code} of ')}{bits}"
        raise UsageError(f"{role}: dtype {kind} is not supported; supported are {SUPPORTED}")
    if writable and read_only:
        raise UsageError(f"{role}: the {name} is read-only: {HOW_TO_WRITE}")
    if writable and not contiguous and overlaps(shape, strides):
        raise UsageError(f"{role}: elements of this {name} share memory; pass a contiguous copy")
    num_elems = 1
    for extent in shape:
        num_elems *= extent
    item_size = ITEM_SIZES[dtype_name]
    return ArrayView(
        ptr,
        num_elems,
        num_elems * item_size,
        _core.DTYPES[dtype_name],
        contiguous and ptr % item_size == 0,
        not read_only and library not in IMMUTABLE_LIBRARIES,
        "dlpack",
        device,
        _Owner(x, capsule, strides),
        shape,
        stream,
    )


class _Borrowed:
    """Shows a DLPack array to NumPy without a copy, dtypes of ml_dtypes as unsigned integers."""

    def __init__(self, described: ArrayView) -> None:
        self.owner = described.owner
        name = described.dtype_name
        size = ITEM_SIZES[name]
        self.__array_interface__ = {
            "version": 3,
            "shape": described.shape,
            "strides": tuple(stride * size for stride in described.owner.strides),
            "typestr": f"|u{size}" if name in ML_DTYPES else np.dtype(name).str,
            "data": (described.ptr, not described.writable),
        }


def as_numpy(described: ArrayView) -> "np.ndarray[Any, Any]":
    """The CPU array of a view of this module, for NumPy, without a copy."""
    array = np.asarray(_Borrowed(described))
    if described.dtype_name in ML_DTYPES:
        return array.view(numpy_dtype(described.dtype_name))
    return array
