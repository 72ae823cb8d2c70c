"""Views of arrays on GPUs, with objects that only say that they are there: their memory is the host's.

What real ones do is tested in tests/gpu.
"""

import ctypes
import sys
import types

import numpy as np
import pytest

from ringcomm import _core, arrays
from ringcomm.arrays import array_view, torch_arrays, viewers
from ringcomm.errors import UsageError
from tests.dtypes import NUMPY, needs_ml_dtypes

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def build_with_cuda(monkeypatch):
    monkeypatch.setattr(array_view, "HAS_CUDA", True)
    monkeypatch.setattr(_core, "device_of", lambda address: 1)
    monkeypatch.setattr(_core, "current_device", lambda: 0)


# ---- __cuda_array_interface__ --------------------------------------------------------------------


class Interface:
    """Speaks the interface for a NumPy array, as device 1."""

    def __init__(self, array, **changes):
        self.array = array
        self.changes = changes

    @property
    def __cuda_array_interface__(self):
        array = self.array
        return {
            "version": 3,
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data if array.size else 0, not array.flags.writeable),
            "strides": None if array.flags.c_contiguous else array.strides,
            "stream": None,
            **self.changes,
        }


class WithDtype(Interface):
    @property
    def dtype(self):
        return self.array.dtype


@pytest.mark.parametrize("dtype", [name for name in _core.DTYPES if not needs_ml_dtypes(name)])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (2, 0, 3)])
def test_the_cuda_array_interface_is_read(dtype, shape):
    array = np.ones(shape, dtype)
    view = arrays.view(Interface(array), writable=True)
    if array.size:
        assert view.ptr == array.ctypes.data
    assert (view.num_elems, view.num_bytes) == (array.size, array.nbytes)
    assert (view.dtype_name, view.shape, view.kind) == (dtype, shape, "cuda")
    assert view.contiguous
    assert view.writable
    assert view.device == ("cuda:1" if array.size else "cuda:0")


@pytest.mark.parametrize(
    ("changes", "stream"),
    [
        ({}, 0),
        ({"stream": 1}, 1),
        ({"stream": 2}, 2),
        ({"stream": 0x7F00DEADBEEF}, 0x7F00DEADBEEF),
        ({"version": 2}, 0),
    ],
)
def test_the_interface_says_which_stream(changes, stream):
    x = Interface(np.zeros(3, np.float32), **changes)
    assert arrays.view(x, writable=True).stream == stream


def test_strides_of_the_interface_say_whether_an_array_is_contiguous():
    whole = np.zeros((4, 6), np.float32)
    for array, contiguous in ((whole, True), (whole[:, ::2], False), (whole.T, False)):
        assert arrays.view(Interface(array), writable=True).contiguous == contiguous
    explicit = Interface(whole, strides=(24, 4))
    assert arrays.view(explicit, writable=True).contiguous
    one_row = Interface(whole[:1], strides=(999, 4))  # the stride of a single row says nothing
    assert arrays.view(one_row, writable=True).contiguous
    misaligned = Interface(np.zeros(17, np.uint8)[1:].view(np.float32))
    assert not arrays.view(misaligned, writable=True).contiguous


@pytest.mark.parametrize("dtype", [name for name in _core.DTYPES if needs_ml_dtypes(name)])
def test_dtypes_without_a_letter_come_from_the_array_or_its_size(dtype):
    pytest.importorskip("ml_dtypes")
    array = np.zeros(4, NUMPY[dtype])
    assert arrays.view(WithDtype(array), writable=True).dtype_name == dtype
    bare = Interface(array)
    if dtype == "bfloat16":
        assert arrays.view(bare, writable=True).dtype_name == dtype
    else:
        with pytest.raises(UsageError, match="is not supported"):
            arrays.view(bare, writable=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 1}, "version 1"),
        ({"stream": 0}, "stream 0"),
        ({"typestr": ">f4"}, "foreign byte order"),
        ({"mask": object()}, "mask"),
        ({"data": (16, True)}, "read-only"),
        ({"strides": (0,)}, "share memory"),
    ],
)
def test_interfaces_that_cannot_be_used_say_why(changes, reason):
    with pytest.raises(UsageError, match=f"grad: .*{reason}"):
        arrays.view(Interface(np.zeros(4, np.float32), **changes), writable=True, role="grad")


def test_read_only_interfaces_may_be_read():
    x = Interface(np.zeros(4, np.float32), data=(16, True))
    assert not arrays.view(x, writable=False).writable


def test_memory_of_no_device_is_refused(monkeypatch):
    monkeypatch.setattr(_core, "device_of", lambda address: -1)
    with pytest.raises(UsageError, match="belongs to no CUDA device"):
        arrays.view(Interface(np.zeros(4, np.float32)), writable=True)


