// In a build without CUDA. Nobody gets here: there is no group of GPUs (base/runtime_nocuda.cpp).
#include "algo/pack.h"
#include "base/error.h"

namespace ringcomm::cuda {
namespace {

[[noreturn]] void refuse() { RC_FAIL(device, "ringcomm was built without CUDA: arrays are packed on the CPU only"); }

}  // namespace

void pack(const std::vector<Piece>&, void*, Stream) { refuse(); }
void unpack(const std::vector<Piece>&, const void*, Stream) { refuse(); }
void load_pack_kernels() { refuse(); }

}  // namespace ringcomm::cuda
