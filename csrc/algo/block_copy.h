// Copies by all threads of a block, which do not wait for each other. For .cu files.
#pragma once

#include "base/launch.h"
#include "base/vector_access.h"

namespace ringcomm {

// num_bytes is a multiple of kElemBytes, and so are the addresses; where they are multiples of 16, it goes 16 bytes at
// a time. Of `to` and `from`, which do not overlap, all threads see what was there before the copy began.
template <int kElemBytes>
__device__ __forceinline__ void copy_by_block(void* to, const void* from, int64_t num_bytes) {
  using Vector = VectorWord<kVectorBytes>::Type;
  using Element = typename VectorWord<kElemBytes>::Type;
  constexpr int kInFlight = 4;  // loads of a thread before it stores
  const int64_t thread = threadIdx.x;
  const int64_t num_threads = blockDim.x;
  const bool aligned = is_aligned(to, kVectorBytes) && is_aligned(from, kVectorBytes);
  const int64_t num_vectors = aligned ? num_bytes / kVectorBytes : 0;
  const Vector* const vectors_from = static_cast<const Vector*>(from);
  Vector* const vectors_to = static_cast<Vector*>(to);
  int64_t i = thread;
  for (; i + (kInFlight - 1) * num_threads < num_vectors; i += kInFlight * num_threads) {
    Vector vectors[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) vectors[k] = vectors_from[i + k * num_threads];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) vectors_to[i + k * num_threads] = vectors[k];
  }
  for (; i < num_vectors; i += num_threads) vectors_to[i] = vectors_from[i];
  const Element* const elements_from = static_cast<const Element*>(from);
  Element* const elements_to = static_cast<Element*>(to);
  for (int64_t k = num_vectors * (kVectorBytes / kElemBytes) + thread; k < num_bytes / kElemBytes; k += num_threads) {
    elements_to[k] = elements_from[k];
  }
}

}  // namespace ringcomm
