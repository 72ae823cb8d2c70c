// What c_table.h declares, on top of Communicator.
#include "bind/c_table.h"

#include <cstring>
#include <memory>

#include "bind/arguments.h"
#include "bind/bind.h"
#include "comm/communicator.h"

namespace ringcomm::bind {
namespace py = pybind11;
namespace {

// An rc_comm is one shared reference.
using Reference = std::shared_ptr<Communicator>;
const Reference& communicator(rc_comm* comm) { return *reinterpret_cast<Reference*>(comm); }
rc_comm* new_reference(const Reference& comm) { return reinterpret_cast<rc_comm*>(new Reference(comm)); }

void fill(rc_error* error, rc_status kind, int culprit_rank, const char* text) {
  error->kind = kind;
  error->culprit_rank = culprit_rank;
  std::strncpy(error->text, text, sizeof(error->text) - 1);
  error->text[sizeof(error->text) - 1] = 0;
}

// Fills from the exception that is being handled.
rc_status fill_from_current(rc_error* error) {
  try {
    throw;
  } catch (const Interrupted& interrupted) {
    py::gil_scoped_acquire acquire;
    try {
      std::rethrow_exception(interrupted.cause);
    } catch (py::error_already_set& python_error) {
      fill(error, RC_INTERRUPTED, -1, "interrupted");
      python_error.restore();
    } catch (const std::exception& other) {
      fill(error, RC_ABORTED, -1, other.what());
    }
  } catch (const Error& ours) {
    fill(error, static_cast<rc_status>(ours.kind()), ours.culprit_rank(), ours.what());
  } catch (const std::exception& other) {
    fill(error, RC_SYSTEM, -1, other.what());
  }
  return error->kind;
}

template <typename Call>
rc_status guarded(rc_error* error, const Call& call) {
  try {
    call();
    return RC_OK;
  } catch (...) {
    return fill_from_current(error);
  }
}

template <typename Enum, typename Name>
int32_t id_of(const char* wanted, int count, Name name) {
  for (int id = 0; id < count; ++id) {
    if (std::strcmp(name(static_cast<Enum>(id)), wanted) == 0) return id;
  }
  return -1;
}

struct Request {
  Collective call;
  Algo algo;
  bool has_algo;
  std::string tag;

