#include "comm/flight_recorder.h"

#include "bind/bind.h"

namespace ringcomm::bind {
namespace py = pybind11;
namespace {

std::string codec_text(const Descriptor& d) {
  const std::string up = codec_name(static_cast<CodecId>(d.codec_up));
  const std::string down = codec_name(static_cast<CodecId>(d.codec_down));
  return up == down ? up : up + "/" + down;
}

}  // namespace

py::list flight_records(const FlightRecorder& recorder) {
  std::vector<FlightRecord> records;
  {
    py::gil_scoped_release release;
    records = recorder.records();
  }
  const auto time = [](int64_t time_ns) -> py::object {
    return time_ns == 0 ? py::none() : py::object(py::int_(time_ns));
  };
  py::list list;
  for (const FlightRecord& record : records) {
    const Descriptor& d = record.descriptor;
    const bool has_data = !is_barrier(d.op);
    py::dict row;
    row["id"] = record.id;
    row["seq"] = record.seq;
    row["op"] = op_name(d.op);
    row["state"] = state_name(record.state);
    row["dtype"] = has_data ? py::object(py::str(dtype_name(d.dtype))) : py::none();
    row["count"] = record.count;
    row["reduce_op"] = reduces(d.op) ? py::object(py::str(reduce_op_name(d.reduce_op))) : py::none();
    row["algo"] = has_data ? py::object(py::str(algo_name(record.algo))) : py::none();
    row["codec"] = codec_text(d);
    row["root"] = !has_root(d.op) ? py::none() : py::object(py::int_(d.root));
    row["tag"] = py::reinterpret_steal<py::object>(
        PyUnicode_DecodeUTF8(d.tag, static_cast<Py_ssize_t>(strnlen(d.tag, kTagBytes)), "replace"));
    row["created_ns"] = time(record.created_ns);
    row["started_ns"] = time(record.started_ns);
    row["ended_ns"] = time(record.ended_ns);
    list.append(row);
  }
  return list;
}

}  // namespace ringcomm::bind
