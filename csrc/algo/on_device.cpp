// Three modes (transport/device_group.h), the same bytes.
//
// in_kernel   announce, launch all rounds, end. The host waits for nobody but where it must know what others announce
//             before it launches: the counts of an exchange, the places of arrays (algo/direct_on_device.h).
//             ShmGroup::begin() of the next call finds what is wrong with this one.
// stepped     announce; for each round: launch it, wait for the stream, publish a step, wait for all. Between the last
//             round of a call and the first of the next there is no wait: both have the same epoch, and the last
//             round writes nothing (wire/device_layout.h).
// host        copy the inputs to the host, run the collective there, copy the outputs back.
//
// Arrays that travel as one are packed on the stream before and unpacked after, in all modes.
//
// Ordering in stepped mode: the stream is done with a round before its step is published, so what a rank's kernel
// wrote into a peer's slab is there before the peer launches the next one.
#include "algo/on_device.h"

#include <algorithm>
#include <array>
#include <vector>

#include "algo/direct_on_device.h"
#include "algo/pack.h"
#include "reduce/reduce.h"

namespace ringcomm {
namespace {

int64_t elem_bytes_of(const Collective& call) { return static_cast<int64_t>(dtype_size(call.dtype)); }

// As it runs if the arrays are not mapped. most_part_elems: as far as this rank knows.
DeviceCall device_call_of(const Collective& call, const DeviceGroup& devices, int world_size) {
  DeviceCall result;
  result.op = call.op;
  result.algo = call.algo == Algo::direct ? staged_algo(call, devices, world_size) : call.algo;
  result.dtype = call.dtype;
  result.reduce_op = call.reduce_op;
  result.factor = call.factor;
  result.count = call.count;
  result.root = call.root;
  result.input = call.input;
  result.output = call.output;
  result.codec.up = call.codec.up;
  result.codec.down = call.codec.down;
  result.codec.rounding = call.codec.rounding;
  result.codec.seed = call.codec.seed;
  result.codec.step = call.codec.step;
  result.codec.residual = call.codec.residual;
  result.codec.owner_residual = call.codec.owner_residual;
  result.has_parts = !call.sends.empty() || !call.receives.empty();
  if (!is_exchange(call.op) && !result.has_parts) return result;
  const ExchangeParts parts = ExchangeParts::of(call, world_size);
  for (size_t peer = 0; peer < static_cast<size_t>(world_size); ++peer) {
    result.sends[peer] = {const_cast<void*>(parts.sends[peer].data), parts.sends[peer].count};
    result.receives[peer] = {parts.receives[peer].data, parts.receives[peer].count};
    result.most_part_elems = std::max({result.most_part_elems, parts.sends[peer].count, parts.receives[peer].count});
  }
  return result;
}

// Of the partial sums that a ring makes of the whole array.
int64_t partial_bytes(const Collective& call) {
  return call.count * static_cast<int64_t>(dtype_size(cpu::accumulator_dtype(call.dtype)));
}

// As the algorithms of the host count them.
int64_t bytes_sent(const Collective& call, Algo algo, int rank, int world_size) {
  const int64_t others = world_size - 1;
  const int64_t num_bytes = call.num_bytes();
  if (call.codec.up != CodecId::none) {
    const size_t both = wire_bytes(call.codec.up, call.count) + wire_bytes(call.codec.down, call.count);
    return ceil_div(others * static_cast<int64_t>(both), world_size);
  }
  switch (call.op) {
    case OpKind::all_reduce:
      if (algo == Algo::one_shot) return num_bytes * others;
      if (algo == Algo::ring) return ceil_div(others * (num_bytes + partial_bytes(call)), world_size);
      return ceil_div(2 * others * num_bytes, world_size);
    case OpKind::reduce:
      return rank == call.root ? 0 : num_bytes;
    case OpKind::broadcast:
      if (algo == Algo::ring) return (rank + 1) % world_size == call.root ? 0 : num_bytes;
      if (algo == Algo::direct) return ceil_div(others * num_bytes, world_size);
      return rank == call.root ? num_bytes * others : 0;
    case OpKind::all_gather:
    case OpKind::reduce_scatter:
      return num_bytes * others;
    case OpKind::gather:
    case OpKind::scatter:
    case OpKind::all_to_all: {
      int64_t elems = 0;
      const ExchangeParts parts = ExchangeParts::of(call, world_size);
      for (int peer = 0; peer < world_size; ++peer) {
        if (peer != rank) elems += parts.sends[static_cast<size_t>(peer)].count;
      }
      return elems * elem_bytes_of(call);
    }
    case OpKind::barrier:
    case OpKind::monitored_barrier:
      break;
  }
  return 0;
}

// Both return the algorithm that it was.
Algo run_in_kernel(ShmGroup& group, DeviceGroup& devices, const Collective& call) {
  devices.report_late(group);
  group.throw_if_failed();
  DeviceCall device_call = device_call_of(call, devices, group.world_size());
  const uint32_t num_steps = announce_arrays(group, devices, call, device_call);
  const DevicePlan plan = cuda::plan_collective(device_call, devices.layout());
  devices.enter(call.stream);
  DeviceRounds rounds;
  rounds.end = plan.num_rounds;
  cuda::launch_collective(device_call, plan, devices.view(group.timeout()), rounds, call.stream);
  devices.leave(call.stream);
  group.end(num_steps);
  return device_call.algo;
}

Algo run_stepped(ShmGroup& group, DeviceGroup& devices, const Collective& call) {
  DeviceCall device_call = device_call_of(call, devices, group.world_size());
  const uint32_t first_step = announce_arrays(group, devices, call, device_call);
  group.wait_all_announced();  // nothing is launched unless all ranks call the same
  const DevicePlan plan = cuda::plan_collective(device_call, devices.layout());
  const GroupView view = devices.view(group.timeout());
  const auto step_after = [=](int64_t round) { return first_step + static_cast<uint32_t>(round) + 1; };
  for (int64_t round = 0; round < plan.num_rounds; ++round) {
    if (round > 0) {
      group.publish_step(step_after(round - 1));
      group.wait_all_steps(step_after(round - 1));
      ++devices.epoch;
    }
    cuda::launch_collective(device_call, plan, view, {round, round + 1, false, devices.epoch}, call.stream);
    devices.leave(call.stream);
    devices.finish(call.stream, group);
  }
  group.end(step_after(plan.num_rounds - 2));
  return device_call.algo;
}

// ---- through the host ----------------------------------------------------------------------------

// Stretches of memory on the GPU and their places, one after the other, in one on the host.
class HostCopies {
 public:
  struct Copy {
    void* device;
    int64_t num_bytes;
    bool is_read;
    bool is_written;
    int64_t offset;
  };

