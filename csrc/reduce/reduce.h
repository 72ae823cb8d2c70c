// Element-wise reduction of several equally long arrays in rank order.
//
// The result of element i is ((in[0][i] op in[1][i]) op in[2][i]) ..., so whoever computes it gets
// the same bits. float16 and bfloat16 accumulate in float32 and are rounded once. Which operator
// reduces which dtype: reduction_refusal() in base/dtype.h; every function here throws UsageError otherwise.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "base/stream.h"

namespace ringcomm {

struct ReduceArgs {
  const void* const* inputs = nullptr;  // num_inputs arrays in rank order, any alignment
  int num_inputs = 0;                   // >= 1
  int64_t num_elems = 0;                // per array; 0 is allowed
  void* output = nullptr;               // may be one of the inputs
  void* const* copies = nullptr;        // num_copies more arrays for the result; they may be inputs, too
  int num_copies = 0;
};

// Throws UsageError, with what to do instead, unless arrays of `dtype` can be reduced with `op`.
void check_reduction(DType dtype, ReduceOp op);

namespace cpu {

// avg divides by num_inputs. Runs on the calling thread, does not block.
void reduce(DType dtype, ReduceOp op, const ReduceArgs& args);

// The type in which partial sums of `dtype` travel when a reduction is done in several hops (ring):
// float32 for the 16-bit types, otherwise dtype itself.
constexpr DType accumulator_dtype(DType dtype) {
  return dtype == DType::float16 || dtype == DType::bfloat16 ? DType::float32 : dtype;
}

// One hop: accumulator[i] = accumulator_in[i] op input[i], all in accumulator_dtype(dtype) except
// input, which is dtype. accumulator_in == null starts the chain (accumulator = input widened).
// avg adds here and divides in finish_hops.
void reduce_hop(DType dtype, ReduceOp op, const void* accumulator_in, const void* input, void* accumulator,
                int64_t num_elems);

// Ends the chain: divides by num_inputs for avg, rounds to dtype. In place when the types agree.
void finish_hops(DType dtype, ReduceOp op, const void* accumulator, int num_inputs, void* output, int64_t num_elems);

// output[i] = input[i] * factor, rounded to dtype: what premul_sum sums up. The factor is rounded to
// accumulator_dtype(dtype), for complex to its part, where the product is taken. In place or apart.
void scale(DType dtype, const void* input, double factor, void* output, int64_t num_elems);

}  // namespace cpu

constexpr int kMostReduceArrays = 64;  // inputs, and outputs, of one reduction on a GPU

// The same numbers, in builds with CUDA (RC_CUDA) only. Pointers are to memory of the current device and lie at
// a multiple of the element's size. Queued on the stream; none waits. Fastest where all arrays are 16-byte
// aligned. Payload and sign of a NaN that arithmetic produces are the device's.
namespace cuda {

void reduce(DType dtype, ReduceOp op, const ReduceArgs& args, Stream stream);
void reduce_hop(DType dtype, ReduceOp op, const void* accumulator_in, const void* input, void* accumulator,
                int64_t num_elems, Stream stream);
void finish_hops(DType dtype, ReduceOp op, const void* accumulator, int num_inputs, void* output, int64_t num_elems,
                 Stream stream);
void scale(DType dtype, const void* input, double factor, void* output, int64_t num_elems, Stream stream);

}  // namespace cuda
}  // namespace ringcomm
