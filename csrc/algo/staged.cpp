// Staged broadcast, all_gather and reduce_scatter for messages that do not fit beside a flag.
//
// broadcast       the root writes segments into its two result buffers in turn; everyone copies them out.
//                 Wire bytes: (n-1) x input for the root. The root waits for all readers of segment s
//                 before it overwrites it with s+2.
// all_gather      every rank does the same with its own part at the same pace.
//                 Wire bytes: (n-1) x input per rank. Publishing s+1 means that s has been read.
// reduce_scatter  first half of two_shot: stage the chunks of the others, sum the own one in rank order.
//                 Wire bytes: (n-1) x output per rank.
// Scratch         the two result buffers (broadcast, all_gather) or the two input buffers (reduce_scatter)
// Ordering        one release per segment and rank, acquired by its readers
#include <array>

#include "algo/collective.h"
#include "reduce/reduce.h"

namespace ringcomm {
namespace {

constexpr int64_t kTileBytes = 32 * 1024;

constexpr uint32_t step_of(int64_t segment) { return static_cast<uint32_t>(segment + 1); }

// How much of a broadcast goes through a buffer at once: an eighth, so that reading overlaps with writing, but
// enough to be worth a wait.
int64_t piece_bytes(int64_t num_bytes, int64_t buffer_bytes) {
  constexpr int64_t kLeast = 64 * 1024;
  const int64_t eighth = round_up(ceil_div(num_bytes, 8), static_cast<int64_t>(kCacheLine));
  return std::min(std::max(eighth, kLeast), buffer_bytes);
}

}  // namespace

int64_t staged_broadcast(ShmGroup& group, const Collective& call) {
  const int64_t num_bytes = call.num_bytes();
  const int64_t most = piece_bytes(num_bytes, group.buffer_bytes());
  const int64_t num_segments = ceil_div(num_bytes, most);
  const bool is_root = group.rank() == call.root;
  StagingAccess staging(group, call.op, false, num_bytes, num_segments);
  group.announce();
  if (is_root) {
    group.wait_all_announced();
  } else {
    group.wait_announced(call.root);
  }
  for (int64_t segment = 0; segment < num_segments; ++segment) {
    const int64_t offset = segment * most;
    const int64_t piece = std::min(most, num_bytes - offset);
    uint8_t* buffer = group.result_buffer(call.root, segment);
    if (is_root) {
      if (segment >= 2) group.wait_all_steps(step_of(segment - 2));
      staging.timed(segment, piece, [&] { staging.write(segment, buffer, bytes_at(call.input, offset), piece); });
    } else {
      group.wait_step(call.root, step_of(segment));
      staging.timed(segment, piece, [&] {
        copy_to_output(bytes_at(call.output, offset), buffer, piece, num_bytes);
        staging.has_read(segment, buffer, piece);
      });
    }
    group.publish_step(step_of(segment));
  }
  if (is_root) copy_to_output(call.output, call.input, num_bytes, num_bytes);
  group.end(static_cast<uint32_t>(num_segments));
  return is_root ? num_bytes * (group.world_size() - 1) : 0;
}

int64_t staged_all_gather(ShmGroup& group, const Collective& call) {
  const int64_t num_bytes = call.num_bytes();
  const int64_t most = group.buffer_bytes();
  const int64_t num_segments = ceil_div(num_bytes, most);
  const int64_t output_bytes = num_bytes * group.world_size();
  StagingAccess staging(group, call.op, false, num_bytes, num_segments);
  group.announce();
  group.wait_all_announced();
  for (int64_t segment = 0; segment < num_segments; ++segment) {
    const int64_t offset = segment * most;
    const int64_t piece = std::min(most, num_bytes - offset);
    // The own part goes to its two places while it is in the nearest cache.
    staging.timed(segment, piece, [&] {
      uint8_t* const buffer = group.result_buffer(group.rank(), segment);
      for (int64_t done = 0; done < piece; done += kTileBytes) {
        const int64_t count = std::min(kTileBytes, piece - done);
        const uint8_t* const from = bytes_at(call.input, offset + done);
        staging.write(segment, buffer + done, from, count);
        copy_to_output(call.part_from(group.rank()) + offset + done, from, count, output_bytes);
      }
    });
    group.publish_step(step_of(segment));
    for (int hop = 1; hop < group.world_size(); ++hop) {
      const int peer = (group.rank() + hop) % group.world_size();
      group.wait_step(peer, step_of(segment));
      staging.timed(segment, piece, [&] {
        uint8_t* const buffer = group.result_buffer(peer, segment);
        copy_to_output(call.part_from(peer) + offset, buffer, piece, output_bytes);
        staging.has_read(segment, buffer, piece);
      });
    }
  }
  group.end(static_cast<uint32_t>(num_segments));
  return num_bytes * (group.world_size() - 1);
}

int64_t staged_reduce_scatter(ShmGroup& group, const Collective& call) {
  const int world_size = group.world_size();
  const int64_t elem_bytes = static_cast<int64_t>(dtype_size(call.dtype));
  const int64_t piece_elems = std::max<int64_t>(
      1, round_down(group.buffer_bytes() / elem_bytes / world_size, static_cast<int64_t>(kCacheLine) / elem_bytes));
  const int64_t num_segments = ceil_div(call.count, piece_elems);
  const auto source = [&](int owner, int64_t first) { return call.part_for(owner) + first * elem_bytes; };
  StagingAccess staging(group, call.op, false, call.num_bytes(), num_segments);
  group.announce();
  group.wait_all_announced();
  for (int64_t segment = 0; segment < num_segments; ++segment) {
    const int64_t first = segment * piece_elems;
    const int64_t elems = std::min(piece_elems, call.count - first);
    staging.timed(segment, elems * elem_bytes, [&] {
      for (int owner = 0; owner < world_size; ++owner) {
        if (owner == group.rank()) continue;
        staging.write(segment, group.input_buffer(group.rank(), segment) + owner * piece_elems * elem_bytes,
                      source(owner, first), elems * elem_bytes);
      }
    });
    group.publish_step(step_of(segment));
    group.wait_all_steps(step_of(segment));
    const auto input_of = [&](int peer) {
      return group.input_buffer(peer, segment) + group.rank() * piece_elems * elem_bytes;
    };
    std::array<const void*, kMaxRanks> inputs;
    for (int peer = 0; peer < world_size; ++peer) {
      inputs[static_cast<size_t>(peer)] = peer == group.rank() ? source(peer, first) : input_of(peer);
    }
    staging.timed(segment, elems * elem_bytes, [&] {
      ReduceArgs args{inputs.data(), world_size, elems, bytes_at(call.output, first * elem_bytes)};
      cpu::reduce(call.dtype, call.reduce_op, args);
      for (int peer = 0; peer < world_size; ++peer) {
        if (peer != group.rank()) staging.has_read(segment, input_of(peer), elems * elem_bytes);
      }
    });
  }
  // The input buffers must end unread.
  group.publish_step(step_of(num_segments));
  group.wait_all_steps(step_of(num_segments));
  group.end(step_of(num_segments));
  return call.num_bytes() * (world_size - 1);
}

}  // namespace ringcomm
