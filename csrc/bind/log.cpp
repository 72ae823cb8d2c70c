// Messages of the core go to a Python function, from whichever thread.
#include "base/log.h"

#include <utility>

#include "bind/bind.h"

namespace ringcomm::bind {
namespace py = pybind11;
namespace {

// Read and written with the GIL held. Never destroyed: threads may outlive the interpreter's modules.
PyObject* python_sink = nullptr;

bool is_finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

void call_python(LogLevel level, const char* subsystem, const std::string& message) {
  if (Py_IsInitialized() == 0 || is_finalizing()) return;
  py::gil_scoped_acquire acquire;
  try {
    const auto text = py::reinterpret_steal<py::object>(
        PyUnicode_DecodeUTF8(message.data(), static_cast<Py_ssize_t>(message.size()), "replace"));
    const auto sink = py::reinterpret_borrow<py::object>(python_sink);
    sink(static_cast<int>(level), subsystem, text);
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable("a log message of ringcomm");
  }
}

}  // namespace

void bind_log(py::module_& module) {
  module.def(
      "set_log_sink",
      [](py::object sink, int level) {
        std::swap(python_sink, sink.ptr());
        set_log_sink(&call_python, static_cast<LogLevel>(level));
      },
      py::arg("sink"), py::arg("level"));
}

}  // namespace ringcomm::bind
