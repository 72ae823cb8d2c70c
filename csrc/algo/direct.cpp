// direct: arrays in symmetric memory are read and written where they are.
//
// Steps       announce (with the array's place in the own segment), wait for the announcements, then
//             all_reduce, reduce   sum the own chunk over all arrays in rank order, into everybody's
//                                  array (reduce: into the root's)
//             broadcast            copy the root's array
//             all_gather           copy every rank's array
//             all_to_all           copy the own part of every rank's array
//             reduce_scatter       sum the own part over all arrays in rank order
//             publish, wait for all
// Wire bytes  all_reduce: 2 (n-1)/n x array, the least that moves at all; the others what they hand over
// Scratch     none
// Ordering    announce releases the inputs, the one step releases "I have read what I need and written what
//             is mine". Nobody returns before all have published: then no peer touches its array any more.
// Best for    everything that is too large for one_shot
//
// Equal bits: one owner sums each element in rank order and writes its sum to everyone.
#include <array>

#include "algo/collective.h"
#include "reduce/reduce.h"

namespace ringcomm {
namespace {

// The peers' arrays, once all have announced.
class SymmetricArrays {
 public:
  SymmetricArrays(ShmGroup& group, const Collective& call) : group_(group), region_(*call.region) {}
  uint8_t* of(int rank) const { return region_.segment(rank) + group_.announced_offset(rank); }

 private:
  ShmGroup& group_;
  const SymmetricRegion& region_;
};

void reduce_into(ShmGroup& group, const Collective& call, const SymmetricArrays& arrays) {
  const int world_size = group.world_size();
  const int64_t elem_bytes = static_cast<int64_t>(dtype_size(call.dtype));
  const Range chunk = chunk_of(call.count, world_size, group.rank(), static_cast<int64_t>(kCacheLine) / elem_bytes);
  const int home = call.op == OpKind::reduce ? call.root : group.rank();
  const auto chunk_in = [&](int rank) { return arrays.of(rank) + chunk.begin * elem_bytes; };
  std::array<const void*, kMaxRanks> inputs;
  std::array<void*, kMaxRanks> copies;
  for (int peer = 0; peer < world_size; ++peer) inputs[static_cast<size_t>(peer)] = chunk_in(peer);
  ReduceArgs args{inputs.data(), world_size, chunk.count(), chunk_in(home)};
  args.copies = copies.data();
  for (int hop = 1; hop < world_size && call.op != OpKind::reduce; ++hop) {
    copies[static_cast<size_t>(args.num_copies++)] = chunk_in((home + hop) % world_size);
  }
  cpu::reduce(call.dtype, call.reduce_op, args);
}

void reduce_own_part(ShmGroup& group, const Collective& call, const SymmetricArrays& arrays) {
  std::array<const void*, kMaxRanks> inputs;
  for (int peer = 0; peer < group.world_size(); ++peer) {
    inputs[static_cast<size_t>(peer)] = arrays.of(peer) + group.rank() * call.num_bytes();
  }
  ReduceArgs args;
  args.inputs = inputs.data();
  args.num_inputs = group.world_size();
  args.num_elems = call.count;
  args.output = call.output;
  cpu::reduce(call.dtype, call.reduce_op, args);
}

}  // namespace

int64_t direct(ShmGroup& group, const Collective& call) {
  const int world_size = group.world_size();
  const int64_t others = world_size - 1;
  const SymmetricArrays arrays(group, call);
  int64_t bytes_sent = call.num_bytes() * others;
  group.announce(call.region->offset_of(call.input, 0));
  if (call.op == OpKind::broadcast && group.rank() != call.root) {
    group.wait_announced(call.root);
  } else {
    group.wait_all_announced();
  }
  switch (call.op) {
    case OpKind::all_reduce:
      reduce_into(group, call, arrays);
      bytes_sent = ceil_div(2 * others * call.num_bytes(), world_size);
      break;
    case OpKind::reduce:
      reduce_into(group, call, arrays);
      bytes_sent = call.num_bytes();
      break;
    case OpKind::broadcast:
      copy_to_output(call.output, arrays.of(call.root), call.num_bytes(), call.num_bytes());
      if (group.rank() != call.root) bytes_sent = 0;
      break;
    case OpKind::all_gather:
      for (int hop = 0; hop < world_size; ++hop) {
        const int peer = (group.rank() + hop) % world_size;
        copy_to_output(call.part_from(peer), arrays.of(peer), call.num_bytes(), call.num_bytes() * world_size);
      }
      break;
    case OpKind::all_to_all: {
      const int64_t part_bytes = call.num_bytes() / world_size;
      for (int hop = 0; hop < world_size; ++hop) {
        const int peer = (group.rank() + hop) % world_size;
        copy_to_output(bytes_at(call.output, peer * part_bytes), arrays.of(peer) + group.rank() * part_bytes,
                       part_bytes, call.num_bytes());
      }
      bytes_sent = part_bytes * others;
      break;
    }
    default:  // reduce_scatter; check_algo() lets nothing else through
      reduce_own_part(group, call, arrays);
  }
  group.publish_step(1);
  group.wait_all_steps(1);
  group.end(1);
  return bytes_sent;
}

}  // namespace ringcomm
