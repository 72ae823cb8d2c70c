// Codecs int8 and int4 (wire/codec_format.h). Compiled once per SIMD level.
//
// Encoding works on groups of 16 blocks, 2 KiB of float32 that stay in the first-level cache, in
// three passes: largest magnitude of each block, the 16 scales at once, codes.
#include <string.h>

#include "base/convert.h"
#include "codec/block_quantize_math.h"
#include "codec/kernels.h"
#include "codec/lanes.h"
#include "codec/load_values.h"

namespace ringcomm::RC_SIMD_LEVEL {
namespace {

constexpr int kGroupBlocks = 16;
constexpr int64_t kGroupElems = kGroupBlocks * kBlockElems;

struct Scales {
  alignas(64) uint32_t absmax_bits[kGroupBlocks];
  alignas(64) uint16_t wire[kGroupBlocks];
  alignas(64) float scale[kGroupBlocks];
  alignas(64) float inverse[kGroupBlocks];
  bool all_finite;
};

template <int kBits>
void find_scales(const float* group, Scales& scales) {
  largest_magnitudes(group, scales.absmax_bits);
  uint32_t largest = 0;
  for (int block = 0; block < kGroupBlocks; ++block) {
    const uint32_t absmax_bits = scales.absmax_bits[block];
    scales.wire[block] = scale_of<kBits>(absmax_bits);
    scales.scale[block] = bfloat16_to_float(scales.wire[block]);
    scales.inverse[block] = inverse_scale(scales.scale[block]);
    largest = absmax_bits > largest ? absmax_bits : largest;
  }
  scales.all_finite = is_finite_block(largest);
}

template <int kBits>
void pack_codes(const float* codes, uint8_t* wire) {
  constexpr int kBytes = kBits == 8 ? kBlockElems : kBlockElems / 2;
  alignas(64) uint32_t words[kBytes];
  for (int i = 0; i < kBytes; ++i) {
    words[i] = kBits == 8 ? int8_byte(codes[i]) : int4_byte(codes[i], codes[i + kBlockElems - kBytes]);
  }
  narrow_to_bytes<kBytes>(words, wire);
}

template <int kBits>
void unpack_values(const uint8_t* wire, float scale, float* values) {
  constexpr int kBytes = kBits == 8 ? kBlockElems : kBlockElems / 2;
  alignas(64) uint32_t words[kBytes];
  widen_bytes<kBytes>(wire, words);
  if (kBits == 8) {
    for (int i = 0; i < kBytes; ++i) values[i] = int8_value(words[i], scale);
  } else {
    for (int i = 0; i < kBytes; ++i) values[i] = int4_low_value(words[i], scale);
    for (int i = 0; i < kBytes; ++i) values[i + kBytes] = int4_high_value(words[i], scale);
  }
}

// The values of a group, filled up with zeros if it is the short last one.
const float* load_group(const EncodeArgs& args, int64_t begin, int64_t count, float* buffer) {
  const float* const values = load_values(args, begin, count, buffer);
  if (count == kGroupElems) return values;
  memmove(buffer, values, static_cast<size_t>(count) * sizeof(float));
  memset(buffer + count, 0, static_cast<size_t>(kGroupElems - count) * sizeof(float));
  return buffer;
}

// One block: 32 values to codes on the wire, and what they lose to `residual`, unless it is null.
template <int kBits, bool kStochastic>
void encode_block(const float* values, float scale, float inverse, RandomKey key, uint32_t index, uint8_t* wire,
                  float* __restrict residual) {
  alignas(64) float codes[kBlockElems];
  for (int i = 0; i < kBlockElems; ++i) {
    codes[i] = kStochastic
                   ? stochastic_code<kBits>(values[i], inverse, uniform_of(key, index + static_cast<uint32_t>(i)))
                   : nearest_code(values[i], inverse);
  }
  pack_codes<kBits>(codes, wire);
  if (residual != nullptr) {
    for (int i = 0; i < kBlockElems; ++i) residual[i] = residual_of(values[i], codes[i], scale);
  }
}

template <int kBits, bool kStochastic>
void encode_rounded(const EncodeArgs& args) {
  const CodecLayout layout = codec_layout(kBits == 8 ? CodecId::int8 : CodecId::int4, args.num_elems);
  alignas(64) float buffer[kGroupElems];
  alignas(64) float last_residual[kGroupElems];
  Scales scales;
  RandomKey key{};
  for (int64_t begin = 0; begin < args.num_elems; begin += kGroupElems) {
    const int64_t count = args.num_elems - begin < kGroupElems ? args.num_elems - begin : kGroupElems;
    const int64_t num_blocks = (count + kBlockElems - 1) / kBlockElems;
    const int64_t first_block = begin / kBlockElems;
    const float* const group = load_group(args, begin, count, buffer);
    find_scales<kBits>(group, scales);
    memcpy(args.wire + layout.scales_offset + first_block * kScaleBytes, scales.wire,
           static_cast<size_t>(num_blocks * kScaleBytes));

    // Blocks are whole; those of a short last group get a residual of whole blocks on the stack.
    float* residual = args.residual == nullptr ? nullptr : args.residual + begin;
    const bool borrow_residual = residual != nullptr && count < kGroupElems;
    if (borrow_residual) {
      memcpy(last_residual, residual, static_cast<size_t>(count) * sizeof(float));
      residual = last_residual;
    }

    const uint64_t index = static_cast<uint64_t>(args.first_elem + begin);
    for (int64_t block = 0; block < num_blocks; ++block) {
      uint8_t* const wire = args.wire + layout.codes_offset + (first_block + block) * layout.block_bytes;
      const uint64_t block_index = index + static_cast<uint64_t>(block * kBlockElems);
      // A key lasts until the upper half of the index changes, which happens between blocks.
      if (kStochastic && (begin + block == 0 || static_cast<uint32_t>(block_index) == 0)) {
        key = random_key(args.seed, args.step, args.rank, static_cast<uint32_t>(block_index >> 32));
      }
      if (!scales.all_finite && !is_finite_block(scales.absmax_bits[block])) {
        memset(wire, 0, static_cast<size_t>(layout.block_bytes));
        continue;
      }
      encode_block<kBits, kStochastic>(group + block * kBlockElems, scales.scale[block], scales.inverse[block], key,
                                       static_cast<uint32_t>(block_index), wire,
                                       residual == nullptr ? nullptr : residual + block * kBlockElems);
    }
    if (borrow_residual) memcpy(args.residual + begin, last_residual, static_cast<size_t>(count) * sizeof(float));
  }
}

template <int kBits>
void encode(const EncodeArgs& args) {
  if (args.rounding == Rounding::stochastic) return encode_rounded<kBits, true>(args);
  encode_rounded<kBits, false>(args);
}

template <int kBits, typename Store>
void for_each_block(const uint8_t* wire, int64_t num_elems, Store store) {
  const CodecLayout layout = codec_layout(kBits == 8 ? CodecId::int8 : CodecId::int4, num_elems);
  const Bfloat16* const scales = reinterpret_cast<const Bfloat16*>(wire + layout.scales_offset);
  alignas(64) float values[kBlockElems];
  for (int64_t block = 0; block < layout.num_blocks; ++block) {
    unpack_values<kBits>(wire + block * layout.block_bytes, bfloat16_to_float(scales[block].bits), values);
    const int64_t begin = block * kBlockElems;
    const int64_t count = num_elems - begin;
    if (count >= kBlockElems) {
      store(values, begin, kBlockElems);
    } else {
      store(values, begin, count);
    }
  }
}

template <int kBits, typename T>
void decode_to(const uint8_t* wire, int64_t num_elems, T* output) {
  for_each_block<kBits>(wire, num_elems, [=](const float* values, int64_t begin, int64_t count) {
    narrow(values, count, output + begin);
  });
}

template <int kBits>
void decode(const uint8_t* wire, int64_t num_elems, void* output, DType output_dtype) {
  if (output_dtype == DType::float32) return decode_to<kBits>(wire, num_elems, static_cast<float*>(output));
  if (output_dtype == DType::bfloat16) return decode_to<kBits>(wire, num_elems, static_cast<Bfloat16*>(output));
  decode_to<kBits>(wire, num_elems, static_cast<Float16*>(output));
}

template <int kBits>
void decode_add(const uint8_t* wire, int64_t num_elems, float* accumulator, bool first) {
  if (first) return decode_to<kBits>(wire, num_elems, accumulator);
  for_each_block<kBits>(wire, num_elems, [=](const float* values, int64_t begin, int64_t count) {
    for (int64_t i = 0; i < count; ++i) accumulator[begin + i] += values[i];
  });
}

}  // namespace

const CodecKernels& int8_kernels() {
  static constexpr CodecKernels kKernels{encode<8>, decode<8>, decode_add<8>};
  return kKernels;
}

const CodecKernels& int4_kernels() {
  static constexpr CodecKernels kKernels{encode<4>, decode<4>, decode_add<4>};
  return kKernels;
}

}  // namespace ringcomm::RC_SIMD_LEVEL
