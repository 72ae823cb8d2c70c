// Checks, then the kernels of the SIMD level in use.
#include "reduce/reduce.h"

#include "base/error.h"
#include "base/simd.h"
#include "reduce/kernels.h"

namespace ringcomm::cpu {
namespace {

const ReduceKernels& kernels(DType dtype, ReduceOp op, int64_t num_elems) {
  RC_CHECK(static_cast<int>(dtype) < kNumDTypes, "unknown dtype ", static_cast<int>(dtype));
  RC_CHECK(static_cast<int>(op) < kNumReduceOps, "unknown reduce op ", static_cast<int>(op));
  RC_CHECK(num_elems >= 0, "num_elems must not be negative, got ", num_elems);
  return RC_SIMD_DISPATCH(reduce_table)[static_cast<int>(dtype)][static_cast<int>(op)];
}

}  // namespace

void reduce(DType dtype, ReduceOp op, const ReduceArgs& args) {
  RC_CHECK(args.num_inputs >= 1, "a reduction needs at least one input, got ", args.num_inputs);
  kernels(dtype, op, args.num_elems).reduce(args);
}

void reduce_hop(DType dtype, ReduceOp op, const void* accumulator_in, const void* input, void* accumulator,
                int64_t num_elems) {
  kernels(dtype, op, num_elems).reduce_hop(accumulator_in, input, accumulator, num_elems);
}

void finish_hops(DType dtype, ReduceOp op, const void* accumulator, int num_inputs, void* output, int64_t num_elems) {
  RC_CHECK(num_inputs >= 1, "a reduction needs at least one input, got ", num_inputs);
  kernels(dtype, op, num_elems).finish_hops(accumulator, num_inputs, output, num_elems);
}

}  // namespace ringcomm::cpu
