// Reads arrays of other libraries: DLPack capsules (plain and versioned) and NumPy's __array_struct__.
//
// Nothing is taken over: the capsule stays its own owner (it is not renamed to "used_dltensor"), so
// whoever keeps the capsule alive keeps the memory alive, and the capsule's destructor frees it.
// The structs below restate the stable ABI of dmlc/dlpack 0.6 .. 1.x and of NumPy's array interface.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "base/error.h"
#include "bind/bind.h"

namespace ringcomm::bind {
namespace py = pybind11;
namespace {

struct DlDevice {
  int32_t device_type;
  int32_t device_id;
};

struct DlDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct DlTensor {
  void* data;
  DlDevice device;
  int32_t ndim;
  DlDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null means C-contiguous
  uint64_t byte_offset;
};

struct DlManagedTensor {
  DlTensor tensor;
  void* manager;
  void (*deleter)(DlManagedTensor*);
};

struct DlManagedTensorVersioned {
  uint32_t major;
  uint32_t minor;
  void* manager;
  void (*deleter)(DlManagedTensorVersioned*);
  uint64_t flags;
  DlTensor tensor;
};

constexpr uint64_t kDlReadOnly = 1;
constexpr int32_t kDlCpu = 1;
constexpr int32_t kDlCuda = 2;
constexpr uint8_t kDlComplex = 5;

// The start of DLPackExchangeAPI, what __dlpack_c_exchange_api__ of a type points to (dlpack 1.3).
struct DlExchangeApi {
  uint32_t major;
  uint32_t minor;
  const void* previous;
  const void* allocate;
  const void* export_array;
  const void* import_array;
  int (*describe)(void* array, DlTensor* out);  // borrows all of `out` from the array; 0 or a Python exception
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);  // likewise; of the calling thread
};

// NumPy's PyArrayInterface, what __array_struct__ points to.
struct ArrayStruct {
  int two;
  int nd;
  char typekind;
  int itemsize;
  int flags;
  intptr_t* shape;
  intptr_t* strides;
  void* data;
  PyObject* descr;
};

bool is_c_contiguous(const DlTensor& tensor) {
  if (tensor.strides == nullptr) return true;
  for (int i = 0; i < tensor.ndim; ++i) {
    if (tensor.shape[i] == 0) return true;
  }
  int64_t expected = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

// (ptr, dtype code, dtype bits, lanes, shape, strides in elements, contiguous, read_only, device type, device id)
py::tuple dlpack_view(const py::capsule& capsule) {
  const char* name = capsule.name();
  const std::string kind = name == nullptr ? "" : name;
  const DlTensor* tensor = nullptr;
  bool read_only = false;
  if (kind == "dltensor") {
    tensor = &static_cast<DlManagedTensor*>(capsule.get_pointer())->tensor;
  } else if (kind == "dltensor_versioned") {
    const auto* managed = static_cast<DlManagedTensorVersioned*>(capsule.get_pointer());
    RC_CHECK(managed->major == 1, "a DLPack capsule of version ", managed->major, ".", managed->minor,
             "; this build reads versions 0 and 1");
    tensor = &managed->tensor;
    read_only = (managed->flags & kDlReadOnly) != 0;
  } else {
    RC_FAIL(usage, "expected a DLPack capsule named 'dltensor' or 'dltensor_versioned', found '", kind,
            "' (a used capsule cannot be read again)");
  }
  py::tuple shape(tensor->ndim);
  py::tuple strides(tensor->ndim);
  int64_t dense_stride = 1;
  for (int i = tensor->ndim - 1; i >= 0; --i) {
    shape[i] = py::int_(tensor->shape[i]);
    strides[i] = py::int_(tensor->strides == nullptr ? dense_stride : tensor->strides[i]);
    dense_stride *= tensor->shape[i];
  }
  const uintptr_t data = reinterpret_cast<uintptr_t>(tensor->data) + static_cast<uintptr_t>(tensor->byte_offset);
  return py::make_tuple(data, static_cast<int>(tensor->dtype.code), static_cast<int>(tensor->dtype.bits),
                        static_cast<int>(tensor->dtype.lanes), shape, strides, is_c_contiguous(*tensor), read_only,
                        tensor->device.device_type, tensor->device.device_id);
}

// (ptr, flags) of a NumPy array, from array.__array_struct__. Flags are NumPy's: 1 C-contiguous,
// 0x100 aligned, 0x200 native byte order, 0x400 writable. An order of magnitude cheaper than
// array.ctypes.data or array.__array_interface__.
py::tuple array_struct_view(const py::capsule& capsule) {
  const auto* view = static_cast<const ArrayStruct*>(capsule.get_pointer());
  RC_CHECK(view != nullptr && view->two == 2, "not a capsule of __array_struct__");
  return py::make_tuple(reinterpret_cast<uintptr_t>(view->data), view->flags);
}

// Views of one library's arrays without going through their Python attributes, which cost a microsecond.
struct ArrayViewer {
  static constexpr const char* kName = "ringcomm.ArrayViewer";
  static constexpr size_t kFields = 11;  // of arrays.ArrayView

  const DlExchangeApi* api;
  PyTypeObject* view_type;
  PyObject* fallback;
  PyObject* library;
  PyObject* cpu;
  PyObject* cuda_devices;  // a tuple of names, by index
  PyObject* is_conj;
  PyObject* is_neg;
  int dtypes[32][17];  // the core's, by DLPack's code and bytes; -1: none

  static void destroy(PyObject* capsule) {
    auto* viewer = static_cast<ArrayViewer*>(PyCapsule_GetPointer(capsule, kName));
    for (PyObject* object : {reinterpret_cast<PyObject*>(viewer->view_type), viewer->fallback, viewer->library,
                             viewer->cpu, viewer->cuda_devices, viewer->is_conj, viewer->is_neg}) {
      Py_DECREF(object);
    }
    delete viewer;
  }

  // False also if the question raises.
  static bool answers_no(PyObject* array, PyObject* question) {
    PyObject* const answer = PyObject_CallMethodNoArgs(array, question);
    Py_XDECREF(answer);
    return answer == Py_False;
  }

  // A view of an ordinary array; null, maybe with an exception set, for any other.
  PyObject* view(PyObject* array) const {
    DlTensor tensor;
    if (api->describe(array, &tensor) != 0) return nullptr;
    const size_t item_bytes = tensor.dtype.bits / 8;
    if (tensor.dtype.lanes != 1 || tensor.dtype.code >= 32 || item_bytes > 16) return nullptr;
    const int dtype = dtypes[tensor.dtype.code][item_bytes];
    const uintptr_t address = reinterpret_cast<uintptr_t>(tensor.data) + static_cast<uintptr_t>(tensor.byte_offset);
    PyObject* device = cpu;
    void* stream = nullptr;
    if (tensor.device.device_type != kDlCpu) {
      device = cuda_device(tensor.device);
      // An address that is no multiple of item_bytes is for the fallback, too.
      if (device == nullptr || dtype < 0 || address % item_bytes != 0) return nullptr;
      if (api->current_stream(kDlCuda, tensor.device.device_id, &stream) != 0) return nullptr;
    }
    int64_t count = 1;
    for (int i = 0; i < tensor.ndim; ++i) count *= tensor.shape[i];
    if (dtype < 0 || !is_c_contiguous(tensor) || (address == 0 && count != 0)) return nullptr;
    // Not in DLPack: lazy conjugates and negatives, whose memory holds other values.
    if (!answers_no(array, is_neg) || (tensor.dtype.code == kDlComplex && !answers_no(array, is_conj))) return nullptr;

    PyObject* const result = view_type->tp_alloc(view_type, kFields);
    PyObject* const shape = PyTuple_New(tensor.ndim);
    if (result == nullptr || shape == nullptr) {
      Py_XDECREF(result);
      Py_XDECREF(shape);
      return nullptr;
    }
    for (int i = 0; i < tensor.ndim; ++i) PyTuple_SET_ITEM(shape, i, PyLong_FromLongLong(tensor.shape[i]));
    PyTuple_SET_ITEM(result, 0, PyLong_FromUnsignedLongLong(address));
    PyTuple_SET_ITEM(result, 1, PyLong_FromLongLong(count));
    PyTuple_SET_ITEM(result, 2, PyLong_FromLongLong(count * static_cast<int64_t>(item_bytes)));
    PyTuple_SET_ITEM(result, 3, PyLong_FromLong(dtype));
    PyTuple_SET_ITEM(result, 4, py::bool_(true).release().ptr());  // contiguous
    PyTuple_SET_ITEM(result, 5, py::bool_(true).release().ptr());  // writable
    PyTuple_SET_ITEM(result, 6, py::handle(library).inc_ref().ptr());
    PyTuple_SET_ITEM(result, 7, py::handle(device).inc_ref().ptr());
    PyTuple_SET_ITEM(result, 8, py::handle(array).inc_ref().ptr());
    PyTuple_SET_ITEM(result, 9, shape);
    PyTuple_SET_ITEM(result, 10, PyLong_FromVoidPtr(stream));
    return result;
  }

  // The name of a CUDA device; null if it has no short cut. Borrowed.
  PyObject* cuda_device(const DlDevice& device) const {
    if (device.device_type != kDlCuda || device.device_id < 0) return nullptr;
    if (device.device_id >= PyTuple_GET_SIZE(cuda_devices) || api->current_stream == nullptr) return nullptr;
    return PyTuple_GET_ITEM(cuda_devices, device.device_id);
  }

  // viewer(array, writable, role)
  static PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t num_args) {
    const auto* viewer = static_cast<const ArrayViewer*>(PyCapsule_GetPointer(self, kName));
    if (num_args > 0) {
      PyObject* const view = viewer->view(args[0]);
      if (view != nullptr) return view;
      PyErr_Clear();
    }
    return PyObject_Vectorcall(viewer->fallback, args, static_cast<size_t>(num_args), nullptr);
  }
};

PyMethodDef viewer_method = {"view", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&ArrayViewer::call)),
                             METH_FASTCALL, "view(array, writable, role)"};

