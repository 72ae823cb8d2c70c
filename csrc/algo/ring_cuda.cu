// ring on GPUs: partial sums travel once around, then the sums do. The rounds of algo/ring.cpp. All_reduce.
//
// Steps       a block owns a slice of every chunk and cuts it into pieces; for each, n-1 rounds in which a rank adds
//             its own values to the partial sums from its left neighbour and writes them to the right (rank r begins
//             chunk r-1; rank c ends chunk c), one of which writes the sum; then n-1 in which it passes sums on. The
//             last of them, which only reads, is also the first of the next piece.
// Wire bytes  2 (n-1)/n x input per rank (16-bit types send float32 partial sums: 3 (n-1)/n)
// Scratch     the boxes of the neighbours
// Ordering    algo/rounds.h: all ranks wait for all, not only for the neighbours, in spite of what that costs: it
//             takes less than a piece, and a rank that is late is named by everyone, where of neighbours everyone
//             would name its own.
// Best for    GPUs that reach one neighbour better than the others (PCIe)
//
// Chunk c is summed in the order c+1, c+2, ..., c (a rotation of rank order): equal bits on all ranks, the same on
// every run. They are those of algo/ring.cpp, whose chunks are the same: boxes, blocks and pieces change no bit.
#include "algo/block_copy.h"
#include "algo/device_kernels.h"
#include "algo/reduction_kernels.h"
#include "algo/rounds.h"
#include "algo/slices.h"
#include "reduce/reduce.h"

namespace ringcomm::cuda {
namespace {

struct RingArgs {
  GroupView group;
  DeviceRounds rounds;
  const uint8_t* input;
  uint8_t* output;
  int64_t num_bytes;
  Slices slices;
  double factor;  // premul_sum
};

// Rounds from the first of a piece to that of the next.
RC_HD int rounds_of_piece(int world_size) { return world_size == 1 ? 1 : 2 * (world_size - 1); }

template <typename T, typename Op, bool kScales>
class Ring {
 public:
  __device__ __forceinline__ Ring(const RingArgs& args, const RoundsOfBlock& block)
      : args_(args), block_(block), rank_(args.group.rank), world_size_(args.group.layout.world_size) {}

  __device__ __forceinline__ void run(int64_t round) const {
    const int64_t piece = round / rounds_of_piece(world_size_);
    const int hop = static_cast<int>(round % rounds_of_piece(world_size_));
    if (hop < world_size_) {
      add(piece, hop);
    }
    if (world_size_ > 1 && hop >= world_size_) pass_on(piece, hop);
    if (world_size_ > 1 && hop == 0 && piece > 0) pass_on(piece - 1, rounds_of_piece(world_size_));
  }

 private:
  static constexpr int kElemBytes = static_cast<int>(sizeof(T));
  using Acc = Accumulator<T>;

  __device__ __forceinline__ int left() const { return rank_ == 0 ? world_size_ - 1 : rank_ - 1; }
  __device__ __forceinline__ int right() const { return rank_ + 1 == world_size_ ? 0 : rank_ + 1; }

  // Of the array.
  __device__ __forceinline__ Range bytes_of(int64_t piece, int hop) const {
    const int owner = (rank_ + 2 * world_size_ - 1 - hop) % world_size_;
    const Range chunk = chunk_of(args_.num_bytes, world_size_, owner, kChunkGranule);
    const Range range = args_.slices.of(static_cast<int>(blockIdx.x), piece, chunk.count());
    return Range{chunk.begin + range.begin, chunk.begin + range.end};
  }

  // Hops of partial sums; the last one makes the sum.
  __device__ __forceinline__ void add(int64_t piece, int hop) const {
    const Range range = bytes_of(piece, hop);
    const uint8_t* const input = args_.input + range.begin;
    uint8_t* const output = args_.output + range.begin;
    const bool aligned = is_aligned(input, kVectorBytes) && is_aligned(output, kVectorBytes);
    const int num_elems = static_cast<int>(range.count()) / kElemBytes;
    const int num_runs = aligned ? num_elems / kRun<T> : 0;
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (int run = thread; run < num_runs; run += kCollectiveThreads)
      add_run<kRun<T>>(hop, input, output, run * kRun<T>);
#pragma unroll 1
    for (int i = num_runs * kRun<T> + thread; i < num_elems; i += kCollectiveThreads) add_run<1>(hop, input, output, i);
  }

