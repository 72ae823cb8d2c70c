"""Arrays on the GPU of this process, real or emulated: the same tests run on both.

A real one's are torch tensors. The emulated one's (tests/simt/emulated.py) lie in the host's memory: NumPy arrays for
communicators, and for codecs objects that say that they are on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ringcomm import _core

Array = Any
DEVICE = "cuda"  # torch's name of it
# For ranks that are threads on one GPU, each with a stream of its own. Left alone, they go in steps and capture nothing.
IN_KERNEL = {"RINGCOMM_CUDA_MODE": "in_kernel"}


def of_threads(device: str, world_size: int) -> dict[str, str]:
    """Variables with which kernels of ranks that are threads wait for each other: an emulated GPU for each rank, or one
    real one for all, whose threads have streams of their own."""
    return {"RINGCOMM_SIMT_DEVICES": str(world_size)} if device == "simt" else IN_KERNEL


COLLECTIVES = ("all_reduce", "broadcast", "reduce", "all_gather", "reduce_scatter")
COLLECTIVES += ("gather", "scatter", "all_to_all", "all_reduce_coalesced")


def is_emulated() -> bool:
    return _core.RUNTIME == "simt"


def name() -> str:
    """What ``ringcomm.init(device=...)`` takes here."""
    return "simt" if is_emulated() else "cuda:0"


@contextlib.contextmanager
def own_stream() -> Iterator[int]:
    """A stream that is current in this thread alone: ranks that are threads wait for each other's kernels."""
    if is_emulated():
        yield 0
        return
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        yield stream.cuda_stream
        stream.synchronize()


@contextlib.contextmanager
def captured(error_mode: str = "thread_local") -> Iterator[Any]:
    """A CUDA graph of what the block queues on the current stream of torch; ``thread_local``: other threads go on.

    Capturing ends whatever the block does: the process runs other tests later.
    """
    import torch

    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode=error_mode)
    try:
        yield graph
    except BaseException:
        with contextlib.suppress(RuntimeError):  # of a capture that the error has spoilt
            graph.capture_end()
        raise
    graph.capture_end()


def synchronize() -> None:
    if is_emulated():
        _core.simt.synchronize(0)
        return
    import torch

    torch.cuda.current_stream().synchronize()


class OnEmulatedGpu:
    """A NumPy array that says that it is on a GPU."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.dtype = array.dtype

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": self.array.shape,
            "typestr": self.array.dtype.str,
            "data": (self.array.ctypes.data, False),
            "strides": None,
            "stream": None,
        }


def put(values: Array) -> Array:
    """A copy of a NumPy array on the GPU, with its strides where torch has such."""
    if is_emulated():
        return OnEmulatedGpu(np.array(values, order="C"))
    return tensor_of(values)


def fetch(array: Array) -> Array:
    """A GPU array as a NumPy array, when the current stream has come so far."""
    synchronize()
    return array.array.copy() if is_emulated() else numpy_of(array)


def pointer(array: Array) -> int:
    return int(array.array.ctypes.data) if is_emulated() else int(array.data_ptr())


def stream() -> int:
    if is_emulated():
        return 0
    import torch

    return int(torch.cuda.current_stream().cuda_stream)


# ---- torch tensors and NumPy arrays, also of dtypes that NumPy or torch cannot convert ---------------

_RAW = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}


def raw(values: Array) -> Array:
    """The same memory as integers; complex numbers and bool as they are."""
    if values.dtype.kind in "cb" or values.dtype.itemsize not in _RAW:
        return values
    return values.view(_RAW[values.dtype.itemsize])


def tensor_of(values: Array) -> Array:
    import torch

    bits = raw(values)
    strides = [stride // values.itemsize for stride in values.strides]
    host = torch.from_numpy(np.ascontiguousarray(bits).reshape(values.shape))
    if values.size == 0 or any(stride <= 0 for stride in strides):
        placed = host.to(DEVICE)
    else:
        placed = torch.empty_strided(values.shape, strides, dtype=host.dtype, device=DEVICE)
        placed.copy_(host)
    return placed.view(getattr(torch, values.dtype.name))


def numpy_of(tensor: Array) -> Array:
    from tests.dtypes import NUMPY

    dtype = NUMPY[str(tensor.dtype).removeprefix("torch.")]
    if dtype.kind in "cb" or dtype.itemsize not in _RAW:
        return tensor.cpu().numpy()
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(integers[dtype.itemsize]).cpu().numpy()
    return bits.view(dtype)


# ---- communicators ---------------------------------------------------------------------------------


class Mirrored:
    """A communicator for NumPy arrays whose collectives run on copies on the GPU. They have ended on return."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self._comm, attribute)
        if attribute not in COLLECTIVES:
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            copies = Copies()
            there = [copies.of(arg) for arg in args]
            named = {key: copies.of(arg) for key, arg in kwargs.items()}
            result = value(*there, **named)
            self._comm.synchronize()
            copies.bring_back()
            return copies.original_of(result)

        return call


class Copies:
    """The arrays of one call, and lists of them, with what stands for them on the GPU."""

    def __init__(self) -> None:
        self._arrays: list[tuple[Array, Array]] = []
        self._lists: list[tuple[Any, Any]] = []

    def of(self, arg: Any) -> Any:
        if isinstance(arg, np.ndarray):
            for here, tensor in self._arrays:
                if here is arg:
                    return tensor
            self._arrays.append((arg, arg if is_emulated() else _within(arg, self._arrays)))
            return self._arrays[-1][1]
        if isinstance(arg, (list, tuple)):
            self._lists.append((arg, type(arg)(self.of(one) for one in arg)))
            return self._lists[-1][1]
        return arg

    def bring_back(self) -> None:
        for here, tensor in self._arrays:
            if here is not tensor and here.flags.writeable:
                raw(here)[...] = raw(numpy_of(tensor))

    def original_of(self, result: Any) -> Any:
        for here, there in (*self._arrays, *self._lists):
            if result is there:
                return here
        if isinstance(result, (list, tuple)):
            return type(result)(self.original_of(one) for one in result)
        return numpy_of(result) if hasattr(result, "data_ptr") else result


def _within(values: Array, pairs: list[tuple[Array, Array]]) -> Array:
    """A tensor for ``values``; part of another's if ``values`` is part of that one's contiguous memory."""
    import torch

    for here, tensor in pairs:
        offset = values.ctypes.data - here.ctypes.data
        inside = offset >= 0 and offset + values.nbytes <= here.nbytes
        if inside and values.nbytes and here.flags.c_contiguous and values.flags.c_contiguous:
            flat = tensor.view(-1)[offset // values.itemsize :][: values.size]
            return flat.view(values.shape)
        around = -offset >= 0 and here.nbytes - offset <= values.nbytes
        if around and here.nbytes and here.flags.c_contiguous and values.flags.c_contiguous:
            whole = tensor_of(values)
            part = whole.view(-1)[-offset // values.itemsize :][: here.size]
            tensor.set_(part.view(here.shape))
            assert isinstance(tensor, torch.Tensor)
            return whole
    return tensor_of(values)


def mirrored(comm: Any, mode: str | None, body: Any, *args: Any) -> Any:
    """``body(comm, *args)`` with a communicator on the GPU, which works in ``mode``."""
    with own_stream():
        comm.use_device(name())
        assert mode is None or comm.device_mode == mode, (comm.device_mode, mode)
        return body(Mirrored(comm), *args)
