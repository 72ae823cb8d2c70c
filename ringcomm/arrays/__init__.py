"""One view of every array: of torch, NumPy and CuPy, and of whatever speaks DLPack or CUDA's array interface.

The communicator and the codecs work on pointers, counts and dtype codes. :func:`view` is the only
place that turns an array of some library into those, and the only place that says no to one. torch
and CuPy are never imported here: they are looked up in ``sys.modules`` once an array could have come
from them.
"""

from ringcomm.arrays.array_view import ArrayView as ArrayView
from ringcomm.arrays.array_view import require_cpu as require_cpu
from ringcomm.arrays.copies import contiguous_copy as contiguous_copy
from ringcomm.arrays.copies import copy_back as copy_back
from ringcomm.arrays.copies import empty_like as empty_like
from ringcomm.arrays.copies import from_buffer as from_buffer
from ringcomm.arrays.copies import from_device_memory as from_device_memory
from ringcomm.arrays.copies import item_bytes as item_bytes
from ringcomm.arrays.torch_arrays import is_torch as is_torch
from ringcomm.arrays.viewers import view as view

__all__ = [
    "ArrayView",
    "contiguous_copy",
    "copy_back",
    "empty_like",
    "from_buffer",
    "from_device_memory",
    "is_torch",
    "item_bytes",
    "require_cpu",
    "view",
]
