// ring: partial sums travel once around, then the sums do.
//
// Steps       per segment of n chunks: n-1 hops of partial sums (rank r starts chunk r-1; rank c ends
//             chunk c and so owns it), then n-1 hops of finished chunks
// Wire bytes  2 (n-1)/n x input per rank (16-bit types send float32 partial sums: 3 (n-1)/n)
// Scratch     n mailboxes in the own input buffers, n-1 in the own result buffers
// Ordering    each hop is released once and acquired by the right neighbour only. Nobody waits for the
//             right neighbour r: a rank's last hop brings the sum that r finished after it had read all
//             its partial sums, and its first own sum of the next segment began at r, after r had read
//             everything of this one. So mailboxes are free when they are written again.
// Best for    links with one good neighbour (PCIe, networks). In shared memory it only adds hops: it is
//             here by name, and as the twin of the CUDA ring.
//
// Chunk c is summed in the order c+1, c+2, ..., c (a rotation of rank order): equal bits on all ranks,
// the same on every run.
#include <array>

#include "algo/collective.h"
#include "reduce/reduce.h"

namespace ringcomm {

int64_t ring_all_reduce(ShmGroup& group, const Collective& call) {
  const int world_size = group.world_size();
  const int rank = group.rank();
  const int left = (rank + world_size - 1) % world_size;
  const int64_t elem_bytes = static_cast<int64_t>(dtype_size(call.dtype));
  const int64_t partial_bytes = static_cast<int64_t>(dtype_size(cpu::accumulator_dtype(call.dtype)));
  const int64_t granule = static_cast<int64_t>(kCacheLine) / elem_bytes;
  const int64_t hops = world_size - 1;
  const Segmentation segmentation(call.count, world_size, 2 * group.buffer_bytes() / partial_bytes, granule);
  const int64_t max_chunk = segmentation.max_chunk_elems();
  const int64_t num_segments = segmentation.num_segments();
  // Steps of one segment: hops partial sums, the finished chunk, hops finished chunks passed on.
  const uint32_t steps = static_cast<uint32_t>(2 * hops + 1);
  int64_t bytes_sent = 0;

  const auto partial_box = [&](int owner_rank, int64_t hop) {
    return group.input_buffer(owner_rank, 0) + hop * max_chunk * partial_bytes;
  };
  const auto finished_box = [&](int owner_rank, int64_t hop) {
    return group.result_buffer(owner_rank, 0) + hop * max_chunk * elem_bytes;
  };

  group.announce();
  group.wait_all_announced();
  for (int64_t segment = 0; segment < num_segments; ++segment) {
    const int64_t first = segmentation.begin(segment);
    const uint32_t base = static_cast<uint32_t>(segment) * steps;
    const auto chunk_behind = [&](int64_t distance) {  // the chunk `distance` places behind the own one
      const int index = static_cast<int>((rank + 2 * world_size - distance) % world_size);
      const Range range = segmentation.chunk(segment, index);
      return Range{first + range.begin, first + range.end};
    };
    const auto input = [&](const Range& range) { return bytes_at(call.input, range.begin * elem_bytes); };
    const auto output = [&](const Range& range) { return bytes_at(call.output, range.begin * elem_bytes); };

    for (int64_t hop = 0; hop < hops; ++hop) {
      const Range range = chunk_behind(hop + 1);
      if (hop > 0) group.wait_step(left, base + static_cast<uint32_t>(hop));
      cpu::reduce_hop(call.dtype, call.reduce_op, hop == 0 ? nullptr : partial_box(left, hop - 1), input(range),
                      partial_box(rank, hop), range.count());
      bytes_sent += range.count() * partial_bytes;
      group.publish_step(base + static_cast<uint32_t>(hop) + 1);
    }

    const Range own = chunk_behind(0);
    group.wait_step(left, base + static_cast<uint32_t>(hops));
    cpu::reduce_hop(call.dtype, call.reduce_op, partial_box(left, hops - 1), input(own), partial_box(rank, hops),
                    own.count());
    cpu::finish_hops(call.dtype, call.reduce_op, partial_box(rank, hops), world_size, output(own), own.count());
    copy_bytes(finished_box(rank, 0), output(own), own.count() * elem_bytes);
    group.publish_step(base + static_cast<uint32_t>(hops) + 1);

    for (int64_t hop = 0; hop < hops; ++hop) {
      const Range range = chunk_behind(hop + 1);
      group.wait_step(left, base + static_cast<uint32_t>(hops + hop) + 1);
      copy_bytes(output(range), finished_box(left, hop), range.count() * elem_bytes);
      if (hop + 1 < hops) {
        copy_bytes(finished_box(rank, hop + 1), output(range), range.count() * elem_bytes);
      }
      bytes_sent += chunk_behind(hop).count() * elem_bytes;
      group.publish_step(base + static_cast<uint32_t>(hops + hop) + 2);
    }
  }
  const uint32_t total = static_cast<uint32_t>(num_segments) * steps;
  group.end(total);
  return bytes_sent;
}

}  // namespace ringcomm
