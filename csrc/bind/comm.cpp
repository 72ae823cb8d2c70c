// The communicator for Python: integers in (addresses, counts, enum values), the GIL released
// around everything that may block.
#include <pybind11/stl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <numeric>
#include <optional>

#include "bind/arguments.h"
#include "bind/bind.h"
#include "comm/communicator.h"
#include "wire/exchange_layout.h"

namespace ringcomm::bind {
namespace py = pybind11;
namespace {

struct Request {
  Collective call;
  std::optional<Algo> algo;
};

Request make_request(int op, uintptr_t input, uintptr_t output, int64_t count, int dtype, int reduce_op, int root,
                     int algo) {
  Request request;
  request.call.op = checked<OpKind>(op, kNumOps, "operation id");
  request.call.dtype = checked<DType>(dtype, kNumDTypes, "dtype id");
  request.call.reduce_op = checked<ReduceOp>(reduce_op, kNumReduceOps, "reduce op id");
  request.call.input = pointer<const void>(input);
  request.call.output = pointer<void>(output);
  request.call.count = count;
  request.call.root = root;
  if (algo >= 0) request.algo = checked<Algo>(algo, kNumAlgos, "algorithm id");
  return request;
}

void put_on_device(Request& request, bool on_device, uintptr_t stream) {
  request.call.on_device = on_device;
  request.call.stream = pointer<CUstream_st>(stream);
}

// By rank: address and elements.
using Parts = std::vector<std::pair<uintptr_t, int64_t>>;

template <typename Part, typename Data>
std::vector<Part> parts(const Parts& given) {
  std::vector<Part> result;
  result.reserve(given.size());
  for (const auto& [address, count] : given) result.push_back({pointer<Data>(address), count});
  return result;
}

CodecOptions make_codec(int up, int down, bool stochastic, uint64_t seed, uint64_t step, uintptr_t residual,
                        uintptr_t owner_residual) {
  CodecOptions codec;
  codec.up = checked<CodecId>(up, kNumCodecs, "codec id");
  codec.down = checked<CodecId>(down, kNumCodecs, "codec id");
  codec.rounding = stochastic ? Rounding::stochastic : Rounding::nearest_even;
  codec.seed = seed;
  codec.step = step;
  codec.residual = pointer<float>(residual);
  codec.owner_residual = pointer<float>(owner_residual);
  return codec;
}

// By operation id, in bytes.
using GivenLimits = std::vector<std::pair<int, int64_t>>;  // by operation id

Limits make_limits(const GivenLimits& given) {
  Limits limits;
  for (const auto& [op, limit] : given) limits.emplace_back(checked<OpKind>(op, kNumOps, "operation id"), limit);
  return limits;
}

// Runs Python's signal handlers (Ctrl-C); throws what they raise. Only Python's main thread runs
// any, so others do not even ask for the GIL.
void check_python_signals() {
  if (::syscall(SYS_gettid) != ::getpid()) return;
  py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// Runs a blocking call without the GIL; Python gets its own exception back if it interrupted the call.
template <typename Call>
auto without_gil(const Call& call) {
  try {
    py::gil_scoped_release release;
    return call();
  } catch (const Interrupted& interrupted) {
    std::rethrow_exception(interrupted.cause);
  }
}

// Peers in this process may need the GIL to finish what the destructor waits for. The last reference
// may be another extension's, dropped without the GIL (c_table.h).
void delete_without_gil(Communicator* comm) {
  if (Py_IsInitialized() != 0 && PyGILState_Check() != 0) {
    py::gil_scoped_release release;
    delete comm;
  } else {
    delete comm;
  }
}

// Runs now, or returns the Work of an asynchronous call.
py::object issue(Communicator& comm, const Request& request, const std::string& tag, bool async_op) {
  const Algo* algo = request.algo ? &*request.algo : nullptr;
  if (async_op) return py::cast(without_gil([&] { return comm.submit(request.call, algo, tag); }));
  without_gil([&] { comm.run(request.call, algo, tag); });
  return py::none();
}

// In place: an address, elements and a dtype id each.
std::vector<ListedArray> listed(const std::vector<std::tuple<uintptr_t, int64_t, int>>& given) {
  std::vector<ListedArray> arrays;
  arrays.reserve(given.size());
  for (const auto& [address, count, dtype] : given) {
    void* const data = pointer<void>(address);
    arrays.push_back({data, data, count, checked<DType>(dtype, kNumDTypes, "dtype id")});
  }
  return arrays;
}

// Waits for a message, or returns the Work of an asynchronous one.
template <typename Post>
std::shared_ptr<Work> issue_message(Communicator& comm, bool async_op, const Post& post) {
  return without_gil([&] {
    std::shared_ptr<Work> work = post();
    if (!async_op) comm.finish_message(*work);
    return work;
  });
}

py::dict stats_row(const OpStats& row) {
  return py::dict(py::arg("calls") = row.calls, py::arg("bytes") = row.bytes, py::arg("bytes_sent") = row.bytes_sent,
                  py::arg("seconds") = row.seconds);
}

template <typename OffsetOf>
py::tuple offsets(int count, const OffsetOf& offset_of) {
  py::tuple result(count);
  for (int i = 0; i < count; ++i) result[static_cast<size_t>(i)] = offset_of(i);
  return result;
}

// Every size and offset of shared memory, for the golden tests of the wire room.
py::dict shared_layout(int world_size, int64_t buffer_bytes) {
  const StagingLayout staging = StagingLayout::make(buffer_bytes);
  py::dict table;
  table["descriptor_bytes"] = sizeof(Descriptor);
  table["descriptor_count"] = offsetof(Descriptor, count);
  table["descriptor_tag"] = offsetof(Descriptor, tag);
  table["slot_header_bytes"] = sizeof(SlotHeader);
  table["slot_descriptor"] = offsetof(SlotHeader, descriptor);
  table["fault"] = offsetof(ControlPage, fault);
  table["fault_bytes"] = sizeof(FaultRecord);
  table["fault_text"] = offsetof(FaultRecord, text);
  table["ranks"] = offsetof(ControlPage, ranks);
  table["rank_bytes"] = sizeof(RankLine);
  table["rank_lifecycle"] = offsetof(RankLine, lifecycle);
  table["rank_pid"] = offsetof(RankLine, pid);
  table["rank_entered_seq"] = offsetof(RankLine, entered_seq);
  table["rank_completed_seq"] = offsetof(RankLine, completed_seq);
  table["rank_handover_votes"] = offsetof(RankLine, handover_votes);
  table["control_bytes"] = ControlPage::bytes(world_size);
  table["inline_bytes"] = staging.inline_bytes;
  table["buffer_bytes"] = staging.half_bytes;
  table["slots"] = py::make_tuple(staging.slot_offset(0), staging.slot_offset(1));
  table["inputs"] = py::make_tuple(staging.input_offset(0), staging.input_offset(1));
  table["results"] = py::make_tuple(staging.result_offset(0), staging.result_offset(1));
  const P2pLayout p2p = P2pLayout::make(staging, world_size);
  table["mailbox_bytes"] = sizeof(Mailbox);
  table["mailbox_taken"] = offsetof(Mailbox, taken);
  table["message_header_bytes"] = sizeof(MessageHeader);
  table["message_slots"] = kMessageSlots;
  table["stream_buffers"] = kStreamBuffers;
  table["eager_bytes"] = p2p.eager_bytes;
  table["chunk_bytes"] = p2p.chunk_bytes;
  table["doorbell"] = p2p.doorbell_offset();
  table["mailboxes"] = offsets(world_size, [&](int peer) { return p2p.mailbox_offset(peer); });
  table["message_slots_of"] = offsets(world_size, [&](int peer) { return p2p.slot_offset(peer, 0); });
  table["streams"] = offsets(kStreamBuffers, [&](int i) { return p2p.stream_offset(static_cast<uint32_t>(i)); });
  table["staging_bytes"] = p2p.end();
  return table;
}

// Where a rank's data lies in an exchange, for the tests of the wire room: segments, and by destination
// (offset, ((begin, end) of segment 0, ...)), in bytes.
py::tuple exchange_layout(const std::vector<int64_t>& send_counts, int64_t elem_bytes, int rank, int64_t inline_bytes,
                          int64_t buffer_bytes) {
  const int world_size = static_cast<int>(send_counts.size());
  const ExchangeLayout layout(send_counts.data(), elem_bytes, rank, world_size, inline_bytes, buffer_bytes);
  py::list lanes;
  for (int dest = 0; dest < world_size; ++dest) {
    const ExchangeLayout::Lane lane = layout.lane(dest);
    py::list ranges;
    for (int64_t segment = 0; segment < layout.num_segments(); ++segment) {
      ranges.append(py::make_tuple(lane.range(segment).begin, lane.range(segment).end));
    }
    lanes.append(py::make_tuple(lane.offset, ranges));
  }
  return py::make_tuple(layout.is_inline(), lanes);
}

}  // namespace

void bind_comm(py::module_& module) {
  module.attr("OPS") = ids_by_name<OpKind>(kNumOps, op_name);
  module.attr("ALGOS") = ids_by_name<Algo>(kNumAlgos, algo_name);
  module.attr("MAX_RANKS") = kMaxRanks;
  module.attr("INLINE_BYTES") = StagingLayout::kDefaultInlineBytes;
  module.attr("SHARED_LAYOUT_VERSION") = kSharedLayoutVersion;
  module.def("control_bytes", &ShmGroup::control_bytes, py::arg("world_size"));
  module.def("staging_bytes", &ShmGroup::staging_bytes, py::arg("buffer_bytes"), py::arg("world_size"));
  module.def("shared_layout", &shared_layout, py::arg("world_size"), py::arg("buffer_bytes"));
  module.def("create_segment", &create_segment, py::arg("name"), py::arg("num_bytes"));
  module.def("format_control", &ShmGroup::format_control, py::arg("control_fd"), py::arg("world_size"),
             py::arg("first_seq") = 0);
  module.def("format_staging", &ShmGroup::format_staging, py::arg("staging_fd"), py::arg("buffer_bytes"),
             py::arg("world_size"), py::arg("first_seq") = 0);
  module.def(
      "choose_algo",
      [](int op, int64_t num_bytes, int world_size, bool has_codec, bool symmetric, int64_t inline_bytes,
         const GivenLimits& limits) {
        const OpKind kind = checked<OpKind>(op, kNumOps, "operation id");
        const Tuning tuning(make_limits(limits), inline_bytes);
        const Choice choice = choose_algo(tuning, kind, num_bytes, world_size, has_codec, symmetric, inline_bytes);
        return py::make_tuple(algo_name(choice.algo), choice.explanation(),
                              exact_wire_bytes(kind, choice.algo, num_bytes, world_size));
      },
      py::arg("op"), py::arg("num_bytes"), py::arg("world_size"), py::arg("has_codec"), py::arg("symmetric"),
      py::arg("inline_bytes"), py::arg("one_shot_limits") = GivenLimits());

  py::class_<Work, std::shared_ptr<Work>>(module, "Work")
      .def("done", &Work::done)
      .def("source", &Work::source)
      .def(
          "wait",
          [](const Work& work, double timeout, const std::optional<uintptr_t>& stream) {
            return without_gil([&] {
              if (!work.wait(timeout, check_python_signals)) return false;
              if (stream) work.hold_back(pointer<CUstream_st>(*stream));
              return true;
            });
          },
          py::arg("timeout") = -1.0, py::arg("stream") = py::none());

  module.def("exchange_layout", &exchange_layout, py::arg("send_counts"), py::arg("elem_bytes"), py::arg("rank"),
             py::arg("inline_bytes"), py::arg("buffer_bytes"));

  // A buffer of bytes: what is made of it keeps the memory mapped.
  py::class_<SymmetricRegion, std::shared_ptr<SymmetricRegion>>(module, "SymmetricRegion", py::buffer_protocol())
      .def_property_readonly("id", &SymmetricRegion::id)
      .def_buffer([](SymmetricRegion& region) { return py::buffer_info(region.own(), region.num_bytes()); });

  py::class_<Communicator, std::shared_ptr<Communicator>>(module, "Communicator")
      .def(py::init([](int rank, int world_size, std::string name, double timeout_s, int64_t buffer_bytes,
                       int num_cores, int control_fd, std::vector<int> staging_fds, std::vector<int> pidfds,
                       std::vector<int> pids, uint32_t first_seq, int64_t recorder_calls, std::string recorder_file,
                       std::vector<int> global_ranks, const GivenLimits& limits) {
             RC_CHECK(recorder_calls >= 0, "recorder_calls must not be negative, got ", recorder_calls);
             RC_CHECK(global_ranks.empty() || global_ranks.size() == pids.size(), "need one global rank per rank");
             if (global_ranks.empty()) {
               global_ranks.resize(pids.size());
               std::iota(global_ranks.begin(), global_ranks.end(), 0);
             }
             GroupConfig config;
             config.rank = rank;
             config.world_size = world_size;
             config.name = std::move(name);
             config.timeout_s = timeout_s;
             config.buffer_bytes = buffer_bytes;
             config.num_cores = num_cores;
             config.control_fd = control_fd;
             config.staging_fds = std::move(staging_fds);
             config.pidfds = std::move(pidfds);
             config.pids = std::move(pids);
             config.first_seq = first_seq;
             config.check_interrupt = check_python_signals;
             return std::shared_ptr<Communicator>(
                 new Communicator(
                     config, FlightRecorderConfig{recorder_calls, std::move(recorder_file), std::move(global_ranks)},
                     make_limits(limits)),
                 delete_without_gil);
           }),
           py::kw_only(), py::arg("rank"), py::arg("world_size"), py::arg("name"), py::arg("timeout_s"),
           py::arg("buffer_bytes"), py::arg("num_cores"), py::arg("control_fd"), py::arg("staging_fds"),
           py::arg("pidfds"), py::arg("pids"), py::arg("first_seq") = 0, py::arg("recorder_calls") = 256,
           py::arg("recorder_file") = "", py::arg("global_ranks") = std::vector<int>(),
           py::arg("one_shot_limits") = GivenLimits())
      .def_property_readonly("rank", &Communicator::rank)
      .def_property_readonly("world_size", &Communicator::world_size)
      .def_property_readonly("inline_bytes", &Communicator::inline_bytes)
      .def(
          "collective",
          [](Communicator& comm, int op, uintptr_t input, uintptr_t output, int64_t count, int dtype, int reduce_op,
             int root, int algo, const std::string& tag, bool async_op, double factor,
             const std::optional<Parts>& sends, const std::optional<Parts>& receives, bool on_device,
             uintptr_t stream) {
            Request request = make_request(op, input, output, count, dtype, reduce_op, root, algo);
            request.call.factor = factor;
            if (sends) request.call.sends = parts<SendPart, const void>(*sends);
            if (receives) request.call.receives = parts<ReceivePart, void>(*receives);
            put_on_device(request, on_device, stream);
            return issue(comm, request, tag, async_op);
          },
          py::arg("op"), py::arg("input"), py::arg("output"), py::arg("count"), py::arg("dtype id"),
          py::arg("reduce_op") = 0, py::arg("root") = -1, py::arg("algo") = -1, py::arg("tag") = "",
          py::arg("async_op") = false, py::arg("factor") = 1.0, py::arg("sends") = py::none(),
          py::arg("receives") = py::none(), py::arg("on_device") = false, py::arg("stream") = 0)
      .def(
          "monitored_barrier",
          [](Communicator& comm, double timeout_s, bool wait_all_ranks, const std::string& tag) {
            Request request = make_request(static_cast<int>(OpKind::monitored_barrier), 0, 0, 0, 0, 0, -1, -1);
            request.call.timeout_s = timeout_s;
            request.call.wait_all_ranks = wait_all_ranks;
            issue(comm, request, tag, false);
          },
          py::arg("timeout_s"), py::arg("wait_all_ranks"), py::arg("tag") = "")
      .def(
          "all_reduce_encoded",
          [](Communicator& comm, uintptr_t input, uintptr_t output, int64_t count, int dtype, int reduce_op, int up,
             int down, bool stochastic, uint64_t seed, uint64_t step, uintptr_t residual, uintptr_t owner_residual,
             int algo, const std::string& tag, bool async_op, bool on_device, uintptr_t stream) {
            Request request =
                make_request(static_cast<int>(OpKind::all_reduce), input, output, count, dtype, reduce_op, -1, algo);
            request.call.codec = make_codec(up, down, stochastic, seed, step, residual, owner_residual);
            put_on_device(request, on_device, stream);
            return issue(comm, request, tag, async_op);
          },
          py::arg("input"), py::arg("output"), py::arg("count"), py::arg("dtype id"), py::arg("reduce_op"),
          py::arg("up"), py::arg("down"), py::arg("stochastic") = false, py::arg("seed") = 0, py::arg("step") = 0,
          py::arg("residual") = 0, py::arg("owner_residual") = 0, py::arg("algo") = -1, py::arg("tag") = "",
          py::arg("async_op") = false, py::arg("on_device") = false, py::arg("stream") = 0)
      .def(
          "all_reduce_coalesced",
          [](Communicator& comm, const std::vector<std::tuple<uintptr_t, int64_t, int>>& given, int reduce_op,
             const std::string& tag, bool async_op, double factor, bool on_device, uintptr_t stream) -> py::object {
            const std::vector<ListedArray> arrays = listed(given);
            Request request = make_request(static_cast<int>(OpKind::all_reduce), 0, 0, 0, 0, reduce_op, -1, -1);
            request.call.factor = factor;
            put_on_device(request, on_device, stream);
            if (async_op) return py::cast(without_gil([&] { return comm.submit_list(request.call, arrays, tag); }));
            without_gil([&] { comm.run_list(request.call, arrays, tag); });
            return py::none();
          },
          py::arg("arrays"), py::arg("reduce_op"), py::arg("tag") = "", py::arg("async_op") = false,
          py::arg("factor") = 1.0, py::arg("on_device") = false, py::arg("stream") = 0)
      .def(
          "send",
          [](Communicator& comm, uintptr_t data, int64_t num_bytes, int dst, int tag, bool async_op) {
            return issue_message(comm, async_op,
                                 [&] { return comm.send(pointer<const void>(data), num_bytes, dst, tag, async_op); });
          },
          py::arg("data"), py::arg("num_bytes"), py::arg("dst"), py::arg("tag"), py::arg("async_op") = false)
      .def(
          "recv",
          [](Communicator& comm, uintptr_t data, int64_t num_bytes, int src, int tag, bool async_op) {
            return issue_message(comm, async_op,
                                 [&] { return comm.recv(pointer<void>(data), num_bytes, src, tag, async_op); });
          },
          py::arg("data"), py::arg("num_bytes"), py::arg("src"), py::arg("tag"), py::arg("async_op") = false)
      .def("stats",
           [](const Communicator& comm) {
             py::dict table;
             const auto stats = comm.stats();
             for (int op = 0; op < kNumOps; ++op) {
               const OpStats& row = stats[static_cast<size_t>(op)];
               if (row.calls == 0) continue;
               table[op_name(static_cast<OpKind>(op))] = stats_row(row);
             }
             const auto messages = comm.message_stats();
             if (messages.send.calls != 0) table["send"] = stats_row(messages.send);
             if (messages.recv.calls != 0) table["recv"] = stats_row(messages.recv);
             return table;
           })
      .def(
          "encoded_sums",
          [](const Communicator& comm, int64_t num_elems, bool on_device) {
            RC_CHECK(num_elems >= 0, "num_elems must not be negative, got ", num_elems);
            py::list ranges;
            for (const Range& range : comm.encoded_sums(num_elems, on_device))
              ranges.append(py::make_tuple(range.begin, range.end));
            return ranges;
          },
          py::arg("num_elems"), py::arg("on_device") = false)
      .def(
          "attach_device",
          [](Communicator& comm, std::shared_ptr<DeviceGroup> group, const GivenLimits& limits) {
            comm.attach_device(std::move(group), Tuning::of_devices(make_limits(limits)));
          },
          py::arg("group"), py::arg("limits") = GivenLimits())
      .def(
          "choose_device_algo",
          [](const Communicator& comm, int op, int64_t num_bytes, bool has_codec,
             const std::optional<GivenLimits>& limits) {
            const OpKind kind = checked<OpKind>(op, kNumOps, "operation id");
            const std::shared_ptr<DeviceGroup> devices = comm.devices();
            RC_CHECK(devices != nullptr && devices->mode() != DeviceMode::host, "no kernels run these calls");
            const Tuning tuning = limits ? Tuning::of_devices(make_limits(*limits)) : comm.device_tuning();
            const Choice choice = choose_device_algo(tuning, kind, num_bytes, comm.world_size(), has_codec,
                                                     devices->mode(), devices->layout(), devices->direct_bytes());
            return py::make_tuple(algo_name(choice.algo), choice.explanation(),
                                  exact_wire_bytes(kind, choice.algo, num_bytes, comm.world_size()));
          },
          py::arg("op"), py::arg("num_bytes"), py::arg("has_codec"), py::arg("limits") = py::none())
      .def("synchronize", [](Communicator& comm) { without_gil([&] { comm.synchronize(); }); })
      .def(
          "copy_across",
          [](const Communicator& comm, int device, uintptr_t to, uintptr_t from, int64_t num_bytes, uintptr_t stream) {
            without_gil([&] {
              comm.copy_across(device, pointer<void>(to), pointer<const void>(from), num_bytes,
                               pointer<CUstream_st>(stream));
            });
          },
          py::arg("device"), py::arg("to"), py::arg("from_"), py::arg("num_bytes"), py::arg("stream"))
      .def("map_symmetric", &Communicator::map_symmetric, py::arg("num_bytes"), py::arg("fds"))
      .def("reset_stats", &Communicator::reset_stats)
      .def("c_handle", &communicator_capsule)
      .def("flight_recorder", [](const Communicator& comm) { return flight_records(comm.recorder()); })
      .def(
          "dump_flight_recorder",
          [](const Communicator& comm, const std::string& path) { without_gil([&] { comm.recorder().dump(path); }); },
          py::arg("path"))
      .def("abort", &Communicator::abort, py::arg("reason"))
      .def("close", [](Communicator& comm) { without_gil([&] { comm.close(); }); });
}

}  // namespace ringcomm::bind
