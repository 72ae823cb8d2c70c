// In a build without CUDA. Nobody gets here: who passes GPU memory asks runtime::available() first.
#include "base/error.h"
#include "reduce/reduce.h"

namespace ringcomm::cuda {
namespace {

[[noreturn]] void refuse() { RC_FAIL(device, "ringcomm was built without CUDA: reductions run on the CPU only"); }

}  // namespace

void reduce(DType, ReduceOp, const ReduceArgs&, Stream) { refuse(); }
void reduce_hop(DType, ReduceOp, const void*, const void*, void*, int64_t, Stream) { refuse(); }
void finish_hops(DType, ReduceOp, const void*, int, void*, int64_t, Stream) { refuse(); }
void scale(DType, const void*, double, void*, int64_t, Stream) { refuse(); }

}  // namespace ringcomm::cuda
