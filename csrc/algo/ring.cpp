// ring: partial sums travel once around, then the sums do.
//
// Steps       a rank owns one chunk of the array. Segment k is piece k of every chunk: n-1 hops of partial sums (rank r
//             starts chunk r-1; rank c ends chunk c), then n-1 hops of finished pieces
// Wire bytes  2 (n-1)/n x input per rank (16-bit types send float32 partial sums: 3 (n-1)/n)
// Scratch     n mailboxes in the own input buffers, n-1 in the own result buffers; a piece fits into each
// Ordering    each hop is released once and acquired by the right neighbour only. Nobody waits for the
//             right neighbour r: a rank's last hop brings the sum that r finished after it had read all
//             its partial sums, and its first own sum of the next segment began at r, after r had read
//             everything of this one. So mailboxes are free when they are written again. Chunks may be short or
//             empty, and then the later pieces of some are empty while those of others are not: a hop of nothing is
//             released and waited for like any other, so both chains are the same for every segment.
// Best for    links with one good neighbour (PCIe, networks). In shared memory it only adds hops: it is
//             here by name, and as the twin of the CUDA ring.
//
// Chunk c is summed in the order c+1, c+2, ..., c (a rotation of rank order): equal bits on all ranks,
// the same on every run. Chunks are those of the whole array (kChunkGranule), as on GPUs: how large the staging buffers
// are, and so how many pieces a chunk has, changes no bit.
#include "algo/collective.h"
#include "reduce/reduce.h"

namespace ringcomm {

int64_t ring_all_reduce(ShmGroup& group, const Collective& call) {
  const int world_size = group.world_size();
  const int rank = group.rank();
  const int left = (rank + world_size - 1) % world_size;
  const int64_t elem_bytes = static_cast<int64_t>(dtype_size(call.dtype));
  const int64_t widening = static_cast<int64_t>(dtype_size(cpu::accumulator_dtype(call.dtype))) / elem_bytes;
  const int64_t hops = world_size - 1;
  const auto chunk = [&](int owner) { return chunk_of(call.num_bytes(), world_size, owner, kChunkGranule); };
  // A granule at least: ShmGroup refuses smaller buffers.
  const int64_t piece_bytes = round_down(2 * group.buffer_bytes() / (world_size * widening), kChunkGranule);
  // The first chunk is the longest. One segment at least, so that an empty array still meets its peers.
  const int64_t num_segments = at_least(ceil_div(chunk(0).count(), piece_bytes), 1);
  // Steps of one segment: hops partial sums, the finished piece, hops finished pieces passed on.
  const uint32_t steps = static_cast<uint32_t>(2 * hops + 1);
  int64_t bytes_sent = 0;

  const auto partial_box = [&](int owner_rank, int64_t hop) {
    return group.input_buffer(owner_rank, 0) + hop * piece_bytes * widening;
  };
  const auto finished_box = [&](int owner_rank, int64_t hop) {
    return group.result_buffer(owner_rank, 0) + hop * piece_bytes;
  };

  group.announce();
  group.wait_all_announced();
  for (int64_t segment = 0; segment < num_segments; ++segment) {
    const uint32_t base = static_cast<uint32_t>(segment) * steps;
    const auto piece_behind = [&](int64_t distance) {  // of the chunk `distance` places behind the own one; bytes
      const Range whole = chunk(static_cast<int>((rank + 2 * world_size - distance) % world_size));
      const int64_t begin = at_most(whole.begin + segment * piece_bytes, whole.end);
      return Range{begin, at_most(begin + piece_bytes, whole.end)};
    };
    const auto input = [&](const Range& piece) { return bytes_at(call.input, piece.begin); };
    const auto output = [&](const Range& piece) { return bytes_at(call.output, piece.begin); };
    const auto num_elems = [&](const Range& piece) { return piece.count() / elem_bytes; };

    for (int64_t hop = 0; hop < hops; ++hop) {
      const Range piece = piece_behind(hop + 1);
      if (hop > 0) group.wait_step(left, base + static_cast<uint32_t>(hop));
      cpu::reduce_hop(call.dtype, call.reduce_op, hop == 0 ? nullptr : partial_box(left, hop - 1), input(piece),
                      partial_box(rank, hop), num_elems(piece));
      bytes_sent += piece.count() * widening;
      group.publish_step(base + static_cast<uint32_t>(hop) + 1);
    }

    const Range own = piece_behind(0);
    group.wait_step(left, base + static_cast<uint32_t>(hops));
    cpu::reduce_hop(call.dtype, call.reduce_op, partial_box(left, hops - 1), input(own), partial_box(rank, hops),
                    num_elems(own));
    cpu::finish_hops(call.dtype, call.reduce_op, partial_box(rank, hops), world_size, output(own), num_elems(own));
    copy_bytes(finished_box(rank, 0), output(own), own.count());
    group.publish_step(base + static_cast<uint32_t>(hops) + 1);

    for (int64_t hop = 0; hop < hops; ++hop) {
      const Range piece = piece_behind(hop + 1);
      group.wait_step(left, base + static_cast<uint32_t>(hops + hop) + 1);
      copy_bytes(output(piece), finished_box(left, hop), piece.count());
      if (hop + 1 < hops) copy_bytes(finished_box(rank, hop + 1), output(piece), piece.count());
      bytes_sent += piece_behind(hop).count();
      group.publish_step(base + static_cast<uint32_t>(hops + hop) + 2);
    }
  }
  const uint32_t total = static_cast<uint32_t>(num_segments) * steps;
  group.end(total);
  return bytes_sent;
}

}  // namespace ringcomm
