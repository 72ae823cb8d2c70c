"""One view of every array: torch tensors, NumPy arrays and whatever speaks DLPack.

The communicator and the codecs work on pointers, counts and dtype codes. :func:`view` is the only
place that turns an array of some library into those, and the only place that says no to one. torch
is never imported here: it is looked up in ``sys.modules`` once a tensor could have come from it.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ringcomm import _core
from ringcomm.errors import UsageError

__all__ = [
    "ArrayView",
    "contiguous_copy",
    "copy_back",
    "empty_like",
    "from_buffer",
    "is_torch",
    "item_bytes",
    "view",
]

_DTYPE_NAMES: dict[int, str] = {code: name for name, code in _core.DTYPES.items()}
_ITEM_SIZES: dict[str, int] = _core.DTYPE_BYTES
# NumPy has these from the package ml_dtypes, which is not needed for anything else.
_ML_DTYPES = frozenset(n for n in _core.DTYPES if n == "bfloat16" or n.startswith("float8"))
_SUPPORTED = ", ".join(_core.DTYPES)
_WHAT_TO_PASS = "pass a torch tensor, a NumPy array or any CPU array that speaks DLPack"
# Libraries whose arrays may not be written to, whatever their capsule says.
_IMMUTABLE_LIBRARIES = ("jax", "jaxlib", "tensorflow")

# DLPack device types whose memory the CPU may read: CPU, and page-locked host memory.
_DLPACK_HOST_DEVICES = (1, 3)
_DLPACK_CUDA_DEVICES = (2, 13)
_DLPACK_DTYPES: dict[tuple[int, int], str] = {
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
_DLPACK_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}

# Flags of __array_struct__ (NumPy's array interface protocol).
_NUMPY_USABLE = 0x1 | 0x100  # C-contiguous and aligned
_NUMPY_WRITABLE = 0x400


class ArrayView(NamedTuple):
    """What the core needs to know about an array. Immutable; aliases the array's memory.

    A named tuple and not a frozen dataclass: making one is four times cheaper, and every
    collective call makes one or two.
    """

    ptr: int
    """Address of element 0 (0 is possible for an array without elements)."""
    num_elems: int
    num_bytes: int
    dtype: int
    """Dtype code of the core, a value of ``_core.DTYPES``."""
    contiguous: bool
    """C-contiguous and aligned, so that ``num_bytes`` bytes from ``ptr`` on are the array. If not,
    work on :func:`contiguous_copy` and write the result back with :func:`copy_back`."""
    writable: bool
    kind: str
    """``"torch"``, ``"numpy"`` or ``"dlpack"``."""
    device: str
    """``"cpu"``; other devices are refused by this build."""
    owner: Any
    """Keeps the memory alive as long as the view lives."""
    shape: tuple[int, ...]

    @property
    def dtype_name(self) -> str:
        """The dtype's name, such as ``"float32"``."""
        return _DTYPE_NAMES[self.dtype]


def view(x: Any, *, writable: bool, role: str = "x") -> ArrayView:
    """Describe the array ``x`` without copying it.

    Args:
        x: torch tensor, NumPy array or DLPack array on the CPU, of any shape (also 0-dimensional
            or empty), contiguous or not, of a dtype in ``_core.DTYPES``: floating (16 to 64 bits,
            bfloat16), integer (8 to 64 bits, signed or not), bool, complex64, complex128 or float8.
            NumPy arrays of bfloat16 and float8 are those of the package ``ml_dtypes``.
        writable: Whether the caller is going to write through the pointer. torch tensors that
            require gradients are accepted: the write is invisible to autograd, as under
            ``torch.no_grad()``.
        role: The argument's name in error messages.

    Returns:
        The view; it aliases ``x`` and keeps it alive. It may be non-contiguous: look at
        ``contiguous`` before using ``ptr``.

    Raises:
        UsageError: ``x`` is no array, lives on another device, has an unsupported dtype or layout,
            or is read-only while ``writable`` is asked for. The message says what to pass instead.
    """
    viewer = _VIEWERS.get(type(x))
    if viewer is None:
        viewer = _find_viewer(x, role)
    return viewer(x, writable, role)


