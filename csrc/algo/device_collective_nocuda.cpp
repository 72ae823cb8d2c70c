// No device: the group of GPUs cannot be made (base/runtime_nocuda.cpp), so nothing here is reached.
#include "algo/device_collective.h"
#include "base/error.h"

namespace ringcomm::cuda {
namespace {

[[noreturn]] void refuse() { RC_FAIL(device, "ringcomm was built without CUDA: no collectives on GPU arrays"); }

}  // namespace

void check_collective(const DeviceCall&, const DeviceLayout&) { refuse(); }
DevicePlan plan_collective(const DeviceCall&, const DeviceLayout&) { refuse(); }
Range encoded_sums_of(int, int64_t, int) { refuse(); }
void launch_collective(const DeviceCall&, const DevicePlan&, const GroupView&, const DeviceRounds&, Stream) {
  refuse();
}
void launch_format(const GroupView&, Stream) { refuse(); }
void load_kernels() { refuse(); }

}  // namespace ringcomm::cuda
