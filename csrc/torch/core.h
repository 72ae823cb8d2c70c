// The communicator of _core as this adapter sees it: c_table.h with owned references, ids instead of
// names, and torch's exceptions instead of status codes.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <exception>
#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/Types.hpp>

#include "bind/c_table.h"

namespace ringcomm::adapter {

// Ids of the operations; -1: this core has none.
struct OpIds {
  int32_t barrier, monitored_barrier, all_reduce, broadcast, all_gather, reduce_scatter, reduce, gather, scatter,
      all_to_all;
};

// How the core is told about an element type. A type that it does not know moves as bytes.
struct Elements {
  int32_t dtype = -1;
  int64_t per_item = 1;  // elements of `dtype` in one item of the tensor
};

class Core {
 public:
  // Throws if the core's table is not the one that this adapter was built for.
  Core(const rc_table* table, rc_comm* comm);
  ~Core();
  Core(const Core&) = delete;

  const OpIds& ops() const { return ops_; }
  // For operations that only move data.
  Elements moved(at::ScalarType type) const;
  // For reductions; throws if the core cannot reduce this type.
  Elements reduced(at::ScalarType type) const;
  // Throws if the core has no such operator.
  int32_t reduce_op(const c10d::ReduceOp& op) const;

  // Both throw what the core reports. run() releases the GIL if this thread holds it.
  void run(const rc_call& call) const;
  rc_status try_run(const rc_call& call, rc_error* error) const;
  void submit(const rc_call& call, rc_done done, void* context) const;
  void send(const void* data, int64_t num_bytes, int to_rank, int tag, rc_done done, void* context) const;
  rc_status try_send(const void* data, int64_t num_bytes, int to_rank, int tag, rc_done done, void* context,
                     rc_error* error) const;
  // from_rank: -1 takes whichever message with this tag comes first.
  void receive(void* data, int64_t num_bytes, int from_rank, int tag, rc_done done, void* context) const;

  void close() const;
  void abort(const std::string& reason) const;
  void set_timeout(double timeout_s) const;
  // RC_OK, or what every later call would fail with.
  rc_status fault() const;
  // Throws it.
  void throw_fault() const;
  rc_device_mode device_mode() const { return table_->device_mode(comm_); }
  void finish_device() const;

 private:
  const rc_table* table_;
  rc_comm* comm_;
  OpIds ops_;
  int32_t bytes_;
};

// The core's error as torch raises it: ValueError for a bad argument, DistBackendError for a lost
// communicator, the Python exception of a signal handler.
std::exception_ptr to_exception(const rc_error& error);
rc_error make_error(rc_status kind, const char* text);

// Releases the GIL for a scope if this thread holds it.
class WithoutGil {
 public:
  WithoutGil();
  ~WithoutGil();
  WithoutGil(const WithoutGil&) = delete;

 private:
  void* state_ = nullptr;
};

// Runs Python's signal handlers (Ctrl-C) if this is the main thread; throws what they raise.
void check_python_signals();

}  // namespace ringcomm::adapter
