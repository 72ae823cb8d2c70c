"""Arrays made of other arrays, always in the same library and on the same device."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from ringcomm import _core
from ringcomm.arrays.array_view import CPU, HOW_TO_WRITE, SUPPORTED, ArrayView
from ringcomm.arrays.cuda_arrays import is_cupy
from ringcomm.arrays.dlpack_arrays import as_numpy
from ringcomm.arrays.numpy_arrays import code_and_bytes, numpy_dtype
from ringcomm.arrays.torch_arrays import is_torch, torch_dtypes
from ringcomm.arrays.viewers import view
from ringcomm.errors import UsageError

__all__ = [
    "contiguous_copy",
    "copy_back",
    "empty_like",
    "from_buffer",
    "from_device_memory",
    "item_bytes",
]


def contiguous_copy(x: Any) -> Any:
    """A C-contiguous copy of ``x`` with the same shape, dtype and device.

    Args:
        x: Any array that :func:`view` accepts; on a GPU a torch tensor or a CuPy array.

    Returns:
        A fresh torch tensor (detached) for a torch tensor, a CuPy array for a CuPy array, else a
        NumPy array. Never aliases ``x``. bfloat16 and float8 arrays of DLPack libraries become
        ``ml_dtypes`` arrays. On a GPU the copy is queued on the library's current stream.

    Raises:
        UsageError: as :func:`view`, or an array on a GPU of another library.
    """
    if is_torch(x):
        torch = sys.modules["torch"]
        return x.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(x, np.ndarray):
        return x.copy(order="C")
    if is_cupy(x):
        with x.device:
            return x.copy(order="C")
    described = view(x, writable=False)
    _check_can_copy(described, x)
    return np.array(as_numpy(described), order="C", copy=True)


def copy_back(source: Any, x: Any) -> None:
    """Write the values of ``source``, a result of :func:`contiguous_copy`, into ``x`` in place.

    On a GPU the copy is queued on the library's current stream.

    Raises:
        UsageError: ``x`` is read-only.
    """
    if is_torch(x):
        torch = sys.modules["torch"]
        with torch.no_grad():
            x.copy_(source)
        return
    if isinstance(x, np.ndarray):
        if not x.flags.writeable:
            raise UsageError(f"x is read-only: {HOW_TO_WRITE}")
        x[...] = source
        return
    if is_cupy(x):
        with x.device:
            x[...] = source
        return
    described = view(x, writable=True)
    _check_can_copy(described, x)
    as_numpy(described)[...] = source


def empty_like(
    x: Any, shape: int | Sequence[int] | None = None, dtype_name: str | None = None
) -> Any:
    """Allocate an uninitialised C-contiguous array of ``x``'s library, dtype and device.

    Args:
        x: Any array that :func:`view` accepts; on a GPU a torch tensor or a CuPy array.
        shape: Its shape; that of ``x`` if None.
        dtype_name: A name in ``_core.DTYPES`` instead of the dtype of ``x``.

    Returns:
        A torch tensor for a torch tensor, a CuPy array for a CuPy array, else a NumPy array (also
        for DLPack arrays).

    Raises:
        UsageError: an array on a GPU of another library.
    """
    if is_torch(x):
        torch = sys.modules["torch"]
        dtype = x.dtype if dtype_name is None else getattr(torch, dtype_name)
        return torch.empty(x.shape if shape is None else shape, dtype=dtype, device=x.device)
    if isinstance(x, np.ndarray):
        dtype = x.dtype if dtype_name is None else numpy_dtype(dtype_name)
        return np.empty(x.shape if shape is None else shape, dtype=dtype)
    if is_cupy(x):
        dtype = x.dtype if dtype_name is None else numpy_dtype(dtype_name)
        with x.device:
            return sys.modules["cupy"].empty(x.shape if shape is None else shape, dtype=dtype)
    described = view(x, writable=False)
    if described.device != CPU:
        raise UsageError(
            f"out: pass one; of {_library(x)} only the caller can make arrays on {described.device}"
        )
    dtype = numpy_dtype(dtype_name or described.dtype_name)
    return np.empty(described.shape if shape is None else shape, dtype)


def item_bytes(dtype: Any) -> int:
    """Bytes of one element of ``dtype``: a torch dtype, or a NumPy dtype or its name.

    Raises:
        UsageError: no dtype, or one that is not supported.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        known = torch_dtypes(torch).get(dtype)
        if known is None:
            raise UsageError(f"dtype {dtype} is not supported; supported are {SUPPORTED}")
        return known[1]
    return _numpy_kind(dtype).itemsize


