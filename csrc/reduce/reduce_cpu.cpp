// Reductions on the CPU. Compiled once per SIMD level.
//
// Arrays are walked in tiles that stay in the first-level cache: every input is read once and every
// output written once, whatever the number of inputs.
#include <string.h>

#include "base/convert.h"
#include "reduce/kernels.h"
#include "reduce/reduce_math.h"
#include "reduce/table.h"

namespace ringcomm::RC_SIMD_LEVEL {
namespace {

constexpr int64_t kTileElems = 1024;
constexpr int kFused = 4;       // inputs that one loop reads at once
constexpr int kUnfinished = 0;  // instead of a number of ranks: more inputs follow

// An array element at any alignment. Loops read and write elements of type InLoops where they lie; only
// float16 goes through a tile of float, because the processor converts whole vectors of it.
struct Bool {};
template <typename T>
struct __attribute__((packed, may_alias)) Element {
  using Accumulator = T;
  using InLoops = Element;
  T value;
  T load() const { return value; }
  void store(T total) { value = total; }
};
template <>
struct __attribute__((packed, may_alias)) Element<Bfloat16> {
  using Accumulator = float;
  using InLoops = Element;
  Bfloat16 value;
  float load() const { return bfloat16_to_float(value.bits); }
  void store(float total) { value.bits = float_to_bfloat16(total); }
};
// Two neighbours in one word come apart and together again without moving values between lanes, which
// is what bounds a loop over single bfloat16 (measured: half the speed).
struct FloatPair {
  float low;
  float high;
};
template <>
struct __attribute__((packed, may_alias)) Element<FloatPair> {
  uint32_t word;  // of two bfloat16
  FloatPair load() const { return {bits_float(word << 16), bits_float(word & 0xFFFF0000u)}; }
  void store(FloatPair total) {
    word = (float_to_bfloat16_high(total.low) >> 16) | (float_to_bfloat16_high(total.high) & 0xFFFF0000u);
  }
};
template <>
struct __attribute__((packed, may_alias)) Element<Bool> {
  using Accumulator = uint8_t;  // 0 or 1, so that bitwise operators are logical ones
  using InLoops = Element;
  uint8_t value;
  uint8_t load() const { return value != 0; }
  void store(uint8_t total) { value = total; }
};
template <>
struct __attribute__((packed, may_alias)) Element<Float16> {
  using Accumulator = float;
  using InLoops = Element<float>;
  Float16 value;
};

template <typename T>
const Element<T>* input_in_loops(const Element<T>* input, int64_t, void*) {
  return input;
}
const Element<float>* input_in_loops(const Element<Float16>* input, int64_t count, float* tile) {
  widen(reinterpret_cast<const Float16*>(input), count, tile);
  return reinterpret_cast<const Element<float>*>(tile);
}

template <typename T>
Element<T>* output_in_loops(Element<T>* output, void*) {
  return output;
}
Element<float>* output_in_loops(Element<Float16>*, float* tile) { return reinterpret_cast<Element<float>*>(tile); }

// After a loop that wrote to output_in_loops.
template <typename T>
void finish_output(Element<T>*, int64_t, const void*) {}
void finish_output(Element<Float16>* output, int64_t count, const float* tile) {
  narrow(tile, count, reinterpret_cast<Float16*>(output));
}

int64_t tile_count(int64_t num_elems, int64_t begin) {
  return num_elems - begin < kTileElems ? num_elems - begin : kTileElems;
}

template <typename Op, typename T>
T combine_values(T a, T b) {
  return Op().combine(a, b);
}
template <typename Op>
FloatPair combine_values(FloatPair a, FloatPair b) {
  return {Op().combine(a.low, b.low), Op().combine(a.high, b.high)};
}

template <typename Op, typename T>
T finish_value(T total, int num_ranks) {
  return num_ranks == kUnfinished ? total : Op().finish(total, num_ranks);
}
template <typename Op>
FloatPair finish_value(FloatPair total, int num_ranks) {
  return {finish_value<Op>(total.low, num_ranks), finish_value<Op>(total.high, num_ranks)};
}

// output = finish(first op rest[0] op ... rest[kRest - 1]), index by index; output may be an input.
template <int kRest, typename Op, typename First, typename Rest, typename Output>
void combine(const First* first, const Rest* const* rest, int num_ranks, Output* output, int64_t count) {
  const Rest* const a = kRest > 0 ? rest[0] : nullptr;
  const Rest* const b = kRest > 1 ? rest[1] : nullptr;
  const Rest* const c = kRest > 2 ? rest[2] : nullptr;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    auto total = first[i].load();
    if (kRest > 0) total = combine_values<Op>(total, a[i].load());
    if (kRest > 1) total = combine_values<Op>(total, b[i].load());
    if (kRest > 2) total = combine_values<Op>(total, c[i].load());
    output[i].store(finish_value<Op>(total, num_ranks));
  }
}

// inputs[0] op ... op inputs[num_inputs - 1], for 1 to kFused of them.
template <typename Op, typename Input, typename Output>
void combine_fused(const Input* const* inputs, int num_inputs, int num_ranks, Output* output, int64_t count) {
  if (num_inputs == 1) combine<0, Op>(inputs[0], inputs + 1, num_ranks, output, count);
  if (num_inputs == 2) combine<1, Op>(inputs[0], inputs + 1, num_ranks, output, count);
  if (num_inputs == 3) combine<2, Op>(inputs[0], inputs + 1, num_ranks, output, count);
  if (num_inputs == 4) combine<3, Op>(inputs[0], inputs + 1, num_ranks, output, count);
}

template <typename Op>
void combine_fused(const Element<Bfloat16>* const* inputs, int num_inputs, int num_ranks, Element<Bfloat16>* output,
                   int64_t count) {
  const Element<FloatPair>* pairs[kFused] = {};
  const Element<Bfloat16>* last[kFused] = {};
  for (int k = 0; k < num_inputs; ++k) {
    pairs[k] = reinterpret_cast<const Element<FloatPair>*>(inputs[k]);
    last[k] = inputs[k] + count - 1;
  }
  // The odd one first: the output may be an input.
  combine_fused<Op, Element<Bfloat16>, Element<Bfloat16>>(last, num_inputs, num_ranks, output + count - 1, count % 2);
  combine_fused<Op>(pairs, num_inputs, num_ranks, reinterpret_cast<Element<FloatPair>*>(output), count / 2);
}

template <typename T, typename Op>
void reduce(const ReduceArgs& args) {
  using Acc = typename Element<T>::Accumulator;
  alignas(64) Acc scratch[kFused][kTileElems];
  alignas(64) Acc total_tile[kTileElems];
  Element<Acc>* const total = reinterpret_cast<Element<Acc>*>(total_tile);
  const int num_ranks = args.num_inputs;
  for (int64_t begin = 0; begin < args.num_elems; begin += kTileElems) {
    const int64_t count = tile_count(args.num_elems, begin);
    const auto input_of = [&](int rank) {
      return input_in_loops(static_cast<const Element<T>*>(args.inputs[rank]) + begin, count, scratch[rank % kFused]);
    };
    Element<T>* const output = static_cast<Element<T>*>(args.output) + begin;
    auto* const result = output_in_loops(output, scratch[0]);
    const typename Element<T>::InLoops* inputs[kFused] = {};
    for (int rank = 0; rank < kFused && rank < num_ranks; ++rank) inputs[rank] = input_of(rank);
    if (num_ranks <= kFused) {
      combine_fused<Op>(inputs, num_ranks, num_ranks, result, count);
    } else {
      // Later inputs may lie in the output, which is therefore written last.
      combine_fused<Op>(inputs, kFused, kUnfinished, total, count);
      for (int rank = kFused; rank < num_ranks - 1; ++rank) {
        inputs[0] = input_of(rank);
        combine<1, Op>(total, inputs, kUnfinished, total, count);
      }
      inputs[0] = input_of(num_ranks - 1);
      combine<1, Op>(total, inputs, num_ranks, result, count);
    }
    finish_output(output, count, scratch[0]);
    for (int k = 0; k < args.num_copies; ++k) {
      memcpy(static_cast<Element<T>*>(args.copies[k]) + begin, output, static_cast<size_t>(count) * sizeof(T));
    }
  }
}

template <typename T, typename Op>
void reduce_hop(const void* accumulator_in, const void* input, void* accumulator, int64_t num_elems) {
  using Acc = typename Element<T>::Accumulator;
  alignas(64) Acc tile[kTileElems];
  const Element<Acc>* const before = static_cast<const Element<Acc>*>(accumulator_in);
  Element<Acc>* const after = static_cast<Element<Acc>*>(accumulator);
  for (int64_t begin = 0; begin < num_elems; begin += kTileElems) {
    const int64_t count = tile_count(num_elems, begin);
    const auto* const values = input_in_loops(static_cast<const Element<T>*>(input) + begin, count, tile);
    if (before == nullptr) {
      combine<0, Op>(values, &values, kUnfinished, after + begin, count);
    } else {
      combine<1, Op>(before + begin, &values, kUnfinished, after + begin, count);
    }
  }
}

template <typename T, typename Op>
void finish_hops(const void* accumulator, int num_inputs, void* output, int64_t num_elems) {
  using Acc = typename Element<T>::Accumulator;
  alignas(64) Acc tile[kTileElems];
  for (int64_t begin = 0; begin < num_elems; begin += kTileElems) {
    const int64_t count = tile_count(num_elems, begin);
    const Element<Acc>* const total = static_cast<const Element<Acc>*>(accumulator) + begin;
    Element<T>* const piece = static_cast<Element<T>*>(output) + begin;
    combine<0, Op>(total, &total, num_inputs, output_in_loops(piece, tile), count);
    finish_output(piece, count, tile);
  }
}

template <typename T>
T scale_value(T value, double factor) {
  return scaled(value, factor);
}
FloatPair scale_value(FloatPair value, double factor) {
  return {scaled(value.low, factor), scaled(value.high, factor)};
}

template <typename Input, typename Output>
void scale_values(const Input* input, double factor, Output* output, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) output[i].store(scale_value(input[i].load(), factor));
}
void scale_values(const Element<Bfloat16>* input, double factor, Element<Bfloat16>* output, int64_t count) {
  scale_values(reinterpret_cast<const Element<FloatPair>*>(input), factor,
               reinterpret_cast<Element<FloatPair>*>(output), count / 2);
  if (count % 2 != 0) output[count - 1].store(scale_value(input[count - 1].load(), factor));
}

