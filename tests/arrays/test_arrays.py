"""What ringcomm.arrays promises about every kind of array."""

import gc
import subprocess
import sys
import weakref

import numpy as np
import pytest

from ringcomm import _core, arrays
from ringcomm.arrays import array_view
from ringcomm.errors import UsageError
from tests.dtypes import NUMPY, needs_ml_dtypes

torch = pytest.importorskip("torch")

# NumPy's own; those of ml_dtypes have a test to themselves.
DTYPES = [name for name in _core.DTYPES if not needs_ml_dtypes(name)]
ML_DTYPES = [name for name in _core.DTYPES if needs_ml_dtypes(name)]


class DlpackOnly:
    """A CPU array of some other library: nothing but the DLPack protocol."""

    def __init__(self, array, *, versioned=True, device=None):
        self._array = array
        self._versioned = versioned
        self._device = device

    def __dlpack_device__(self):
        return self._device or self._array.__dlpack_device__()

    def __dlpack__(self, **kwargs):
        if not self._versioned and kwargs:
            raise TypeError("unexpected keyword argument 'max_version'")
        return self._array.__dlpack__(**kwargs)


class FakeCuda:
    __cuda_array_interface__ = {"version": 3, "shape": (1,), "typestr": "<f4", "data": (16, False)}


def kinds(array):
    yield "numpy", array
    yield "torch", torch.from_numpy(array)
    yield "dlpack", DlpackOnly(array)
    yield "dlpack", DlpackOnly(array, versioned=False)
    yield "dlpack", DlpackOnly(torch.from_numpy(array), versioned=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (2, 0, 3)])
def test_view_gives_pointer_count_and_dtype_of_every_kind(dtype, shape):
    array = np.ones(shape, dtype)
    for kind, x in kinds(array):
        view = arrays.view(x, writable=True)
        if array.size:  # libraries may give null for an empty array
            assert view.ptr == array.ctypes.data
        assert view.num_elems == array.size
        assert view.num_bytes == array.nbytes
        assert view.dtype == _core.DTYPES[dtype]
        assert view.dtype_name == dtype
        assert tuple(view.shape) == shape
        assert view.contiguous
        assert view.writable
        assert (view.kind, view.device) == (kind, "cpu")


@pytest.mark.parametrize("dtype", ML_DTYPES)
def test_dtypes_of_torch_and_of_ml_dtypes_that_numpy_lacks(dtype):
    size = 2 if dtype == "bfloat16" else 1
    tensor = torch.full((2, 3), 2.0).to(getattr(torch, dtype))
    for kind, x in (
        ("torch", tensor),
        ("dlpack", DlpackOnly(tensor)),
        ("dlpack", DlpackOnly(tensor, versioned=False)),
    ):
        view = arrays.view(x, writable=True)
        assert (view.dtype_name, view.dtype) == (dtype, _core.DTYPES[dtype])
        assert (view.num_bytes, view.kind) == (6 * size, kind)
        assert view.ptr == tensor.data_ptr()
    copy = arrays.contiguous_copy(tensor.t())
    assert copy.dtype == tensor.dtype
    assert copy.is_contiguous()
    copy.zero_()
    arrays.copy_back(copy, tensor.t())
    zero = 0.0 if dtype != "float8_e8m0fnu" else float(copy[0, 0])  # it has no zero
    assert tensor.float().tolist() == [[zero] * 3] * 2

    pytest.importorskip("ml_dtypes")
    array = np.full((2, 3), 2.0, np.float32).astype(NUMPY[dtype])
    view = arrays.view(array, writable=True)
    assert (view.dtype_name, view.num_bytes, view.kind) == (dtype, 6 * size, "numpy")
    assert view.ptr == array.ctypes.data
    exporter = DlpackOnly(torch.full((2, 3), 2.0).to(getattr(torch, dtype)).t())
    copy = arrays.contiguous_copy(exporter)
    assert copy.dtype == NUMPY[dtype]
    assert copy.astype(np.float32).tolist() == [[2.0] * 2] * 3
    assert arrays.empty_like(exporter, (4,)).dtype == NUMPY[dtype]
    arrays.copy_back(np.full((3, 2), 4.0, np.float32).astype(NUMPY[dtype]), exporter)
    assert exporter._array.float().tolist() == [[4.0] * 2] * 3


