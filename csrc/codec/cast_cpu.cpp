// Codecs bf16 and fp16, and division by a number. Compiled once per SIMD level.
#include <string.h>

#include "base/convert.h"
#include "codec/cast_math.h"
#include "codec/kernels.h"
#include "codec/load_values.h"

namespace ringcomm::RC_SIMD_LEVEL {
namespace {

constexpr int64_t kTileElems = 1024;  // two float tiles stay in the first-level cache

template <typename Code>
void encode(const EncodeArgs& args) {
  alignas(64) float tile[kTileElems];
  alignas(64) float decoded[kTileElems];
  Code* const wire = reinterpret_cast<Code*>(args.wire);
  for (int64_t begin = 0; begin < args.num_elems; begin += kTileElems) {
    const int64_t count = args.num_elems - begin < kTileElems ? args.num_elems - begin : kTileElems;
    const float* const values = load_values(args, begin, count, tile);
    narrow(values, count, wire + begin);
    if (args.residual == nullptr) continue;
    float* const residual = args.residual + begin;
    widen(wire + begin, count, decoded);
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) residual[i] = cast_residual(values[i], decoded[i], residual[i]);
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
