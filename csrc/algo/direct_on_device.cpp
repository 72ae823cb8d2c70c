#include "algo/direct_on_device.h"

#include <vector>

#include "wire/exchange_layout.h"

namespace ringcomm {
namespace {

struct Bytes {
  const void* data = nullptr;
  int64_t count = 0;
};

// What this rank sends in an exchange, if it lies in rank order without gaps.
Bytes consecutive(const ExchangeParts& parts, int64_t elem_bytes) {
  Bytes whole;
  for (const SendPart& part : parts.sends) {
    if (part.count == 0) continue;
    if (whole.data == nullptr) whole.data = part.data;
    if (part.data != bytes_at(whole.data, whole.count)) return {};
    whole.count += part.count * elem_bytes;
  }
  return whole;
}

class ArraysOfCall {
 public:
  ArraysOfCall(ShmGroup& group, DeviceGroup& devices, const Collective& call)
      : group_(group),
        devices_(devices),
        call_(call),
        world_size_(group.world_size()),
        exchanges_(is_exchange(call.op)),
        is_captured_(runtime::is_capturing(call.stream)) {}

  // Into the own payload.
  void say() {
    DeviceArraysRecord& record = *record_of(group_.rank());
    record = DeviceArraysRecord{};
    const Bytes input = readable();
    if (input.count >= least_bytes()) record.input = find(input, record);
    const Bytes output = writable();
    record.output = output.data == input.data ? record.input : find(output, record);
  }

  uint32_t meet() {
    for (int rank = 0; rank < world_size_; ++rank) records_.push_back(record_of(rank));
    return devices_.arrays.meet(group_, records_, [this] { devices_.finish_calls(group_); });
  }

  // False, on all ranks, if one of the arrays is not mapped.
  bool reach(DevicePeers* peers) const {
    for (int rank = 0; rank < world_size_; ++rank) {
      const DeviceArraysRecord& record = *records_[static_cast<size_t>(rank)];
      if (reads(rank)) {
        const uint8_t* const input = devices_.arrays.reach(records_, rank, record.input, is_captured_);
        if (input == nullptr) return false;
        peers->inputs[rank] = input + offset_for_this_rank(rank);
      }
      if (writes(rank)) {
        peers->outputs[rank] = devices_.arrays.reach(records_, rank, record.output, is_captured_);
        if (peers->outputs[rank] == nullptr) return false;
      }
    }
    return true;
  }

  // Parts and arrays of fewer bytes are not worth it.
  int64_t least_bytes() const { return exchanges_ ? devices_.direct_bytes() / world_size_ : 0; }

 private:
  DeviceArraysRecord* record_of(int rank) const {
    return reinterpret_cast<DeviceArraysRecord*>(group_.inline_payload(rank) +
                                                 (exchanges_ ? ExchangeCounts::bytes(world_size_) : 0));
  }
  ArrayPlace find(const Bytes& array, DeviceArraysRecord& record) const {
    return devices_.arrays.find(array.data, array.count, is_captured_, record);
  }
  ExchangeCounts counts_of(int rank) const { return ExchangeCounts::at(group_.inline_payload(rank), world_size_); }

  // Of this rank: what peers read, and what they write. A part of a list is in neither.
  Bytes readable() const {
    const int64_t elem_bytes = static_cast<int64_t>(dtype_size(call_.dtype));
    if (exchanges_) return consecutive(ExchangeParts::of(call_, world_size_), elem_bytes);
    if (!call_.sends.empty()) return {};
    if (call_.op == OpKind::broadcast && group_.rank() != call_.root) return writable();
    return {call_.input, call_.num_bytes() * (call_.op == OpKind::reduce_scatter ? world_size_ : 1)};
  }
  Bytes writable() const { return writes(group_.rank()) ? Bytes{call_.output, call_.num_bytes()} : Bytes{}; }

  // Whose arrays the kernels of others read and write: the same for all ranks.
  bool reads(int rank) const {
    if (call_.op == OpKind::broadcast) return rank == call_.root;
    if (!exchanges_) return true;
    const ExchangeCounts counts = counts_of(rank);
    for (int peer = 0; peer < world_size_; ++peer) {
      if (counts.sends[peer] > 0) return true;
    }
    return false;
  }
  bool writes(int rank) const {
    if (call_.op == OpKind::reduce) return rank == call_.root;
    return call_.op == OpKind::all_reduce || call_.op == OpKind::broadcast;
  }
  // Of an exchange: before it, `rank` has what goes to lower ranks.
  int64_t offset_for_this_rank(int rank) const {
    int64_t elems = 0;
    for (int peer = 0; exchanges_ && peer < group_.rank(); ++peer) elems += counts_of(rank).sends[peer];
    return elems * static_cast<int64_t>(dtype_size(call_.dtype));
  }

  ShmGroup& group_;
  DeviceGroup& devices_;
  const Collective& call_;
  const int world_size_;
  const bool exchanges_;
  const bool is_captured_;
  std::vector<DeviceArraysRecord*> records_;
};

}  // namespace

Algo staged_algo(const Collective& call, const DeviceGroup& devices, int world_size) {
  if (call.op == OpKind::all_reduce || call.op == OpKind::reduce) return Algo::two_shot;
  const bool hands_on = call.op == OpKind::broadcast && world_size > 2 && devices.mode() == DeviceMode::in_kernel;
  return hands_on ? Algo::ring : Algo::staged;
}

uint32_t announce_arrays(ShmGroup& group, DeviceGroup& devices, const Collective& call, DeviceCall& device_call) {
  const bool exchanges = is_exchange(call.op);
  const bool may_be_direct =
      devices.direct_bytes() >= 0 && !premultiplies(call) && (exchanges || call.algo == Algo::direct);
  ArraysOfCall arrays(group, devices, call);
  if (exchanges) write_counts(group, ExchangeParts::of(call, group.world_size()));
  if (may_be_direct) arrays.say();
  group.announce();
  if (!exchanges && !may_be_direct) return 0;

  group.wait_all_announced();
  if (exchanges) device_call.most_part_elems = check_counts(group);
  if (!may_be_direct) return 0;
  const uint32_t steps = arrays.meet();
  const int64_t largest_part = device_call.most_part_elems * static_cast<int64_t>(dtype_size(call.dtype));
  DevicePeers peers;
  if ((exchanges && largest_part < arrays.least_bytes()) || !arrays.reach(&peers)) return steps;
  device_call.algo = Algo::direct;
  device_call.peers = peers;
  ++devices.arrays.num_direct_calls;
  return steps;
}

}  // namespace ringcomm