py::object array_viewer(const py::capsule& exchange_api, const py::type& view_type,
                        const std::vector<std::tuple<int, int, int>>& dtypes, const std::string& library,
                        const py::list& cuda_devices, const py::function& fallback) {
  const auto* api = static_cast<const DlExchangeApi*>(PyCapsule_GetPointer(exchange_api.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  if (api->major != 1 || api->describe == nullptr) return fallback;
  auto* viewer = new ArrayViewer;
  viewer->api = api;
  viewer->view_type = reinterpret_cast<PyTypeObject*>(py::object(view_type).release().ptr());
  viewer->fallback = py::object(fallback).release().ptr();
  viewer->library = py::str(library).release().ptr();
  viewer->cpu = py::str("cpu").release().ptr();
  viewer->cuda_devices = py::tuple(cuda_devices).release().ptr();
  viewer->is_conj = PyUnicode_InternFromString("is_conj");
  viewer->is_neg = PyUnicode_InternFromString("is_neg");
  for (auto& row : viewer->dtypes) std::fill(std::begin(row), std::end(row), -1);
  for (const auto& [code, bits, dtype] : dtypes) viewer->dtypes[code][bits / 8] = dtype;
  const py::object self =
      py::reinterpret_steal<py::object>(PyCapsule_New(viewer, ArrayViewer::kName, &ArrayViewer::destroy));
  return py::reinterpret_steal<py::object>(PyCFunction_New(&viewer_method, self.ptr()));
}

}  // namespace

void bind_dlpack(py::module_& module) {
  module.def("array_viewer", &array_viewer, py::arg("exchange_api"), py::arg("view_type"), py::arg("dtypes"),
             py::arg("library"), py::arg("cuda_devices"), py::arg("fallback"));
  module.def("dlpack_view", &dlpack_view, py::arg("capsule"));
  module.def("array_struct_view", &array_struct_view, py::arg("capsule"));
}

}  // namespace ringcomm::bind