def from_buffer(buffer: Any, dtype: Any, shape: Sequence[int]) -> Any:
    """An array of the bytes of ``buffer``, which it keeps alive, without a copy.

    Args:
        buffer: Anything with Python's buffer protocol, of exactly that many bytes.
        dtype: As in :func:`item_bytes`; a torch dtype makes a torch tensor, else a NumPy array.
        shape: Of the array.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(dtype, torch.dtype):
        return np.frombuffer(buffer, _numpy_kind(dtype)).reshape(shape)
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).reshape(shape)


class _DeviceBytes:
    """GPU memory with CUDA's array interface; NumPy's where the emulated GPU's memory is the host's."""

    def __init__(self, owner: Any, address: int, num_bytes: int, interface: str) -> None:
        self._owner = owner
        says = {"shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3}
        setattr(self, interface, says)


def from_device_memory(
    owner: Any, address: int, num_bytes: int, device: str, dtype: Any, shape: Sequence[int]
) -> Any:
    """An array of GPU memory, whose ``owner`` it keeps alive, without a copy.

    Args:
        owner: Of the memory.
        address: Of its first byte.
        num_bytes: That the array has.
        device: ``"cuda:<index>"``; ``"simt"`` for an array of the host.
        dtype: As in :func:`item_bytes`; a torch dtype makes a torch tensor, else a CuPy array.
        shape: Of the array.

    Raises:
        UsageError: a CuPy array is wanted, and CuPy has not been imported.
    """
    # Libraries refuse to look at 0 bytes.
    torch, room = sys.modules.get("torch"), max(num_bytes, 1)
    if device == "simt":
        host = np.asarray(_DeviceBytes(owner, address, room, "__array_interface__"))
        return from_buffer(host[:num_bytes], dtype, shape)
    memory = _DeviceBytes(owner, address, room, "__cuda_array_interface__")
    if torch is not None and isinstance(dtype, torch.dtype):
        return torch.as_tensor(memory, device=device)[:num_bytes].view(dtype).reshape(shape)
    cupy = sys.modules.get("cupy")
    if cupy is None:
        raise UsageError(
            f"dtype: {dtype!r} makes a CuPy array on {device}, and CuPy has not been imported; "
            "import it, or pass a torch dtype for a torch tensor"
        )
    with cupy.cuda.Device(int(device.removeprefix("cuda:"))):
        return cupy.asarray(memory)[:num_bytes].view(_numpy_kind(dtype)).reshape(shape)


def _numpy_kind(dtype: Any) -> "np.dtype[Any]":
    try:
        kind: np.dtype[Any] = numpy_dtype(dtype) if dtype in _core.DTYPES else np.dtype(dtype)
    except TypeError:
        raise UsageError(f"dtype: {dtype!r} is no dtype; supported are {SUPPORTED}") from None
    code_and_bytes(kind, "dtype")
    return kind


def _check_can_copy(described: ArrayView, x: Any) -> None:
    if described.device != CPU:
        raise UsageError(
            f"x: a non-contiguous array of {_library(x)} on {described.device}; pass a contiguous one, or a "
            "view of it as a torch tensor (torch.as_tensor) or a CuPy array (cupy.asarray)"
        )


def _library(x: Any) -> str:
    return type(x).__module__.partition(".")[0]
