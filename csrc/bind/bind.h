// The Python face of the core: one file and one bind function per concept.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

namespace ringcomm {
class Communicator;
class FlightRecorder;
}  // namespace ringcomm

namespace ringcomm::bind {

void bind_errors(pybind11::module_& module);
void bind_simd(pybind11::module_& module);
void bind_device(pybind11::module_& module);
void bind_codec(pybind11::module_& module);
void bind_dlpack(pybind11::module_& module);
void bind_device_group(pybind11::module_& module);
void bind_comm(pybind11::module_& module);
void bind_c_table(pybind11::module_& module);
void bind_log(pybind11::module_& module);
// In the emulated build only, where the tests define it (tests/simt/runtime/bind_simt.cpp).
void bind_simt(pybind11::module_& module);

// An rc_comm for the functions of c_table.h; the capsule holds one reference.
pybind11::capsule communicator_capsule(const std::shared_ptr<Communicator>& comm);

// A dict per call, oldest first.
pybind11::list flight_records(const FlightRecorder& recorder);

}  // namespace ringcomm::bind
