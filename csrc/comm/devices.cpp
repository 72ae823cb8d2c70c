// The GPU of a communicator's rank.
#include "comm/communicator.h"

namespace ringcomm {

void Communicator::attach_device(std::shared_ptr<DeviceGroup> devices, const Tuning& tuning) {
  check_usable();
  std::lock_guard<std::mutex> lock(mutex_);
  RC_CHECK(devices_ == nullptr, "this communicator has been set up for arrays on GPUs before");
  if (!group_) RC_FAIL(aborted, "this communicator is closed; init() a new one");
  devices_ = std::move(devices);
  device_tuning_ = tuning;
  has_devices_.store(true, std::memory_order_release);
  // Kernels notice a failure through their own memory only, and what they find they cannot tell others.
  group_->watch([devices = devices_, group = group_.get()] {
    devices->report_late(*group);
    if (!group->has_failed()) return true;
    devices->abort(group->fault());
    return false;
  });
}

std::shared_ptr<DeviceGroup> Communicator::devices() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return devices_;
}

std::vector<Range> Communicator::encoded_sums(int64_t num_elems, bool on_device) const {
  const std::shared_ptr<DeviceGroup> group = devices();
  if (!on_device || !group || group->mode() == DeviceMode::host) {
    return encoded_sums_of(rank_, num_elems, world_size_, buffer_bytes_);
  }
  const Range range = cuda::encoded_sums_of(rank_, num_elems, world_size_);
  return range.count() > 0 ? std::vector<Range>{range} : std::vector<Range>();
}

void Communicator::synchronize() {
  check_usable();
  {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!changed_.wait_for(lock, kInterruptCheck, [this] { return !busy_ && queue_.empty(); })) {
      lock.unlock();
      check_interrupt("in synchronize()");
      lock.lock();
    }
    busy_ = true;
  }
  std::exception_ptr error;
  try {
    if (!group_) RC_FAIL(aborted, "this communicator is closed; init() a new one");
    group_->throw_if_failed();
    if (devices_) group_->wait_for_device_outside([this] { return devices_->is_idle(*group_); });
  } catch (...) {
    error = std::current_exception();
    if (devices_ && group_ && group_->has_failed()) {
      devices_->abort(group_->fault());
      devices_->let_peers_stop();
    }
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    busy_ = false;
    changed_.notify_all();
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace ringcomm
