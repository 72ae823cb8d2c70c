// How the blocks of a collective's grid share out a chunk of an array. Everything is counted in bytes, or
// in elements where these are encoded.
//   slice = what one block does of every chunk
//   piece = what of a slice goes through a box at once
#pragma once

#include "base/launch.h"
#include "base/partition.h"
#include "base/vector_access.h"
#include "wire/device_layout.h"

namespace ringcomm {

class Slices {
 public:
  // Blocks that have enough to do with a chunk of so many bytes; 1 at least.
  static int num_blocks(int64_t longest_chunk, const DeviceLayout& layout) {
    constexpr int64_t kLeastSlice = int64_t{kCollectiveThreads} * kVectorBytes;
    const int64_t busy = ceil_div(longest_chunk, kLeastSlice);
    return static_cast<int>(busy < 1 ? 1 : at_most(busy, layout.num_blocks));
  }

  // piece is a multiple of 16.
  Slices(int64_t longest_chunk, int num_blocks, int64_t piece)
      : slice_(round_up(ceil_div(longest_chunk, num_blocks), kGranule)), piece_(piece) {}

  RC_HD_METHOD int64_t num_pieces() const { return ceil_div(slice_, piece_); }
  // Of a chunk of chunk_bytes: from its begin on. Empty past the last piece.
  RC_HD_METHOD Range of(int block, int64_t piece, int64_t chunk_bytes) const {
    const int64_t slice_end = at_most((block + 1) * slice_, chunk_bytes);
    const int64_t begin = at_most(block * slice_ + piece * piece_, slice_end);
    return Range{begin, at_most(begin + piece_, slice_end)};
  }

 private:
  static constexpr int64_t kGranule = 512;  // what a warp takes at once

  int64_t slice_;
  int64_t piece_;
};

}  // namespace ringcomm
