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
#include "algo/device_kernels.h"
#include "algo/rounds.h"
#include "base/vector_access.h"

namespace ringcomm::cuda {
namespace {

// Of a part, for one block: less is not worth the wait of one more.
constexpr int64_t kLeastBlockBytes = 4096;
// Of slices: blocks touch no cache line of each other where parts begin at one.
constexpr int64_t kSliceBytes = 128;
// A ring works at a slice in so many pieces, to be at work at all ranks, but not in smaller ones than this.
constexpr int64_t kRingPieces = 8;
constexpr int64_t kLeastRingBytes = 16 * 1024;

struct Part {
  uint8_t* data;
  int64_t num_bytes;
  int64_t slice_bytes;  // of every block but the last ones
};

struct MoveArgs {
  GroupView group;
  DeviceRounds rounds;
  int64_t piece_bytes;
  // By rank; those of this rank are its own part. In a ring the root has its input in sends[root], and every rank its
  // output in receives[root].
  Part sends[kMostDeviceRanks];
  Part receives[kMostDeviceRanks];
  bool same_for_all;  // all sends are one array
  int root;           // of a ring
};

// ---- One block's copies, byte by byte equal to memcpy

template <int kBytes, typename Targets>
__device__ __forceinline__ void copy_words(const uint8_t* from, int64_t num_words, int num_targets, Targets target) {
  using Word = typename VectorWord<kBytes>::Type;
  constexpr int kInFlight = 4;  // loads of a thread before it stores
  const Word* const source = reinterpret_cast<const Word*>(from);
  int64_t i = threadIdx.x;
#pragma unroll 1
  for (; i + (kInFlight - 1) * kCollectiveThreads < num_words; i += kInFlight * kCollectiveThreads) {
    Word words[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) words[j] = source[i + j * kCollectiveThreads];
#pragma unroll 1
    for (int k = 0; k < num_targets; ++k) {
      Word* const to = reinterpret_cast<Word*>(target(k)) + i;
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) to[j * kCollectiveThreads] = words[j];
    }
  }
#pragma unroll 1
  for (; i < num_words; i += kCollectiveThreads) {
    const Word word = source[i];
#pragma unroll 1
    for (int k = 0; k < num_targets; ++k) reinterpret_cast<Word*>(target(k))[i] = word;
  }
}

template <int kBytes, typename Targets>
__device__ __forceinline__ bool copied_by(uint64_t addresses, const uint8_t* from, int64_t num_bytes, int num_targets,
                                          Targets target) {
  if (addresses % kBytes != 0) return false;
  const int64_t num_words = num_bytes / kBytes;
  copy_words<kBytes>(from, num_words, num_targets, target);
  const int64_t i = num_words * kBytes + threadIdx.x;  // what is left is less than a word
  if (i < num_bytes) {
#pragma unroll 1
    for (int k = 0; k < num_targets; ++k) target(k)[i] = from[i];
  }
  return true;
}

// Reads num_bytes once and writes them to target(0), ..., target(num_targets - 1), in the widest words that all of the
// addresses allow. By all threads of the block.
template <typename Targets>
__device__ __forceinline__ void copy_to_all(const uint8_t* from, int64_t num_bytes, int num_targets, Targets target) {
  if (num_bytes <= 0 || num_targets == 0) return;
  uint64_t addresses = reinterpret_cast<uint64_t>(from);
  for (int k = 0; k < num_targets; ++k) addresses |= reinterpret_cast<uint64_t>(target(k));
  copied_by<16>(addresses, from, num_bytes, num_targets, target) ||
      copied_by<8>(addresses, from, num_bytes, num_targets, target) ||
      copied_by<4>(addresses, from, num_bytes, num_targets, target) ||
      copied_by<2>(addresses, from, num_bytes, num_targets, target) ||
      copied_by<1>(addresses, from, num_bytes, num_targets, target);
}

__device__ __forceinline__ void copy(uint8_t* to, const uint8_t* from, int64_t num_bytes) {
  if (to != from) copy_to_all(from, num_bytes, 1, [=](int) { return to; });
}

// ---- Rounds

// This block's piece k of a part.
__device__ __forceinline__ Range piece_of(const MoveArgs& args, const Part& part, int64_t k) {
  const int64_t slice_begin = at_most(part.slice_bytes * blockIdx.x, part.num_bytes);
  const int64_t slice_end = at_most(slice_begin + part.slice_bytes, part.num_bytes);
  const int64_t begin = at_most(slice_begin + k * args.piece_bytes, slice_end);
  return Range{begin, at_most(begin + args.piece_bytes, slice_end)};
}

// Peers in an order that differs from rank to rank, so that they do not all write to one of them at a time.
__device__ __forceinline__ int peer_at(const GroupView& group, int hop) {
  const int peer = group.rank + hop;
  return peer < group.layout.world_size ? peer : peer - group.layout.world_size;
}

__device__ __forceinline__ void push(const MoveArgs& args, const RoundsOfBlock& block, int64_t k) {
  const GroupView& group = args.group;
  const int num_peers = group.layout.world_size - 1;
  const Part& own = args.sends[group.rank];
  const Range own_piece = piece_of(args, own, k);
  if (args.same_for_all) {
    copy_to_all(own.data + own_piece.begin, own_piece.count(), num_peers,
                [&](int i) { return block.box_at(peer_at(group, i + 1)); });
  }
  for (int hop = 1; hop <= num_peers && !args.same_for_all; ++hop) {
    const int peer = peer_at(group, hop);
    const Range piece = piece_of(args, args.sends[peer], k);
    copy(block.box_at(peer), args.sends[peer].data + piece.begin, piece.count());
  }
  copy(args.receives[group.rank].data + own_piece.begin, own.data + own_piece.begin, own_piece.count());
}

__device__ __forceinline__ void collect(const MoveArgs& args, const RoundsOfBlock& block, int64_t k) {
  for (int hop = 1; hop < args.group.layout.world_size; ++hop) {
    const int peer = peer_at(args.group, hop);
    const Range piece = piece_of(args, args.receives[peer], k);
    copy(args.receives[peer].data + piece.begin, block.box_from(peer), piece.count());
  }
}

__global__ void __launch_bounds__(kCollectiveThreads) staged_kernel(const __grid_constant__ MoveArgs args) {
  RoundsOfBlock block(args.group, args.rounds);
  for (int64_t round = args.rounds.begin; round < args.rounds.end; ++round) {
    if (round > args.rounds.begin && !block.next_round()) return;
    push(args, block, round);
    if (round > 0) collect(args, block, round - 1);
  }
  block.finish();
}

__global__ void __launch_bounds__(kCollectiveThreads) ring_kernel(const __grid_constant__ MoveArgs args) {
  const int world_size = args.group.layout.world_size;
  const int distance = (args.group.rank - args.root + world_size) % world_size;
  const int left = peer_at(args.group, world_size - 1);
  const int right = peer_at(args.group, 1);
  const Part& output = args.receives[args.root];
  RoundsOfBlock block(args.group, args.rounds);
  for (int64_t round = args.rounds.begin; round < args.rounds.end; ++round) {
    if (round > args.rounds.begin && !block.next_round()) return;
    if (round < distance) continue;
    const Range piece = piece_of(args, output, round - distance);
    const uint8_t* const from = distance == 0 ? args.sends[args.root].data + piece.begin : block.box_from(left);
    if (distance + 1 < world_size) copy(block.box_at(right), from, piece.count());
    copy(output.data + piece.begin, from, piece.count());
  }
  block.finish();
}

// ---- Host

// How every block cuts parts. The same on every rank.
struct Cut {
  int num_blocks;
  int64_t piece_bytes;
  int64_t num_pieces;  // of the largest slice
};

Cut cut_of(const DeviceCall& call, const DeviceLayout& layout) {
  const int64_t elems = is_exchange(call.op) ? call.most_part_elems : call.count;
  const int64_t part_bytes = elems * static_cast<int64_t>(dtype_size(call.dtype));
  Cut cut;
  cut.num_blocks = static_cast<int>(at_most(at_least(ceil_div(part_bytes, kLeastBlockBytes), 1), layout.num_blocks));
  const int64_t slice_bytes = chunk_of(part_bytes, cut.num_blocks, 0, kSliceBytes).count();
  cut.piece_bytes = layout.box_bytes;
  if (call.algo == Algo::ring) {
    const int64_t share = round_up(ceil_div(slice_bytes, kRingPieces), kSliceBytes);
    cut.piece_bytes = at_most(at_least(share, kLeastRingBytes), layout.box_bytes);
  }
  cut.num_pieces = ceil_div(slice_bytes, cut.piece_bytes);
  return cut;
}

DevicePlan plan(const DeviceCall& call, const DeviceLayout& layout) {
  const Cut cut = cut_of(call, layout);
  const int64_t hops = call.algo == Algo::ring ? layout.world_size - 1 : 1;
  return DevicePlan{cut.num_pieces == 0 ? 1 : cut.num_pieces + hops, cut.num_blocks};
}

// What goes where, of every operation.
void set_parts(const DeviceCall& call, const GroupView& group, int num_blocks, MoveArgs& args) {
  const int64_t elem_bytes = static_cast<int64_t>(dtype_size(call.dtype));
  const auto part_of = [=](const DevicePart& part) {
    const int64_t num_bytes = part.count * elem_bytes;
    return Part{static_cast<uint8_t*>(part.data), num_bytes, chunk_of(num_bytes, num_blocks, 0, kSliceBytes).count()};
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
  args.same_for_all = call.op == OpKind::all_gather || call.op == OpKind::broadcast;
}

void launch_move(const DeviceCall& call, const DevicePlan& plan, const GroupView& group, const DeviceRounds& rounds,
                 Stream stream) {
  MoveArgs args{};
  args.group = group;
  args.rounds = rounds;
  args.piece_bytes = cut_of(call, group.layout).piece_bytes;
  args.root = call.root;
  set_parts(call, group, plan.num_blocks, args);
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
