// What a rank announces in a gather, scatter or all_to_all, and how its data lies in its staging slab:
// a pure function of what it announced, so its readers need no further word.
//
// Inline payload of every rank, n = world_size:
//   offset   bytes  content
//        0     8 n  elements that this rank sends to rank 0, 1, ... (to itself, too)
//      8 n     8 n  elements that it expects from rank 0, 1, ...
//     16 n   total  if all of it fits here: what it sends to rank 0, 1, ... without gaps, nothing for
//                   itself. One segment.
//
// Otherwise S >= 2 segments, in staging buffers. Every destination gets an S-th of its bytes in each
// of them, in whole cache lines, so all have theirs at the same time however uneven they are:
//   total bytes = S x what fits beside one cache line per destination, rounded up
//   piece of a destination = its bytes / S, rounded up to a cache line; the last pieces may be short or
//                            empty. In a buffer pieces stand in rank order, without gaps.
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/partition.h"
#include "wire/shared_layout.h"

namespace ringcomm {

// The two rows of counts at the start of an inline payload.
struct ExchangeCounts {
  int64_t* sends;
  int64_t* receives;

  static ExchangeCounts at(uint8_t* payload, int world_size) {
    auto* counts = reinterpret_cast<int64_t*>(payload);
    return {counts, counts + world_size};
  }
  static constexpr int64_t bytes(int world_size) { return 16 * int64_t{world_size}; }
};

class ExchangeLayout {
 public:
  // What goes from one rank to another. All in bytes.
  struct Lane {
    int64_t total = 0;
    int64_t offset = 0;  // of every piece: in the inline payload, or in the segment's buffer
    int64_t piece = 0;   // of every segment but the last ones

    // The part of the data that lies in a segment.
    Range range(int64_t segment) const {
      return {std::min(total, segment * piece), std::min(total, (segment + 1) * piece)};
    }
  };

  // send_counts: the row of counts of the sending rank, `rank`; read by lane() as well.
  ExchangeLayout(const int64_t* send_counts, int64_t elem_bytes, int rank, int world_size, int64_t inline_bytes,
                 int64_t buffer_bytes)
      : send_counts_(send_counts), elem_bytes_(elem_bytes), rank_(rank), world_size_(world_size) {
    int64_t num_dests = 0;
    for (int dest = 0; dest < world_size; ++dest) {
      num_dests += bytes_to(dest) > 0 ? 1 : 0;
      total_ += bytes_to(dest);
    }
    if (total_ > inline_bytes - ExchangeCounts::bytes(world_size)) {
      num_segments_ = std::max<int64_t>(2, ceil_div(total_, buffer_bytes - kLine * num_dests));
    }
  }

  // Bytes for other ranks.
  int64_t total() const { return total_; }
  bool is_inline() const { return num_segments_ == 1; }
  int64_t num_segments() const { return num_segments_; }
  Lane lane(int dest) const {
    Lane lane{bytes_to(dest), is_inline() ? ExchangeCounts::bytes(world_size_) : 0, piece_for(dest)};
    for (int earlier = 0; earlier < dest; ++earlier) lane.offset += piece_for(earlier);
    return lane;
  }

 private:
  static constexpr int64_t kLine = static_cast<int64_t>(kCacheLine);

  int64_t bytes_to(int dest) const { return dest == rank_ ? 0 : send_counts_[dest] * elem_bytes_; }
  int64_t piece_for(int dest) const {
    return is_inline() ? bytes_to(dest) : round_up(ceil_div(bytes_to(dest), num_segments_), kLine);
  }

  const int64_t* const send_counts_;
  const int64_t elem_bytes_;
  const int rank_;
  const int world_size_;
  int64_t total_ = 0;
  int64_t num_segments_ = 1;
};

}  // namespace ringcomm
