// Loops of the conversions in half.h, for kernel files that are compiled once per SIMD level. Uses the
// processor's own float16 conversion where the level has it; it gives the same bits.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "base/half.h"
#include "base/host_device.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace ringcomm {

// Arrays as callers hand them over: any alignment, any effective type.
struct __attribute__((packed, may_alias)) Float16 {
  uint16_t bits;
};
struct __attribute__((packed, may_alias)) Bfloat16 {
  uint16_t bits;
};

namespace RC_SIMD_LEVEL {
namespace {

inline void widen(const float* input, int64_t num_elems, float* output) {
  memcpy(output, input, static_cast<size_t>(num_elems) * sizeof(float));
}

inline void widen(const Bfloat16* input, int64_t num_elems, float* output) {
#pragma GCC ivdep
  for (int64_t i = 0; i < num_elems; ++i) output[i] = bfloat16_to_float(input[i].bits);
}

inline void narrow(const float* input, int64_t num_elems, float* output) {
  memcpy(output, input, static_cast<size_t>(num_elems) * sizeof(float));
}

inline void narrow(const float* input, int64_t num_elems, Bfloat16* output) {
#pragma GCC ivdep
  for (int64_t i = 0; i < num_elems; ++i) output[i].bits = float_to_bfloat16(input[i]);
}

inline void widen(const Float16* input, int64_t num_elems, float* output) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= num_elems; i += 16) {
    _mm512_storeu_ps(output + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(input + i))));
  }
#elif defined(__F16C__)
  for (; i + 8 <= num_elems; i += 8) {
    _mm256_storeu_ps(output + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(input + i))));
  }
#endif
#pragma GCC ivdep
  for (; i < num_elems; ++i) output[i] = float16_to_float(input[i].bits);
}

inline void narrow(const float* input, int64_t num_elems, Float16* output) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= num_elems; i += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(output + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(input + i), _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__)
  for (; i + 8 <= num_elems; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(output + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(input + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
#pragma GCC ivdep
  for (; i < num_elems; ++i) output[i].bits = float_to_float16(input[i]);
}

}  // namespace
}  // namespace RC_SIMD_LEVEL
}  // namespace ringcomm
