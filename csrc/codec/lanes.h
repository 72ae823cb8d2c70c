// The steps of the block codecs that move values between lanes, for kernel files that are compiled once
// per SIMD level. GCC makes slow code of them from plain loops; everything else is plain loops.
#pragma once

#include <cstdint>

#include "codec/block_quantize_math.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ringcomm::RC_SIMD_LEVEL {
namespace {

// bytes[i] = low byte of words[i]; kCount is 16 or 32.
template <int kCount>
inline void narrow_to_bytes(const uint32_t* words, uint8_t* bytes) {
#if defined(__AVX512F__)
  for (int i = 0; i < kCount; i += 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + i), _mm512_cvtepi32_epi8(_mm512_loadu_si512(words + i)));
  }
#elif defined(__AVX2__)
  const __m256i low_byte = _mm256_set1_epi32(0xFF);
  const __m256i word_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int i = 0; i < kCount; i += 16) {
    const __m256i* const source = reinterpret_cast<const __m256i*>(words + i);
    const __m256i shorts = _mm256_packus_epi32(_mm256_and_si256(_mm256_loadu_si256(source), low_byte),
                                               _mm256_and_si256(_mm256_loadu_si256(source + 1), low_byte));
    const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(shorts, shorts), word_order);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + i), _mm256_castsi256_si128(packed));
  }
#else
  for (int i = 0; i < kCount; ++i) bytes[i] = static_cast<uint8_t>(words[i]);
#endif
}

// words[i] = bytes[i]; kCount is 16 or 32.
template <int kCount>
inline void widen_bytes(const uint8_t* bytes, uint32_t* words) {
#if defined(__AVX512F__)
  for (int i = 0; i < kCount; i += 16) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i));
    _mm512_storeu_si512(words + i, _mm512_cvtepu8_epi32(packed));
  }
#elif defined(__AVX2__)
  for (int i = 0; i < kCount; i += 8) {
    const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + i), _mm256_cvtepu8_epi32(packed));
  }
#else
  for (int i = 0; i < kCount; ++i) words[i] = bytes[i];
#endif
}

// largest[b] = the largest magnitude_bits of the 32 values of block b, for 16 blocks. With vectors of N
// lanes, N blocks are folded at once: each step halves the lanes that a block occupies and the number
// of vectors. RC_KEEP_ORDER makes the compiler read the group from front to back: in the order that it
// likes better no hardware prefetcher follows (measured from memory: 13 to 20 instead of 24 GB/s).
#define RC_KEEP_ORDER() asm volatile("" ::: "memory")
#if defined(__AVX512F__)
inline __m512i magnitudes(const float* block) {
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  return _mm512_max_epi32(_mm512_and_si512(_mm512_loadu_si512(block), magnitude),
                          _mm512_and_si512(_mm512_loadu_si512(block + 16), magnitude));
}

inline __m512i fold_pairs(__m512i a, __m512i b) {
  return _mm512_max_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

// Four blocks, each reduced to one lane in every quarter.
inline __m512i fold_four(const float* block) {
  const __m512i a = magnitudes(block);
  const __m512i b = magnitudes(block + kBlockElems);
  const __m512i ab = fold_pairs(a, b);
  const __m512i c = magnitudes(block + 2 * kBlockElems);
  const __m512i d = magnitudes(block + 3 * kBlockElems);
  const __m512i cd = fold_pairs(c, d);
  return _mm512_max_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

inline __m512i fold_quarters(__m512i a, __m512i b) {
  return _mm512_max_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
}

inline void largest_magnitudes(const float* group, uint32_t* largest) {
  const __m512i a = fold_four(group);
  RC_KEEP_ORDER();
  const __m512i b = fold_four(group + 4 * kBlockElems);
  const __m512i ab = fold_quarters(a, b);
  RC_KEEP_ORDER();
  const __m512i c = fold_four(group + 8 * kBlockElems);
  RC_KEEP_ORDER();
  const __m512i d = fold_four(group + 12 * kBlockElems);
  _mm512_storeu_si512(largest, fold_quarters(ab, fold_quarters(c, d)));
}
#elif defined(__AVX2__)
inline __m256i magnitudes(const float* block) {
  const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
  const __m256i* const values = reinterpret_cast<const __m256i*>(block);
  __m256i largest = _mm256_and_si256(_mm256_loadu_si256(values), magnitude);
  for (int i = 1; i < 4; ++i) {
    largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_loadu_si256(values + i), magnitude));
  }
  return largest;
}

inline __m256i fold_pairs(__m256i a, __m256i b) {
  return _mm256_max_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
}

// Four blocks, each reduced to one lane in either half.
inline __m256i fold_four(const float* block) {
  const __m256i a = magnitudes(block);
  const __m256i b = magnitudes(block + kBlockElems);
  const __m256i ab = fold_pairs(a, b);
  const __m256i c = magnitudes(block + 2 * kBlockElems);
  const __m256i d = magnitudes(block + 3 * kBlockElems);
  const __m256i cd = fold_pairs(c, d);
  return _mm256_max_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}

inline void largest_magnitudes(const float* group, uint32_t* largest) {
  for (int block = 0; block < 16; block += 8) {
    const __m256i low = fold_four(group + block * kBlockElems);
    RC_KEEP_ORDER();
    const __m256i high = fold_four(group + (block + 4) * kBlockElems);
    const __m256i folded =
        _mm256_max_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(largest + block), folded);
  }
}
#else
inline void largest_magnitudes(const float* group, uint32_t* largest) {
  for (int block = 0; block < 16; ++block) {
    int32_t most = 0;  // signed: SSE2 has no unsigned comparison
    for (int64_t i = 0; i < kBlockElems; ++i) {
      const int32_t magnitude = static_cast<int32_t>(magnitude_bits(group[block * kBlockElems + i]));
      most = magnitude > most ? magnitude : most;
    }
    largest[block] = static_cast<uint32_t>(most);
  }
}
#endif

#undef RC_KEEP_ORDER

}  // namespace
}  // namespace ringcomm::RC_SIMD_LEVEL
