// Elements of arrays in kernels that reduce: how they are read, combined and written. The arithmetic is that of
// reduce_math.h. For .cu files.
#pragma once

#include <cstdint>

#include "base/element.h"
#include "base/vector_access.h"
#include "reduce/table.h"

namespace ringcomm {

struct BoolElement {
  uint8_t value;
};

// What an element is computed in, and the ways there and back.
template <typename T>
struct InKernels {
  using Accumulator = T;
  __device__ __forceinline__ static T load(T element) { return element; }
  __device__ __forceinline__ static T store(T total) { return total; }
};
template <typename T>
struct InFloat {
  using Accumulator = float;
  __device__ __forceinline__ static float load(T element) { return to_float(element); }
  __device__ __forceinline__ static T store(float total) { return from_float<T>(total); }
};
template <>
struct InKernels<Bfloat16Element> : InFloat<Bfloat16Element> {};
template <>
struct InKernels<Float16Element> : InFloat<Float16Element> {};
template <>
struct InKernels<BoolElement> {
  using Accumulator = uint8_t;  // 0 or 1, so that bitwise operators are logical ones
  __device__ __forceinline__ static uint8_t load(BoolElement element) { return element.value != 0; }
  __device__ __forceinline__ static BoolElement store(uint8_t total) { return {total}; }
};
template <typename T>
using Accumulator = typename InKernels<T>::Accumulator;

// Elements of a 16-byte access.
template <typename T>
constexpr int kRun = kVectorBytes / static_cast<int>(sizeof(T));

// T[kCount] of an array, from element `begin` on, in one access or several of 16 bytes: see base/vector_access.h.
template <typename T, int kCount>
__device__ __forceinline__ void load_run(const void* array, int64_t begin, Accumulator<T> (&values)[kCount]) {
  T elements[kCount];
  load_vector(static_cast<const T*>(array) + begin, elements);
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = InKernels<T>::load(elements[i]);
}

template <typename T, int kCount>
__device__ __forceinline__ void to_elements(const Accumulator<T> (&values)[kCount], T (&elements)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) elements[i] = InKernels<T>::store(values[i]);
}

template <typename Op, typename Acc, int kCount>
__device__ __forceinline__ void combine_runs(Acc (&totals)[kCount], const Acc (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) totals[i] = Op().combine(totals[i], values[i]);
}

// The elements of one of several ranks, in their order: those of rank 0 are the first totals.
template <typename Op, typename T, int kCount>
__device__ __forceinline__ void combine_rank(int rank, const T (&elements)[kCount], Accumulator<T> (&totals)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const Accumulator<T> value = InKernels<T>::load(elements[i]);
    totals[i] = rank == 0 ? value : Op().combine(totals[i], value);
  }
}

// What premul_sum adds up: rounded to T, as cpu::scale does.
template <typename T>
__device__ __forceinline__ T scaled_element(T element, double factor) {
  return InKernels<T>::store(scaled(InKernels<T>::load(element), factor));
}

template <typename T, int kCount>
__device__ __forceinline__ void load_scaled_run(const void* array, int64_t begin, double factor,
                                                Accumulator<T> (&values)[kCount]) {
  T elements[kCount];
  load_vector(static_cast<const T*>(array) + begin, elements);
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = InKernels<T>::load(scaled_element(elements[i], factor));
}

// The part of a device in table.h that is the same for all kernels.
struct DeviceElements {
  using Float16 = Float16Element;
  using Bfloat16 = Bfloat16Element;
  using Bool = BoolElement;
};

}  // namespace ringcomm
