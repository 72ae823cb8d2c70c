// float16 and bfloat16 <-> float32 on bit patterns, round to nearest even, host and device.
// float32 NaN becomes the quiet NaN of the same sign (float16 keeps the top payload bits, as the
// F16C instructions do; bfloat16 becomes 0x7FC0, as torch does).
#pragma once

#include <cstdint>
#include <cstring>

#include "base/host_device.h"

namespace ringcomm {

RC_HD uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

RC_HD float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

RC_HD float bfloat16_to_float(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }

// The rounded bfloat16 in the upper half; the lower half holds nothing.
RC_HD uint32_t float_to_bfloat16_high(float value) {
  const uint32_t bits = float_bits(value);
  return value != value ? 0x7FC00000u : bits + 0x7FFFu + ((bits >> 16) & 1u);
}

RC_HD uint16_t float_to_bfloat16(float value) { return static_cast<uint16_t>(float_to_bfloat16_high(value) >> 16); }

// Both float16 conversions are branch-free, so that loops vectorise, and give the same bits when the
// thread flushes float32 subnormals to zero.
RC_HD float float16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7FFFu;
  const uint32_t normal = (magnitude << 13) + 0x38000000u;
  const uint32_t subnormal =
      float_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 5.9604644775390625e-8f);  // 2^-24
  const uint32_t special = (magnitude << 13) | 0x7F800000u | (magnitude > 0x7C00u ? 0x00400000u : 0u);
  // Masks, not selects: GCC would turn selects into jumps and leave the loop scalar.
  const uint32_t is_subnormal = 0u - static_cast<uint32_t>(magnitude < 0x0400u);
  const uint32_t is_special = 0u - static_cast<uint32_t>(magnitude >= 0x7C00u);
  const uint32_t finite = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  const uint32_t result = (special & is_special) | (finite & ~is_special);
  return bits_float(sign | result);
}

RC_HD uint16_t float_to_float16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Normal range: rebase the exponent, round to nearest even on the 13 dropped bits.
  const uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal range (below 2^-14): adding 0.5 aligns the mantissa so that the unit in the last
  // place is 2^-24; the addition itself rounds to nearest even.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t nan = 0x7E00u | ((magnitude >> 13) & 0x03FFu);
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477FF000u ? 0x7C00u : result;  // 65520 and above round to infinity
  result = magnitude > 0x7F800000u ? nan : result;
  return static_cast<uint16_t>(sign | result);
}

}  // namespace ringcomm
