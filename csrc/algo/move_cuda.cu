// broadcast, all_gather, all_to_all, gather and scatter on GPUs: bytes go from the arrays of one rank through its boxes
// at the others into their arrays. Nothing is computed, so that dtypes are only a number of bytes.
//
// staged   Each block has a slice of every part that goes from one rank to another, and cuts it into pieces of a box.
// Steps    round k: push piece k of what goes to each peer; collect piece k - 1 of what comes from each.
//          broadcast: the root alone pushes. The own part is copied directly, beside what is pushed.
// Rounds   pieces + 1
// Bytes    what a rank sends, once
//
// ring     broadcast. Each rank hands on to its right neighbour what it got from its left one, and so the root sends
//          everything once only.
// Steps    round r: the rank at distance d behind the root takes piece r - d; the root from its input, the others
//          from their boxes.
// Rounds   pieces + world_size - 1
// Bytes    the input, once; the last rank none
//
// Ordering algo/rounds.h. What is pushed in a round is collected in the next, while its other half of boxes is pushed.
// The last round pushes nothing and the first collects nothing, so one collective follows another without a wait.
#include "algo/block_copy.h"
#include "algo/device_kernels.h"
#include "algo/rounds.h"
#include "algo/slices.h"

namespace ringcomm::cuda {
namespace {

// A ring works at a slice in so many pieces, to be at work at all ranks, but not in smaller ones than this.
constexpr int64_t kRingPieces = 8;
constexpr int64_t kLeastRingBytes = 16 * 1024;

struct Part {
  uint8_t* data;
  int64_t num_bytes;
};

struct MoveArgs {
  GroupView group;
  DeviceRounds rounds;
  Slices slices;
  bool same_for_all;  // all sends are one array
  int root;           // of a ring
  // By rank; those of this rank are its own part. In a ring the root has its input in sends[root], and every rank its
  // output in receives[root].
  Part sends[kMostDeviceRanks];
  Part receives[kMostDeviceRanks];
};

// Every thread's kInFlight vectors, the first of them number i, to the boxes at all peers. Each is read once.
template <int kInFlight>
__device__ __forceinline__ void vectors_to_all(const RoundsOfBlock& block, const uint8_t* from, int64_t i) {
  using Vector = VectorWord<kVectorBytes>::Type;
  const Vector* const source = reinterpret_cast<const Vector*>(from) + i;
  Vector vectors[kInFlight];
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) vectors[k] = source[k * kCollectiveThreads];
#pragma unroll 1
  for (int step = 1; step < block.world_size(); ++step) {
    Vector* const box = reinterpret_cast<Vector*>(block.box_at(block.peer_at(step))) + i;
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) box[k * kCollectiveThreads] = vectors[k];
  }
}

__device__ __forceinline__ void copy_to_all(const RoundsOfBlock& block, const uint8_t* from, int64_t num_bytes) {
  constexpr int kInFlight = 4;
  const int64_t num_vectors = is_aligned(from, kVectorBytes) ? num_bytes / kVectorBytes : 0;
  int64_t i = threadIdx.x;
#pragma unroll 1
  for (; i + (kInFlight - 1) * kCollectiveThreads < num_vectors; i += kInFlight * kCollectiveThreads) {
    vectors_to_all<kInFlight>(block, from, i);
  }
#pragma unroll 1
  for (; i < num_vectors; i += kCollectiveThreads) vectors_to_all<1>(block, from, i);
  const int64_t done = num_vectors * kVectorBytes;
#pragma unroll 1
  for (int step = 1; step < block.world_size(); ++step) {
    copy_bytes_by_block(block.box_at(block.peer_at(step)) + done, from + done, num_bytes - done);
  }
}

// This block's piece k of a part.
__device__ __forceinline__ Range piece_of(const MoveArgs& args, const Part& part, int64_t k) {
  return args.slices.of(static_cast<int>(blockIdx.x), k, part.num_bytes);
}

__device__ __forceinline__ void push(const MoveArgs& args, const RoundsOfBlock& block, int64_t k) {
  const Part& own = args.sends[args.group.rank];
  const Range own_piece = piece_of(args, own, k);
  if (args.same_for_all) copy_to_all(block, own.data + own_piece.begin, own_piece.count());
  for (int step = 1; step < block.world_size() && !args.same_for_all; ++step) {
    const int peer = block.peer_at(step);
    const Range piece = piece_of(args, args.sends[peer], k);
    copy_bytes_by_block(block.box_at(peer), args.sends[peer].data + piece.begin, piece.count());
  }
  copy_bytes_by_block(args.receives[args.group.rank].data + own_piece.begin, own.data + own_piece.begin,
                      own_piece.count());
}

__device__ __forceinline__ void collect(const MoveArgs& args, const RoundsOfBlock& block, int64_t k) {
  for (int step = 1; step < block.world_size(); ++step) {
    const int peer = block.peer_at(step);
    const Range piece = piece_of(args, args.receives[peer], k);
    copy_bytes_by_block(args.receives[peer].data + piece.begin, block.box_from(peer), piece.count());
  }
}

