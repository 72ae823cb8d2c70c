// What reductions check on every device.
#include "reduce/reduce.h"

#include "base/error.h"

namespace ringcomm {

void check_reduction(DType dtype, ReduceOp op) {
  RC_CHECK(static_cast<int>(dtype) < kNumDTypes, "unknown dtype ", static_cast<int>(dtype));
  RC_CHECK(static_cast<int>(op) < kNumReduceOps, "unknown reduce op ", static_cast<int>(op));
  const char* refusal = reduction_refusal(dtype, op);
  RC_CHECK(refusal == nullptr, "op='", reduce_op_name(op), "' does not reduce ", dtype_name(dtype), ": ", refusal);
}

}  // namespace ringcomm