  // Null, and no copy, for nothing.
  template <typename T>
  void add(T*& pointer, int64_t num_bytes, bool is_read, bool is_written) {
    void* const device = const_cast<void*>(static_cast<const void*>(pointer));
    if (device == nullptr || num_bytes == 0) return;
    copies_.push_back({device, num_bytes, is_read, is_written, total_});
    also(pointer);
    total_ += round_up(num_bytes, static_cast<int64_t>(kCacheLine));
  }
  // Another pointer to what was added last.
  template <typename T>
  void also(T*& pointer) {
    if (copies_.empty()) return;
    pointers_.push_back(
        [&pointer, offset = copies_.back().offset](uint8_t* host) { pointer = reinterpret_cast<T*>(host + offset); });
  }

  int64_t total() const { return total_; }
  // Puts the places in `host` where the pointers that were added point to.
  void place(uint8_t* host) {
    host_ = host;
    for (const auto& set : pointers_) set(host);
  }
  void fetch(Stream stream) const {
    for (const Copy& copy : copies_) {
      if (copy.is_read) runtime::copy_async(host_ + copy.offset, copy.device, copy.num_bytes, stream);
    }
  }
  void bring_back(Stream stream) const {
    for (const Copy& copy : copies_) {
      if (copy.is_written) runtime::copy_async(copy.device, host_ + copy.offset, copy.num_bytes, stream);
    }
  }

