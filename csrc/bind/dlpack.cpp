// Reads arrays of other libraries: DLPack capsules (plain and versioned) and NumPy's __array_struct__.
//
// Nothing is taken over: the capsule stays its own owner (it is not renamed to "used_dltensor"), so
// whoever keeps the capsule alive keeps the memory alive, and the capsule's destructor frees it.
// The structs below restate the stable ABI of dmlc/dlpack 0.6 .. 1.x and of NumPy's array interface.
#include <cstdint>
#include <string>

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

}  // namespace

void bind_dlpack(py::module_& module) {
  module.def("dlpack_view", &dlpack_view, py::arg("capsule"));
  module.def("array_struct_view", &array_struct_view, py::arg("capsule"));
}

}  // namespace ringcomm::bind
