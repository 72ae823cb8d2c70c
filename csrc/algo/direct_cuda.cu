// direct on GPUs: arrays that all ranks have mapped are read and written where they are. Exact all_reduce, reduce,
// reduce_scatter, broadcast, all_gather and exchanges.
//
// Steps       round 0  nothing. Its end: everybody's arrays are ready
//             round 1  all_reduce, reduce   sum the own chunk over all inputs in rank order, into everybody's output
//                                           (the root's)
//                      reduce_scatter       sum the own part over all inputs in rank order
//                      broadcast            the own chunk of the root's input into everybody's output: so the root
//                                           sends everything once only, and the others do the rest
//                      all_gather           copy every rank's input
//                      exchanges            copy the own part of what every rank has
//             round 2  nothing. Its beginning: nobody touches this rank's arrays any more
//             A block works on a slice of every chunk or part.
// Wire bytes  all_reduce, broadcast: 2 (n-1)/n x array, the least that moves at all; the others what they hand over
// Scratch     none
// Ordering    algo/rounds.h. A kernel begins when its stream has made the arrays, and the end of round 0 tells the
//             peers. The end of round 1 tells them what was written here, and that it has been read: block by block,
//             but every block waits, so when the kernel ends, all of it is true.
// Best for    everything that is not small
//
// Equal bits: one owner sums each element in rank order and writes its sum to everyone; the bytes of two_shot.
#include "algo/block_copy.h"
#include "algo/device_kernels.h"
#include "algo/reduction_kernels.h"
#include "algo/rounds.h"
#include "algo/slices.h"

namespace ringcomm::cuda {
namespace {

constexpr int64_t kNumRounds = 3;
constexpr int64_t kWorkRound = 1;

// By rank, as everywhere below; offsets are in the pointers already.
struct DirectArgs {
  GroupView group;
  DeviceRounds rounds;
  const uint8_t* inputs[kMostDeviceRanks];
  uint8_t* outputs[kMostDeviceRanks];   // null: nothing goes there
  int64_t num_bytes[kMostDeviceRanks];  // of what goes from the input of a rank to its output; sums, push: in [0]
  Slices slices;
  bool aligned;  // all of them, for vectors
};

// Of num_bytes that begin at the pointers: this block's.
__device__ __forceinline__ Range slice_of(const DirectArgs& args, int64_t num_bytes) {
  return args.slices.of(static_cast<int>(blockIdx.x), 0, num_bytes);
}

template <typename T, typename Op, int kCount>
__device__ __forceinline__ void sum_run(const DirectArgs& args, const RoundsOfBlock& block, int64_t first_byte) {
  using Elements = T[kCount];
  const int world_size = block.world_size();
  Accumulator<T> totals[kCount];
  load_ahead<Elements>(
      world_size, [&](int rank, Elements& elements) { load_vector(args.inputs[rank] + first_byte, elements); },
      [&](int rank, const Elements& elements) { combine_rank<Op>(rank, elements, totals); });
#pragma unroll
  for (int i = 0; i < kCount; ++i) totals[i] = Op().finish(totals[i], world_size);
  T sums[kCount];
  to_elements<T>(totals, sums);
#pragma unroll 1
  for (int step = 0; step < world_size; ++step) {
    uint8_t* const output = args.outputs[block.peer_at(step)];
    if (output != nullptr) store_vector(output + first_byte, sums);
  }
}

template <typename T, typename Op>
__device__ __forceinline__ void sum(const DirectArgs& args, const RoundsOfBlock& block) {
  constexpr int64_t kRunBytes = kRun<T> * static_cast<int64_t>(sizeof(T));
  const Range range = slice_of(args, args.num_bytes[0]);
  const int64_t num_runs = args.aligned ? range.count() / kRunBytes : 0;
  const int64_t thread = threadIdx.x;
#pragma unroll 1
  for (int64_t run = thread; run < num_runs; run += kCollectiveThreads) {
    sum_run<T, Op, kRun<T>>(args, block, range.begin + run * kRunBytes);
  }
  const int64_t num_elems = range.count() / static_cast<int64_t>(sizeof(T));
#pragma unroll 1
  for (int64_t i = num_runs * kRun<T> + thread; i < num_elems; i += kCollectiveThreads) {
    sum_run<T, Op, 1>(args, block, range.begin + i * static_cast<int64_t>(sizeof(T)));
  }
}

// kElemBytes of inputs[0] in every access.
template <int kElemBytes, int kInFlight>
__device__ __forceinline__ void push_elements(const DirectArgs& args, const RoundsOfBlock& block, int64_t first) {
  using Element = typename VectorWord<kElemBytes>::Type;
  const Element* const from = reinterpret_cast<const Element*>(args.inputs[0]) + first;
  Element elements[kInFlight];
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) elements[k] = from[k * kCollectiveThreads];
#pragma unroll 1
  for (int step = 0; step < block.world_size(); ++step) {
    uint8_t* const output = args.outputs[block.peer_at(step)];
    if (output == nullptr) continue;
    Element* const to = reinterpret_cast<Element*>(output) + first;
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) to[k * kCollectiveThreads] = elements[k];
  }
}

