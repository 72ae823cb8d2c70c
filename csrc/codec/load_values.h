// How encoders read their input, for kernel files that are compiled once per SIMD level.
#pragma once

#include "base/convert.h"
#include "codec/codec.h"

namespace ringcomm::RC_SIMD_LEVEL {
namespace {

// Elements [begin, begin + count) of the input in float32, residual added. They are in `buffer`, or where
// the input lies if nothing had to be done to it.
inline const float* load_values(const EncodeArgs& args, int64_t begin, int64_t count, float* buffer) {
  const float* values = buffer;
  if (args.input_dtype == DType::bfloat16) {
    widen(static_cast<const Bfloat16*>(args.input) + begin, count, buffer);
  } else if (args.input_dtype == DType::float16) {
    widen(static_cast<const Float16*>(args.input) + begin, count, buffer);
  } else {
    values = static_cast<const float*>(args.input) + begin;
  }
  if (args.residual == nullptr) return values;
  const float* const residual = args.residual + begin;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) buffer[i] = values[i] + residual[i];
  return buffer;
}

}  // namespace
}  // namespace ringcomm::RC_SIMD_LEVEL
