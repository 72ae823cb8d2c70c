// The cast codecs bf16 and fp16 in kernels, on runs of elements in registers. For .cu files; the arithmetic is that of
// base/half.h and cast_math.h. Code is Bfloat16Element or Float16Element.
#pragma once

#include "base/element.h"
#include "codec/cast_math.h"

namespace ringcomm {

// has_residual: `residual` goes from what it was to what the cast lost. One loop: of two, the comparisons of the first
// would be kept in registers of which there are seven.
template <typename Code, int kRun>
__device__ __forceinline__ void cast_run(const float (&values)[kRun], bool has_residual, Code (&codes)[kRun],
                                         float (&residual)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    codes[i] = from_float<Code>(values[i]);
    if (has_residual) residual[i] = cast_residual(values[i], to_float(codes[i]), residual[i]);
  }
}

}  // namespace ringcomm