__device__ __forceinline__ void push(const DirectArgs& args, const RoundsOfBlock& block) {
  constexpr int kInFlight = 4;
  const Range range = slice_of(args, args.num_bytes[0]);
  const int64_t end = range.begin + (args.aligned ? round_down(range.count(), kVectorBytes) : 0);
  int64_t i = range.begin / kVectorBytes + threadIdx.x;
#pragma unroll 1
  for (; i + (kInFlight - 1) * kCollectiveThreads < end / kVectorBytes; i += kInFlight * kCollectiveThreads) {
    push_elements<kVectorBytes, kInFlight>(args, block, i);
  }
#pragma unroll 1
  for (; i < end / kVectorBytes; i += kCollectiveThreads) push_elements<kVectorBytes, 1>(args, block, i);
#pragma unroll 1
  for (i = end + threadIdx.x; i < range.end; i += kCollectiveThreads) push_elements<1, 1>(args, block, i);
}

__device__ __forceinline__ void pull(const DirectArgs& args, const RoundsOfBlock& block) {
  for (int step = 0; step < block.world_size(); ++step) {
    const int peer = block.peer_at(step);
    const Range range = slice_of(args, args.num_bytes[peer]);
    copy_bytes_by_block(args.outputs[peer] + range.begin, args.inputs[peer] + range.begin, range.count());
  }
}

// The rounds, with work() in the one that has some.
template <typename Work>
__device__ __forceinline__ void run(const DirectArgs& args, Work work) {
  RoundsOfBlock block(args.group, args.rounds);
  for (int64_t round = args.rounds.begin; round < args.rounds.end; ++round) {
    if (round > args.rounds.begin && !block.next_round()) return;
    if (round != kWorkRound) continue;
    if (!block.may_touch_arrays()) return;
    work(block);
  }
  block.finish();
}

template <typename T, typename Op>
__global__ void __launch_bounds__(kCollectiveThreads, 1) sum_kernel(const __grid_constant__ DirectArgs args) {
  run(args, [&](const RoundsOfBlock& block) { sum<T, Op>(args, block); });
}
__global__ void __launch_bounds__(kCollectiveThreads, 1) push_kernel(const __grid_constant__ DirectArgs args) {
  run(args, [&](const RoundsOfBlock& block) { push(args, block); });
}
__global__ void __launch_bounds__(kCollectiveThreads, 1) pull_kernel(const __grid_constant__ DirectArgs args) {
  run(args, [&](const RoundsOfBlock& block) { pull(args, block); });
}

struct Sums {
  using Args = DirectArgs;
  static constexpr const char* kName = "direct";
  template <typename T, typename Op, bool kScales>  // nothing is scaled; check() sees to that
  static constexpr auto kernel = sum_kernel<T, Op>;
};

// ---- Host

int64_t elem_bytes_of(const DeviceCall& call) { return static_cast<int64_t>(dtype_size(call.dtype)); }

bool has_chunks(OpKind op) { return op == OpKind::all_reduce || op == OpKind::reduce || op == OpKind::broadcast; }

Range own_chunk(const DeviceCall& call, int rank, int world_size) {
  return chunk_of(call.count * elem_bytes_of(call), world_size, rank, kChunkGranule);
}