__global__ void __launch_bounds__(kCollectiveThreads, 1) staged_kernel(const __grid_constant__ MoveArgs args) {
  RoundsOfBlock block(args.group, args.rounds);
  for (int64_t round = args.rounds.begin; round < args.rounds.end; ++round) {
    if (round > args.rounds.begin && !block.next_round()) return;
    push(args, block, round);
    if (round > 0) collect(args, block, round - 1);
  }
  block.finish();
}

__global__ void __launch_bounds__(kCollectiveThreads, 1) ring_kernel(const __grid_constant__ MoveArgs args) {
  RoundsOfBlock block(args.group, args.rounds);
  const int last = block.world_size() - 1;
  const int distance = args.group.rank - args.root + (args.group.rank < args.root ? block.world_size() : 0);
  const Part& output = args.receives[args.root];
  for (int64_t round = args.rounds.begin; round < args.rounds.end; ++round) {
    if (round > args.rounds.begin && !block.next_round()) return;
    if (round < distance) continue;
    const Range piece = piece_of(args, output, round - distance);
    const uint8_t* const from =
        distance == 0 ? args.sends[args.root].data + piece.begin : block.box_from(block.peer_at(last));
    if (distance < last) copy_bytes_by_block(block.box_at(block.peer_at(1)), from, piece.count());
    copy_bytes_by_block(output.data + piece.begin, from, piece.count());
  }
  block.finish();
}

// ---- Host

// Of the longest part between two ranks.
int64_t part_bytes(const DeviceCall& call) {
  const int64_t num_elems = is_exchange(call.op) ? call.most_part_elems : call.count;
  return num_elems * static_cast<int64_t>(dtype_size(call.dtype));
}

Slices slices_of(const DeviceCall& call, const DeviceLayout& layout, int num_blocks) {
  int64_t piece_bytes = layout.box_bytes;
  if (call.algo == Algo::ring) {
    const int64_t share = round_up(ceil_div(part_bytes(call), num_blocks * kRingPieces), kVectorBytes);
    piece_bytes = at_most(at_least(share, kLeastRingBytes), layout.box_bytes);
  }
  return Slices(part_bytes(call), num_blocks, piece_bytes);
}

DevicePlan plan(const DeviceCall& call, const DeviceLayout& layout) {
  DevicePlan plan;
  plan.num_blocks = Slices::num_blocks(part_bytes(call), layout);
  const int64_t num_pieces = slices_of(call, layout, plan.num_blocks).num_pieces();
  const int64_t hops = call.algo == Algo::ring ? layout.world_size - 1 : 1;
  plan.num_rounds = num_pieces == 0 ? 1 : num_pieces + hops;
  return plan;
}

// What goes where, of every operation.
void set_parts(const DeviceCall& call, const GroupView& group, MoveArgs& args) {
  const int64_t elem_bytes = static_cast<int64_t>(dtype_size(call.dtype));
  const auto part_of = [=](const DevicePart& part) {
    return Part{static_cast<uint8_t*>(part.data), part.count * elem_bytes};
  };
  const DevicePart input{const_cast<void*>(call.input), call.count};
  for (int peer = 0; peer < group.layout.world_size; ++peer) {
    if (call.op == OpKind::broadcast) {
      if (group.rank == call.root) args.sends[peer] = part_of(input);
      if (peer == call.root) args.receives[peer] = part_of({call.output, call.count});
    } else if (call.op == OpKind::all_gather) {
      uint8_t* const part = static_cast<uint8_t*>(call.output) + peer * call.count * elem_bytes;
      args.sends[peer] = part_of(input);
      args.receives[peer] = part_of(call.has_parts ? call.receives[peer] : DevicePart{part, call.count});
    } else {
      args.sends[peer] = part_of(call.sends[peer]);
      args.receives[peer] = part_of(call.receives[peer]);
    }
  }
}

void launch_move(const DeviceCall& call, const DevicePlan& plan, const GroupView& group, const DeviceRounds& rounds,
                 Stream stream) {
  const bool same_for_all = call.op == OpKind::all_gather || call.op == OpKind::broadcast;
  MoveArgs args{group, rounds, slices_of(call, group.layout, plan.num_blocks), same_for_all, call.root, {}, {}};
  set_parts(call, group, args);
  const LaunchShape shape{dim3(static_cast<unsigned>(plan.num_blocks)), dim3(kCollectiveThreads)};
  if (call.algo == Algo::ring) return launch("ring broadcast", shape, stream, ring_kernel, args);
  launch(op_name(call.op), shape, stream, staged_kernel, args);
}

void load() {
  load_kernel("staged moves", staged_kernel);
  load_kernel("ring broadcast", ring_kernel);
}

}  // namespace

const CollectiveKernels& move_kernels() {
  static constexpr CollectiveKernels kKernels{plan, launch_move, load};
  return kKernels;
}

}  // namespace ringcomm::cuda
