// The public functions on CUDA: checks, then the launchers of the codec.
#include "base/error.h"
#include "base/vector_access.h"
#include "codec/codec.h"
#include "codec/kernels_cuda.h"

namespace ringcomm::cuda {
namespace {

const CodecLaunchers& launchers(CodecId codec) {
  switch (codec) {
    case CodecId::none:
      break;
    case CodecId::bf16:
      return bf16_launchers();
    case CodecId::fp16:
      return fp16_launchers();
    case CodecId::int8:
      return int8_launchers();
    case CodecId::int4:
      break;
  }
  return int4_launchers();  // the checks let nothing else through
}

void check_alignment(const char* what, const void* array, DType dtype) {
  RC_CHECK(is_aligned(array, dtype_size(dtype)), what, " of ", dtype_name(dtype), " must lie at a multiple of ",
           dtype_size(dtype), " bytes on a GPU, got address ", array, ": copy it to an array of its own");
}

}  // namespace

void encode(CodecId codec, const EncodeArgs& args, Stream stream) {
  check_encode(codec, args);
  check_alignment("an input", args.input, args.input_dtype);
  check_alignment("a residual", args.residual, DType::float32);
  if (args.num_elems > 0) launchers(codec).encode(args, stream);
}

void decode(CodecId codec, const uint8_t* wire, int64_t num_elems, void* output, DType output_dtype, Stream stream) {
  check_decode(codec, num_elems, output_dtype);
  check_alignment("an output", output, output_dtype);
  if (num_elems > 0) launchers(codec).decode(wire, num_elems, output, output_dtype, stream);
}

void decode_add(CodecId codec, const uint8_t* wire, int64_t num_elems, float* accumulator, bool first, Stream stream) {
  check_decode(codec, num_elems, DType::float32);
  check_alignment("an accumulator", accumulator, DType::float32);
  if (num_elems > 0) launchers(codec).decode_add(wire, num_elems, accumulator, first, stream);
}

void divide(float* values, int64_t num_elems, float divisor, Stream stream) {
  RC_CHECK(num_elems >= 0, "num_elems must not be negative, got ", num_elems);
  check_alignment("an array", values, DType::float32);
  if (num_elems > 0) launch_divide(values, num_elems, divisor, stream);
}

}  // namespace ringcomm::cuda