  const Algo* algo_or_null() const { return has_algo ? &algo : nullptr; }
};

Request make_request(const rc_call& from, int world_size) {
  Request request;
  Collective& call = request.call;
  call.op = checked<OpKind>(from.op, kNumOps, "operation id");
  call.dtype = checked<DType>(from.dtype, kNumDTypes, "dtype id");
  call.reduce_op = checked<ReduceOp>(from.reduce_op, kNumReduceOps, "reduce op id");
  call.count = from.count;
  call.root = from.root;
  call.input = from.input;
  call.output = from.output;
  call.factor = from.factor;
  call.timeout_s = from.timeout_s;
  call.wait_all_ranks = from.wait_all_ranks != 0;
  call.on_device = from.on_device != 0;
  call.stream = static_cast<Stream>(from.stream);
  for (int rank = 0; from.sends != nullptr && rank < world_size; ++rank)
    call.sends.push_back({from.sends[rank].data, from.sends[rank].count});
  for (int rank = 0; from.receives != nullptr && rank < world_size; ++rank)
    call.receives.push_back({from.receives[rank].data, from.receives[rank].count});
  request.has_algo = from.algo >= 0;
  if (request.has_algo) request.algo = checked<Algo>(from.algo, kNumAlgos, "algorithm id");
  if (from.tag != nullptr) request.tag = from.tag;
  return request;
}

std::vector<ListedArray> listed(const rc_call& from) {
  std::vector<ListedArray> arrays;
  arrays.reserve(static_cast<size_t>(from.num_arrays));
  for (int64_t i = 0; i < from.num_arrays; ++i) {
    const rc_array& array = from.arrays[i];
    arrays.push_back({array.input, array.output, array.count, checked<DType>(array.dtype, kNumDTypes, "dtype id")});
  }
  return arrays;
}

void run(Communicator& comm, const rc_call& call) {
  const Request request = make_request(call, comm.world_size());
  if (call.is_list != 0) return comm.run_list(request.call, listed(call), request.tag);
  comm.run(request.call, request.algo_or_null(), request.tag);
}

std::shared_ptr<Work> submit(Communicator& comm, const rc_call& call) {
  const Request request = make_request(call, comm.world_size());
  if (call.is_list != 0) return comm.submit_list(request.call, listed(call), request.tag);
  return comm.submit(request.call, request.algo_or_null(), request.tag);
}

void call_back_when_done(Work& work, rc_done done, void* context) {
  work.on_done([done, context](const std::exception_ptr& error, int source) {
    if (!error) return done(context, nullptr, source);
    rc_error failure;
    try {
      std::rethrow_exception(error);
    } catch (...) {
      fill_from_current(&failure);
    }
    done(context, &failure, -1);
  });
}

const rc_table kTable = {
    RC_TABLE_VERSION,
    sizeof(rc_table),
    [](const char* name) { return id_of<OpKind>(name, kNumOps, op_name); },
    [](const char* name) { return id_of<DType>(name, kNumDTypes, dtype_name); },
    [](const char* name) { return id_of<ReduceOp>(name, kNumReduceOps, reduce_op_name); },
    [](const char* name) { return id_of<Algo>(name, kNumAlgos, algo_name); },
    [](rc_comm* comm) { return new_reference(communicator(comm)); },
    [](rc_comm* comm) { delete reinterpret_cast<Reference*>(comm); },
    [](rc_comm* comm, const rc_call* call, rc_error* error) {
      return guarded(error, [&] { run(*communicator(comm), *call); });
    },
    [](rc_comm* comm, const rc_call* call, rc_done done, void* context, rc_error* error) {
      return guarded(error, [&] { call_back_when_done(*submit(*communicator(comm), *call), done, context); });
    },
    [](rc_comm* comm, const void* data, int64_t num_bytes, int32_t to_rank, int32_t tag, rc_done done, void* context,
       rc_error* error) {
      return guarded(error, [&] {
        call_back_when_done(*communicator(comm)->send(data, num_bytes, to_rank, tag, true), done, context);
      });
    },
    [](rc_comm* comm, void* data, int64_t num_bytes, int32_t from_rank, int32_t tag, rc_done done, void* context,
       rc_error* error) {
      return guarded(error, [&] {
        const int source = from_rank < 0 ? kAnySource : from_rank;
        call_back_when_done(*communicator(comm)->recv(data, num_bytes, source, tag, true), done, context);
      });
    },
    [](rc_comm* comm, rc_error* error) { return guarded(error, [&] { communicator(comm)->close(); }); },
    [](rc_comm* comm, const char* reason, rc_error* error) {
      return guarded(error, [&] { communicator(comm)->abort(reason); });
    },
    [](rc_comm* comm, double timeout_s, rc_error* error) {
      return guarded(error, [&] { communicator(comm)->set_timeout(timeout_s); });
    },
    [](rc_comm* comm, rc_error* error) {
      return guarded(error, [&] {
        if (const std::optional<Error> fault = communicator(comm)->fault()) throw *fault;
      });
    },
    [](rc_comm* comm) -> rc_device_mode {
      const std::shared_ptr<DeviceGroup> devices = communicator(comm)->devices();
      if (!devices) return RC_DEVICE_NONE;
      return devices->queues() ? RC_DEVICE_QUEUES : RC_DEVICE_BLOCKS;
    },
    [](rc_comm* comm, rc_error* error) { return guarded(error, [&] { communicator(comm)->synchronize(); }); },
};

}  // namespace

py::capsule communicator_capsule(const std::shared_ptr<Communicator>& comm) {
  return py::capsule(new_reference(comm), RC_COMM_CAPSULE, [](PyObject* capsule) {
    kTable.release(static_cast<rc_comm*>(PyCapsule_GetPointer(capsule, RC_COMM_CAPSULE)));
  });
}

void bind_c_table(py::module_& module) {
  module.attr("C_TABLE_VERSION") = RC_TABLE_VERSION;
  module.def("c_table", [] { return py::capsule(&kTable, RC_TABLE_CAPSULE); });
}

}  // namespace ringcomm::bind
