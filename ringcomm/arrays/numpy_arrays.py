"""NumPy arrays, and NumPy's dtypes, which CuPy shares."""

from typing import Any

import numpy as np

from ringcomm import _core
from ringcomm.arrays.array_view import (
    CPU,
    HOW_TO_WRITE,
    ITEM_SIZES,
    ML_DTYPES,
    SUPPORTED,
    ArrayView,
    overlaps,
)
from ringcomm.errors import UsageError

__all__ = ["code_and_bytes", "numpy_dtype", "view_numpy", "view_numpy_subclass"]

# Flags of __array_struct__ (NumPy's array interface protocol).
_USABLE = 0x1 | 0x100  # C-contiguous and aligned
_WRITABLE = 0x400

_dtypes: dict[Any, tuple[int, int]] = {
    np.dtype(name): (code, ITEM_SIZES[name])
    for name, code in _core.DTYPES.items()
    if name not in ML_DTYPES
}


def view_numpy(x: Any, writable: bool, role: str) -> ArrayView:
    known = _dtypes.get(x.dtype)
    if known is None:
        known = code_and_bytes(x.dtype, role)
    ptr, flags = _core.array_struct_view(x.__array_struct__)
    if writable:
        if not flags & _WRITABLE:
            raise UsageError(f"{role}: the NumPy array is read-only: {HOW_TO_WRITE}")
        if not flags & 1 and overlaps(x.shape, x.strides):
            raise UsageError(
                f"{role}: elements of this array share memory (a stride of 0), so it cannot be "
                f"written in place; pass numpy.ascontiguousarray({role})"
            )
    num_elems = x.size
    return ArrayView(
        ptr,
        num_elems,
        num_elems * known[1],
        known[0],
        flags & _USABLE == _USABLE,
        flags & _WRITABLE != 0,
        "numpy",
        CPU,
        x,
        x.shape,
    )


def view_numpy_subclass(x: Any, writable: bool, role: str) -> ArrayView:
    if isinstance(x, np.ma.MaskedArray):
        raise UsageError(f"{role}: a masked array would lose its mask; pass {role}.filled(value)")
    return view_numpy(x, writable, role)


def code_and_bytes(dtype: Any, role: str) -> tuple[int, int]:
    """The core's code of a NumPy dtype (NumPy's own or one of ml_dtypes), and its bytes; or an error."""
    known = _dtypes.get(dtype)
    if known is not None:
        return known
    if dtype.name in ML_DTYPES and dtype.itemsize == ITEM_SIZES[dtype.name]:
        known = _dtypes[dtype] = (_core.DTYPES[dtype.name], dtype.itemsize)
        return known
    if not dtype.isnative:
        raise UsageError(
            f"{role}: the array has foreign byte order ({dtype.str}); pass "
            f"{role}.astype({role}.dtype.newbyteorder('='))"
        )
    raise UsageError(f"{role}: dtype {dtype} is not supported; supported are {SUPPORTED}")


def numpy_dtype(name: str) -> Any:
    """The NumPy dtype of that name, from ml_dtypes where NumPy has none."""
    if name not in ML_DTYPES:
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise UsageError(f"a {name} NumPy array needs the package ml_dtypes") from error
    return np.dtype(getattr(ml_dtypes, name))
