#include "comm/work.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "base/process.h"

namespace ringcomm {

void check_not_forked(uint64_t fork_generation) {
  if (fork_generation != fork_count()) {
    RC_FAIL(aborted, "this communicator belongs to the parent process; call ringcomm.init() in the forked child");
  }
}

Work::Work() : fork_generation_(fork_count()) {}

bool Work::done() const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!done_ || !end_ || is_captured_) return done_;
  try {
    return end_->passed();
  } catch (const Error&) {  // of the device; wait() says it
    return true;
  }
}

void Work::hold_back(Stream stream) const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (end_) end_->hold_back(stream);
}

int Work::source() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return source_;
}

bool Work::wait(double timeout_s, const std::function<void()>& check_interrupt) const {
  check_not_forked(fork_generation_);
  if (messages_ && !messages_->wait([this] { return done(); }, timeout_s, check_interrupt)) return false;
  using Seconds = std::chrono::duration<double>;
  const auto start = std::chrono::steady_clock::now();
  std::unique_lock<std::mutex> lock(mutex_);
  while (!done_) {
    Seconds slice = kInterruptCheck;
    if (timeout_s >= 0) {
      const Seconds left = Seconds(timeout_s) - (std::chrono::steady_clock::now() - start);
      if (left.count() <= 0) return false;
      slice = std::min(slice, left);
    }
    if (finished_.wait_for(lock, slice, [this] { return done_; }) || !check_interrupt) continue;
    lock.unlock();
    check_interrupt();
    lock.lock();
  }
  if (error_) std::rethrow_exception(error_);
  if (devices_) devices_->throw_if_failed();
  return true;
}

void Work::on_done(Callback callback) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!done_) {
      callback_ = std::move(callback);
      return;
    }
  }
  callback(error_, source_);
}

void Work::finish(std::exception_ptr error, int source) {
  Callback callback;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    done_ = true;
    error_ = std::move(error);
    callback.swap(callback_);
    source_ = source;
  }
  finished_.notify_all();
  if (callback) callback(error_, source_);
}

}  // namespace ringcomm
