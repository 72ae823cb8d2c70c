// two_shot on GPUs: a rank owns one chunk of the array, sums it, and hands the sum to who gets it. Exact all_reduce,
// reduce, reduce_scatter.
//
// Steps       a block owns a slice of every chunk and cuts it into pieces that fill a box:
//             push     write its piece of every peer's chunk into the box at that peer
//             sum      sum the own piece in rank order, out of the boxes and the input, into the output and the
//                      boxes at all peers (reduce: at the root)
//             collect  copy the sums of the peers' pieces out of the boxes into the output
//             A round of its own is each; collect(k) and push(k + 1) share one. A reduce_scatter has no collect: there
//             sum(k) and push(k + 1) share one.
// Wire bytes  2 (n-1)/n x input per rank; reduce: 1 x input; reduce_scatter: (n-1) x output
// Scratch     the boxes
// Ordering    algo/rounds.h. In place: all of a piece is read before the round in which it is written; the own piece
//             is read and written by the same threads.
// Best for    everything that is not small
//
// Equal bits: one owner sums each element in rank order, everyone takes the owner's bytes.
#include "algo/block_copy.h"
#include "algo/device_kernels.h"
#include "algo/reduction_kernels.h"
#include "algo/rounds.h"
#include "algo/slices.h"

namespace ringcomm::cuda {
namespace {

struct TwoShotArgs {
  GroupView group;
  DeviceRounds rounds;
  // By owner: where the chunk lies in this rank's input, how long it is, and where this rank wants the sum (null:
  // nowhere).
  const uint8_t* inputs[kMostDeviceRanks];
  int64_t chunk_bytes[kMostDeviceRanks];
  uint8_t* outputs[kMostDeviceRanks];
  uint32_t receivers;  // a bit for every rank that gets the sums of all chunks
  Slices slices;
  double factor;  // premul_sum
};

template <typename T, typename Op, bool kScales>
class TwoShot {
 public:
  __device__ __forceinline__ TwoShot(const TwoShotArgs& args, const RoundsOfBlock& block)
      : args_(args), block_(block), rank_(args.group.rank), world_size_(args.group.layout.world_size) {}

  __device__ __forceinline__ void push(int64_t piece) const {
    for (int step = 1; step < world_size_; ++step) {
      const int owner = block_.peer_at(step);
      const Range range = bytes_of(owner, piece);
      if (range.count() > 0) push_to(block_.box_at(owner), args_.inputs[owner] + range.begin, range.count());
    }
  }

  __device__ __forceinline__ void sum(int64_t piece) const {
    if (piece < 0) return;
    const Range range = bytes_of(rank_, piece);
    const uint8_t* const input = args_.inputs[rank_] + range.begin;
    uint8_t* const output = args_.outputs[rank_] == nullptr ? nullptr : args_.outputs[rank_] + range.begin;
    const bool aligned = is_aligned(input, kVectorBytes) && is_aligned(output, kVectorBytes);
    const int num_elems = static_cast<int>(range.count()) / kElemBytes;
    const int num_runs = aligned ? num_elems / kRun<T> : 0;
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (int run = thread; run < num_runs; run += kCollectiveThreads) sum_run<kRun<T>>(input, output, run * kRun<T>);
#pragma unroll 1
    for (int i = num_runs * kRun<T> + thread; i < num_elems; i += kCollectiveThreads) sum_run<1>(input, output, i);
  }

  __device__ __forceinline__ void collect(int64_t piece) const {
    if (piece < 0 || !receives(rank_)) return;
    for (int step = 1; step < world_size_; ++step) {
      const int owner = block_.peer_at(step);
      const Range range = bytes_of(owner, piece);
      if (range.count() > 0) {
        copy_by_block<kElemBytes>(args_.outputs[owner] + range.begin, block_.box_from(owner), range.count());
      }
    }
  }

 private:
  static constexpr int kElemBytes = static_cast<int>(sizeof(T));

  __device__ __forceinline__ bool receives(int rank) const { return (args_.receivers >> rank & 1u) != 0; }

  // Of the owner's chunk.
  __device__ __forceinline__ Range bytes_of(int owner, int64_t piece) const {
    return args_.slices.of(static_cast<int>(blockIdx.x), piece, args_.chunk_bytes[owner]);
  }

  __device__ __forceinline__ void push_to(uint8_t* box, const uint8_t* input, int64_t num_bytes) const {
    if constexpr (kScales) {
      const int64_t num_elems = num_bytes / kElemBytes;
      const int64_t num_runs = is_aligned(input, kVectorBytes) ? num_elems / kRun<T> : 0;
      for (int64_t run = threadIdx.x; run < num_runs; run += blockDim.x) scale_run<kRun<T>>(box, input, run * kRun<T>);
      for (int64_t i = num_runs * kRun<T> + threadIdx.x; i < num_elems; i += blockDim.x) scale_run<1>(box, input, i);
    } else {
      copy_by_block<kElemBytes>(box, input, num_bytes);
    }
  }

  template <int kCount>
  __device__ __forceinline__ void scale_run(uint8_t* box, const uint8_t* input, int64_t begin) const {
    T elements[kCount];
    load_vector(reinterpret_cast<const T*>(input) + begin, elements);
#pragma unroll
    for (int i = 0; i < kCount; ++i) elements[i] = scaled_element(elements[i], args_.factor);
    store_vector(reinterpret_cast<T*>(box) + begin, elements);
  }

