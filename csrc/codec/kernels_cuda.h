// What a codec's CUDA file exports. Arguments are valid and num_elems is not 0. The public functions are in
// codec/codec.h.
#pragma once

#include "base/stream.h"
#include "codec/codec.h"

namespace ringcomm::cuda {

struct CodecLaunchers {
  void (*encode)(const EncodeArgs& args, Stream stream);
  void (*decode)(const uint8_t* wire, int64_t num_elems, void* output, DType output_dtype, Stream stream);
  void (*decode_add)(const uint8_t* wire, int64_t num_elems, float* accumulator, bool first, Stream stream);
};

const CodecLaunchers& bf16_launchers();
const CodecLaunchers& fp16_launchers();
const CodecLaunchers& int8_launchers();
const CodecLaunchers& int4_launchers();
void launch_divide(float* values, int64_t num_elems, float divisor, Stream stream);

}  // namespace ringcomm::cuda