def test_offset_views_point_at_their_first_element():
    array = np.arange(12, dtype=np.float32)
    for _, x in (("numpy", array[5:]), ("torch", torch.from_numpy(array)[5:])):
        assert arrays.view(x, writable=True).ptr == array.ctypes.data + 20
    assert arrays.view(DlpackOnly(torch.from_numpy(array)[5:]), writable=True).ptr == (
        array.ctypes.data + 20
    )


@pytest.mark.parametrize("make", [lambda a: a, torch.from_numpy, lambda a: DlpackOnly(a)])
def test_noncontiguous_arrays_are_copied_and_copied_back(make):
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    x = make(array[:, ::2])
    view = arrays.view(x, writable=True)
    assert not view.contiguous
    assert (view.num_elems, view.num_bytes, tuple(view.shape)) == (12, 48, (4, 3))
    copy = arrays.contiguous_copy(x)
    assert arrays.view(copy, writable=True).contiguous
    assert np.array_equal(np.asarray(copy), array[:, ::2])
    copy += 100
    assert array[0, 0] == 0  # the copy aliases nothing
    arrays.copy_back(copy, x)
    assert array[0, 0] == 100
    assert array[3, 4] == 122
    assert array[0, 1] == 1


def test_contiguous_copy_keeps_shape_also_of_0_dim():
    assert arrays.contiguous_copy(np.array(3, np.float32)).shape == ()
    assert arrays.contiguous_copy(torch.tensor(3.0)).shape == ()
    assert arrays.contiguous_copy(torch.zeros(2, 3).t()).shape == (3, 2)
    assert not arrays.contiguous_copy(torch.zeros(3, requires_grad=True)).requires_grad


def test_resolved_complex_tensors_are_accepted():
    x = torch.tensor([1 + 2j]).conj().resolve_conj()
    assert arrays.view(x, writable=True).dtype_name == "complex64"
    real = arrays.view(torch.zeros(3, dtype=torch.complex128).real, writable=True)
    assert (real.dtype_name, real.contiguous) == ("float64", False)


def test_channels_last_tensor_is_not_taken_for_contiguous():
    x = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert not arrays.view(x, writable=True).contiguous


def test_misaligned_numpy_array_is_not_taken_for_contiguous():
    raw = np.zeros(17, np.uint8)
    assert not arrays.view(raw[1:].view(np.float32), writable=True).contiguous


def test_empty_like_allocates_in_the_library_of_the_array():
    x = torch.zeros(2, 2, dtype=torch.float16)
    assert isinstance(arrays.empty_like(x), torch.Tensor)
    assert arrays.empty_like(x).shape == (2, 2)
    assert arrays.empty_like(x, (5,)).dtype == torch.float16
    assert arrays.empty_like(np.zeros((2, 3), np.int64)).shape == (2, 3)
    made = arrays.empty_like(DlpackOnly(np.zeros(4, np.int32)), (2, 2))
    assert isinstance(made, np.ndarray)
    assert made.dtype == np.int32
    assert made.shape == (2, 2)


def test_view_keeps_the_memory_alive():
    class Exporter:
        """Its array is dropped as soon as nobody holds the capsule."""

        def __init__(self):
            self.array = np.zeros(8, np.float32)

        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, **kwargs):
            return self.array.__dlpack__(**kwargs)

    exporter = Exporter()
    alive = weakref.ref(exporter.array)
    view = arrays.view(exporter, writable=True)
    exporter.array = None
    del exporter
    gc.collect()
    assert alive() is not None
    del view
    gc.collect()
    assert alive() is None


