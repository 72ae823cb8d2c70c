// ringcomm._core.simt: base/runtime.h for Python tests, which there is in the emulated build only. Addresses and
// streams are integers.
#include <pybind11/stl.h>

#include <cstring>

#include "base/error.h"
#include "base/nvml.h"
#include "base/runtime.h"
#include "bind/bind.h"
#include "devices.h"
#include "gpu.h"
#include "kernels.h"

namespace ringcomm::bind {
namespace py = pybind11;
using namespace runtime;

namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

Stream stream_of(uintptr_t stream) { return reinterpret_cast<Stream>(stream); }
template <typename T = void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A guard that Python enters and leaves.
struct CurrentDevice {
  int device;
  std::unique_ptr<DeviceGuard> guard;
};

SharedMemory open_memory(int device, const py::bytes& handle, int fd) {
  const std::string text = handle;
  MemoryHandle parsed;
  RC_CHECK(text.size() == sizeof(parsed), "a handle has ", sizeof(parsed), " bytes, not ", text.size());
  std::memcpy(&parsed, text.data(), sizeof(parsed));
  return SharedMemory::open(device, parsed, fd);
}

}  // namespace

void bind_simt(py::module_& core) {
  py::module_ module = core.def_submodule("simt");
  module.def("available", [] {
    std::string reason;
    const bool is = available(&reason);
    return py::make_tuple(is, reason);
  });
  module.def("device_count", &device_count);
  module.def("current_device", &current_device);
  module.def("device_uuid", [](int device) {
    const DeviceUuid uuid = device_uuid(device);
    return py::bytes(reinterpret_cast<const char*>(uuid.data()), uuid.size());
  });
  module.def("reaches", &reaches);
  module.def("devices_with_context", &simt::devices_with_context);
  module.def("num_events_made", &simt::num_events_made);
  module.def("process_token", [] {
    const ProcessToken token = process_token();
    return py::bytes(reinterpret_cast<const char*>(token.data()), token.size());
  });
  module.def("shares_device_concurrently", &shares_device_concurrently);
  module.def("linked_by_nvlink", [](const DeviceUuid& uuid, const DeviceUuid& peer) {
    std::string reason;
    const std::optional<bool> answer = nvml::linked_by_nvlink(uuid, peer, &reason);
    return py::make_tuple(answer, reason);
  });
  module.def("device_of", [](uintptr_t address) { return device_of(at(address)); });
  module.def("place",
             [](uintptr_t address, int64_t num_bytes, int device) { simt::place(at(address), num_bytes, device); });

  py::class_<CurrentDevice>(module, "DeviceGuard")
      .def(py::init([](int device) { return CurrentDevice{device, nullptr}; }))
      .def("__enter__", [](CurrentDevice& self) { self.guard = std::make_unique<DeviceGuard>(self.device); })
      .def("__exit__", [](CurrentDevice& self, const py::args&) { self.guard.reset(); });
  py::class_<OwnStream>(module, "OwnStream")
      .def(py::init<int>())
      .def_property_readonly("handle", [](const OwnStream& self) { return reinterpret_cast<uintptr_t>(self.get()); });
  py::class_<Event>(module, "Event")
      .def(py::init<int>())
      .def("record", [](Event& self, uintptr_t stream) { self.record(stream_of(stream)); })
      .def("passed", &Event::passed)
      .def("hold_back", [](const Event& self, uintptr_t stream) { self.hold_back(stream_of(stream)); });
  py::class_<simt::Gpu::Capture, simt::Gpu::CapturePtr>(module, "Graph")
      .def("launch", [](const simt::Gpu::CapturePtr& self) { simt::Gpu::get().launch(self); });
  module.def("begin_capture", [](uintptr_t stream) { simt::capture(stream_of(stream)); });
  module.def("end_capture", [](uintptr_t stream) { return simt::end_capture(stream_of(stream)); });
  // Of _core, with what the other twins need not show.
  auto shared_memory = py::reinterpret_borrow<py::class_<SharedMemory>>(core.attr("SharedDeviceMemory"));
  module.attr("SharedMemory") = shared_memory;
  shared_memory.def_static("allocate", &SharedMemory::allocate)
      .def_static("open", &open_memory)
      .def_property_readonly("address",
                             [](const SharedMemory& self) { return reinterpret_cast<uintptr_t>(self.data()); })
      .def("close", [](SharedMemory& self) { SharedMemory closed(std::move(self)); }, NoGil());
  py::class_<DeviceMemory>(module, "DeviceMemory")
      .def(py::init<int, int64_t>())
      .def_property_readonly("address",
                             [](const DeviceMemory& self) { return reinterpret_cast<uintptr_t>(self.data()); });
  py::class_<PinnedMemory>(module, "PinnedMemory")
      .def(py::init<int64_t>())
      .def_property_readonly("address",
                             [](const PinnedMemory& self) { return reinterpret_cast<uintptr_t>(self.host()); });

  module.def("copy_async", [](uintptr_t to, uintptr_t from, int64_t num_bytes, uintptr_t stream) {
    copy_async(at(to), at(from), num_bytes, stream_of(stream));
  });
  module.def("fill_async", [](uintptr_t to, int value, int64_t num_bytes, uintptr_t stream) {
    fill_async(at(to), value, num_bytes, stream_of(stream));
  });
  module.def("synchronize", [](uintptr_t stream) { synchronize(stream_of(stream)); }, NoGil());
  module.def("is_capturing", [](uintptr_t stream) { return is_capturing(stream_of(stream)); });
  module.def(
      "meet",
      [](uintptr_t word, uint32_t wait_value, uintptr_t outcome, uintptr_t values, int64_t num_elems, uintptr_t stream,
         double timeout_s, int num_blocks, uintptr_t tell, uint32_t value) {
        cuda::MeetArgs args{at<uint32_t>(tell),
                            value,
                            at<uint32_t>(word),
                            wait_value,
                            static_cast<uint64_t>(timeout_s * 1e9),
                            at<uint32_t>(outcome),
                            at<int32_t>(values),
                            num_elems};
        cuda::launch_meet(args, num_blocks, stream_of(stream));
      },
      py::arg("word"), py::arg("wait_value"), py::arg("outcome"), py::arg("values"), py::arg("num_elems"),
      py::arg("stream"), py::arg("timeout_s") = 30.0, py::arg("num_blocks") = 1, py::arg("tell") = 0,
      py::arg("value") = 0, NoGil());
  module.def("divergent_barrier", [](uintptr_t stream) { cuda::launch_divergent_barrier(stream_of(stream)); });
}

}  // namespace ringcomm::bind
