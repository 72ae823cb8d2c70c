// The set-up of a group's GPUs, step by step as ringcomm/device.py takes them. What travels is bytes.
#include "transport/device_group.h"

#include <pybind11/stl.h>

#include <cstring>
#include <type_traits>

#include "algo/on_device.h"
#include "bind/arguments.h"
#include "bind/bind.h"

namespace ringcomm::bind {
namespace py = pybind11;
namespace {

template <typename Record>
py::bytes to_bytes(const Record& record) {
  static_assert(std::is_trivially_copyable<Record>::value, "travels");
  return py::bytes(reinterpret_cast<const char*>(&record), sizeof(Record));
}

template <typename Record>
std::vector<Record> from_bytes(const std::vector<std::string>& rows, const char* what) {
  std::vector<Record> records(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].size() != sizeof(Record)) {
      RC_FAIL(wire, what, " of rank ", i, " has ", rows[i].size(), " bytes, expected ", sizeof(Record));
    }
    std::memcpy(&records[i], rows[i].data(), sizeof(Record));
  }
  return records;
}

}  // namespace

void bind_device_group(py::module_& module) {
  module.attr("DEVICE_MODES") = ids_by_name<DeviceMode>(kNumDeviceModes, device_mode_name);
  module.attr("MAX_DEVICE_RANKS") = kMostDeviceRanks;
  module.def(
      "device_facts",
      [](int device, const std::optional<int>& mode, int64_t slab_bytes, int64_t direct_bytes) {
        std::optional<DeviceMode> wanted;
        if (mode) wanted = checked<DeviceMode>(*mode, kNumDeviceModes, "device mode");
        return to_bytes(device_facts(device, wanted, slab_bytes, direct_bytes));
      },
      py::arg("device"), py::arg("mode"), py::arg("slab_bytes"), py::arg("direct_bytes"));
  module.def(
      "reachable_devices",
      [](int device, const std::vector<std::string>& facts) {
        return reachable_devices(device, from_bytes<DeviceFacts>(facts, "what is known of the GPU"));
      },
      py::arg("device"), py::arg("facts"));

  module.def(
      "device_ordinals",
      [](const std::vector<std::string>& facts) {
        return ordinals_of(from_bytes<DeviceFacts>(facts, "what is known of the GPU"));
      },
      py::arg("facts"));
  py::class_<runtime::SharedMemory>(module, "SharedDeviceMemory")
      .def(py::init([](int device, int64_t num_bytes) {
             py::gil_scoped_release release;
             DeviceRegion::free_dropped();
             return runtime::SharedMemory::allocate(device, num_bytes);
           }),
           py::arg("device"), py::arg("num_bytes"))
      .def_property_readonly("handle", [](const runtime::SharedMemory& memory) { return to_bytes(memory.handle()); })
      .def("export_descriptor", &runtime::SharedMemory::export_descriptor);
  py::class_<DeviceRegion, std::shared_ptr<DeviceRegion>>(module, "DeviceRegion")
      .def_property_readonly("address",
                             [](const DeviceRegion& region) { return reinterpret_cast<uintptr_t>(region.own()); })
      .def_property_readonly("num_bytes", &DeviceRegion::num_bytes);

  py::class_<DeviceGroup, std::shared_ptr<DeviceGroup>>(module, "DeviceGroup")
      .def(py::init(
               [](int rank, int device, const std::vector<std::string>& facts, const std::vector<uint32_t>& reachable) {
                 const auto all = from_bytes<DeviceFacts>(facts, "what is known of the GPU");
                 RC_CHECK(reachable.size() == all.size(), "need facts and reachable devices of every rank");
                 const DeviceSetup setup = agree_on_devices(all, reachable);
                 py::gil_scoped_release release;
                 return make_device_group(rank, static_cast<int>(all.size()), device, setup);
               }),
           py::arg("rank"), py::arg("device"), py::arg("facts"), py::arg("reachable"))
      .def_property_readonly("mode", [](const DeviceGroup& group) { return device_mode_name(group.mode()); })
      .def_property_readonly("reason", &DeviceGroup::reason)
      .def_property_readonly("num_blocks", [](const DeviceGroup& group) { return group.layout().num_blocks; })
      .def_property_readonly(
          "slab_bytes",
          [](const DeviceGroup& group) { return group.has_slab() ? group.layout().total_bytes() : int64_t{0}; })
      .def_property_readonly("handle", [](const DeviceGroup& group) { return to_bytes(group.handle()); })
      .def("export_descriptor", &DeviceGroup::export_descriptor)
      .def(
          "open",
          [](DeviceGroup& group, const std::vector<std::string>& handles, const std::vector<int>& fds) {
            const auto records = from_bytes<runtime::MemoryHandle>(handles, "the handle");
            py::gil_scoped_release release;
            group.open(records, fds);
          },
          py::arg("handles"), py::arg("fds"))
      .def(
          "map_region",
          [](DeviceGroup& group, runtime::SharedMemory& own, int64_t num_bytes, const std::vector<std::string>& handles,
             const std::vector<int>& fds) {
            const auto records = from_bytes<runtime::MemoryHandle>(handles, "the handle");
            py::gil_scoped_release release;
            return group.arrays.map_region(std::move(own), num_bytes, records, fds);
          },
          py::arg("own"), py::arg("num_bytes"), py::arg("handles"), py::arg("fds"))
      .def_property_readonly("num_direct_calls",
                             [](const DeviceGroup& group) { return group.arrays.num_direct_calls.load(); });
}

}  // namespace ringcomm::bind
