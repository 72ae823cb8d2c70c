// The codec registry: sizes, and what codecs take.
#include "codec/codec.h"

#include "base/error.h"

namespace ringcomm {
namespace {

void check_id(CodecId codec) {
  RC_CHECK(static_cast<int>(codec) < kNumCodecs, "codec id must be below ", kNumCodecs, ", not ",
           static_cast<int>(codec));
}

void check_call(CodecId codec, int64_t num_elems, DType dtype) {
  check_id(codec);
  RC_CHECK(codec != CodecId::none, "codec 'none' encodes nothing: copy the values instead");
  RC_CHECK(codec_takes(dtype), "codec '", codec_name(codec), "' takes float32, bfloat16 or float16, not ",
           dtype_name(dtype), ": send other types without a codec");
  RC_CHECK(num_elems >= 0, "num_elems must not be negative, got ", num_elems);
}

}  // namespace

double bits_per_value(CodecId codec) {
  check_id(codec);
  return 8.0 * static_cast<double>(codec_layout(codec, kBlockElems).total_bytes) / kBlockElems;
}

size_t wire_bytes(CodecId codec, int64_t num_elems) {
  check_id(codec);
  RC_CHECK(num_elems >= 0, "num_elems must not be negative, got ", num_elems);
  return codec_layout(codec, num_elems).total_bytes;
}

bool codec_takes(DType dtype) { return dtype == DType::float32 || dtype == DType::bfloat16 || dtype == DType::float16; }

void check_encode(CodecId codec, const EncodeArgs& args) {
  check_call(codec, args.num_elems, args.input_dtype);
  RC_CHECK(args.num_elems == 0 || (args.first_elem >= 0 && args.first_elem % kBlockElems == 0),
           "first_elem must be a multiple of ", kBlockElems, ", got ", args.first_elem, ": cut arrays between blocks");
  RC_CHECK(args.rounding == Rounding::nearest_even || codec == CodecId::int8 || codec == CodecId::int4, "codec '",
           codec_name(codec), "' rounds to nearest even only; stochastic rounding needs int8 or int4");
}

void check_decode(CodecId codec, int64_t num_elems, DType output_dtype) { check_call(codec, num_elems, output_dtype); }

}  // namespace ringcomm
