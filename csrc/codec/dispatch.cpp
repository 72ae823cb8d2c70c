// The public functions on the CPU: checks, then the kernels of the SIMD level in use.
#include "base/simd.h"
#include "codec/codec.h"
#include "codec/kernels.h"

namespace ringcomm::cpu {
namespace {

const CodecKernels& kernels(CodecId codec) {
  switch (codec) {
    case CodecId::none:
      break;
    case CodecId::bf16:
      return RC_SIMD_DISPATCH(bf16_kernels);
    case CodecId::fp16:
      return RC_SIMD_DISPATCH(fp16_kernels);
    case CodecId::int8:
      return RC_SIMD_DISPATCH(int8_kernels);
    case CodecId::int4:
      break;
  }
  return RC_SIMD_DISPATCH(int4_kernels);  // the checks let nothing else through
}

}  // namespace

void encode(CodecId codec, const EncodeArgs& args) {
  check_encode(codec, args);
  kernels(codec).encode(args);
}

void decode(CodecId codec, const uint8_t* wire, int64_t num_elems, void* output, DType output_dtype) {
  check_decode(codec, num_elems, output_dtype);
  kernels(codec).decode(wire, num_elems, output, output_dtype);
}

void decode_add(CodecId codec, const uint8_t* wire, int64_t num_elems, float* accumulator, bool first) {
  check_decode(codec, num_elems, DType::float32);
  kernels(codec).decode_add(wire, num_elems, accumulator, first);
}

void divide(float* values, int64_t num_elems, float divisor) {
  RC_SIMD_DISPATCH(divide_kernel)(values, num_elems, divisor);
}

}  // namespace ringcomm::cpu