// The longest stretch that a rank works on at once; the same on all ranks.
int64_t longest(const DeviceCall& call, const DeviceLayout& layout) {
  if (has_chunks(call.op)) return own_chunk(call, 0, layout.world_size).count();
  return (is_exchange(call.op) ? call.most_part_elems : call.count) * elem_bytes_of(call);
}

DevicePlan plan(const DeviceCall& call, const DeviceLayout& layout) {
  return {kNumRounds, Slices::num_blocks(longest(call, layout), layout)};
}

// What goes where; see DirectArgs.
void set_arrays(const DeviceCall& call, const GroupView& group, DirectArgs& args) {
  const int world_size = group.layout.world_size;
  const int64_t elem_bytes = elem_bytes_of(call);
  const int64_t num_bytes = call.count * elem_bytes;
  const auto input = [&](int rank) { return static_cast<const uint8_t*>(call.peers.inputs[rank]); };
  const auto output = [&](int rank) { return static_cast<uint8_t*>(call.peers.outputs[rank]); };
  if (has_chunks(call.op)) {
    const Range chunk = own_chunk(call, group.rank, world_size);
    args.num_bytes[0] = chunk.count();
    for (int rank = 0; rank < world_size; ++rank) {
      if (call.op != OpKind::broadcast) args.inputs[rank] = input(rank) + chunk.begin;
      const bool gets = call.op == OpKind::reduce ? rank == call.root : true;
      if (gets) args.outputs[rank] = output(rank) + chunk.begin;
    }
    if (call.op != OpKind::broadcast) return;
    args.inputs[0] = input(call.root) + chunk.begin;
    if (args.outputs[call.root] == args.inputs[0]) args.outputs[call.root] = nullptr;
    return;
  }
  args.num_bytes[0] = num_bytes;  // of a reduce_scatter
  if (call.op == OpKind::reduce_scatter) args.outputs[group.rank] = static_cast<uint8_t*>(call.output);
  for (int rank = 0; rank < world_size; ++rank) {
    if (call.op == OpKind::reduce_scatter) {
      args.inputs[rank] = input(rank) + group.rank * num_bytes;
      continue;
    }
    const bool gathers = call.op == OpKind::all_gather && !call.has_parts;
    const DevicePart part =
        gathers ? DevicePart{static_cast<uint8_t*>(call.output) + rank * num_bytes, call.count} : call.receives[rank];
    args.inputs[rank] = input(rank);
    args.outputs[rank] = static_cast<uint8_t*>(part.data);
    args.num_bytes[rank] = part.count * elem_bytes;
  }
}

bool all_aligned(const DirectArgs& args) {
  for (int rank = 0; rank < args.group.layout.world_size; ++rank) {
    if (!is_aligned(args.inputs[rank], kVectorBytes) || !is_aligned(args.outputs[rank], kVectorBytes)) return false;
  }
  return true;
}

void launch_direct(const DeviceCall& call, const DevicePlan& plan, const GroupView& group, const DeviceRounds& rounds,
                   Stream stream) {
  constexpr int64_t kWholeSlice = int64_t{1} << 62;
  DirectArgs args{group, rounds, {}, {}, {}, Slices(longest(call, group.layout), plan.num_blocks, kWholeSlice), false};
  set_arrays(call, group, args);
  args.aligned = all_aligned(args);
  const LaunchShape shape{dim3(static_cast<unsigned>(plan.num_blocks)), dim3(kCollectiveThreads)};
  if (reduces(call.op)) return launch(Sums::kName, shape, stream, ReductionKernels<Sums>::of(call).kernel, args);
  launch(Sums::kName, shape, stream, call.op == OpKind::broadcast ? push_kernel : pull_kernel, args);
}

void load() {
  ReductionKernels<Sums>::load();
  load_kernel(Sums::kName, push_kernel);
  load_kernel(Sums::kName, pull_kernel);
}

}  // namespace

const CollectiveKernels& direct_kernels() {
  static constexpr CollectiveKernels kernels{plan, launch_direct, load};
  return kernels;
}

}  // namespace ringcomm::cuda
