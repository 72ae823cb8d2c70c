// Arithmetic of the block codecs int8 and int4, host and device, once. What the bytes mean:
// wire/codec_format.h. Every function is branch-free, so loops over it vectorise, and rounds the same
// way on every processor: products that feed an addition are rounded on their own (the host is built
// with -ffp-contract=off), except code * scale, which is exact.
//
// One block: absmax_bits over its values -> scale_of -> inverse_scale -> a code per value. Where
// is_finite_block is false the codes are 0, whatever the functions below say.
#pragma once

#include <cstdint>

#include "base/half.h"
#include "base/host_device.h"

namespace ringcomm {

template <int kBits>
struct BlockQuantize;

template <>
struct BlockQuantize<8> {
  static constexpr float kLargestCode = 127.0f;
  static constexpr float kInverseLargestCode = 1.0f / 127.0f;
};

template <>
struct BlockQuantize<4> {
  static constexpr float kLargestCode = 7.0f;
  static constexpr float kInverseLargestCode = 1.0f / 7.0f;
};

constexpr uint16_t kNanScale = 0x7FC0;
constexpr uint16_t kSmallestScale = 0x0080;  // 2^-126, the smallest normal number
constexpr uint32_t kInfinityBits = 0x7F800000u;

// Adding 1.5 * 2^23 leaves an integer in the low mantissa bits, rounded to nearest even.
constexpr float kRoundingMagic = 12582912.0f;

RC_HD float product_rounded(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);  // nvcc would fuse it with the addition that follows
#else
  return a * b;
#endif
}

// Ordered as integers: NaN > infinity > finite.
RC_HD uint32_t magnitude_bits(float value) { return float_bits(value) & 0x7FFFFFFFu; }

RC_HD bool is_finite_block(uint32_t absmax_bits) { return absmax_bits < kInfinityBits; }

// All ones if the condition holds. Masks, not selects, where GCC would turn a select into a jump.
RC_HD uint32_t mask_if(bool condition) { return 0u - static_cast<uint32_t>(condition); }

// bfloat16 bits of the scale of a block. It cannot overflow: the largest float32 gives a scale that
// rounds down for 127 and for 7, so largest code * scale is finite for every finite block.
template <int kBits>
RC_HD uint16_t scale_of(uint32_t absmax_bits) {
  const uint32_t exact = float_bits(bits_float(absmax_bits) * BlockQuantize<kBits>::kInverseLargestCode);
  const uint32_t rounded = (exact + 0x7FFFu + ((exact >> 16) & 1u)) >> 16;
  const uint32_t scale = rounded & mask_if(rounded >= kSmallestScale);
  const uint32_t not_finite = mask_if(absmax_bits >= kInfinityBits);
  return static_cast<uint16_t>((scale & ~not_finite) | (kNanScale & not_finite));
}

// 1 / scale, and 0 for a scale of 0.
RC_HD float inverse_scale(float scale) {
  return bits_float(float_bits(1.0f / scale) & mask_if(float_bits(scale) != 0));
}

// The code of a value, plus kRoundingMagic: its lowest byte is the code in two's complement, and
// code_value gives the number. |value| <= absmax keeps the code within range by itself.
RC_HD float nearest_code(float value, float inverse) { return product_rounded(value, inverse) + kRoundingMagic; }

// The same with stochastic rounding; uniform is in [0, 1).
template <int kBits>
RC_HD float stochastic_code(float value, float inverse, float uniform) {
  const float target = product_rounded(value, inverse) + uniform;
  const float nearest = (target + kRoundingMagic) - kRoundingMagic;
  const float floor = nearest - (nearest > target ? 1.0f : 0.0f);
  const float limit = BlockQuantize<kBits>::kLargestCode;
  const float at_most = floor > limit ? limit : floor;
  return (at_most < -limit ? -limit : at_most) + kRoundingMagic;
}

RC_HD float code_value(float code) { return code - kRoundingMagic; }

RC_HD float residual_of(float value, float code, float scale) { return value - code_value(code) * scale; }

// The byte that goes on the wire, in the low 8 bits; what is above them is dropped.
RC_HD uint32_t int8_byte(float code) { return float_bits(code); }

// Elements j and j + 16 of a block share byte j.
RC_HD uint32_t int4_byte(float low_code, float high_code) {
  return (float_bits(low_code) & 0x0Fu) | (float_bits(high_code) << 4);
}

// Values of a byte (bits above the lowest 8 are ignored). A code is moved to the top of the word and
// back, which extends its sign.
RC_HD float int8_value(uint32_t byte, float scale) {
  return static_cast<float>(static_cast<int32_t>(byte << 24) >> 24) * scale;
}
RC_HD float int4_low_value(uint32_t byte, float scale) {
  return static_cast<float>(static_cast<int32_t>(byte << 28) >> 28) * scale;
}
RC_HD float int4_high_value(uint32_t byte, float scale) {
  return static_cast<float>(static_cast<int32_t>(byte << 24) >> 28) * scale;
}

// Random numbers for stochastic rounding: a counter, so that every device draws the same. The element
// index is its position in the whole array.
struct RandomKey {
  uint32_t first;
  uint32_t second;
};

// Finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
RC_HD uint64_t mix64(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ull;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBull;
  return value ^ (value >> 31);
}

// One key serves 2^32 elements: index_high is the upper half of the element index, the same for all
// elements of a block.
RC_HD RandomKey random_key(uint64_t seed, uint64_t step, uint32_t rank, uint32_t index_high) {
  uint64_t key = mix64(seed + 0x9E3779B97F4A7C15ull);
  key = mix64(key ^ (step + 0x9E3779B97F4A7C15ull));
  key = mix64(key ^ ((static_cast<uint64_t>(index_high) << 32) | rank));
  return RandomKey{static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// Uniform in [0, 1) with 24 bits: the 32-bit mixer "lowbias32" (Wellons, hash-prospector), half a key
// before it and half in its middle.
RC_HD float uniform_of(RandomKey key, uint32_t index_low) {
  uint32_t bits = index_low ^ key.first;
  bits = (bits ^ (bits >> 16)) * 0x7FEB352Du;
  bits += key.second;
  bits = (bits ^ (bits >> 15)) * 0x846CA68Bu;
  bits ^= bits >> 16;
  return static_cast<float>(static_cast<int32_t>(bits >> 8)) * 5.9604644775390625e-8f;  // 2^-24
}

}  // namespace ringcomm
