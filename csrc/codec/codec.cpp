// The codec registry and the public functions: checks, then the kernels of the SIMD level in use.
#include "codec/codec.h"

#include "base/error.h"
#include "base/simd.h"
#include "codec/kernels.h"

namespace ringcomm {
namespace {

struct CodecEntry {
  const char* name;
  const CodecKernels* (*kernels)();
};

// Indexed by CodecId.
constexpr CodecEntry kCodecs[kNumCodecs] = {
    {"none", nullptr},
    {"bf16", [] { return &RC_SIMD_DISPATCH(bf16_kernels); }},
    {"fp16", [] { return &RC_SIMD_DISPATCH(fp16_kernels); }},
    {"int8", [] { return &RC_SIMD_DISPATCH(int8_kernels); }},
    {"int4", [] { return &RC_SIMD_DISPATCH(int4_kernels); }},
};

const CodecEntry& entry(CodecId codec) {
  RC_CHECK(static_cast<int>(codec) < kNumCodecs, "codec id must be below ", kNumCodecs, ", not ",
           static_cast<int>(codec));
  return kCodecs[static_cast<int>(codec)];
}

const CodecKernels& kernels(CodecId codec) {
  RC_CHECK(codec != CodecId::none, "codec 'none' encodes nothing: copy the values instead");
  return *entry(codec).kernels();
}

void check_dtype(CodecId codec, DType dtype) {
  RC_CHECK(codec_takes(dtype), "codec '", codec_name(codec), "' takes float32, bfloat16 or float16, not ",
           dtype_name(dtype), ": send other types without a codec");
}

}  // namespace

const char* codec_name(CodecId codec) { return entry(codec).name; }

double bits_per_value(CodecId codec) {
  entry(codec);
  return 8.0 * static_cast<double>(codec_layout(codec, kBlockElems).total_bytes) / kBlockElems;
}

size_t wire_bytes(CodecId codec, int64_t num_elems) {
  entry(codec);
  RC_CHECK(num_elems >= 0, "num_elems must not be negative, got ", num_elems);
  return codec_layout(codec, num_elems).total_bytes;
}

bool codec_takes(DType dtype) { return dtype == DType::float32 || dtype == DType::bfloat16 || dtype == DType::float16; }

namespace cpu {

void encode(CodecId codec, const EncodeArgs& args) {
  const CodecKernels& codec_kernels = kernels(codec);
  check_dtype(codec, args.input_dtype);
  RC_CHECK(args.num_elems >= 0, "num_elems must not be negative, got ", args.num_elems);
  RC_CHECK(args.num_elems == 0 || (args.first_elem >= 0 && args.first_elem % kBlockElems == 0),
           "first_elem must be a multiple of ", kBlockElems, ", got ", args.first_elem, ": cut arrays between blocks");
  RC_CHECK(args.rounding == Rounding::nearest_even || codec == CodecId::int8 || codec == CodecId::int4, "codec '",
           codec_name(codec), "' rounds to nearest even only; stochastic rounding needs int8 or int4");
  codec_kernels.encode(args);
}

void decode(CodecId codec, const uint8_t* wire, int64_t num_elems, void* output, DType output_dtype) {
  const CodecKernels& codec_kernels = kernels(codec);
  check_dtype(codec, output_dtype);
  RC_CHECK(num_elems >= 0, "num_elems must not be negative, got ", num_elems);
  codec_kernels.decode(wire, num_elems, output, output_dtype);
}

void decode_add(CodecId codec, const uint8_t* wire, int64_t num_elems, float* accumulator, bool first) {
  const CodecKernels& codec_kernels = kernels(codec);
  RC_CHECK(num_elems >= 0, "num_elems must not be negative, got ", num_elems);
  codec_kernels.decode_add(wire, num_elems, accumulator, first);
}

void divide(float* values, int64_t num_elems, float divisor) {
  RC_SIMD_DISPATCH(divide_kernel)(values, num_elems, divisor);
}

}  // namespace cpu
}  // namespace ringcomm
