"""Arrays on GPUs of CuPy, and of whatever else has ``__cuda_array_interface__`` (Numba, RAPIDS, PyCUDA).

The interface, versions 2 and 3: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
"""

import math
import sys
from typing import Any

import numpy as np

from ringcomm import _core
from ringcomm.arrays.array_view import (
    HOW_TO_WRITE,
    IMMUTABLE_LIBRARIES,
    ML_DTYPES,
    SUPPORTED,
    ArrayView,
    check_cuda,
    overlaps,
)
from ringcomm.arrays.numpy_arrays import code_and_bytes, numpy_dtype
from ringcomm.errors import UsageError

__all__ = ["is_cupy", "view_cuda_interface", "view_cupy"]

_VERSIONS = (2, 3)
_LEGACY_DEFAULT, _PER_THREAD_DEFAULT = (
    1,
    2,
)  # as of the interface, and as handles of the CUDA runtime


def is_cupy(x: Any) -> bool:
    """Whether ``x`` is a CuPy array. Never imports CuPy."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def view_cupy(x: Any, writable: bool, role: str) -> ArrayView:
    check_cuda(f"CuPy array on cuda:{x.device.id}", role)
    code, item_bytes = code_and_bytes(x.dtype, role)
    contiguous = x.flags.c_contiguous
    if writable and not contiguous and overlaps(x.shape, x.strides):
        raise UsageError(
            f"{role}: elements of this array share memory (a stride of 0), so it cannot be written in "
            f"place; pass cupy.ascontiguousarray({role})"
        )
    ptr, device = x.data.ptr, x.device.id
    return ArrayView(
        ptr,
        x.size,
        x.size * item_bytes,
        code,
        contiguous and ptr % item_bytes == 0,
        True,
        "cupy",
        f"cuda:{device}",
        x,
        x.shape,
        sys.modules["cupy"].cuda.get_current_stream(device).ptr,
    )


def view_cuda_interface(x: Any, writable: bool, role: str) -> ArrayView:
    name = f"{type(x).__module__}.{type(x).__name__}"
    check_cuda(name, role)
    interface = x.__cuda_array_interface__
    version = interface.get("version")
    if version not in _VERSIONS:
        raise UsageError(
            f"{role}: version {version} of __cuda_array_interface__ of this {name}; supported are 2 and 3"
        )
    if interface.get("mask") is not None:
        raise UsageError(f"{role}: a masked array would lose its mask; pass its data")
    code, item_bytes = code_and_bytes(_dtype(x, interface["typestr"], role), role)
    (ptr, read_only), shape = interface["data"], tuple(interface["shape"])
    if writable and (read_only or type(x).__module__.partition(".")[0] in IMMUTABLE_LIBRARIES):
        raise UsageError(f"{role}: the {name} is read-only: {HOW_TO_WRITE}")
    dense = _dense_strides(shape, item_bytes)
    strides = interface.get("strides") or dense
    num_elems = math.prod(shape)
    contiguous = num_elems == 0 or all(
        extent == 1 or stride == expected
        for extent, stride, expected in zip(shape, strides, dense, strict=True)
    )
    if writable and not contiguous and overlaps(shape, strides):
        raise UsageError(f"{role}: elements of this {name} share memory; pass a contiguous copy")
    return ArrayView(
        ptr or 0,
        num_elems,
        num_elems * item_bytes,
        code,
        contiguous and (ptr or 0) % item_bytes == 0,
        not read_only,
        "cuda",
        f"cuda:{_device(x, ptr, name, role)}",
        x,
        shape,
        _stream(interface, name, role),
    )


def _dtype(x: Any, typestr: str, role: str) -> Any:
    """The dtype of the elements. The interface has no letters for those of ml_dtypes."""
    named = getattr(getattr(x, "dtype", None), "name", None)
    if named in ML_DTYPES:
        return numpy_dtype(named)
    if typestr[1:] == "V2":  # as ml_dtypes says it, which has only one dtype of that kind and size
        return numpy_dtype("bfloat16")
    try:
        return np.dtype(typestr)
    except TypeError:
        raise UsageError(
            f"{role}: dtype {typestr!r} is not supported; supported are {SUPPORTED}"
        ) from None


def _dense_strides(shape: tuple[int, ...], item_bytes: int) -> tuple[int, ...]:
    strides, step = [], item_bytes
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def _device(x: Any, ptr: int, name: str, role: str) -> int:
    """Where the array is, which the interface does not say."""
    if hasattr(x, "__dlpack_device__"):
        return int(x.__dlpack_device__()[1])
    if not ptr:  # an array without elements is anywhere
        return _core.current_device()
    device = _core.device_of(ptr)
    if device < 0:
        raise UsageError(
            f"{role}: the memory of this {name} belongs to no CUDA device; pass it as a CPU array"
        )
    return device


def _stream(interface: dict[str, Any], name: str, role: str) -> int:
    stream = interface.get("stream")  # absent in version 2
    if stream is None:
        return 0
    if stream < _LEGACY_DEFAULT:
        raise UsageError(
            f"{role}: stream {stream} in __cuda_array_interface__ of this {name}; expected None, "
            f"{_LEGACY_DEFAULT} (default stream), {_PER_THREAD_DEFAULT} (per-thread default stream) or a handle"
        )
    return int(stream)
