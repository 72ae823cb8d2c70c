// The codec registry: how values are written on the wire. A codec is stateless; error feedback is
// a float32 array that the caller keeps (see EncodeArgs::residual). Byte layouts: wire/codec_format.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "base/stream.h"
#include "wire/codec_format.h"

namespace ringcomm {

// Casts (bf16, fp16) round to nearest even only.
enum class Rounding : uint8_t { nearest_even = 0, stochastic = 1 };

struct EncodeArgs {
  const void* input = nullptr;  // num_elems values of input_dtype (float32, bfloat16 or float16)
  DType input_dtype = DType::float32;
  int64_t num_elems = 0;
  uint8_t* wire = nullptr;  // wire_bytes(codec, num_elems) bytes, any alignment
  // Error feedback, num_elems float32 or null: encodes input + residual, then stores what the
  // encoding lost. Blocks that hold NaN or Inf leave their residual as it was, and so do elements
  // of a cast that decode to NaN or Inf.
  float* residual = nullptr;
  Rounding rounding = Rounding::nearest_even;
  // Stochastic rounding draws from a counter: (seed, step, rank, first_elem + i).
  uint64_t seed = 0;
  uint64_t step = 0;
  uint32_t rank = 0;
  int64_t first_elem = 0;  // index of input[0] in the whole array, a multiple of kBlockElems
};

// Bits per value without the rounding-up to whole blocks: 32, 16, 16, 8.5, 4.5.
double bits_per_value(CodecId codec);
// Bytes that num_elems values take; exact for every count, including 0. none: 4 bytes a value.
size_t wire_bytes(CodecId codec, int64_t num_elems);
bool codec_takes(DType dtype);  // float32, bfloat16, float16

// What every device checks before it starts: throw UsageError.
void check_encode(CodecId codec, const EncodeArgs& args);
void check_decode(CodecId codec, int64_t num_elems, DType output_dtype);

namespace cpu {

// All run on the calling thread and do not block. codec is not `none`.
void encode(CodecId codec, const EncodeArgs& args);
// output = decoded values, rounded to output_dtype (float32, bfloat16 or float16).
void decode(CodecId codec, const uint8_t* wire, int64_t num_elems, void* output, DType output_dtype);
// accumulator[i] += decoded value i, in float32. `first` writes instead of adding.
void decode_add(CodecId codec, const uint8_t* wire, int64_t num_elems, float* accumulator, bool first = false);
// values[i] /= divisor.
void divide(float* values, int64_t num_elems, float divisor);

}  // namespace cpu

// The same bytes, in builds with CUDA (RC_CUDA) only. Pointers are to memory of the current device; arrays lie at a
// multiple of their element's size, wire bytes anywhere. Queued on the stream; none waits. Fastest where everything is
// 16-byte aligned.
//
// Not the same are payload and sign of a NaN that arithmetic produces (input + residual, code * scale,
// accumulator + value): they are the device's. They show in decoded values and accumulators, and on the wire in fp16
// with a residual.
namespace cuda {

void encode(CodecId codec, const EncodeArgs& args, Stream stream);
void decode(CodecId codec, const uint8_t* wire, int64_t num_elems, void* output, DType output_dtype, Stream stream);
void decode_add(CodecId codec, const uint8_t* wire, int64_t num_elems, float* accumulator, bool first, Stream stream);
void divide(float* values, int64_t num_elems, float divisor, Stream stream);

}  // namespace cuda
}  // namespace ringcomm
