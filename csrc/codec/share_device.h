// Any codec in a kernel that fuses it with something else: a lane has a share of a block of 32 values in float32
// registers, encodes and decodes it. For .cu files. Arrays of values may start and end anywhere; encoded ones
// (wire/codec_format.h) are 16-byte aligned and have room for whole blocks.
#pragma once

#include "base/element.h"
#include "base/launch.h"
#include "base/partition.h"
#include "base/vector_access.h"
#include "codec/block_quantize_device.h"
#include "codec/cast_device.h"

namespace ringcomm {

// A run of kRun values and the one that lies 16 values later.
template <int kRun>
struct Share {
  float low[kRun];
  float high[kRun];
};

struct SharePlace {
  int64_t block;  // in the encoded array
  int offset;     // of the low run in its block
  bool present;   // lanes past the last block go along, because lanes of a warp exchange values: they hold zeros
  bool vector;    // load_run, store_run
  int64_t begin;  // of the low run, in arrays of values
  int64_t end;    // where the values end in them
};

// Calls work(place) for all shares of the values [begin, end) of arrays, which are an encoded array of their own. By
// all threads of a block; warps stay together. vectors: the arrays are aligned for them, and begin is a multiple of 32.
template <int kRun, typename Work>
__device__ __forceinline__ void for_each_share(const Range& values, bool vectors, Work work) {
  constexpr int kLanes = kHalfBlock / kRun;
  constexpr int kBlocksPerWarp = kWarpLanes / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int64_t warp = threadIdx.x / kWarpLanes;
  const int64_t step = static_cast<int64_t>(blockDim.x / kWarpLanes) * kBlocksPerWarp;
  const int64_t num_blocks = ceil_div(values.count(), kBlockElems);
  for (int64_t first = warp * kBlocksPerWarp; first < num_blocks; first += step) {
    SharePlace place;
    place.block = first + lane / kLanes;
    place.offset = lane % kLanes * kRun;
    place.present = place.block < num_blocks;
    const int64_t block_begin = values.begin + place.block * kBlockElems;
    place.vector = vectors && block_begin + kBlockElems <= values.end;
    place.begin = block_begin + place.offset;
    place.end = values.end;
    work(place);
  }
}

template <typename T, int kRun>
__device__ __forceinline__ void load_share(const T* array, const SharePlace& place, Share<kRun>& share) {
  T low[kRun], high[kRun];
  load_run(array, place.begin, place.end, place.vector, low);
  load_run(array, place.begin + kHalfBlock, place.end, place.vector, high);
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    share.low[i] = to_float(low[i]);
    share.high[i] = to_float(high[i]);
  }
}

template <typename T, int kRun>
__device__ __forceinline__ void store_share(T* array, const SharePlace& place, const Share<kRun>& share) {
  T low[kRun], high[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    low[i] = from_float<T>(share.low[i]);
    high[i] = from_float<T>(share.high[i]);
  }
  store_run(array, place.begin, place.end, place.vector, low);
  store_run(array, place.begin + kHalfBlock, place.end, place.vector, high);
}

template <int kRun>
__device__ __forceinline__ void add_share(Share<kRun>& total, const Share<kRun>& share) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    total.low[i] += share.low[i];
    total.high[i] += share.high[i];
  }
}

template <int kRun>
__device__ __forceinline__ void divide_share(Share<kRun>& share, float divisor) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    share.low[i] /= divisor;
    share.high[i] /= divisor;
  }
}

struct ShareRounding {
  bool stochastic;  // block codecs only; else to nearest even
  RandomKeys keys;  // by the position in arrays of values
};

// What encodes and decodes shares. Every form has
//   Encoded<kRun>                 a share on the wire, in registers
//   encode(values, place, rounding, residual, encoded)
//                                 by whole warps. residual: null, or an array of values that was added to these
//                                 already: gets what the encoding lost, as EncodeArgs says
//   store(encoded, wire, layout, place), load(wire, layout, place, values)
//                                 the encoded array at `wire`; where place.present only
template <typename Code>
struct CastShares {
  template <int kRun>
  struct Encoded {
    Code low[kRun];
    Code high[kRun];
  };

  template <int kRun>
  __device__ __forceinline__ static void encode(const Share<kRun>& values, const SharePlace& place, ShareRounding&,
                                                float* residual, Encoded<kRun>& encoded) {
    encode_run(values.low, place, place.begin, residual, encoded.low);
    encode_run(values.high, place, place.begin + kHalfBlock, residual, encoded.high);
  }

