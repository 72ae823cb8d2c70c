// Memory that every rank allocates together and all ranks map: peers read and write each other's arrays
// where they are, without staging.
//
// Every rank has a segment of its own, of the same size. After a collective on it has returned, no peer
// touches a rank's segment any more; it may be unmapped at any time outside of one.
#pragma once

#include <cstdint>
#include <vector>

#include "transport/segment.h"

namespace ringcomm {

class SymmetricRegion {
 public:
  // id: the same on all ranks. fds: of the segments, by rank; borrowed.
  SymmetricRegion(uint32_t id, int rank, int64_t num_bytes, const std::vector<int>& fds)
      : id_(id), rank_(rank), num_bytes_(num_bytes) {
    for (const int fd : fds) segments_.emplace_back(fd, num_bytes);
  }

  uint32_t id() const { return id_; }
  int64_t num_bytes() const { return num_bytes_; }
  uint8_t* segment(int rank) const { return segments_[static_cast<size_t>(rank)].data(); }
  uint8_t* own() const { return segment(rank_); }

  // Where an array lies in this rank's segment, -1 if it is not inside.
  int64_t offset_of(const void* data, int64_t num_bytes) const {
    const int64_t offset = static_cast<const uint8_t*>(data) - own();
    return offset >= 0 && offset + num_bytes <= num_bytes_ ? offset : -1;
  }

 private:
  const uint32_t id_;
  const int rank_;
  const int64_t num_bytes_;
  std::vector<Mapping> segments_;
};

}  // namespace ringcomm
