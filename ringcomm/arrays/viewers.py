"""Which view an array gets."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from ringcomm import _core
from ringcomm.arrays import array_view
from ringcomm.arrays.array_view import ArrayView
from ringcomm.arrays.cuda_arrays import is_cupy, view_cuda_interface, view_cupy
from ringcomm.arrays.dlpack_arrays import DLPACK_DTYPES, view_dlpack
from ringcomm.arrays.numpy_arrays import view_numpy, view_numpy_subclass
from ringcomm.arrays.torch_arrays import is_torch, torch_dtypes, view_torch, view_torch_subclass
from ringcomm.errors import UsageError

__all__ = ["view"]

Viewer = Callable[[Any, bool, str], ArrayView]

_WHAT_TO_PASS = (
    "pass a torch tensor, a NumPy or CuPy array or any array that speaks DLPack or has "
    "__cuda_array_interface__"
)
_MOST_DEVICES = 64  # that have a short cut

# By exact type, so that the common case is one dictionary look-up. torch's and CuPy's types join
# when the first of their arrays is seen.
_VIEWERS: dict[type, Viewer] = {np.ndarray: view_numpy}


def view(x: Any, *, writable: bool, role: str = "x") -> ArrayView:
    """Describe the array ``x`` without copying it.

    Args:
        x: torch tensor, NumPy or CuPy array, or any array that speaks DLPack or has
            ``__cuda_array_interface__``, on the CPU or on a CUDA device, of any shape (also
            0-dimensional or empty), contiguous or not, of a dtype in ``_core.DTYPES``: floating (16
            to 64 bits, bfloat16), integer (8 to 64 bits, signed or not), bool, complex64, complex128
            or float8. NumPy arrays of bfloat16 and float8 are those of the package ``ml_dtypes``.
        writable: Whether the caller is going to write through the pointer. torch tensors that
            require gradients are accepted: the write is invisible to autograd, as under
            ``torch.no_grad()``.
        role: The argument's name in error messages.

    Returns:
        The view; it aliases ``x`` and keeps it alive. It may be non-contiguous: look at
        ``contiguous`` before using ``ptr``. On a GPU, use it in the order of ``stream``.

    Raises:
        UsageError: ``x`` is no array, lives on another device (on a GPU, in a build without CUDA),
            has an unsupported dtype or layout, or is read-only while ``writable`` is asked for. The
            message says what to pass instead.
    """
    viewer = _VIEWERS.get(type(x))
    if viewer is None:
        viewer = _find_viewer(x, role)
    return viewer(x, writable, role)


def _find_viewer(x: Any, role: str) -> Viewer:
    if is_torch(x):
        torch = sys.modules["torch"]
        if torch.Tensor not in _VIEWERS:
            torch_dtypes(torch)
            viewer = _fast_viewer(torch.Tensor, "torch", view_torch)
            _VIEWERS[torch.Tensor] = _VIEWERS[torch.nn.Parameter] = viewer
        return _VIEWERS.get(type(x), view_torch_subclass)
    if isinstance(x, np.ndarray):
        return view_numpy_subclass
    if is_cupy(x):
        _VIEWERS[type(x)] = view_cupy
        return view_cupy
    if hasattr(x, "__cuda_array_interface__"):
        return view_cuda_interface
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return view_dlpack
    if isinstance(x, (int, float, complex, bool, np.generic)):
        raise UsageError(
            f"{role}: a scalar ({x!r}) cannot be written in place; pass a 0-dimensional array, "
            f"such as numpy.array({x!r}, dtype='float32')"
        )
    if isinstance(x, (list, tuple)):
        raise UsageError(
            f"{role}: a {type(x).__name__}, which is no array; {_WHAT_TO_PASS}, one array a call"
        )
    raise UsageError(f"{role}: a {type(x).__name__}, which is no array; {_WHAT_TO_PASS}")


def _fast_viewer(array_type: type, library: str, viewer: Viewer) -> Viewer:
    """``viewer``, behind a short cut for ordinary arrays where the library has DLPack's C functions."""
    exchange_api = getattr(array_type, "__dlpack_c_exchange_api__", None)
    if exchange_api is None:
        return viewer
    dtypes = [(*key, _core.DTYPES[name]) for key, name in DLPACK_DTYPES.items()]
    devices = [f"cuda:{index}" for index in range(_MOST_DEVICES)] if array_view.HAS_CUDA else []
    fast: Viewer = _core.array_viewer(exchange_api, ArrayView, dtypes, library, devices, viewer)
    return fast
