// Codecs bf16 and fp16, and division by a number. Compiled once per SIMD level.
#include <string.h>

#include "base/convert.h"
#include "codec/cast_math.h"
#include "codec/kernels.h"

namespace ringcomm::RC_SIMD_LEVEL {
namespace {

constexpr int64_t kTileElems = 1024;  // two float tiles stay in the first-level cache

template <typename T>
float* widen_tile(const void* array, int64_t begin, int64_t count, float* tile) {
  widen(static_cast<const T*>(array) + begin, count, tile);
  return tile;
}

const float* load_tile(const EncodeArgs& args, int64_t begin, int64_t count, float* tile) {
  if (args.input_dtype == DType::bfloat16) return widen_tile<Bfloat16>(args.input, begin, count, tile);
  if (args.input_dtype == DType::float16) return widen_tile<Float16>(args.input, begin, count, tile);
  if (args.residual == nullptr) return static_cast<const float*>(args.input) + begin;
  return widen_tile<float>(args.input, begin, count, tile);
}

template <typename Code>
void encode(const EncodeArgs& args) {
  alignas(64) float tile[kTileElems];
  alignas(64) float decoded[kTileElems];
  Code* const wire = reinterpret_cast<Code*>(args.wire);
  for (int64_t begin = 0; begin < args.num_elems; begin += kTileElems) {
    const int64_t count = args.num_elems - begin < kTileElems ? args.num_elems - begin : kTileElems;
    const float* values = load_tile(args, begin, count, tile);
    if (args.residual == nullptr) {
      narrow(values, count, wire + begin);
      continue;
    }
    float* const residual = args.residual + begin;
    for (int64_t i = 0; i < count; ++i) tile[i] += residual[i];
    narrow(tile, count, wire + begin);
    widen(wire + begin, count, decoded);
    for (int64_t i = 0; i < count; ++i) residual[i] = cast_residual(tile[i], decoded[i], residual[i]);
  }
}

template <typename Code>
void decode(const uint8_t* wire, int64_t num_elems, void* output, DType output_dtype) {
  alignas(64) float tile[kTileElems];
  const Code* const codes = reinterpret_cast<const Code*>(wire);
  if (output_dtype == DType::float32) return widen(codes, num_elems, static_cast<float*>(output));
  for (int64_t begin = 0; begin < num_elems; begin += kTileElems) {
    const int64_t count = num_elems - begin < kTileElems ? num_elems - begin : kTileElems;
    widen(codes + begin, count, tile);
    if (output_dtype == DType::bfloat16) {
      narrow(tile, count, static_cast<Bfloat16*>(output) + begin);
    } else {
      narrow(tile, count, static_cast<Float16*>(output) + begin);
    }
  }
}

template <typename Code>
void decode_add(const uint8_t* wire, int64_t num_elems, float* accumulator, bool first) {
  alignas(64) float tile[kTileElems];
  const Code* const codes = reinterpret_cast<const Code*>(wire);
  if (first) return widen(codes, num_elems, accumulator);
  for (int64_t begin = 0; begin < num_elems; begin += kTileElems) {
    const int64_t count = num_elems - begin < kTileElems ? num_elems - begin : kTileElems;
    widen(codes + begin, count, tile);
    for (int64_t i = 0; i < count; ++i) accumulator[begin + i] += tile[i];
  }
}

void divide(float* values, int64_t num_elems, float divisor) {
  for (int64_t i = 0; i < num_elems; ++i) values[i] /= divisor;
}

}  // namespace

const CodecKernels& bf16_kernels() {
  static constexpr CodecKernels kKernels{encode<Bfloat16>, decode<Bfloat16>, decode_add<Bfloat16>};
  return kKernels;
}

const CodecKernels& fp16_kernels() {
  static constexpr CodecKernels kKernels{encode<Float16>, decode<Float16>, decode_add<Float16>};
  return kKernels;
}

DivideKernel& divide_kernel() { return divide; }

}  // namespace ringcomm::RC_SIMD_LEVEL
