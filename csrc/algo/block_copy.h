// Copies by all threads of a block, which do not wait for each other. For .cu files.
#pragma once

#include "base/launch.h"
#include "base/vector_access.h"

namespace ringcomm {

// By a block of kCollectiveThreads. num_bytes is a multiple of kElemBytes, and so are the addresses; where they are
// multiples of 16, it goes 16 bytes at a time. `to` and `from` do not overlap.
template <int kElemBytes>
__device__ __forceinline__ void copy_by_block(void* to, const void* from, int64_t num_bytes) {
  using Vector = VectorWord<kVectorBytes>::Type;
  using Element = typename VectorWord<kElemBytes>::Type;
  constexpr int kInFlight = 4;  // loads of a thread before it stores
  const int64_t thread = threadIdx.x;
  const bool aligned = is_aligned(to, kVectorBytes) && is_aligned(from, kVectorBytes);
  const int64_t num_vectors = aligned ? num_bytes / kVectorBytes : 0;
  int64_t i = thread;
#pragma unroll 1
  for (; i + (kInFlight - 1) * kCollectiveThreads < num_vectors; i += kInFlight * kCollectiveThreads) {
    const Vector* const vectors_from = static_cast<const Vector*>(from) + i;
    Vector* const vectors_to = static_cast<Vector*>(to) + i;
    Vector vectors[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) vectors[k] = vectors_from[k * kCollectiveThreads];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) vectors_to[k * kCollectiveThreads] = vectors[k];
  }
#pragma unroll 1
  for (; i < num_vectors; i += kCollectiveThreads) static_cast<Vector*>(to)[i] = static_cast<const Vector*>(from)[i];
  const int64_t num_elems = num_bytes / kElemBytes;
#pragma unroll 1
  for (i = num_vectors * (kVectorBytes / kElemBytes) + thread; i < num_elems; i += kCollectiveThreads) {
    static_cast<Element*>(to)[i] = static_cast<const Element*>(from)[i];
  }
}

// The same for any number of bytes, in the largest elements that fit. Nothing to do where `to` is `from`.
__device__ __forceinline__ void copy_bytes_by_block(uint8_t* to, const uint8_t* from, int64_t num_bytes) {
  if (num_bytes == 0 || to == from) return;
  const uint64_t numbers =
      reinterpret_cast<uint64_t>(to) | reinterpret_cast<uint64_t>(from) | static_cast<uint64_t>(num_bytes);
  if (numbers % 8 == 0) return copy_by_block<8>(to, from, num_bytes);
  if (numbers % 4 == 0) return copy_by_block<4>(to, from, num_bytes);
  if (numbers % 2 == 0) return copy_by_block<2>(to, from, num_bytes);
  copy_by_block<1>(to, from, num_bytes);
}

}  // namespace ringcomm
