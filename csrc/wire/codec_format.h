// Bytes of an encoded array. One table, codec_layout(), gives every offset and total; nothing else
// computes one. All numbers are little endian; the bytes do not depend on the device or on the SIMD
// level that wrote them. An encoded array starts at any address.
//
// none        n x float32
// bf16, fp16  n x 2 bytes: bfloat16 or float16, rounded to nearest even
// int8, int4  B = ceil(n / 32) blocks of 32 values. The codes of all blocks come first, then the
//             scales of all blocks. value = code * scale, exact in float32.
//
//   offset               bytes    what
//   int8  0              B * 32   block b, byte j: code of element 32 b + j, two's complement, -127..127
//         B * 32         B * 2    scale of block b, bfloat16
//   int4  0              B * 16   block b, byte j: low nibble = code of element 32 b + j,
//                                 high nibble = code of element 32 b + j + 16, two's complement, -7..7
//         B * 16         B * 2    scale of block b, bfloat16
//
//   Elements that the last block lacks have code 0.
//   scale = bfloat16(absmax * (1 / 127 or 1 / 7)), rounded to nearest even. Below 2^-126 it is 0, and so
//           are all codes.
//           absmax is the largest magnitude of the block by its bits, so NaN > infinity > finite.
//   A block with an infinity or NaN has scale 0x7FC0 (NaN) and codes 0: it decodes to NaN everywhere.
//   code  = value * (1 / scale), rounded to nearest even; or, with stochastic rounding,
//           floor(value * (1 / scale) + u), u in [0, 1) from block_quantize_math.h; then clamped.
//
// The scale is bfloat16, not float16: it has float32's range, so small gradients survive without loss
// scaling (a float16 scale is subnormal below 7.7e-3 in int8 and 0 below 3.8e-6), and its 8 significant
// bits make code * scale exact, so a fused multiply-add gives the same bits as two roundings.
//
// Encoding is local to blocks: cutting an array at multiples of 32 elements changes no code and no scale.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/host_device.h"

namespace ringcomm {

// Raised whenever the same values would give other bytes, or the same bytes other values.
constexpr int kCodecFormatVersion = 1;

// Wire ids: append, never renumber. `none` stands for "exact, no codec".
enum class CodecId : uint8_t { none = 0, bf16 = 1, fp16 = 2, int8 = 3, int4 = 4 };
constexpr int kNumCodecs = 5;

constexpr const char* codec_name(CodecId codec) {
  switch (codec) {
    case CodecId::none:
      return "none";
    case CodecId::bf16:
      return "bf16";
    case CodecId::fp16:
      return "fp16";
    case CodecId::int8:
      return "int8";
    case CodecId::int4:
      return "int4";
  }
  return "?";
}

// Values per block: one scale each. Chunk borders fall on multiples of this for every codec.
constexpr int64_t kBlockElems = 32;
constexpr int64_t kScaleBytes = 2;

struct CodecLayout {
  int64_t num_blocks;    // 0 for codecs without blocks
  int64_t block_bytes;   // codes of one block
  size_t codes_offset;   // codes, or the values of a codec without blocks
  size_t scales_offset;  // == total_bytes for codecs without blocks
  size_t total_bytes;
};

RC_HD constexpr CodecLayout codec_layout(CodecId codec, int64_t num_elems) {
  const bool has_blocks = codec == CodecId::int8 || codec == CodecId::int4;
  const int64_t num_blocks = has_blocks ? (num_elems + kBlockElems - 1) / kBlockElems : 0;
  const int64_t block_bytes = codec == CodecId::int8 ? kBlockElems : codec == CodecId::int4 ? kBlockElems / 2 : 0;
  const int64_t value_bytes = has_blocks ? 0 : codec == CodecId::none ? 4 : 2;
  const size_t scales_offset = static_cast<size_t>(num_blocks * block_bytes + num_elems * value_bytes);
  return CodecLayout{num_blocks, block_bytes, 0, scales_offset,
                     scales_offset + static_cast<size_t>(num_blocks * kScaleBytes)};
}

}  // namespace ringcomm
