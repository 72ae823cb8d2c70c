// A call whose turn it is: which algorithm runs it, and on what.
#include "base/log.h"
#include "comm/communicator.h"
#include "reduce/reduce.h"

namespace ringcomm {
namespace {

// Any collective of a single rank.
void copy_alone(const Collective& call) {
  const void* from = call.sends.empty() ? call.input : call.sends[0].data;
  void* to = call.receives.empty() ? call.output : call.receives[0].data;
  const int64_t count = call.receives.empty() ? call.count : call.receives[0].count;
  copy_bytes(to, from, count * static_cast<int64_t>(dtype_size(call.dtype)));
}

Patience patience_of(const Collective& call) {
  Patience patience;
  patience.timeout_s = call.timeout_s;
  if (call.op == OpKind::monitored_barrier) {
    patience.names = call.wait_all_ranks ? Patience::Names::all_and_where : Patience::Names::all;
  }
  return patience;
}

// Zeros between packed arrays are not theirs.
int64_t bytes_of_caller(const Collective& call) {
  if (!is_packed(call)) return call.num_bytes();
  int64_t num_bytes = 0;
  for (const Piece& piece : call.op == OpKind::all_gather ? call.packed : call.unpacked) num_bytes += piece.num_bytes;
  return num_bytes;
}

}  // namespace

OpStats Communicator::execute(const Prepared& prepared, Clock::time_point start) {
  const Collective& call = prepared.call;
  OpStats stats;
  stats.calls = 1;
  stats.bytes = static_cast<uint64_t>(bytes_of_caller(call));
  if (!group_) RC_FAIL(aborted, "this communicator is closed; init() a new one");
  if (world_size_ == 1) {
    group_->throw_if_failed();
    if (call.on_device) {
      run_on_device_alone(*devices_, call);
    } else {
      copy_alone(premultiplies(call) ? scale_input(call) : call);
    }
  } else {
    try {
      group_->begin(prepared.descriptor, patience_of(call));
      stats.bytes_sent = static_cast<uint64_t>(call.on_device ? dispatch_on_device(call) : run_on_host(call));
    } catch (const std::exception& error) {
      // Usually the group's fault, which fail() throws again. Anything else would leave the peers waiting.
      group_->fail(Error(ErrorKind::aborted,
                         concat("rank ", rank_, " failed inside ", group_->describe_current(), ": ", error.what(),
                                ". The communicator is lost."),
                         rank_));
    }
  }
  stats.seconds = std::chrono::duration<double>(Clock::now() - start).count();
  if (logs(LogLevel::trace)) {
    log(LogLevel::trace, "COLL", describe(prepared.descriptor, world_size_ == 1 ? 0 : group_->seq()), ": ",
        static_cast<int64_t>(stats.seconds * 1e6), " us");
  }
  return stats;
}

Collective Communicator::scale_input(Collective call) {
  // The result of an all_reduce goes where the scaled input lies; every other input must stay as it is.
  const int64_t count = call.op == OpKind::reduce_scatter ? call.count * world_size_ : call.count;
  const int64_t elem_bytes = static_cast<int64_t>(dtype_size(call.dtype));
  if (call.op == OpKind::all_reduce) {
    cpu::scale(call.dtype, call.input, call.factor, call.output, count);
    call.input = call.output;
  } else if (call.sends.empty()) {
    uint8_t* const scaled = scratch_.bytes(count * elem_bytes);
    cpu::scale(call.dtype, call.input, call.factor, scaled, count);
    call.input = scaled;
  } else {
    int64_t total = 0;
    for (const SendPart& part : call.sends) total += part.count;
    uint8_t* scaled = scratch_.bytes(total * elem_bytes);
    for (SendPart& part : call.sends) {
      cpu::scale(call.dtype, part.data, call.factor, scaled, part.count);
      part.data = scaled;
      scaled += part.count * elem_bytes;
    }
  }
  return call;
}

int64_t Communicator::dispatch_on_device(const Collective& call) {
  try {
    return run_on_device(*group_, *devices_, call, [this](const Collective& on_host) { return run_on_host(on_host); });
  } catch (...) {
    if (group_->has_failed()) {
      devices_->abort(group_->fault());
      devices_->let_peers_stop();
    }
    throw;
  }
}

int64_t Communicator::run_on_host(const Collective& call) {
  if (is_packed(call)) return run_packed(call);
  return premultiplies(call) ? dispatch(scale_input(call)) : dispatch(call);
}

int64_t Communicator::run_packed(const Collective& call) {
  // scale_input() takes the same memory, and scales a reduce_scatter's buffer in place.
  uint8_t* const buffer = scratch_.bytes(buffer_bytes(call, world_size_));
  const Collective whole = call_on_buffer(call, rank_, buffer);
  cpu::pack(call.packed, const_cast<void*>(whole.input));
  const int64_t sent = run_on_host(whole);
  cpu::unpack(call.unpacked, whole.output);
  return sent;
}

int64_t Communicator::dispatch(const Collective& call) {
  if (is_barrier(call.op)) return barrier(*group_);
  if (is_exchange(call.op) && call.algo != Algo::direct) {
    return exchange(*group_, call, tuning_.has_limit(call.op) ? tuning_.limit(call.op) : inline_bytes_);
  }
  switch (call.algo) {
    case Algo::one_shot:
      return one_shot(*group_, call);
    case Algo::two_shot:
      return two_shot(*group_, call, scratch_);
    case Algo::ring:
      return ring_all_reduce(*group_, call);
    case Algo::direct:
      return direct(*group_, call);
    case Algo::staged:
      if (call.op == OpKind::broadcast) return staged_broadcast(*group_, call);
      if (call.op == OpKind::all_gather) return staged_all_gather(*group_, call);
      return staged_reduce_scatter(*group_, call);
  }
  return 0;
}

}  // namespace ringcomm
