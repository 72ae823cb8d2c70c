// In a build without CUDA. Nobody gets here: who passes GPU memory asks runtime::available() first.
#include "base/error.h"
#include "codec/codec.h"

namespace ringcomm::cuda {
namespace {

[[noreturn]] void refuse() { RC_FAIL(device, "ringcomm was built without CUDA: codecs run on the CPU only"); }

}  // namespace

void encode(CodecId, const EncodeArgs&, Stream) { refuse(); }
void decode(CodecId, const uint8_t*, int64_t, void*, DType, Stream) { refuse(); }
void decode_add(CodecId, const uint8_t*, int64_t, float*, bool, Stream) { refuse(); }
void divide(float*, int64_t, float, Stream) { refuse(); }

}  // namespace ringcomm::cuda
