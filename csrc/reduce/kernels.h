// What reduce_cpu.cpp exports, once per SIMD level (base/simd.h). C headers only.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "reduce/reduce.h"

namespace ringcomm {

// For one dtype and operator. Arguments are valid and num_elems may be 0; see reduce/reduce.h. Kernels
// are shared where the bits are the same, so the element of a kernel may be a part of the array's: a
// complex sum is a float sum. num_elems counts the kernel's.
struct ReduceKernels {
  void (*reduce)(const ReduceArgs& args);
  void (*reduce_hop)(const void* accumulator_in, const void* input, void* accumulator, int64_t num_elems);
  void (*finish_hops)(const void* accumulator, int num_inputs, void* output, int64_t num_elems);
  int parts;  // kernel elements per array element
};

struct ScaleKernel {
  void (*scale)(const void* input, double factor, void* output, int64_t num_elems);
  int parts;
};

// Null where reduction_refusal() says no.
struct DTypeKernels {
  ReduceKernels ops[kNumReduceOps];
  ScaleKernel scale;  // for premul_sum
};

// Indexed by dtype.
using ReduceTable = DTypeKernels[kNumDTypes];

namespace baseline {
const ReduceTable& reduce_table();
}
namespace avx2 {
const ReduceTable& reduce_table();
}
namespace avx512 {
const ReduceTable& reduce_table();
}

}  // namespace ringcomm
