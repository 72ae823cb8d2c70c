// What kernels say in PTX, and nothing else does: words that several GPUs or processes synchronise by, a clock, and a
// store that stays in one piece. For .cu files. Every function has a twin for tests/simt, where the race detector takes
// its order from those of the words.
//
// A release is seen by whoever acquires the value: everything that the releasing thread did before, or that
// it learned of (through __syncthreads, or an acquire of its own), happened before what follows the acquire.
// Words are 4-byte aligned. None of these blocks; whoever waits checks a deadline.
#pragma once

#include <cstdint>

#if defined(RC_SIMT)
#include <simt/memory_order.h>
#endif

namespace ringcomm {

__device__ __forceinline__ uint32_t load_acquire_system(const uint32_t* word) {
#if defined(RC_SIMT)
  return simt::load(word, simt::Order::acquire);
#else
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
#endif
}

__device__ __forceinline__ void store_release_system(uint32_t* word, uint32_t value) {
#if defined(RC_SIMT)
  simt::store(word, value, simt::Order::release);
#else
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
#endif
}

// Without order of their own: with __threadfence_system() after a load or before a store they have that of
// the functions above. Unlike plain accesses they race with nobody.
__device__ __forceinline__ uint32_t load_relaxed_system(const uint32_t* word) {
#if defined(RC_SIMT)
  return simt::load(word, simt::Order::relaxed);
#else
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
#endif
}

__device__ __forceinline__ void store_relaxed_system(uint32_t* word, uint32_t value) {
#if defined(RC_SIMT)
  simt::store(word, value, simt::Order::relaxed);
#else
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
#endif
}

// 8 bytes in one access: a reader sees all of what one store wrote, or nothing of it. No order with other words.
__device__ __forceinline__ uint64_t load_relaxed_system(const uint64_t* word) {
#if defined(RC_SIMT)
  return simt::load(word, simt::Order::relaxed);
#else
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
#endif
}

__device__ __forceinline__ void store_relaxed_system(uint64_t* word, uint64_t value) {
#if defined(RC_SIMT)
  simt::store(word, value, simt::Order::relaxed);
#else
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
#endif
}

// A plain store of 16 bytes of global memory. The compiler does not take it apart, as it does with those of its own
// where another branch stores parts of the same bytes.
__device__ __forceinline__ void store_whole(uint4* to, uint4 word) {
#if defined(RC_SIMT)
  *to = word;
#else
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
#endif
}

// A clock of the whole device, for deadlines: it ticks coarsely.
__device__ __forceinline__ uint64_t global_nanoseconds() {
#if defined(RC_SIMT)
  return simt::nanoseconds();
#else
  uint64_t time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return time;
#endif
}

}  // namespace ringcomm
