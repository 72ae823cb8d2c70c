// ringcomm._c10d: built against one torch, with the pybind11 inside that torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "torch/backend.h"

namespace {
namespace py = pybind11;
using ringcomm::adapter::Core;
using ringcomm::adapter::RingBackend;

// ringcomm/adapter.py looks for this in the file before it loads it.
[[gnu::used]] const char kStamp[] = "ringcomm._c10d was built for torch " TORCH_VERSION;

template <typename T>
T* from_capsule(const py::object& capsule, const char* name) {
  auto* pointer = PyCapsule_GetPointer(capsule.ptr(), name);
  if (pointer == nullptr) throw py::error_already_set();
  return static_cast<T*>(pointer);
}

c10::intrusive_ptr<RingBackend> make_backend(const py::object& table, const py::object& comm, int rank, int size,
                                             double timeout_s, const std::string& group_name,
                                             const std::vector<uint64_t>& global_ranks, const py::object& use_device,
                                             const std::string& cpu_device) {
  auto core = std::make_shared<Core>(from_capsule<const rc_table>(table, RC_TABLE_CAPSULE),
                                     from_capsule<rc_comm>(comm, RC_COMM_CAPSULE));
  auto options = c10::make_intrusive<c10d::Backend::Options>(
      "ringcomm", std::chrono::milliseconds(static_cast<int64_t>(timeout_s * 1e3)));
  options->group_name = group_name;
  options->global_ranks_in_group = global_ranks;
  // The last reference may be dropped without the GIL, or after the interpreter.
  const std::shared_ptr<py::object> callable(new py::object(use_device), [](py::object* object) {
    if (Py_IsInitialized() == 0) {
      static_cast<void>(object->release());
      delete object;
      return;
    }
    const py::gil_scoped_acquire acquire;
    delete object;
  });
  const auto use = [callable](const std::string& device) {
    const py::gil_scoped_acquire acquire;
    (*callable)(device);
  };
  return c10::make_intrusive<RingBackend>(std::move(core), rank, size, std::move(options), use, cpu_device);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "torch.distributed's backend \"ringcomm\"; see ringcomm/backend.py.";
  py::class_<RingBackend, c10d::Backend, c10::intrusive_ptr<RingBackend>>(module, "Backend")
      .def(py::init(&make_backend), py::arg("table"), py::arg("comm"), py::arg("rank"), py::arg("size"),
           py::arg("timeout_s"), py::arg("group_name"), py::arg("global_ranks"), py::arg("use_device"),
           py::arg("cpu_device") = "")
      .def_property_readonly("options", &RingBackend::getBackendOptions);
  module.def("shutdown_all", &RingBackend::shutdown_all);
}
