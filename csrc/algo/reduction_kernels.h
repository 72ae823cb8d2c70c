// The kernels of one algorithm for every dtype and operator that can be reduced. For .cu files.
#pragma once

#include "algo/device_collective.h"
#include "base/launch.h"
#include "reduce/reduce_device.h"

namespace ringcomm {

// A kernel's elements may be parts of the array's, see reduce/table.h. Args is the kernel's only parameter.
template <typename Args>
struct ReductionKernel {
  void (*kernel)(const Args args);
  int parts;  // kernel elements per array element; 0: not reduced
};
template <typename Args>
struct ReductionRow {
  ReductionKernel<Args> ops[kNumReduceOps];
  ReductionKernel<Args> scale;  // premul_sum
};

// Algorithm has Args, a name, and `template <typename T, typename Op, bool kScales> kernel`, a pointer to one that
// multiplies the inputs if kScales.
template <typename Algorithm>
class ReductionKernels {
 public:
  using Args = typename Algorithm::Args;

  static ReductionKernel<Args> of(const DeviceCall& call) {
    const Row& row = ReduceRows<Device>::kTable[static_cast<int>(call.dtype)];
    return call.reduce_op == ReduceOp::premul_sum ? row.scale : row.ops[static_cast<int>(call.reduce_op)];
  }

  static void load() {
    for (const Row& row : ReduceRows<Device>::kTable) {
      for (const Kernel& entry : row.ops) load_one(entry);
      load_one(row.scale);
    }
  }

 private:
  using Kernel = ReductionKernel<Args>;
  using Row = ReductionRow<Args>;

  struct Device : DeviceElements {
    using Kernels = ReductionKernel<Args>;
    using Row = ReductionRow<Args>;
    template <typename T, typename Op, int kParts>
    static constexpr Kernels kKernels{Algorithm::template kernel<T, Op, false>, kParts};
    template <typename T, int kParts>
    static constexpr Kernels kScale{Algorithm::template kernel<T, Sum, true>, kParts};
  };
  static_assert(ReduceRows<Device>::follows_the_rule());

  static void load_one(const Kernel& entry) {
    if (entry.parts != 0) load_kernel(Algorithm::kName, entry.kernel);
  }
};

}  // namespace ringcomm
