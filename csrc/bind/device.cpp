#include "base/device.h"

#include <pybind11/stl.h>

#include "base/runtime.h"
#include "bind/arguments.h"
#include "bind/bind.h"

namespace ringcomm::bind {
namespace py = pybind11;

void bind_device(py::module_& module) {
  module.attr("RUNTIME") = runtime::name();
  py::class_<DeviceInfo>(module, "DeviceInfo")
      .def_readonly("name", &DeviceInfo::name)
      .def_readonly("total_bytes", &DeviceInfo::total_bytes)
      .def_readonly("num_multiprocessors", &DeviceInfo::num_multiprocessors)
      .def_property_readonly("compute_capability", [](const DeviceInfo& info) {
        return py::make_tuple(info.compute_major, info.compute_minor);
      });
  py::class_<DeviceProbe>(module, "DeviceProbe")
      .def_readonly("count", &DeviceProbe::count)
      .def_readonly("reason", &DeviceProbe::reason)
      .def_readonly("driver_version", &DeviceProbe::driver_version)
      .def_readonly("runtime_version", &DeviceProbe::runtime_version)
      .def_readonly("devices", &DeviceProbe::devices);
  module.def("cuda_probe", &probe_devices, py::call_guard<py::gil_scoped_release>());
  module.def("current_device", &runtime::current_device);
  module.def(
      "device_of", [](uintptr_t address) { return runtime::device_of(pointer<const void>(address)); },
      py::arg("address"));
  module.def(
      "link_between",
      [](int device, int peer) {
        const runtime::Link link = runtime::link_between(device, peer);
        return std::make_pair(link.kind, link.source);
      },
      py::arg("device"), py::arg("peer"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace ringcomm::bind
