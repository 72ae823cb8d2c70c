"""What the core is told about an array, and what all kinds of arrays have in common."""

from typing import Any, NamedTuple

from ringcomm import _core
from ringcomm.errors import UsageError

__all__ = [
    "CPU",
    "DTYPE_NAMES",
    "HAS_CUDA",
    "HOW_TO_WRITE",
    "IMMUTABLE_LIBRARIES",
    "ITEM_SIZES",
    "ML_DTYPES",
    "SUPPORTED",
    "ArrayView",
    "check_cuda",
    "overlaps",
    "require_cpu",
]

DTYPE_NAMES: dict[int, str] = {code: name for name, code in _core.DTYPES.items()}
ITEM_SIZES: dict[str, int] = _core.DTYPE_BYTES
# NumPy has these from the package ml_dtypes, which is not needed for anything else.
ML_DTYPES = frozenset(n for n in _core.DTYPES if n == "bfloat16" or n.startswith("float8"))
SUPPORTED = ", ".join(_core.DTYPES)
HOW_TO_WRITE = "pass a writable copy (numpy.array(x)) and use the returned or passed array"
# Libraries whose arrays may not be written to, whatever their capsule says.
IMMUTABLE_LIBRARIES = ("jax", "jaxlib", "tensorflow")
CPU = "cpu"
HAS_CUDA: bool = _core.RUNTIME != "none"
"""Whether this build reaches arrays on GPUs, be they emulated."""


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
    """``"torch"``, ``"numpy"``, ``"cupy"``, ``"cuda"`` (``__cuda_array_interface__``) or ``"dlpack"``."""
    device: str
    """``"cpu"``, or ``"cuda:<index>"`` as the CUDA runtime counts in this process."""
    owner: Any
    """Keeps the memory alive as long as the view lives."""
    shape: tuple[int, ...]
    stream: int = 0
    """The CUDA stream (``cudaStream_t``) in whose order the array is to be used: its library's
    current one, at the time of the view. 0: the default stream; always 0 on the CPU."""

    @property
    def dtype_name(self) -> str:
        """The dtype's name, such as ``"float32"``."""
        return DTYPE_NAMES[self.dtype]


def require_cpu(described: ArrayView, role: str, what: str) -> ArrayView:
    """``described``, if it is on the CPU, for what has no business on a GPU.

    Args:
        described: The view.
        role: The argument's name.
        what: Who asks, such as ``"the reference"``.

    Raises:
        UsageError: it is on a GPU.
    """
    if described.device == CPU:
        return described
    raise UsageError(
        f"{role}: an array on {described.device}, but {what} takes CPU arrays only; pass {_on_the_cpu(role)}"
    )


def check_cuda(what: str, role: str) -> None:
    """Refuses the CUDA array ``what`` in a build that cannot reach it."""
    if not HAS_CUDA:
        raise UsageError(
            f"{role}: this is a CUDA array ({what}), but this build has no CUDA (see python -m ringcomm.info); "
            f"pass a CPU array, such as {_on_the_cpu(role)}"
        )


def _on_the_cpu(role: str) -> str:
    return f"{role}.cpu() or cupy.asnumpy({role})"


def overlaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements of such an array certainly share memory."""
    return 0 not in shape and any(
        stride == 0 and extent > 1 for extent, stride in zip(shape, strides, strict=True)
    )