template <typename T>
void scale(const void* input, double factor, void* output, int64_t num_elems) {
  alignas(64) typename Element<T>::Accumulator tile[kTileElems];
  for (int64_t begin = 0; begin < num_elems; begin += kTileElems) {
    const int64_t count = tile_count(num_elems, begin);
    const auto* const values = input_in_loops(static_cast<const Element<T>*>(input) + begin, count, tile);
    Element<T>* const piece = static_cast<Element<T>*>(output) + begin;
    scale_values(values, factor, output_in_loops(piece, tile), count);
    finish_output(piece, count, tile);
  }
}

struct Cpu {
  using Float16 = ringcomm::Float16;
  using Bfloat16 = ringcomm::Bfloat16;
  using Bool = RC_SIMD_LEVEL::Bool;
  using Kernels = ReduceKernels;
  using Row = DTypeKernels;
  template <typename T, typename Op, int kParts>
  static constexpr ReduceKernels kKernels{reduce<T, Op>, reduce_hop<T, Op>, finish_hops<T, Op>, kParts};
  template <typename T, int kParts>
  static constexpr ScaleKernel kScale{scale<T>, kParts};
};
static_assert(ReduceRows<Cpu>::follows_the_rule());

}  // namespace

const ReduceTable& reduce_table() { return ReduceRows<Cpu>::kTable; }

}  // namespace ringcomm::RC_SIMD_LEVEL
