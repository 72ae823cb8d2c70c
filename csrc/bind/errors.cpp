// C++ errors become the classes of ringcomm/errors.py, one per ErrorKind.
#include <cstring>
#include <string>

#include "base/error.h"
#include "bind/bind.h"

namespace ringcomm::bind {
namespace py = pybind11;
namespace {

const char* python_class_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::usage:
      return "UsageError";
    case ErrorKind::mismatch:
      return "MismatchError";
    case ErrorKind::peer_lost:
      return "PeerLostError";
    case ErrorKind::deadline:
      return "DeadlineError";
    case ErrorKind::aborted:
      return "AbortedError";
    case ErrorKind::device:
      return "DeviceError";
    case ErrorKind::wire:
      return "WireError";
    case ErrorKind::system:
      return "SystemResourceError";
  }
  return "RingcommError";
}

}  // namespace

void bind_errors(py::module_&) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      const py::object cls = py::module_::import("ringcomm.errors").attr(python_class_name(error.kind()));
      // A text that was cut to fit the fault record may end inside a character.
      const py::object text = py::reinterpret_steal<py::object>(
          PyUnicode_DecodeUTF8(error.what(), static_cast<Py_ssize_t>(std::strlen(error.what())), "replace"));
      py::object instance = cls(text);
      if (error.culprit_rank() >= 0) instance.attr("rank") = error.culprit_rank();
      PyErr_SetObject(cls.ptr(), instance.ptr());
    }
  });
}

}  // namespace ringcomm::bind
