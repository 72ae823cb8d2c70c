// What reduce_cpu.cpp exports, once per SIMD level (base/simd.h). C headers only.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "reduce/reduce.h"

namespace ringcomm {

// For one dtype and operator. Arguments are valid and num_elems may be 0; see reduce/reduce.h.
struct ReduceKernels {
  void (*reduce)(const ReduceArgs& args);
  void (*reduce_hop)(const void* accumulator_in, const void* input, void* accumulator, int64_t num_elems);
  void (*finish_hops)(const void* accumulator, int num_inputs, void* output, int64_t num_elems);
};

// Indexed by dtype and operator.
using ReduceTable = ReduceKernels[kNumDTypes][kNumReduceOps];

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
