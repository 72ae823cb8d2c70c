// How an array of elements is shared out among ranks and cut into pieces.
//   chunk   = the share of one rank
//   segment = one pipelined piece of the whole array
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/host_device.h"

namespace ringcomm {

struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  RC_HD_METHOD constexpr int64_t count() const { return end - begin; }
};

RC_HD constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
RC_HD constexpr int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }
RC_HD constexpr int64_t round_down(int64_t value, int64_t multiple) { return value / multiple * multiple; }

// std::min and std::max, which kernels cannot call.
RC_HD constexpr int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
RC_HD constexpr int64_t at_least(int64_t value, int64_t limit) { return value > limit ? value : limit; }

// The elements of [0, num_elems) that `rank` owns. Equal chunks in multiples of `granule` elements
// (the last ones may be short or empty), so chunk borders never cut a codec block or a cache line.
RC_HD constexpr Range chunk_of(int64_t num_elems, int world_size, int rank, int64_t granule) {
  const int64_t chunk = round_up(ceil_div(num_elems, world_size), granule);
  const int64_t begin = at_most(chunk * rank, num_elems);
  return Range{begin, at_most(begin + chunk, num_elems)};
}

// Of chunks of a whole array, in bytes; every dtype's size divides it. The same on CPUs and GPUs: the chunk of an
// element decides in which order a ring sums it.
constexpr int64_t kChunkGranule = 64;

// An array cut into segments, and each segment into one chunk per rank.
class Segmentation {
 public:
  // Segments of at most max_segment_elems, but of one granule per rank at least.
  constexpr Segmentation(int64_t num_elems, int world_size, int64_t max_segment_elems, int64_t granule)
      : num_elems_(num_elems),
        world_size_(world_size),
        granule_(granule),
        max_chunk_elems_(std::max<int64_t>(1, max_segment_elems / (granule * world_size)) * granule) {}

  constexpr int64_t max_chunk_elems() const { return max_chunk_elems_; }
  // At least 1, so that an empty array still meets its peers.
  constexpr int64_t num_segments() const { return std::max<int64_t>(1, ceil_div(num_elems_, segment_elems())); }
  // Index of the segment's first element in the array.
  constexpr int64_t begin(int64_t segment) const { return segment * segment_elems(); }
  constexpr int64_t count(int64_t segment) const { return std::min(segment_elems(), num_elems_ - begin(segment)); }
  // The elements that `rank` owns, counted from begin(segment).
  constexpr Range chunk(int64_t segment, int rank) const {
    return chunk_of(count(segment), world_size_, rank, granule_);
  }

 private:
  constexpr int64_t segment_elems() const { return max_chunk_elems_ * world_size_; }

  int64_t num_elems_;
  int world_size_;
  int64_t granule_;
  int64_t max_chunk_elems_;
};

}  // namespace ringcomm
