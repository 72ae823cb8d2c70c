// Which cache, if any, the lines of an array are in.
//
// Internal linkage: kernel files, which are compiled for other instruction sets, use it too (base/simd.h).
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace ringcomm {

// Writes one byte of every cache line of [data, data + num_bytes) with the value that it has: the lines
// become this core's own. Others may read or claim the same bytes meanwhile, nobody may change them.
static inline void claim_lines(void* data, size_t num_bytes) {
  constexpr size_t kLine = 64;
  uint8_t* const bytes = static_cast<uint8_t*>(data);
  const size_t second_line = kLine - reinterpret_cast<uintptr_t>(data) % kLine;
  for (size_t i = 0; i < num_bytes; i = i == 0 ? second_line : i + kLine) {
    __atomic_store_n(bytes + i, __atomic_load_n(bytes + i, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
  }
}

#if defined(__x86_64__)
constexpr bool kHaveStreamingStores = true;

// A copy whose stores go past the caches to memory: whole cache lines do, the ends as memcpy writes them.
// Ordered for other threads only by a stream_fence() after it.
static inline void stream_copy(void* to, const void* from, size_t num_bytes) {
  constexpr size_t kLine = 64;
  uint8_t* out = static_cast<uint8_t*>(to);
  const uint8_t* in = static_cast<const uint8_t*>(from);
  size_t head = (kLine - reinterpret_cast<uintptr_t>(out) % kLine) % kLine;
  if (head > num_bytes) head = num_bytes;
  memcpy(out, in, head);
  size_t done = head;
  for (; done + kLine <= num_bytes; done += kLine) {
    const __m128i* source = reinterpret_cast<const __m128i*>(in + done);
    __m128i* target = reinterpret_cast<__m128i*>(out + done);
    const __m128i a = _mm_loadu_si128(source);
    const __m128i b = _mm_loadu_si128(source + 1);
    const __m128i c = _mm_loadu_si128(source + 2);
    const __m128i d = _mm_loadu_si128(source + 3);
    _mm_stream_si128(target, a);
    _mm_stream_si128(target + 1, b);
    _mm_stream_si128(target + 2, c);
    _mm_stream_si128(target + 3, d);
  }
  memcpy(out + done, in + done, num_bytes - done);
}

static inline void stream_fence() { _mm_sfence(); }
#else
constexpr bool kHaveStreamingStores = false;
static inline void stream_copy(void* to, const void* from, size_t num_bytes) { memcpy(to, from, num_bytes); }
static inline void stream_fence() {}
#endif

}  // namespace ringcomm