def test_parameters_and_tensors_that_require_grad_are_accepted():
    leaf = torch.nn.Parameter(torch.zeros(3))
    assert arrays.view(leaf, writable=True).ptr == leaf.data_ptr()
    source = torch.ones(3)
    arrays.copy_back(source, leaf)
    assert leaf.detach().tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.zeros(2, dtype=torch.complex32), "torch.complex32 is not supported"),
        (lambda: torch.zeros(2, dtype=torch.complex64).conj(), "resolve_conj"),
        (lambda: torch.zeros(2, dtype=torch.complex128).conj()[:1], "resolve_conj"),
        (lambda: DlpackOnly(torch.zeros(2, dtype=torch.complex64).conj()), "cannot be exported"),
        (lambda: torch.zeros(2, dtype=torch.complex64).conj().imag, "resolve_neg"),
        (lambda: torch.zeros(2, device="meta"), "meta device has no values"),
        (lambda: torch.zeros(2, 2).to_sparse(), "sparse tensor.*to_dense"),
        (lambda: torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8), "dequantize"),
        (lambda: torch.zeros(1).expand(4), "share memory"),
        (lambda: torch.nn.utils.rnn.pack_sequence([torch.zeros(2)]), "no array"),
        (lambda: np.zeros(2, ">f4"), "foreign byte order"),
        (lambda: np.zeros(2, ">c8"), "foreign byte order"),
        (lambda: np.zeros(2, np.clongdouble), "is not supported; supported are float32"),
        (lambda: np.zeros(2, np.longdouble), "is not supported; supported are float32"),
        (lambda: np.array(["a"]), "is not supported"),
        (lambda: np.ma.masked_array([1.0], [True]), "masked"),
        (lambda: np.broadcast_to(np.zeros(1), 4), "read-only"),
        (lambda: np.lib.stride_tricks.as_strided(np.zeros(1), (4,), (0,)), "share memory"),
        (lambda: DlpackOnly(torch.zeros(2, dtype=torch.complex32)), "complex32 is not supported"),
        (lambda: DlpackOnly(np.zeros(2), device=(2, 0)), "CUDA array.*this build has no CUDA"),
        (lambda: DlpackOnly(np.zeros(2), device=(8, 0)), "DLPack device"),
        (FakeCuda, "this is a CUDA array.*python -m ringcomm.info"),
        (lambda: 3.0, "scalar.*0-dimensional"),
        (lambda: np.float32(3), "scalar.*0-dimensional"),
        (lambda: [1.0, 2.0], "a list, which is no array"),
        (lambda: None, "a NoneType, which is no array"),
        (lambda: b"abc", "no array"),
    ],
)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_refused_arrays_say_why(make, reason, monkeypatch):
    monkeypatch.setattr(array_view, "HAS_CUDA", False)
    with pytest.raises(UsageError, match=f"(?s)grad: .*{reason}"):
        arrays.view(make(), writable=True, role="grad")


def test_tensor_subclass_without_memory_is_refused():
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls):
            return torch.Tensor._make_wrapper_subclass(cls, (2,))

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

        def to_local(self):
            return torch.zeros(2)

    with pytest.raises(UsageError, match="to_local"):
        arrays.view(Wrapper(), writable=False)


def test_plain_tensor_subclass_is_accepted():
    class Named(torch.Tensor):
        pass

    assert arrays.view(torch.zeros(2).as_subclass(Named), writable=True).num_elems == 2


def test_functional_transform_tensor_is_refused():
    seen = []

    def inner(x):
        with pytest.raises(UsageError, match="accessible memory"):
            arrays.view(x, writable=True)
        seen.append(True)
        return x

    torch.vmap(inner)(torch.zeros(2, 2))
    assert seen


def test_read_only_arrays_are_fine_to_read_and_refused_to_write():
    array = np.zeros(3, np.float32)
    array.flags.writeable = False
    assert not arrays.view(array, writable=False).writable
    with pytest.raises(UsageError, match="read-only.*writable copy"):
        arrays.view(array, writable=True)
    with pytest.raises(UsageError, match="read-only"):
        arrays.copy_back(np.ones(3, np.float32), array)
    if np.lib.NumpyVersion(np.__version__) >= "2.1.0":  # exports a versioned, read-only capsule
        assert not arrays.view(DlpackOnly(array), writable=False).writable
        with pytest.raises(UsageError, match="read-only"):
            arrays.view(DlpackOnly(array), writable=True)


def test_arrays_of_immutable_libraries_are_refused_to_write():
    immutable = type("ArrayImpl", (DlpackOnly,), {"__module__": "jaxlib._jax"})
    x = immutable(np.zeros(2, np.float32))
    assert not arrays.view(x, writable=False).writable
    with pytest.raises(UsageError, match="jaxlib are immutable"):
        arrays.view(x, writable=True)


def test_a_capsule_is_not_consumed_and_a_used_one_is_refused():
    capsule = torch.zeros(3).__dlpack__()
    _core.dlpack_view(capsule)
    _core.dlpack_view(capsule)
    torch.from_dlpack(capsule)
    with pytest.raises(UsageError, match="used capsule"):
        _core.dlpack_view(capsule)


def test_numpy_arrays_work_without_importing_torch():
    code = (
        "import sys, numpy as np, ringcomm\n"
        "from ringcomm import arrays, codec\n"
        "arrays.view(np.zeros(3, np.float32), writable=True)\n"
        "codec('int4').encode(np.zeros(100, np.float32))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