def is_torch(x: Any) -> bool:
    """Whether ``x`` is a torch tensor. Never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def contiguous_copy(x: Any) -> Any:
    """A C-contiguous copy of ``x`` on the CPU with the same shape and dtype.

    Args:
        x: Any array that :func:`view` accepts.

    Returns:
        A fresh torch tensor (detached) for a torch tensor, else a fresh NumPy array. Never aliases
        ``x``. bfloat16 and float8 arrays of DLPack libraries become ``ml_dtypes`` arrays.

    Raises:
        UsageError: as :func:`view`.
    """
    if is_torch(x):
        torch = sys.modules["torch"]
        return x.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(x, np.ndarray):
        return x.copy(order="C")
    return np.array(_borrow(x), order="C", copy=True)


def copy_back(source: Any, x: Any) -> None:
    """Write the values of ``source``, a result of :func:`contiguous_copy`, into ``x`` in place.

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
            raise UsageError(f"x is read-only: {_HOW_TO_WRITE}")
        x[...] = source
        return
    view(x, writable=True)
    _borrow(x)[...] = source


def empty_like(x: Any, shape: int | Sequence[int] | None = None) -> Any:
    """Allocate an uninitialised C-contiguous CPU array of ``x``'s library and dtype.

    Args:
        x: Any array that :func:`view` accepts.
        shape: Its shape; that of ``x`` if None.

    Returns:
        A torch tensor for a torch tensor, else a NumPy array (also for DLPack arrays).
    """
    if is_torch(x):
        torch = sys.modules["torch"]
        return torch.empty(x.shape if shape is None else shape, dtype=x.dtype)
    if isinstance(x, np.ndarray):
        return np.empty(x.shape if shape is None else shape, dtype=x.dtype)
    described = view(x, writable=False)
    return np.empty(described.shape if shape is None else shape, _numpy_dtype(described.dtype_name))