def test_arrays_of_unknown_libraries_are_not_copied_or_made():
    x = Interface(np.zeros((4, 6), np.float32)[:, ::2])
    for call in (arrays.contiguous_copy, lambda x: arrays.copy_back(None, x)):
        with pytest.raises(UsageError, match="non-contiguous array of tests on cuda:1.*as_tensor"):
            call(x)
    with pytest.raises(UsageError, match="out: pass one.*on cuda:1"):
        arrays.empty_like(x)


# ---- CuPy ----------------------------------------------------------------------------------------


class Device:
    current = 0

    def __init__(self, index):
        self.id = index

    def __enter__(self):
        self.before, Device.current = Device.current, self.id

    def __exit__(self, *exc):
        Device.current = self.before


class CupyArray:
    """As much of cupy.ndarray as is used, on device 1."""

    def __init__(self, array):
        self.array = array
        self.device = Device(1)
        self.data = types.SimpleNamespace(ptr=array.ctypes.data)
        for name in ("dtype", "size", "shape", "strides", "flags"):
            setattr(self, name, getattr(array, name))

    __cuda_array_interface__ = {}  # never looked at: it would cost a synchronisation

    def copy(self, order):
        assert Device.current == 1
        return CupyArray(self.array.copy(order=order))

    def __setitem__(self, key, value):
        assert Device.current == 1
        self.array[key] = value.array


@pytest.fixture
def cupy(monkeypatch):
    module = types.ModuleType("cupy")
    module.ndarray = CupyArray
    module.cuda = types.SimpleNamespace(
        get_current_stream=lambda device: types.SimpleNamespace(ptr=1000 + device)
    )

    def empty(shape, dtype):
        assert Device.current == 1
        return CupyArray(np.empty(shape, dtype))

    module.empty = empty
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_cupy_arrays_come_with_the_stream_that_is_current_on_their_device(cupy):
    array = np.arange(12, dtype=np.float16).reshape(3, 4)
    view = arrays.view(CupyArray(array), writable=True)
    assert view.ptr == array.ctypes.data
    assert (view.num_elems, view.num_bytes, view.shape) == (12, 24, (3, 4))
    assert (view.dtype_name, view.kind, view.device) == ("float16", "cupy", "cuda:1")
    assert (view.stream, view.contiguous, view.writable) == (1001, True, True)
    assert not arrays.view(CupyArray(array[:, ::2]), writable=True).contiguous
    with pytest.raises(UsageError, match="share memory.*ascontiguousarray"):
        arrays.view(CupyArray(np.broadcast_to(array[:1], (3, 4))), writable=True)
    with pytest.raises(UsageError, match="is not supported"):
        arrays.view(CupyArray(np.array(["a"])), writable=True)


def test_cupy_arrays_are_copied_and_made_on_their_device(cupy):
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    x = CupyArray(array[:, ::2])
    copy = arrays.contiguous_copy(x)
    assert isinstance(copy, CupyArray)
    assert copy.flags.c_contiguous
    assert np.array_equal(copy.array, array[:, ::2])
    copy.array += 100
    arrays.copy_back(copy, x)
    assert array[3, 4] == 122
    assert array[0, 1] == 1
    made = arrays.empty_like(x, (5,))
    assert (made.shape, made.dtype) == ((5,), np.float32)
    assert Device.current == 0


# ---- torch ---------------------------------------------------------------------------------------


class Tensor:
    """What view_torch asks a tensor, answered for device 1."""

    is_cpu, is_cuda, is_meta = False, True, False
    device = types.SimpleNamespace(type="cuda", index=1)

    def __init__(self, tensor):
        self.tensor = tensor
        self.dtype, self.shape = tensor.dtype, tensor.shape

    def __getattr__(self, name):
        return getattr(self.tensor, name)


def test_torch_tensors_come_with_the_stream_that_is_current_on_their_device(monkeypatch):
    arrays.view(torch.zeros(1), writable=False)  # torch's dtypes are known from now on
    asked = []
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda device: asked.append(device) or types.SimpleNamespace(cuda_stream=77),
    )
    tensor = torch.zeros(3, 4, dtype=torch.bfloat16)
    view = torch_arrays.view_torch(Tensor(tensor), True, "x")
    assert (view.ptr, view.num_elems, view.num_bytes) == (tensor.data_ptr(), 12, 24)
    assert (view.dtype_name, view.kind, view.device) == ("bfloat16", "torch", "cuda:1")
    assert (view.stream, view.contiguous, view.writable) == (77, True, True)
    assert asked == [Tensor.device]
    assert not torch_arrays.view_torch(Tensor(tensor.t()), True, "x").contiguous


class DlTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


DESCRIBE = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DlTensor))
CURRENT_STREAM = ctypes.PYFUNCTYPE(
    ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p)
)


class ExchangeApi(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("unused", ctypes.c_void_p * 4),
        ("describe", DESCRIBE),
        ("current_stream", CURRENT_STREAM),
    )


def fast_viewer(monkeypatch, tensor, device, stream):
    """The short cut for torch, told that ``tensor`` is on ``device``."""
    shape = (ctypes.c_int64 * 2)(*tensor.shape)
    strides = (ctypes.c_int64 * 2)(*tensor.stride())

    def describe(_array, out):
        out[0] = DlTensor(tensor.data_ptr(), *device, 2, 2, 32, 1, shape, strides, 0)
        return 0

    def current_stream(device_type, device_id, out):
        assert (device_type, device_id) == device
        out[0] = stream
        return 0

    api = ExchangeApi((1, 3), (None,) * 4, DESCRIBE(describe), CURRENT_STREAM(current_stream))
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = (
        ctypes.py_object,
        (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
    )
    capsule = new(ctypes.addressof(api), b"dlpack_exchange_api", None)
    array_type = type("Array", (), {"__dlpack_c_exchange_api__": capsule, "api": api})
    return viewers._fast_viewer(array_type, "torch", lambda x, writable, role: "the other way")


def test_the_short_cut_takes_tensors_on_gpus(monkeypatch):
    x = torch.zeros(3, 4)
    view = fast_viewer(monkeypatch, x, (2, 3), 0x7F0012345678)(x, True, "x")
    assert view == arrays.ArrayView(
        x.data_ptr(), 12, 48, view.dtype, True, True, "torch", "cuda:3", x, (3, 4), 0x7F0012345678
    )
    assert view.dtype_name == "float32"
    odd = torch.zeros(13)[1:].view(3, 4)
    misaligned = odd.view(torch.uint8)[:, 2:14].view(3, 12)
    assert fast_viewer(monkeypatch, misaligned, (2, 3), 5)(x, True, "x") == "the other way"
    for device in ((10, 0), (2, 64), (2, -1)):
        assert fast_viewer(monkeypatch, x, device, 5)(x, True, "x") == "the other way"
    monkeypatch.setattr(array_view, "HAS_CUDA", False)
    assert fast_viewer(monkeypatch, x, (2, 3), 5)(x, True, "x") == "the other way"


# ---- DLPack --------------------------------------------------------------------------------------


def test_dlpack_arrays_on_gpus_are_asked_for_the_default_stream():
    class Exporter:
        def __init__(self, array):
            self.array, self.asked = array, []

        def __dlpack_device__(self):
            return (2, 3)

        def __dlpack__(self, **options):
            self.asked.append(options)
            options.pop("stream")
            return self.array.__dlpack__(**options)

    x = Exporter(np.zeros((2, 3), np.float32))
    view = arrays.view(x, writable=True)
    assert (view.kind, view.device, view.stream) == ("dlpack", "cuda:3", 1)
    assert view.ptr == x.array.ctypes.data
    assert x.asked == [{"max_version": (1, 0)}]
    strided = Exporter(np.zeros((2, 6), np.float32)[:, ::2])
    with pytest.raises(UsageError, match="non-contiguous array of tests on cuda:3"):
        arrays.contiguous_copy(strided)
    with pytest.raises(UsageError, match="out: pass one"):
        arrays.empty_like(x)


# ---- who takes what ------------------------------------------------------------------------------


def test_a_build_without_cuda_says_so(monkeypatch, cupy):
    monkeypatch.setattr(array_view, "HAS_CUDA", False)
    reason = "grad: this is a CUDA array .*this build has no CUDA .see python -m ringcomm.info"
    for x in (Interface(np.zeros(3)), CupyArray(np.zeros(3))):
        with pytest.raises(UsageError, match=reason):
            arrays.view(x, writable=True, role="grad")
    with pytest.raises(UsageError, match=reason):
        torch_arrays.view_torch(Tensor(torch.zeros(3)), True, "grad")


def test_places_without_business_on_a_gpu_say_so():
    on_cpu = arrays.view(np.zeros(3), writable=True)
    assert arrays.require_cpu(on_cpu, "x", "the reference") is on_cpu
    on_gpu = arrays.view(Interface(np.zeros(3)), writable=True)
    with pytest.raises(UsageError, match="x: an array on cuda:1, but the reference takes CPU"):
        arrays.require_cpu(on_gpu, "x", "the reference")
