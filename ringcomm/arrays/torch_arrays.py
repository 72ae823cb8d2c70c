"""torch tensors, on the CPU and on GPUs. torch itself is never imported."""

import sys
from typing import Any

from ringcomm import _core
from ringcomm.arrays.array_view import CPU, ITEM_SIZES, SUPPORTED, ArrayView, check_cuda, overlaps
from ringcomm.errors import UsageError

__all__ = ["is_torch", "torch_dtypes", "view_torch", "view_torch_subclass"]

_dtypes: dict[Any, tuple[int, int]] = {}


def is_torch(x: Any) -> bool:
    """Whether ``x`` is a torch tensor. Never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def torch_dtypes(torch: Any) -> dict[Any, tuple[int, int]]:
    """Of every torch.dtype that the core knows: its code and bytes."""
    if not _dtypes:
        for name, code in _core.DTYPES.items():
            if hasattr(torch, name):
                _dtypes[getattr(torch, name)] = (code, ITEM_SIZES[name])
    return _dtypes


def view_torch(x: Any, writable: bool, role: str) -> ArrayView:
    known = _dtypes.get(x.dtype)
    on_cpu = x.is_cpu
    if known is None or not (on_cpu or x.is_cuda) or x.is_neg() or x.is_conj():
        raise UsageError(f"{role}: {_why_not(x)}")
    if not on_cpu:
        check_cuda(f"torch tensor on {x.device}", role)
    try:
        ptr = x.data_ptr()
        contiguous = x.is_contiguous()
    except RuntimeError as error:
        raise UsageError(f"{role}: {_why_not(x)} ({error})") from error
    num_elems = x.numel()
    if not contiguous and writable and overlaps(tuple(x.shape), x.stride()):
        raise UsageError(
            f"{role}: elements of this tensor share memory (a stride of 0, from expand()), so it "
            f"cannot be written in place; pass {role}.contiguous()"
        )
    device, stream = CPU, 0
    if not on_cpu:
        device, stream = f"cuda:{x.device.index}", _current_stream(x.device)
        contiguous = contiguous and ptr % known[1] == 0
    return ArrayView(
        ptr,
        num_elems,
        num_elems * known[1],
        known[0],
        contiguous,
        True,
        "torch",
        device,
        x,
        x.shape,
        stream,
    )


def view_torch_subclass(x: Any, writable: bool, role: str) -> ArrayView:
    torch = sys.modules["torch"]
    if type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        hint = f"{role}.to_local()" if hasattr(x, "to_local") else "the plain tensor inside it"
        raise UsageError(
            f"{role}: a {type(x).__module__}.{type(x).__name__} has no memory of its own; pass {hint}"
        )
    return view_torch(x, writable, role)


def _current_stream(device: Any) -> int:
    return int(sys.modules["torch"].cuda.current_stream(device).cuda_stream)


def _why_not(x: Any) -> str:
    torch = sys.modules["torch"]
    if x.is_meta:
        return "a tensor on the meta device has no values; pass one on the CPU or on a GPU"
    if not (x.is_cpu or x.is_cuda):
        return f"a tensor on {x.device}, expected one on the CPU or on a CUDA device; pass .cpu()"
    if x.layout != torch.strided:
        return f"a sparse tensor (layout {x.layout}); pass .to_dense(), or its values()"
    if x.is_quantized:
        return f"a quantized tensor ({x.dtype}); pass .dequantize() or .int_repr()"
    if x.is_conj():
        return "a lazily conjugated tensor; pass .resolve_conj()"
    if x.is_neg():
        return "a lazily negated view; pass .resolve_neg()"
    if x.dtype not in _dtypes:
        return f"dtype {x.dtype} is not supported; supported are {SUPPORTED}"
    return "a tensor without accessible memory (inside a function transform or a trace?)"
