// The public functions on the CPU: checks, then the kernels of the SIMD level in use.
#include "base/error.h"
#include "base/simd.h"
#include "reduce/kernels.h"
#include "reduce/reduce.h"

namespace ringcomm::cpu {
namespace {

const ReduceKernels& kernels(DType dtype, ReduceOp op, int64_t num_elems) {
  check_reduction(dtype, op);
  RC_CHECK(num_elems >= 0, "num_elems must not be negative, got ", num_elems);
  return RC_SIMD_DISPATCH(reduce_table)[static_cast<int>(dtype)].ops[static_cast<int>(op)];
}

}  // namespace

void reduce(DType dtype, ReduceOp op, const ReduceArgs& args) {
  RC_CHECK(args.num_inputs >= 1, "a reduction needs at least one input, got ", args.num_inputs);
  const ReduceKernels& chosen = kernels(dtype, op, args.num_elems);
  ReduceArgs parts = args;
  parts.num_elems *= chosen.parts;
  chosen.reduce(parts);
}

void reduce_hop(DType dtype, ReduceOp op, const void* accumulator_in, const void* input, void* accumulator,
                int64_t num_elems) {
  const ReduceKernels& chosen = kernels(dtype, op, num_elems);
  chosen.reduce_hop(accumulator_in, input, accumulator, num_elems * chosen.parts);
}

void finish_hops(DType dtype, ReduceOp op, const void* accumulator, int num_inputs, void* output, int64_t num_elems) {
  RC_CHECK(num_inputs >= 1, "a reduction needs at least one input, got ", num_inputs);
  const ReduceKernels& chosen = kernels(dtype, op, num_elems);
  chosen.finish_hops(accumulator, num_inputs, output, num_elems * chosen.parts);
}

void scale(DType dtype, const void* input, double factor, void* output, int64_t num_elems) {
  check_reduction(dtype, ReduceOp::premul_sum);
  RC_CHECK(num_elems >= 0, "num_elems must not be negative, got ", num_elems);
  const ScaleKernel& chosen = RC_SIMD_DISPATCH(reduce_table)[static_cast<int>(dtype)].scale;
  chosen.scale(input, factor, output, num_elems * chosen.parts);
}

}  // namespace ringcomm::cpu