def item_bytes(dtype: Any) -> int:
    """Bytes of one element of ``dtype``: a torch dtype, or a NumPy dtype or its name.

    Raises:
        UsageError: no dtype, or one that is not supported.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        if not _torch_dtypes:
            _load_torch_dtypes(torch)
        known = _torch_dtypes.get(dtype)
        if known is None:
            raise UsageError(f"dtype {dtype} is not supported; supported are {_SUPPORTED}")
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


def _numpy_kind(dtype: Any) -> "np.dtype[Any]":
    try:
        kind: np.dtype[Any] = _numpy_dtype(dtype) if dtype in _core.DTYPES else np.dtype(dtype)
    except TypeError:
        raise UsageError(f"dtype: {dtype!r} is no dtype; supported are {_SUPPORTED}") from None
    if kind not in _numpy_dtypes:
        _new_numpy_dtype(kind, "dtype")
    return kind


# ---- torch ---------------------------------------------------------------------------------------

_torch_dtypes: dict[Any, tuple[int, int]] = {}  # torch.dtype -> (code, item size)


def _load_torch_dtypes(torch: Any) -> None:
    for name, code in _core.DTYPES.items():
        if hasattr(torch, name):
            _torch_dtypes[getattr(torch, name)] = (code, _ITEM_SIZES[name])


def _view_torch(x: Any, writable: bool, role: str) -> ArrayView:
    known = _torch_dtypes.get(x.dtype)
    if known is None or not x.is_cpu or x.is_neg() or x.is_conj():
        raise UsageError(f"{role}: {_why_not_torch(x)}")
    try:
        ptr = x.data_ptr()
        contiguous = x.is_contiguous()
    except RuntimeError as error:
        raise UsageError(f"{role}: {_why_not_torch(x)} ({error})") from error
    num_elems = x.numel()
    if not contiguous and writable and _overlaps(tuple(x.shape), x.stride()):
        raise UsageError(
            f"{role}: elements of this tensor share memory (a stride of 0, from expand()), so it "
            f"cannot be written in place; pass {role}.contiguous()"
        )
    return ArrayView(
        ptr, num_elems, num_elems * known[1], known[0], contiguous, True, "torch", "cpu", x, x.shape
    )


def _view_torch_subclass(x: Any, writable: bool, role: str) -> ArrayView:
    torch = sys.modules["torch"]
    if type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        hint = f"{role}.to_local()" if hasattr(x, "to_local") else "the plain tensor inside it"
        raise UsageError(
            f"{role}: a {type(x).__module__}.{type(x).__name__} has no memory of its own; pass {hint}"
        )
    return _view_torch(x, writable, role)


def _why_not_torch(x: Any) -> str:
    torch = sys.modules["torch"]
    if x.is_cuda:
        return _cuda_reason(f"torch tensor on {x.device}")
    if x.is_meta:
        return "a tensor on the meta device has no values; pass one on the CPU"
    if not x.is_cpu:
        return f"a tensor on {x.device}, the communicator is on the CPU; pass .cpu()"
    if x.layout != torch.strided:
        return f"a sparse tensor (layout {x.layout}); pass .to_dense(), or its values()"
    if x.is_quantized:
        return f"a quantized tensor ({x.dtype}); pass .dequantize() or .int_repr()"
    if x.is_conj():
        return "a lazily conjugated tensor; pass .resolve_conj()"
    if x.is_neg():
        return "a lazily negated view; pass .resolve_neg()"
    if x.dtype not in _torch_dtypes:
        return f"dtype {x.dtype} is not supported; supported are {_SUPPORTED}"
    return "a tensor without accessible memory (inside a function transform or a trace?)"


# ---- NumPy ---------------------------------------------------------------------------------------

_HOW_TO_WRITE = "pass a writable copy (numpy.array(x)) and use the returned or passed array"
_numpy_dtypes: dict[Any, tuple[int, int]] = {
    np.dtype(name): (code, _ITEM_SIZES[name])
    for name, code in _core.DTYPES.items()
    if name not in _ML_DTYPES
}


def _view_numpy(x: Any, writable: bool, role: str) -> ArrayView:
    known = _numpy_dtypes.get(x.dtype)
    if known is None:
        known = _new_numpy_dtype(x.dtype, role)
    ptr, flags = _core.array_struct_view(x.__array_struct__)
    if writable:
        if not flags & _NUMPY_WRITABLE:
            raise UsageError(f"{role}: the NumPy array is read-only: {_HOW_TO_WRITE}")
        if not flags & 1 and _overlaps(x.shape, x.strides):
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
        flags & _NUMPY_USABLE == _NUMPY_USABLE,
        flags & _NUMPY_WRITABLE != 0,
        "numpy",
        "cpu",
        x,
        x.shape,
    )


def _view_numpy_subclass(x: Any, writable: bool, role: str) -> ArrayView:
    if isinstance(x, np.ma.MaskedArray):
        raise UsageError(f"{role}: a masked array would lose its mask; pass {role}.filled(value)")
    return _view_numpy(x, writable, role)


def _new_numpy_dtype(dtype: Any, role: str) -> tuple[int, int]:
    """The code of a dtype that is not in the table yet: one of ml_dtypes, or an error."""
    if dtype.name in _ML_DTYPES and dtype.itemsize == _ITEM_SIZES[dtype.name]:
        known = (_core.DTYPES[dtype.name], dtype.itemsize)
        _numpy_dtypes[dtype] = known
        return known
    if not dtype.isnative:
        raise UsageError(
            f"{role}: the array has foreign byte order ({dtype.str}); pass "
            f"{role}.astype({role}.dtype.newbyteorder('='))"
        )
    raise UsageError(f"{role}: dtype {dtype} is not supported; supported are {_SUPPORTED}")


def _numpy_dtype(name: str) -> Any:
    if name not in _ML_DTYPES:
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise UsageError(f"a {name} NumPy array needs the package ml_dtypes") from error
    return np.dtype(getattr(ml_dtypes, name))


# ---- DLPack --------------------------------------------------------------------------------------


def _fast_viewer(array_type: type, library: str, viewer: "_Viewer") -> "_Viewer":
    """``viewer``, behind a short cut for ordinary arrays where the library has DLPack's C functions."""
    exchange_api = getattr(array_type, "__dlpack_c_exchange_api__", None)
    if exchange_api is None:
        return viewer
    dtypes = [(*key, _core.DTYPES[name]) for key, name in _DLPACK_DTYPES.items()]
    fast: _Viewer = _core.array_viewer(exchange_api, ArrayView, dtypes, library, viewer)
    return fast


class _DlpackOwner:
    """Keeps the exporting array and its capsule alive."""

    __slots__ = ("array", "capsule", "strides")

    def __init__(self, array: Any, capsule: Any, strides: tuple[int, ...]) -> None:
        self.array = array
        self.capsule = capsule
        self.strides = strides  # in elements


