// Reductions on the CPU. Compiled once per SIMD level.
//
// Arrays are walked in tiles that stay in the first-level cache: every input is read once and every
// output written once, whatever the number of inputs.
#include <string.h>

#include "base/convert.h"
#include "reduce/kernels.h"
#include "reduce/reduce_math.h"

namespace ringcomm::RC_SIMD_LEVEL {
namespace {

constexpr int64_t kTileElems = 1024;

// An element at any alignment, and the type it accumulates in.
template <typename T>
struct __attribute__((packed, may_alias)) Element {
  using Accumulator = T;
  T value;
};
template <>
struct __attribute__((packed, may_alias)) Element<Float16> {
  using Accumulator = float;
  Float16 value;
};
template <>
struct __attribute__((packed, may_alias)) Element<Bfloat16> {
  using Accumulator = float;
  Bfloat16 value;
};

template <typename T>
using AccumulatorOf = typename Element<T>::Accumulator;

int64_t tile_count(int64_t num_elems, int64_t begin) {
  return num_elems - begin < kTileElems ? num_elems - begin : kTileElems;
}

// Wider types are read in place, 16-bit ones through `tile`.
template <typename T>
const Element<T>* read_tile(const void* array, int64_t begin, int64_t, T*) {
  return static_cast<const Element<T>*>(array) + begin;
}
template <typename T, typename = decltype(T::bits)>
const Element<float>* read_tile(const void* array, int64_t begin, int64_t count, float* tile) {
  widen(static_cast<const T*>(array) + begin, count, tile);
  return reinterpret_cast<const Element<float>*>(tile);
}

template <typename T>
void write_tile(const T* tile, int64_t count, Element<T>* output) {
  memcpy(output, tile, static_cast<size_t>(count) * sizeof(T));
}
void write_tile(const float* tile, int64_t count, Element<Float16>* output) { narrow(tile, count, &output->value); }
void write_tile(const float* tile, int64_t count, Element<Bfloat16>* output) { narrow(tile, count, &output->value); }

// output = finish(a op b ...), at the same index; output may be one of the inputs.
template <typename Op, typename T, typename Out>
void combine(const Element<T>* a, const Element<T>* b, Out* output, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) output[i].value = Op().combine(a[i].value, b[i].value);
}

template <typename T, typename Op>
void reduce(const ReduceArgs& args) {
  using Acc = AccumulatorOf<T>;
  alignas(64) Acc scratch[kTileElems];
  alignas(64) Acc total_tile[kTileElems];
  Element<Acc>* const total = reinterpret_cast<Element<Acc>*>(total_tile);
  for (int64_t begin = 0; begin < args.num_elems; begin += kTileElems) {
    const int64_t count = tile_count(args.num_elems, begin);
    const Element<Acc>* sum = read_tile<T>(args.inputs[0], begin, count, total_tile);
    for (int k = 1; k < args.num_inputs; ++k) {
      combine<Op>(sum, read_tile<T>(args.inputs[k], begin, count, scratch), total, count);
      sum = total;
    }
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) total[i].value = Op().finish(sum[i].value, args.num_inputs);
    write_tile(total_tile, count, static_cast<Element<T>*>(args.output) + begin);
    if (args.second_output != nullptr) {
      write_tile(total_tile, count, static_cast<Element<T>*>(args.second_output) + begin);
    }
  }
}

template <typename T, typename Op>
void reduce_hop(const void* accumulator_in, const void* input, void* accumulator, int64_t num_elems) {
  using Acc = AccumulatorOf<T>;
  alignas(64) Acc scratch[kTileElems];
  const Element<Acc>* const before = static_cast<const Element<Acc>*>(accumulator_in);
  Element<Acc>* const after = static_cast<Element<Acc>*>(accumulator);
  for (int64_t begin = 0; begin < num_elems; begin += kTileElems) {
    const int64_t count = tile_count(num_elems, begin);
    const Element<Acc>* const values = read_tile<T>(input, begin, count, scratch);
    if (before == nullptr) {
      memmove(after + begin, values, static_cast<size_t>(count) * sizeof(Acc));
    } else {
      combine<Op>(before + begin, values, after + begin, count);
    }
  }
}

template <typename T, typename Op>
void finish_hops(const void* accumulator, int num_inputs, void* output, int64_t num_elems) {
  using Acc = AccumulatorOf<T>;
  alignas(64) Acc tile[kTileElems];
  const Element<Acc>* const total = static_cast<const Element<Acc>*>(accumulator);
  for (int64_t begin = 0; begin < num_elems; begin += kTileElems) {
    const int64_t count = tile_count(num_elems, begin);
    for (int64_t i = 0; i < count; ++i) tile[i] = Op().finish(total[begin + i].value, num_inputs);
    write_tile(tile, count, static_cast<Element<T>*>(output) + begin);
  }
}

template <typename T, typename Op>
constexpr ReduceKernels kKernels{reduce<T, Op>, reduce_hop<T, Op>, finish_hops<T, Op>};

// In the order of ReduceOp.
#define RC_ALL_OPS(T) \
  {kKernels<T, Sum>, kKernels<T, Average>, kKernels<T, Minimum>, kKernels<T, Maximum>, kKernels<T, Product>}

// In the order of DType.
constexpr ReduceTable kTable = {RC_ALL_OPS(float),   RC_ALL_OPS(double),  RC_ALL_OPS(Float16), RC_ALL_OPS(Bfloat16),
                                RC_ALL_OPS(int32_t), RC_ALL_OPS(int64_t), RC_ALL_OPS(uint8_t)};
#undef RC_ALL_OPS

}  // namespace

const ReduceTable& reduce_table() { return kTable; }

}  // namespace ringcomm::RC_SIMD_LEVEL