 private:
  std::vector<Copy> copies_;
  std::vector<std::function<void(uint8_t*)>> pointers_;
  int64_t total_ = 0;
  uint8_t* host_ = nullptr;
};

// What this rank gives and gets in `input` and `output`: no parts, and not what another rank has.
void add_arrays(HostCopies& copies, Collective& call, int rank, int world_size) {
  const bool is_root = rank == call.root;
  const bool gives = call.sends.empty() && call.op != OpKind::scatter && (call.op != OpKind::broadcast || is_root);
  const bool gets = call.receives.empty() && call.op != OpKind::gather && (call.op != OpKind::reduce || is_root);
  const int64_t input_bytes = call.num_bytes() * (call.op == OpKind::reduce_scatter ? world_size : 1);
  const int64_t output_bytes = call.num_bytes() * (call.op == OpKind::all_gather ? world_size : 1);
  if (gives && gets && call.input == call.output && input_bytes == output_bytes) {
    copies.add(call.output, output_bytes, true, call.op != OpKind::broadcast);
    copies.also(call.input);
    return;
  }
  if (gives) copies.add(call.input, input_bytes, true, false);
  if (gets) copies.add(call.output, output_bytes, false, true);
}

int64_t run_through_host(ShmGroup& group, DeviceGroup& devices, Collective call,
                         const std::function<int64_t(const Collective&)>& run_on_host) {
  const int64_t elem_bytes = elem_bytes_of(call);
  const int64_t residual_bytes = call.count * static_cast<int64_t>(sizeof(float));
  const Stream stream = call.stream;
  HostCopies copies;
  add_arrays(copies, call, group.rank(), group.world_size());
  for (SendPart& part : call.sends) copies.add(part.data, part.count * elem_bytes, true, false);
  for (ReceivePart& part : call.receives) copies.add(part.data, part.count * elem_bytes, false, true);
  copies.add(call.codec.residual, residual_bytes, true, true);
  copies.add(call.codec.owner_residual, residual_bytes, true, true);
  copies.place(devices.scratch(copies.total()));
  call.on_device = false;

  copies.fetch(stream);
  devices.leave(stream);
  devices.finish(stream, group);
  const int64_t sent = run_on_host(call);
  copies.bring_back(stream);
  devices.leave(stream);
  // The scratch memory must not change before it has been read, and the call ends when the arrays are there.
  devices.finish(stream, group);
  return sent;
}

int64_t run_packed(ShmGroup& group, DeviceGroup& devices, const Collective& call,
                   const std::function<int64_t(const Collective&)>& run_on_host) {
  const Collective whole = call_on_buffer(call, group.rank(), devices.pack_buffer());
  devices.enter(call.stream);
  cuda::pack(call.packed, const_cast<void*>(whole.input), call.stream);
  const int64_t sent = run_on_device(group, devices, whole, run_on_host);
  cuda::unpack(call.unpacked, whole.output, call.stream);
  devices.leave(call.stream);
  if (!devices.queues()) devices.finish(call.stream, group);
  return sent;
}

}  // namespace

std::shared_ptr<DeviceGroup> make_device_group(int rank, int world_size, int device, const DeviceSetup& setup) {
  auto devices = std::make_shared<DeviceGroup>(rank, world_size, device, setup);
  const runtime::DeviceGuard guard(device);
  if (devices->has_slab()) {
    cuda::load_kernels();
    cuda::launch_format(devices->view({}), devices->own_stream());
    runtime::synchronize(devices->own_stream());
  }
  return devices;
}

void check_on_device(const Collective& call, const DeviceGroup& devices, int world_size) {
  if (world_size == 1) return;
  if (!devices.queues()) {
    const runtime::DeviceGuard guard(devices.device());
    RC_CHECK(!runtime::is_capturing(call.stream), op_name(call.op),
             " cannot be captured into a CUDA graph: this group's mode is ", device_mode_name(devices.mode()), " (",
             devices.reason(),
             "), in which the host waits between the steps of a call; call it outside of the capture");
  }
  if (devices.mode() == DeviceMode::host) return;
  if (is_packed(call)) {
    return check_on_device(call_on_buffer(call, devices.rank(), devices.pack_buffer()), devices, world_size);
  }
  cuda::check_collective(device_call_of(call, devices, world_size), devices.layout());
}

int64_t run_on_device(ShmGroup& group, DeviceGroup& devices, const Collective& call,
                      const std::function<int64_t(const Collective&)>& run_on_host) {
  const runtime::DeviceGuard guard(devices.device());
  if (is_packed(call)) return run_packed(group, devices, call, run_on_host);
  if (devices.mode() == DeviceMode::host) return run_through_host(group, devices, call, run_on_host);
  const Algo algo =
      devices.mode() == DeviceMode::in_kernel ? run_in_kernel(group, devices, call) : run_stepped(group, devices, call);
  return bytes_sent(call, algo, group.rank(), group.world_size());
}

void run_on_device_alone(DeviceGroup& devices, const Collective& call) {
  const runtime::DeviceGuard guard(devices.device());
  const void* from = call.sends.empty() ? call.input : call.sends[0].data;
  void* to = call.receives.empty() ? call.output : call.receives[0].data;
  const int64_t count = call.receives.empty() ? call.count : call.receives[0].count;
  devices.enter(call.stream);
  if (premultiplies(call)) {
    cuda::scale(call.dtype, from, call.factor, to, count, call.stream);
  } else if (count > 0 && from != to) {
    runtime::copy_async(to, from, count * elem_bytes_of(call), call.stream);
  }
  devices.leave(call.stream);
}

}  // namespace ringcomm
