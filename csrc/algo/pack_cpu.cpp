#include <cstring>

#include "algo/collective.h"
#include "algo/pack.h"

namespace ringcomm::cpu {

// Through the caches: the buffer is read next, by whoever reduces it.
void pack(const std::vector<Piece>& pieces, void* buffer) {
  uint8_t* to = static_cast<uint8_t*>(buffer);
  for (const Piece& piece : pieces) {
    copy_bytes(to, piece.data, piece.num_bytes);
    const int64_t taken = packed_bytes(piece.num_bytes);
    if (taken > piece.num_bytes) std::memset(to + piece.num_bytes, 0, static_cast<size_t>(taken - piece.num_bytes));
    to += taken;
  }
}

void unpack(const std::vector<Piece>& pieces, const void* buffer) {
  const int64_t total = packed_bytes(pieces);
  const uint8_t* from = static_cast<const uint8_t*>(buffer);
  for (const Piece& piece : pieces) {
    copy_to_output(piece.data, from, piece.num_bytes, total);
    from += packed_bytes(piece.num_bytes);
  }
}

}  // namespace ringcomm::cpu