def _view_dlpack(x: Any, writable: bool, role: str) -> ArrayView:
    library = type(x).__module__.partition(".")[0]
    name = f"{type(x).__module__}.{type(x).__name__}"
    if writable and library in _IMMUTABLE_LIBRARIES:
        raise UsageError(
            f"{role}: arrays of {library} are immutable, so the result cannot be written in place; "
            f"pass a copy (numpy.array({role})) and use the result"
        )
    device_type, device_id = x.__dlpack_device__()
    device_type = int(device_type)
    if device_type in _DLPACK_CUDA_DEVICES:
        raise UsageError(f"{role}: {_cuda_reason(f'{name} on cuda:{device_id}')}")
    if device_type not in _DLPACK_HOST_DEVICES:
        raise UsageError(
            f"{role}: a {name} on DLPack device ({device_type}, {device_id}), the communicator is "
            "on the CPU; pass a CPU array"
        )
    try:
        try:
            capsule = x.__dlpack__(max_version=(1, 0))
        except TypeError:
            capsule = x.__dlpack__()
    except (BufferError, RuntimeError, ValueError) as error:
        raise UsageError(f"{role}: the {name} cannot be exported: {error}") from error
    ptr, code, bits, lanes, shape, strides, contiguous, read_only, _, _ = _core.dlpack_view(capsule)
    dtype_name = _DLPACK_DTYPES.get((code, bits)) if lanes == 1 else None
    if dtype_name is None:
        kind = f"{_DLPACK_KINDS.get(code, f'DLPack type {code} of ')}{bits}"
        raise UsageError(f"{role}: dtype {kind} is not supported; supported are {_SUPPORTED}")
    if writable and read_only:
        raise UsageError(f"{role}: the {name} is read-only: {_HOW_TO_WRITE}")
    if writable and not contiguous and _overlaps(shape, strides):
        raise UsageError(f"{role}: elements of this {name} share memory; pass a contiguous copy")
    num_elems = 1
    for extent in shape:
        num_elems *= extent
    item_size = _ITEM_SIZES[dtype_name]
    return ArrayView(
        ptr,
        num_elems,
        num_elems * item_size,
        _core.DTYPES[dtype_name],
        contiguous and ptr % item_size == 0,
        not read_only and library not in _IMMUTABLE_LIBRARIES,
        "dlpack",
        "cpu",
        _DlpackOwner(x, capsule, strides),
        shape,
    )


class _Borrowed:
    """Shows a DLPack array to NumPy without a copy, dtypes of ml_dtypes as unsigned integers."""

    def __init__(self, described: ArrayView) -> None:
        self.owner = described.owner
        name = described.dtype_name
        size = _ITEM_SIZES[name]
        self.__array_interface__ = {
            "version": 3,
            "shape": described.shape,
            "strides": tuple(stride * size for stride in described.owner.strides),
            "typestr": f"|u{size}" if name in _ML_DTYPES else np.dtype(name).str,
            "data": (described.ptr, not described.writable),
        }


def _borrow(x: Any) -> "np.ndarray[Any, Any]":
    described = view(x, writable=False)
    array = np.asarray(_Borrowed(described))
    if described.dtype_name in _ML_DTYPES:
        return array.view(_numpy_dtype(described.dtype_name))
    return array


# ---- Choosing a viewer ---------------------------------------------------------------------------

_Viewer = Callable[[Any, bool, str], ArrayView]
# By exact type, so that the common case is one dictionary look-up. torch's types join when the
# first tensor is seen.
_VIEWERS: dict[type, _Viewer] = {np.ndarray: _view_numpy}


def _find_viewer(x: Any, role: str) -> _Viewer:
    if is_torch(x):
        torch = sys.modules["torch"]
        if not _torch_dtypes:
            _load_torch_dtypes(torch)
            viewer = _fast_viewer(torch.Tensor, "torch", _view_torch)
            _VIEWERS[torch.Tensor] = _VIEWERS[torch.nn.Parameter] = viewer
        return _VIEWERS.get(type(x), _view_torch_subclass)
    if isinstance(x, np.ndarray):
        return _view_numpy_subclass
    if hasattr(x, "__cuda_array_interface__"):
        name = f"{type(x).__module__}.{type(x).__name__}"
        raise UsageError(f"{role}: {_cuda_reason(name)}")
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return _view_dlpack
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


def _overlaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return 0 not in shape and any(
        stride == 0 and extent > 1 for extent, stride in zip(shape, strides, strict=True)
    )


def _cuda_reason(what: str) -> str:
    return (
        f"this is a CUDA array ({what}), the communicator is on the CPU and this build has no CUDA "
        "transport; pass a CPU array, such as x.cpu() or cupy.asnumpy(x)"
    )