  template <int kCount>
  __device__ __forceinline__ void add_run(int hop, const uint8_t* input, uint8_t* output, int begin) const {
    Acc values[kCount];
    if constexpr (kScales) {
      load_scaled_run<T>(input, begin, args_.factor, values);
    } else {
      load_run<T>(input, begin, values);
    }
    if (hop > 0) {
      Acc totals[kCount];
      load_vector(block_.box_from(left()) + begin * static_cast<int>(sizeof(Acc)), totals);
      combine_runs<Op>(totals, values);
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = totals[i];
    }
    uint8_t* const box = block_.box_at(right());
    if (hop + 1 < world_size_) return store_vector(box + begin * static_cast<int>(sizeof(Acc)), values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = Op().finish(values[i], world_size_);
    T elements[kCount];
    to_elements<T>(values, elements);
    store_vector(output + begin * kElemBytes, elements);
    if (world_size_ > 1) store_vector(box + begin * kElemBytes, elements);
  }

  __device__ __forceinline__ void pass_on(int64_t piece, int hop) const {
    const Range range = bytes_of(piece, hop);
    const uint8_t* const sums = block_.box_from(left());
    copy_by_block<kElemBytes>(args_.output + range.begin, sums, range.count());
    if (hop < rounds_of_piece(world_size_)) copy_by_block<kElemBytes>(block_.box_at(right()), sums, range.count());
  }

  const RingArgs& args_;
  const RoundsOfBlock& block_;
  const int rank_;
  const int world_size_;
};

template <typename T, typename Op, bool kScales>
__global__ void __launch_bounds__(kCollectiveThreads, 1) ring_kernel(const __grid_constant__ RingArgs args) {
  RoundsOfBlock block(args.group, args.rounds);
  const Ring<T, Op, kScales> ring(args, block);
  for (int64_t round = args.rounds.begin; round < args.rounds.end; ++round) {
    if (round > args.rounds.begin && !block.next_round()) return;
    ring.run(round);
  }
  block.finish();
}

struct Kernels {
  using Args = RingArgs;
  static constexpr const char* kName = "ring";
  template <typename T, typename Op, bool kScales>
  static constexpr auto kernel = ring_kernel<T, Op, kScales>;
};

int64_t num_bytes_of(const DeviceCall& call) { return call.count * static_cast<int64_t>(dtype_size(call.dtype)); }

int64_t longest_chunk(const DeviceCall& call, const DeviceLayout& layout) {
  return chunk_of(num_bytes_of(call), layout.world_size, 0, kChunkGranule).count();
}

// Partial sums may be wider than the array's elements.
Slices slices_of(const DeviceCall& call, const DeviceLayout& layout, int num_blocks) {
  const int64_t widening =
      static_cast<int64_t>(dtype_size(cpu::accumulator_dtype(call.dtype)) / dtype_size(call.dtype));
  return Slices(longest_chunk(call, layout), num_blocks, layout.box_bytes / widening);
}

DevicePlan plan(const DeviceCall& call, const DeviceLayout& layout) {
  DevicePlan plan;
  plan.num_blocks = Slices::num_blocks(longest_chunk(call, layout), layout);
  plan.num_rounds = slices_of(call, layout, plan.num_blocks).num_pieces() * rounds_of_piece(layout.world_size) + 1;
  return plan;
}

void launch_ring(const DeviceCall& call, const DevicePlan& plan, const GroupView& group, const DeviceRounds& rounds,
                 Stream stream) {
  const RingArgs args{group,
                      rounds,
                      static_cast<const uint8_t*>(call.input),
                      static_cast<uint8_t*>(call.output),
                      num_bytes_of(call),
                      slices_of(call, group.layout, plan.num_blocks),
                      call.factor};
  const LaunchShape shape{dim3(static_cast<unsigned>(plan.num_blocks)), dim3(kCollectiveThreads), 0};
  launch(Kernels::kName, shape, stream, ReductionKernels<Kernels>::of(call).kernel, args);
}

}  // namespace

const CollectiveKernels& ring_kernels() {
  static constexpr CollectiveKernels kernels{plan, launch_ring, ReductionKernels<Kernels>::load};
  return kernels;
}

}  // namespace ringcomm::cuda