  template <int kRun>
  __device__ __forceinline__ static void store(const Encoded<kRun>& encoded, uint8_t* wire, const CodecLayout&,
                                               const SharePlace& place) {
    Code* const codes = reinterpret_cast<Code*>(wire) + place.block * kBlockElems + place.offset;
    store_vector(codes, encoded.low);
    store_vector(codes + kHalfBlock, encoded.high);
  }

  template <int kRun>
  __device__ __forceinline__ static void load(const uint8_t* wire, const CodecLayout&, const SharePlace& place,
                                              Share<kRun>& values) {
    const Code* const codes = reinterpret_cast<const Code*>(wire) + place.block * kBlockElems + place.offset;
    Encoded<kRun> encoded;
    load_vector(codes, encoded.low);
    load_vector(codes + kHalfBlock, encoded.high);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      values.low[i] = to_float(encoded.low[i]);
      values.high[i] = to_float(encoded.high[i]);
    }
  }

 private:
  template <int kRun>
  __device__ __forceinline__ static void encode_run(const float (&values)[kRun], const SharePlace& place, int64_t begin,
                                                    float* residual, Code (&codes)[kRun]) {
    const bool has_residual = residual != nullptr;
    float kept[kRun];
    if (has_residual) load_run(residual, begin, place.end, place.vector, kept);
    cast_run(values, has_residual, codes, kept);
    if (has_residual) store_run(residual, begin, place.end, place.vector, kept);
  }
};

template <int kBits>
struct QuantizedShares {
  template <int kRun>
  struct Encoded {
    uint8_t low[kRun];
    uint8_t high[kRun];  // of int8
    uint16_t scale;
  };

  template <int kRun>
  __device__ __forceinline__ static void encode(const Share<kRun>& values, const SharePlace& place,
                                                ShareRounding& rounding, float* residual, Encoded<kRun>& encoded) {
    const BlockScale scale = block_scale<kBits>(block_absmax(values.low, values.high));
    Share<kRun> codes;
    if (rounding.stochastic) {
      const uint64_t index = static_cast<uint64_t>(place.begin);
      const RandomKey key = rounding.keys.at(index);
      quantize_stochastic<kBits>(values.low, scale.inverse, key, static_cast<uint32_t>(index), codes.low);
      quantize_stochastic<kBits>(values.high, scale.inverse, key, static_cast<uint32_t>(index) + kHalfBlock,
                                 codes.high);
    } else {
      quantize_nearest(values.low, scale.inverse, codes.low);
      quantize_nearest(values.high, scale.inverse, codes.high);
    }
    pack_codes<kBits>(codes.low, codes.high, scale.finite, encoded.low, encoded.high);
    encoded.scale = scale.wire;
    if (residual == nullptr || !scale.finite) return;
    Share<kRun> lost;
    residual_run(values.low, codes.low, scale.value, lost.low);
    residual_run(values.high, codes.high, scale.value, lost.high);
    store_share(residual, place, lost);
  }

  template <int kRun>
  __device__ __forceinline__ static void store(const Encoded<kRun>& encoded, uint8_t* wire, const CodecLayout& layout,
                                               const SharePlace& place) {
    uint8_t* const codes = wire + place.block * layout.block_bytes + place.offset;
    store_vector(codes, encoded.low);
    if (kBits == 8) store_vector(codes + kHalfBlock, encoded.high);
    if (place.offset == 0) reinterpret_cast<uint16_t*>(wire + layout.scales_offset)[place.block] = encoded.scale;
  }

  template <int kRun>
  __device__ __forceinline__ static void load(const uint8_t* wire, const CodecLayout& layout, const SharePlace& place,
                                              Share<kRun>& values) {
    const uint8_t* const codes = wire + place.block * layout.block_bytes + place.offset;
    Encoded<kRun> encoded;
    load_vector(codes, encoded.low);
    if (kBits == 8) load_vector(codes + kHalfBlock, encoded.high);
    const float scale = bfloat16_to_float(reinterpret_cast<const uint16_t*>(wire + layout.scales_offset)[place.block]);
    unpack_codes<kBits>(encoded.low, encoded.high, scale, values.low, values.high);
  }
};

template <CodecId kCodec>
struct ShareCodecOf;
template <>
struct ShareCodecOf<CodecId::bf16> : CastShares<Bfloat16Element> {};
template <>
struct ShareCodecOf<CodecId::fp16> : CastShares<Float16Element> {};
template <>
struct ShareCodecOf<CodecId::int8> : QuantizedShares<8> {};
template <>
struct ShareCodecOf<CodecId::int4> : QuantizedShares<4> {};

}  // namespace ringcomm
