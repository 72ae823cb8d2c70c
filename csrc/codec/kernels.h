// What a codec's CPU file exports, once per SIMD level (base/simd.h). C headers only.
#pragma once

#include <cstdint>

#include "codec/codec.h"

namespace ringcomm {

// Arguments are valid and num_elems may be 0. The public functions are in codec/codec.h.
struct CodecKernels {
  void (*encode)(const EncodeArgs& args);
  void (*decode)(const uint8_t* wire, int64_t num_elems, void* output, DType output_dtype);
  void (*decode_add)(const uint8_t* wire, int64_t num_elems, float* accumulator, bool first);
};

using DivideKernel = void(float* values, int64_t num_elems, float divisor);

#define RC_DECLARE_CODEC_KERNELS(level) \
  namespace level {                     \
  const CodecKernels& bf16_kernels();   \
  const CodecKernels& fp16_kernels();   \
  const CodecKernels& int8_kernels();   \
  const CodecKernels& int4_kernels();   \
  DivideKernel& divide_kernel();        \
  }
RC_DECLARE_CODEC_KERNELS(baseline)
RC_DECLARE_CODEC_KERNELS(avx2)
RC_DECLARE_CODEC_KERNELS(avx512)
#undef RC_DECLARE_CODEC_KERNELS

}  // namespace ringcomm
