// Codecs int8 and int4 (wire/codec_format.h) on CUDA. A run is 16 bytes of the array (block_quantize_device.h): memory
// is passed over once.
#include "base/element.h"
#include "codec/block_quantize_device.h"
#include "codec/kernels_cuda.h"

namespace ringcomm::cuda {
namespace {

constexpr int kThreads = 256;

template <int kBits>
constexpr CodecId kCodec = kBits == 8 ? CodecId::int8 : CodecId::int4;

// Blocks that may be accessed by whole vectors: those that no array cuts short, or none.
template <typename... Pointers>
int64_t vector_blocks(int64_t num_elems, Pointers... pointers) {
  return (is_aligned(pointers, kVectorBytes) && ...) ? num_elems / kBlockElems : 0;
}

template <int kRun>
__device__ __forceinline__ void load_bytes(const uint8_t* wire, bool vector, uint8_t (&bytes)[kRun]) {
  if (vector) return load_vector(wire, bytes);
#pragma unroll
  for (int i = 0; i < kRun; ++i) bytes[i] = wire[i];
}

template <int kRun>
__device__ __forceinline__ void store_bytes(uint8_t* wire, bool vector, const uint8_t (&bytes)[kRun]) {
  if (vector) return store_vector(wire, bytes);
#pragma unroll
  for (int i = 0; i < kRun; ++i) wire[i] = bytes[i];
}

// The input in float32, residual added.
template <typename T, int kRun>
__device__ __forceinline__ void load_values(const EncodeArgs& args, int64_t begin, bool vector, float (&values)[kRun]) {
  T run[kRun];
  load_run(static_cast<const T*>(args.input), begin, args.num_elems, vector, run);
#pragma unroll
  for (int i = 0; i < kRun; ++i) values[i] = to_float(run[i]);
  if (args.residual == nullptr) return;
  float residual[kRun];
  load_run<float>(args.residual, begin, args.num_elems, vector, residual);
#pragma unroll
  for (int i = 0; i < kRun; ++i) values[i] += residual[i];
}

template <int kRun>
__device__ __forceinline__ void store_residual(const EncodeArgs& args, int64_t begin, bool vector,
                                               const float (&values)[kRun], const float (&codes)[kRun], float scale) {
  float residual[kRun];
  residual_run(values, codes, scale, residual);
  store_run(args.residual, begin, args.num_elems, vector, residual);
}

template <int kBits, bool kStochastic, typename T>
__global__ void __launch_bounds__(kThreads) encode_kernel(const EncodeArgs args, int64_t num_vector_blocks) {
  constexpr int kRun = Shares<T>::kRun;
  constexpr int kLanes = Shares<T>::kLanes;
  constexpr int kBlocksPerWarp = kWarpLanes / kLanes;
  const CodecLayout layout = codec_layout(kCodec<kBits>, args.num_elems);
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int offset = lane % kLanes * kRun;  // of the low run in its block
  const int64_t warp = first_item() / kWarpLanes;
  const int64_t step = item_step() / kWarpLanes * kBlocksPerWarp;
  RandomKeys keys(args.seed, args.step, args.rank);

  // Whole warps go round together, because their lanes exchange values: those past the end hold zeros.
  for (int64_t first = warp * kBlocksPerWarp; first < layout.num_blocks; first += step) {
    const int64_t block = first + lane / kLanes;
    const int64_t begin = block * kBlockElems + offset;
    const bool vector = block < num_vector_blocks;
    float low[kRun], high[kRun];
    load_values<T>(args, begin, vector, low);
    load_values<T>(args, begin + kHalfBlock, vector, high);

    const uint32_t absmax_bits = block_absmax(low, high);
    if (block >= layout.num_blocks) continue;

    const BlockScale scale = block_scale<kBits>(absmax_bits);
    float low_codes[kRun], high_codes[kRun];
    if (kStochastic) {
      const uint64_t index = static_cast<uint64_t>(args.first_elem + begin);
      const RandomKey key = keys.at(index);
      quantize_stochastic<kBits>(low, scale.inverse, key, static_cast<uint32_t>(index), low_codes);
      quantize_stochastic<kBits>(high, scale.inverse, key, static_cast<uint32_t>(index) + kHalfBlock, high_codes);
    } else {
      quantize_nearest(low, scale.inverse, low_codes);
      quantize_nearest(high, scale.inverse, high_codes);
    }
    uint8_t low_bytes[kRun], high_bytes[kRun];
    pack_codes<kBits>(low_codes, high_codes, scale.finite, low_bytes, high_bytes);
    uint8_t* const codes = args.wire + block * layout.block_bytes + offset;
    store_bytes(codes, vector, low_bytes);
    if (kBits == 8) store_bytes(codes + kHalfBlock, vector, high_bytes);
    if (offset == 0) {
      uint8_t* const place = args.wire + layout.scales_offset + block * kScaleBytes;
      if (vector) {
        *reinterpret_cast<uint16_t*>(place) = scale.wire;
      } else {
        store_two_bytes(place, scale.wire);
      }
    }
    if (args.residual != nullptr && scale.finite) {
      store_residual(args, begin, vector, low, low_codes, scale.value);
      store_residual(args, begin + kHalfBlock, vector, high, high_codes, scale.value);
    }
  }
}

template <typename T, bool kAdd, int kRun>
__device__ __forceinline__ void store_decoded(T* output, int64_t begin, int64_t num_elems, bool vector,
                                              const float (&values)[kRun]) {
  T run[kRun];
  if (kAdd) load_run<T>(output, begin, num_elems, vector, run);
#pragma unroll
  for (int i = 0; i < kRun; ++i) run[i] = from_float<T>(kAdd ? to_float(run[i]) + values[i] : values[i]);
  store_run(output, begin, num_elems, vector, run);
}

template <int kBits, typename T, bool kAdd>
__global__ void __launch_bounds__(kThreads)
    decode_kernel(const uint8_t* wire, int64_t num_elems, T* output, int64_t num_vector_blocks) {
  constexpr int kRun = Shares<T>::kRun;
  constexpr int kLanes = Shares<T>::kLanes;
  const CodecLayout layout = codec_layout(kCodec<kBits>, num_elems);
  for (int64_t item = first_item(); item < layout.num_blocks * kLanes; item += item_step()) {
    const int64_t block = item / kLanes;
    const int offset = static_cast<int>(item % kLanes) * kRun;
    const int64_t begin = block * kBlockElems + offset;
    const bool vector = block < num_vector_blocks;
    const uint8_t* const codes = wire + block * layout.block_bytes + offset;
    const uint8_t* const place = wire + layout.scales_offset + block * kScaleBytes;
    const float scale = bfloat16_to_float(vector ? *reinterpret_cast<const uint16_t*>(place) : load_two_bytes(place));
    uint8_t low_bytes[kRun], high_bytes[kRun];
    load_bytes(codes, vector, low_bytes);
    if (kBits == 8) load_bytes(codes + kHalfBlock, vector, high_bytes);
    float low[kRun], high[kRun];
    unpack_codes<kBits>(low_bytes, high_bytes, scale, low, high);
    store_decoded<T, kAdd>(output, begin, num_elems, vector, low);
    store_decoded<T, kAdd>(output, begin + kHalfBlock, num_elems, vector, high);
  }
}

template <int kBits, bool kStochastic, typename T>
void launch_encode_from(const EncodeArgs& args, Stream stream) {
  const int64_t num_vector_blocks = vector_blocks(args.num_elems, args.input, args.wire, args.residual);
  const int64_t num_blocks = codec_layout(kCodec<kBits>, args.num_elems).num_blocks;
  launch(kBits == 8 ? "encode int8" : "encode int4", spread(num_blocks * Shares<T>::kLanes, kThreads), stream,
         encode_kernel<kBits, kStochastic, T>, args, num_vector_blocks);
}

template <int kBits, bool kStochastic>
void launch_encode_rounded(const EncodeArgs& args, Stream stream) {
  if (args.input_dtype == DType::float32) return launch_encode_from<kBits, kStochastic, float>(args, stream);
  if (args.input_dtype == DType::bfloat16) {
    return launch_encode_from<kBits, kStochastic, Bfloat16Element>(args, stream);
  }
  launch_encode_from<kBits, kStochastic, Float16Element>(args, stream);
}

template <int kBits>
void launch_encode(const EncodeArgs& args, Stream stream) {
  if (args.rounding == Rounding::stochastic) return launch_encode_rounded<kBits, true>(args, stream);
  launch_encode_rounded<kBits, false>(args, stream);
}

template <int kBits, bool kAdd, typename T>
void launch_decode_to(const uint8_t* wire, int64_t num_elems, T* output, Stream stream) {
  const int64_t num_blocks = codec_layout(kCodec<kBits>, num_elems).num_blocks;
  const char* const name = kBits == 8 ? kAdd ? "decode_add int8" : "decode int8"
                           : kAdd     ? "decode_add int4"
                                      : "decode int4";
  launch(name, spread(num_blocks * Shares<T>::kLanes, kThreads), stream, decode_kernel<kBits, T, kAdd>, wire, num_elems,
         output, vector_blocks(num_elems, wire, output));
}

template <int kBits>
void launch_decode(const uint8_t* wire, int64_t num_elems, void* output, DType output_dtype, Stream stream) {
  if (output_dtype == DType::float32) {
    return launch_decode_to<kBits, false>(wire, num_elems, static_cast<float*>(output), stream);
  }
  if (output_dtype == DType::bfloat16) {
    return launch_decode_to<kBits, false>(wire, num_elems, static_cast<Bfloat16Element*>(output), stream);
  }
  launch_decode_to<kBits, false>(wire, num_elems, static_cast<Float16Element*>(output), stream);
}

template <int kBits>
void launch_decode_add(const uint8_t* wire, int64_t num_elems, float* accumulator, bool first, Stream stream) {
  if (first) return launch_decode_to<kBits, false>(wire, num_elems, accumulator, stream);
  launch_decode_to<kBits, true>(wire, num_elems, accumulator, stream);
}

}  // namespace

const CodecLaunchers& int8_launchers() {
  static constexpr CodecLaunchers kLaunchers{launch_encode<8>, launch_decode<8>, launch_decode_add<8>};
  return kLaunchers;
}

const CodecLaunchers& int4_launchers() {
  static constexpr CodecLaunchers kLaunchers{launch_encode<4>, launch_decode<4>, launch_decode_add<4>};
  return kLaunchers;
}

}  // namespace ringcomm::cuda
