// pack: many arrays into one contiguous buffer; unpack: the other way. Bytes, whatever they mean.
//
// Pieces may begin at any address, have any number of bytes (0 too) and do not overlap each other or the buffer, in
// which they lie as wire/packed_layout.h says. pack writes all of the buffer, zeros between pieces included; unpack
// writes the pieces and nothing else. One pass over memory. Any number of pieces.
#pragma once

#include <cstdint>
#include <vector>

#include "base/stream.h"
#include "wire/packed_layout.h"

namespace ringcomm {

struct Piece {
  void* data = nullptr;  // pack does not write it
  int64_t num_bytes = 0;
};

inline int64_t packed_bytes(const std::vector<Piece>& pieces) {
  int64_t total = 0;
  for (const Piece& piece : pieces) total += packed_bytes(piece.num_bytes);
  return total;
}

// Run on the calling thread. The buffer may begin at any address.
namespace cpu {
void pack(const std::vector<Piece>& pieces, void* buffer);
void unpack(const std::vector<Piece>& pieces, const void* buffer);
}  // namespace cpu

// Queued on the stream, one launch for every 240 pieces that are not empty; memory of the current device. The buffer
// begins at a multiple of 16 bytes. Pieces that do, too, move 16 bytes at a time, others as many as their address
// allows. Blocks share the bytes evenly, however they are spread over pieces. `pieces` may be gone on return.
namespace cuda {
void pack(const std::vector<Piece>& pieces, void* buffer, Stream stream);
void unpack(const std::vector<Piece>& pieces, const void* buffer, Stream stream);
// As load_kernels() in algo/device_collective.h, which calls it.
void load_pack_kernels();
}  // namespace cuda

}  // namespace ringcomm
