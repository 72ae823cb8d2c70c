// How an array of elements is shared out among ranks and cut into pieces.
//   chunk   = the share of one rank
//   segment = one pipelined piece of the whole array
#pragma once

#include <algorithm>
#include <cstdint>

namespace ringcomm {

struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t count() const { return end - begin; }
};

constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
constexpr int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }
constexpr int64_t round_down(int64_t value, int64_t multiple) { return value / multiple * multiple; }

// The elements of [0, num_elems) that `rank` owns. Equal chunks in multiples of `granule` elements
// (the last ones may be short or empty), so chunk borders never cut a codec block or a cache line.
constexpr Range chunk_of(int64_t num_elems, int world_size, int rank, int64_t granule) {
  const int64_t chunk = round_up(ceil_div(num_elems, world_size), granule);
  const int64_t begin = std::min<int64_t>(num_elems, chunk * rank);
  return Range{begin, std::min<int64_t>(num_elems, begin + chunk)};
}

}  // namespace ringcomm
