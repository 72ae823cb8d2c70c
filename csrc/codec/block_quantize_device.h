// The block codecs int8 and int4 in kernels: what one lane does with its share of a block, in registers. For .cu files;
// the arithmetic is that of block_quantize_math.h.
//
// Neighbouring lanes of a warp share a block. Each of them holds two runs of kRun elements: one of the first 16
// elements of the block and the one that lies 16 elements later, with which int4 shares bytes.
#pragma once

#include "base/launch.h"
#include "base/vector_access.h"
#include "codec/block_quantize_math.h"
#include "wire/codec_format.h"

namespace ringcomm {

constexpr int kHalfBlock = static_cast<int>(kBlockElems) / 2;

// How lanes share a block where a run is 16 bytes of an array of T. float32: 4 lanes hold 4 + 4 elements; 16-bit types:
// 2 lanes hold 8 + 8.
template <typename T>
struct Shares {
  static constexpr int kRun = kVectorBytes / static_cast<int>(sizeof(T));
  static constexpr int kLanes = kHalfBlock / kRun;  // that share a block
};

template <int kRun>
__device__ __forceinline__ uint32_t largest_magnitude(const float (&values)[kRun], uint32_t largest) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const uint32_t magnitude = magnitude_bits(values[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// The bits of the block's largest magnitude, for all of its lanes. Called by whole warps.
template <int kRun>
__device__ __forceinline__ uint32_t block_absmax(const float (&low)[kRun], const float (&high)[kRun]) {
  constexpr unsigned kAllLanes = 0xFFFFFFFFu;
  uint32_t absmax_bits = largest_magnitude(high, largest_magnitude(low, 0));
#pragma unroll
  for (int distance = kHalfBlock / kRun / 2; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, absmax_bits, distance);
    absmax_bits = other > absmax_bits ? other : absmax_bits;
  }
  return absmax_bits;
}

struct BlockScale {
  uint16_t wire;
  bool finite;
  float value;
  float inverse;
};

template <int kBits>
__device__ __forceinline__ BlockScale block_scale(uint32_t absmax_bits) {
  const uint16_t wire = scale_of<kBits>(absmax_bits);
  const float value = bfloat16_to_float(wire);
  return {wire, is_finite_block(absmax_bits), value, inverse_scale(value)};
}

// random_key() of the element that it is asked for; it is worked out anew where the upper half of the index changes.
class RandomKeys {
 public:
  __device__ __forceinline__ RandomKeys(uint64_t seed, uint64_t step, uint32_t rank)
      : seed_(seed), step_(step), rank_(rank) {}
  __device__ __forceinline__ RandomKey at(uint64_t index) {
    const uint32_t index_high = static_cast<uint32_t>(index >> 32);
    if (!known_ || index_high != index_high_) {
      known_ = true;
      index_high_ = index_high;
      key_ = random_key(seed_, step_, rank_, index_high);
    }
    return key_;
  }

 private:
  uint64_t seed_;
  uint64_t step_;
  uint32_t rank_;
  uint32_t index_high_ = 0;
  bool known_ = false;
  RandomKey key_{};
};

template <int kRun>
__device__ __forceinline__ void quantize_nearest(const float (&values)[kRun], float inverse, float (&codes)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) codes[i] = nearest_code(values[i], inverse);
}

// index_low: the lower half of the index of the first value.
template <int kBits, int kRun>
__device__ __forceinline__ void quantize_stochastic(const float (&values)[kRun], float inverse, RandomKey key,
                                                    uint32_t index_low, float (&codes)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    codes[i] = stochastic_code<kBits>(values[i], inverse, uniform_of(key, index_low + static_cast<uint32_t>(i)));
  }
}

// The bytes of a lane's codes: those at its offset in the block and, of int8, those kHalfBlock later.
template <int kBits, int kRun>
__device__ __forceinline__ void pack_codes(const float (&low)[kRun], const float (&high)[kRun], bool finite,
                                           uint8_t (&low_bytes)[kRun], uint8_t (&high_bytes)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const uint32_t byte = kBits == 8 ? int8_byte(low[i]) : int4_byte(low[i], high[i]);
    low_bytes[i] = static_cast<uint8_t>(byte & mask_if(finite));
    if (kBits == 8) high_bytes[i] = static_cast<uint8_t>(int8_byte(high[i]) & mask_if(finite));
  }
}

template <int kBits, int kRun>
__device__ __forceinline__ void unpack_codes(const uint8_t (&low_bytes)[kRun], const uint8_t (&high_bytes)[kRun],
                                             float scale, float (&low)[kRun], float (&high)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    low[i] = kBits == 8 ? int8_value(low_bytes[i], scale) : int4_low_value(low_bytes[i], scale);
    high[i] = kBits == 8 ? int8_value(high_bytes[i], scale) : int4_high_value(low_bytes[i], scale);
  }
}

// What the codes lost.
template <int kRun>
__device__ __forceinline__ void residual_run(const float (&values)[kRun], const float (&codes)[kRun], float scale,
                                             float (&residual)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) residual[i] = residual_of(values[i], codes[i], scale);
}

}  // namespace ringcomm