  template <int kCount>
  __device__ __forceinline__ void sum_run(const uint8_t* input, uint8_t* output, int begin) const {
    const int first_byte = begin * kElemBytes;
    const uint8_t* const boxes = block_.box_from(0) + first_byte;
    const uint32_t box_step = static_cast<uint32_t>(block_.box_from(1) - block_.box_from(0));
    Accumulator<T> totals[kCount];
    using Elements = T[kCount];
    const auto load = [&](int rank, Elements& elements) {
      const uint64_t offset = static_cast<uint64_t>(static_cast<uint32_t>(rank)) * box_step;
      load_vector(rank == rank_ ? input + first_byte : boxes + offset, elements);
    };
    load_ahead<Elements>(world_size_, load, [&](int rank, Elements& elements) {
      if constexpr (kScales) {  // what came from others is scaled already
        if (rank == rank_) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) elements[i] = scaled_element(elements[i], args_.factor);
        }
      }
      combine_rank<Op>(rank, elements, totals);
    });
#pragma unroll
    for (int i = 0; i < kCount; ++i) totals[i] = Op().finish(totals[i], world_size_);
    T elements[kCount];
    to_elements<T>(totals, elements);
#pragma unroll 1
    for (int step = 1; step < world_size_; ++step) {
      const int peer = block_.peer_at(step);
      if (receives(peer)) store_vector(block_.box_at(peer) + first_byte, elements);
    }
    if (output != nullptr) store_vector(output + first_byte, elements);
  }

  const TwoShotArgs& args_;
  const RoundsOfBlock& block_;
  const int rank_;
  const int world_size_;
};

template <typename T, typename Op, bool kScales>
__global__ void __launch_bounds__(kCollectiveThreads, 1) two_shot_kernel(const __grid_constant__ TwoShotArgs args) {
  RoundsOfBlock block(args.group, args.rounds);
  const TwoShot<T, Op, kScales> shots(args, block);
  for (int64_t round = args.rounds.begin; round < args.rounds.end; ++round) {
    if (round > args.rounds.begin && !block.next_round()) return;
    const bool gathers = args.receivers != 0;
    if (!gathers || round % 2 == 0) shots.push(gathers ? round / 2 : round);
    if (!gathers || round % 2 == 1) shots.sum(gathers ? round / 2 : round - 1);
    if (gathers && round % 2 == 0) shots.collect(round / 2 - 1);
  }
  block.finish();
}

struct Kernels {
  using Args = TwoShotArgs;
  static constexpr const char* kName = "two_shot";
  template <typename T, typename Op, bool kScales>
  static constexpr auto kernel = two_shot_kernel<T, Op, kScales>;
};

// Of the array; the first chunk is the longest.
Range chunk_bytes(const DeviceCall& call, const DeviceLayout& layout, int owner) {
  const int64_t num_bytes = call.count * static_cast<int64_t>(dtype_size(call.dtype));
  if (call.op == OpKind::reduce_scatter) return Range{owner * num_bytes, (owner + 1) * num_bytes};
  return chunk_of(num_bytes, layout.world_size, owner, kChunkGranule);
}

Slices slices_of(const DeviceCall& call, const DeviceLayout& layout, int num_blocks) {
  return Slices(chunk_bytes(call, layout, 0).count(), num_blocks, layout.box_bytes);
}

DevicePlan plan(const DeviceCall& call, const DeviceLayout& layout) {
  DevicePlan plan;
  plan.num_blocks = Slices::num_blocks(chunk_bytes(call, layout, 0).count(), layout);
  const int64_t num_pieces = slices_of(call, layout, plan.num_blocks).num_pieces();
  plan.num_rounds = (call.op == OpKind::reduce_scatter ? num_pieces : 2 * num_pieces) + 1;
  return plan;
}

void launch_two_shot(const DeviceCall& call, const DevicePlan& plan, const GroupView& group, const DeviceRounds& rounds,
                     Stream stream) {
  const DeviceLayout& layout = group.layout;
  const uint32_t all = (1u << layout.world_size) - 1;
  const uint32_t receivers = call.op == OpKind::all_reduce ? all : call.op == OpKind::reduce ? 1u << call.root : 0;
  TwoShotArgs args{group, rounds, {}, {}, {}, receivers, slices_of(call, layout, plan.num_blocks), call.factor};
  for (int owner = 0; owner < layout.world_size; ++owner) {
    const Range range = chunk_bytes(call, layout, owner);
    args.chunk_bytes[owner] = range.count();
    args.inputs[owner] = call.has_parts ? static_cast<const uint8_t*>(call.sends[owner].data)
                                        : static_cast<const uint8_t*>(call.input) + range.begin;
    if ((receivers >> group.rank & 1u) != 0) args.outputs[owner] = static_cast<uint8_t*>(call.output) + range.begin;
  }
  if (call.op == OpKind::reduce_scatter) args.outputs[group.rank] = static_cast<uint8_t*>(call.output);
  const LaunchShape shape{dim3(static_cast<unsigned>(plan.num_blocks)), dim3(kCollectiveThreads), 0};
  launch(Kernels::kName, shape, stream, ReductionKernels<Kernels>::of(call).kernel, args);
}

}  // namespace

const CollectiveKernels& two_shot_kernels() {
  static constexpr CollectiveKernels kernels{plan, launch_two_shot, ReductionKernels<Kernels>::load};
  return kernels;
}

}  // namespace ringcomm::cuda
