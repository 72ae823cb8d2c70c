// Collectives of csrc/algo as C functions for ctypes. Structures have fields of 8 bytes only; their twins are in
// tests/simt/collectives.py.
#include "algo/device_collective.h"
#include "simt/export.h"

using namespace ringcomm;

namespace {

struct TestPart {
  void* data;
  int64_t count;
};

struct TestCall {
  int64_t op;
  int64_t algo;
  int64_t dtype;
  int64_t reduce_op;
  double factor;
  int64_t count;
  int64_t root;
  const void* input;
  void* output;
  TestPart sends[kMostDeviceRanks];
  TestPart receives[kMostDeviceRanks];
  int64_t has_parts;
  int64_t most_part_elems;
  const void* peer_inputs[kMostDeviceRanks];
  void* peer_outputs[kMostDeviceRanks];
  int64_t codec_up;
  int64_t codec_down;
  int64_t stochastic;
  uint64_t seed;
  uint64_t step;
  float* residual;
  float* owner_residual;
};

struct TestGroup {
  uint8_t* slabs[kMostDeviceRanks];
  DeviceWatch* watch;
  uint64_t timeout_ns;
  int64_t world_size;
  int64_t num_blocks;
  int64_t box_bytes;
  int64_t packets_per_box;
  int64_t rank;
};

DeviceCall call_of(const TestCall& given) {
  DeviceCall call;
  call.op = static_cast<OpKind>(given.op);
  call.algo = static_cast<Algo>(given.algo);
  call.dtype = static_cast<DType>(given.dtype);
  call.reduce_op = static_cast<ReduceOp>(given.reduce_op);
  call.factor = given.factor;
  call.count = given.count;
  call.root = static_cast<int>(given.root);
  call.input = given.input;
  call.output = given.output;
  for (int rank = 0; rank < kMostDeviceRanks; ++rank) {
    call.sends[rank] = {given.sends[rank].data, given.sends[rank].count};
    call.receives[rank] = {given.receives[rank].data, given.receives[rank].count};
    call.peers.inputs[rank] = given.peer_inputs[rank];
    call.peers.outputs[rank] = given.peer_outputs[rank];
  }
  call.has_parts = given.has_parts != 0;
  call.most_part_elems = given.most_part_elems;
  call.codec.up = static_cast<CodecId>(given.codec_up);
  call.codec.down = static_cast<CodecId>(given.codec_down);
  call.codec.rounding = given.stochastic != 0 ? Rounding::stochastic : Rounding::nearest_even;
  call.codec.seed = given.seed;
  call.codec.step = given.step;
  call.codec.residual = given.residual;
  call.codec.owner_residual = given.owner_residual;
  return call;
}

DeviceLayout layout_of(const TestGroup& group) {
  return DeviceLayout{static_cast<int>(group.world_size), static_cast<int>(group.num_blocks), group.box_bytes,
                      group.packets_per_box};
}

GroupView view_of(const TestGroup& group) {
  GroupView view{};
  for (int rank = 0; rank < kMostDeviceRanks; ++rank) view.slabs[rank] = group.slabs[rank];
  view.watch = group.watch;
  view.timeout_ns = group.timeout_ns;
  view.layout = layout_of(group);
  view.rank = static_cast<int>(group.rank);
  return view;
}

}  // namespace

SIMT_EXPORT int64_t simt_slab_bytes(const TestGroup* group) { return layout_of(*group).total_bytes(); }

SIMT_EXPORT int simt_plan(const TestCall* given, const TestGroup* group, int64_t* num_rounds, int64_t* num_blocks) {
  return simt::guarded([&] {
    const DeviceCall call = call_of(*given);
    cuda::check_collective(call, layout_of(*group));
    const DevicePlan plan = cuda::plan_collective(call, layout_of(*group));
    *num_rounds = plan.num_rounds;
    *num_blocks = plan.num_blocks;
  });
}

// Queues rounds [begin, end).
SIMT_EXPORT int simt_collective(const TestCall* given, const TestGroup* group, int64_t begin, int64_t end,
                                int64_t in_kernel, uint64_t epoch, CUstream_st* stream) {
  return simt::guarded([&] {
    const DeviceCall call = call_of(*given);
    const GroupView view = view_of(*group);
    const DevicePlan plan = cuda::plan_collective(call, view.layout);
    const DeviceRounds rounds{begin, end, in_kernel != 0, static_cast<uint32_t>(epoch)};
    cuda::launch_collective(call, plan, view, rounds, stream);
  });
}

SIMT_EXPORT int simt_format(const TestGroup* group, CUstream_st* stream) {
  return simt::guarded([&] { cuda::launch_format(view_of(*group), stream); });
}

// The first element, and the one after the last.
SIMT_EXPORT void simt_encoded_sums_of(int64_t rank, int64_t num_elems, int64_t world_size, int64_t* begin,
                                      int64_t* end) {
  const Range range = cuda::encoded_sums_of(static_cast<int>(rank), num_elems, static_cast<int>(world_size));
  *begin = range.begin;
  *end = range.end;
}
