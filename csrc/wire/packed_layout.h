// Several arrays in one buffer, as one collective moves them; and what ranks compare of a list of arrays.
//
// Every array begins at a multiple of 16 bytes, behind zeros: of the largest element, so that a buffer is an array of
// any dtype; and of the widest access of a kernel, so that an array that lies at such a multiple itself, as those of
// all allocators do, is copied in accesses of 16 bytes. The zeros are reduced like everything else, with those of the
// other ranks, and go nowhere.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "base/partition.h"

namespace ringcomm {

constexpr int64_t kPackedGranule = 16;

// What an array takes in the buffer.
RC_HD constexpr int64_t packed_bytes(int64_t num_bytes) { return round_up(num_bytes, kPackedGranule); }

// Of a list of arrays: how many, and a hash of their dtypes and sizes in order. It is in the descriptor of every call
// that comes of the list (wire/descriptor.h), because a packed call by itself shows a total only. Two lists of as many
// arrays that differ have the same fingerprint once in 2^32 times.
struct ListMark {
  int32_t num_arrays = -1;  // no list
  uint64_t hash = 0;

  void add(DType dtype, int64_t count) {
    ++num_arrays;
    // A step of splitmix64: every bit of what came before changes half of the bits.
    hash += (static_cast<uint64_t>(count) << 8 | static_cast<uint64_t>(dtype)) + 0x9E3779B97F4A7C15ull;
    hash = (hash ^ hash >> 30) * 0xBF58476D1CE4E5B9ull;
    hash = (hash ^ hash >> 27) * 0x94D049BB133111EBull;
    hash ^= hash >> 31;
  }
  uint32_t fingerprint() const { return static_cast<uint32_t>(hash); }
};

}  // namespace ringcomm
