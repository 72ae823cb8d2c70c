// CUDA's dialect for g++, forced into every .cu file in front of its first line: keywords, vector types, built-in
// variables and the intrinsics that the kernels use. No CUDA toolkit is needed. What is not here is not
// supported: clusters, tensor cores, cp.async and TMA, textures, __activemask, block-scope fences.
#pragma once

#include <cstddef>
#include <cstdint>

#define RC_SIMT 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
// One OS thread runs all CUDA threads; the image of the module's thread-locals is swapped with the block.
#define __shared__ thread_local

struct uint2 {
  unsigned x, y;
} __attribute__((aligned(8)));
struct uint3 {
  unsigned x, y, z;
};
struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern const uint3 threadIdx;
extern const uint3 blockIdx;
extern const dim3 blockDim;
extern const dim3 gridDim;

namespace simt {

// The line of the kernel that calls an intrinsic, for reports.
struct Place {
  const char* file;
  int line;
};
#define SIMT_HERE const char *simt_file = __builtin_FILE(), int simt_line = __builtin_LINE()
#define SIMT_PLACE (::simt::Place{simt_file, simt_line})

enum class Collective { sync, ballot, any, all, shuffle, shuffle_up, shuffle_down, shuffle_xor };

// Whether any thread of the block said so.
bool block_barrier(bool predicate, Place place);
uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, int argument, int width, Place place);
void fence();
void sleep();
void* dynamic_shared();
// Before an atomic access to `bytes` at `address`.
void atomic_access(const volatile void* address, unsigned bytes);

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

inline void __syncthreads(SIMT_HERE) { simt::block_barrier(false, SIMT_PLACE); }
inline int __syncthreads_or(int predicate, SIMT_HERE) { return simt::block_barrier(predicate != 0, SIMT_PLACE); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, SIMT_HERE) {
  simt::warp_collective(simt::Collective::sync, mask, 0, 0, 32, SIMT_PLACE);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_HERE) {
  return static_cast<unsigned>(
      simt::warp_collective(simt::Collective::ballot, mask, predicate != 0, 0, 32, SIMT_PLACE));
}
inline int __any_sync(unsigned mask, int predicate, SIMT_HERE) {
  return static_cast<int>(simt::warp_collective(simt::Collective::any, mask, predicate != 0, 0, 32, SIMT_PLACE));
}
inline int __all_sync(unsigned mask, int predicate, SIMT_HERE) {
  return static_cast<int>(simt::warp_collective(simt::Collective::all, mask, predicate != 0, 0, 32, SIMT_PLACE));
}
#define SIMT_SHUFFLE(name, kind)                                                                                 \
  template <typename T>                                                                                          \
  T name(unsigned mask, T value, int argument, int width = 32, SIMT_HERE) {                                      \
    return simt::from_bits<T>(                                                                                   \
        simt::warp_collective(simt::Collective::kind, mask, simt::to_bits(value), argument, width, SIMT_PLACE)); \
  }
SIMT_SHUFFLE(__shfl_sync, shuffle)
SIMT_SHUFFLE(__shfl_up_sync, shuffle_up)
SIMT_SHUFFLE(__shfl_down_sync, shuffle_down)
SIMT_SHUFFLE(__shfl_xor_sync, shuffle_xor)
#undef SIMT_SHUFFLE

// Scopes are not told apart: both order as __threadfence_system does.
inline void __threadfence() { simt::fence(); }
inline void __threadfence_system() { simt::fence(); }
inline void __nanosleep(unsigned) { simt::sleep(); }

#define SIMT_ATOMIC(name, update)                                        \
  template <typename T>                                                  \
  __attribute__((no_sanitize("thread"))) T name(T* address, T operand) { \
    simt::atomic_access(address, sizeof(T));                             \
    const T old = *address;                                              \
    *address = update;                                                   \
    return old;                                                          \
  }
SIMT_ATOMIC(atomicAdd, static_cast<T>(old + operand))
SIMT_ATOMIC(atomicExch, operand)
SIMT_ATOMIC(atomicOr, static_cast<T>(old | operand))
#undef SIMT_ATOMIC
template <typename T>
__attribute__((no_sanitize("thread"))) T atomicCAS(T* address, T expected, T desired) {
  simt::atomic_access(address, sizeof(T));
  const T old = *address;
  if (old == expected) *address = desired;
  return old;
}
