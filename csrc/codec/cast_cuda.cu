// Codecs bf16 and fp16 on CUDA, and division by a number. A thread takes 16 bytes of the array; what is left over, and
// all of an array that is not aligned, goes element by element.
#include "base/launch.h"
#include "base/vector_access.h"
#include "codec/cast_device.h"
#include "codec/kernels_cuda.h"

namespace ringcomm::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
constexpr int kRun = kVectorBytes / static_cast<int>(sizeof(T));

// Runs of kRun<T> elements that may be accessed by whole vectors, from the start of the arrays.
template <typename T, typename... Pointers>
int64_t vector_runs(int64_t num_elems, Pointers... pointers) {
  return (is_aligned(pointers, kVectorBytes) && ...) ? num_elems / kRun<T> : 0;
}

// What the grid is spread over. The few elements after the runs make no difference.
int64_t num_items(int64_t num_elems, int64_t num_runs) { return num_runs > 0 ? num_runs : num_elems; }

template <typename Code, typename T>
__global__ void __launch_bounds__(kThreads) encode_kernel(const EncodeArgs args, int64_t num_runs) {
  constexpr int kCount = kRun<T>;
  const bool has_residual = args.residual != nullptr;
  const T* const input = static_cast<const T*>(args.input);
  for (int64_t run = first_item(); run < num_runs; run += item_step()) {
    const int64_t begin = run * kCount;
    T elements[kCount];
    Code codes[kCount];
    float values[kCount], residual[kCount];
    load_vector(input + begin, elements);
    if (has_residual) load_vector(args.residual + begin, residual);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = to_float(elements[i]);
      if (has_residual) values[i] += residual[i];
    }
    cast_run(values, has_residual, codes, residual);
    store_vector(reinterpret_cast<Code*>(args.wire) + begin, codes);
    if (has_residual) store_vector(args.residual + begin, residual);
  }
  for (int64_t i = num_runs * kCount + first_item(); i < args.num_elems; i += item_step()) {
    float value[1] = {to_float(input[i])};
    float residual[1] = {has_residual ? args.residual[i] : 0.0f};
    if (has_residual) value[0] += residual[0];
    Code code[1];
    cast_run(value, has_residual, code, residual);
    store_two_bytes(args.wire + i * 2, code[0].bits);
    if (has_residual) args.residual[i] = residual[0];
  }
}

template <typename Code, typename T, bool kAdd>
__global__ void __launch_bounds__(kThreads)
    decode_kernel(const uint8_t* wire, int64_t num_elems, T* output, int64_t num_runs) {
  constexpr int kCount = kRun<T>;
  for (int64_t run = first_item(); run < num_runs; run += item_step()) {
    const int64_t begin = run * kCount;
    Code codes[kCount];
    T elements[kCount];
    load_vector(reinterpret_cast<const Code*>(wire) + begin, codes);
    if (kAdd) load_vector(output + begin, elements);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float value = to_float(codes[i]);
      elements[i] = from_float<T>(kAdd ? to_float(elements[i]) + value : value);
    }
    store_vector(output + begin, elements);
  }
  for (int64_t i = num_runs * kCount + first_item(); i < num_elems; i += item_step()) {
    const float value = to_float(Code{load_two_bytes(wire + i * 2)});
    output[i] = from_float<T>(kAdd ? to_float(output[i]) + value : value);
  }
}

// Element by element: IEEE division is a call, around which the registers of a whole vector would be spilled.
__global__ void __launch_bounds__(kThreads) divide_kernel(float* values, int64_t num_elems, float divisor) {
  for (int64_t i = first_item(); i < num_elems; i += item_step()) values[i] /= divisor;
}

template <typename Code>
constexpr bool kIsBfloat16 = std::is_same_v<Code, Bfloat16Element>;

template <typename Code, typename T>
void launch_encode_from(const EncodeArgs& args, Stream stream) {
  const int64_t num_runs = vector_runs<T>(args.num_elems, args.input, args.wire, args.residual);
  launch(kIsBfloat16<Code> ? "encode bf16" : "encode fp16", spread(num_items(args.num_elems, num_runs), kThreads),
         stream, encode_kernel<Code, T>, args, num_runs);
}

template <typename Code>
void launch_encode(const EncodeArgs& args, Stream stream) {
  if (args.input_dtype == DType::float32) return launch_encode_from<Code, float>(args, stream);
  if (args.input_dtype == DType::bfloat16) return launch_encode_from<Code, Bfloat16Element>(args, stream);
  launch_encode_from<Code, Float16Element>(args, stream);
}

template <typename Code, bool kAdd, typename T>
void launch_decode_to(const uint8_t* wire, int64_t num_elems, T* output, Stream stream) {
  const int64_t num_runs = vector_runs<T>(num_elems, wire, output);
  const char* const name = kIsBfloat16<Code> ? kAdd ? "decode_add bf16" : "decode bf16"
                           : kAdd            ? "decode_add fp16"
                                             : "decode fp16";
  launch(name, spread(num_items(num_elems, num_runs), kThreads), stream, decode_kernel<Code, T, kAdd>, wire, num_elems,
         output, num_runs);
}

template <typename Code>
void launch_decode(const uint8_t* wire, int64_t num_elems, void* output, DType output_dtype, Stream stream) {
  if (output_dtype == DType::float32) {
    return launch_decode_to<Code, false>(wire, num_elems, static_cast<float*>(output), stream);
  }
  if (output_dtype == DType::bfloat16) {
    return launch_decode_to<Code, false>(wire, num_elems, static_cast<Bfloat16Element*>(output), stream);
  }
  launch_decode_to<Code, false>(wire, num_elems, static_cast<Float16Element*>(output), stream);
}

template <typename Code>
void launch_decode_add(const uint8_t* wire, int64_t num_elems, float* accumulator, bool first, Stream stream) {
  if (first) return launch_decode_to<Code, false>(wire, num_elems, accumulator, stream);
  launch_decode_to<Code, true>(wire, num_elems, accumulator, stream);
}

}  // namespace

const CodecLaunchers& bf16_launchers() {
  static constexpr CodecLaunchers kLaunchers{launch_encode<Bfloat16Element>, launch_decode<Bfloat16Element>,
                                             launch_decode_add<Bfloat16Element>};
  return kLaunchers;
}

const CodecLaunchers& fp16_launchers() {
  static constexpr CodecLaunchers kLaunchers{launch_encode<Float16Element>, launch_decode<Float16Element>,
                                             launch_decode_add<Float16Element>};
  return kLaunchers;
}

void launch_divide(float* values, int64_t num_elems, float divisor, Stream stream) {
  launch("divide", spread(num_elems, kThreads), stream, divide_kernel, values, num_elems, divisor);
}

}  // namespace ringcomm::cuda
