#include "torch/work.h"

#include <ATen/core/ivalue.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <utility>

namespace ringcomm::adapter {
namespace {

constexpr std::chrono::milliseconds kSignalCheck{100};
constexpr std::chrono::microseconds kPoll{50};
constexpr std::chrono::seconds kIdle{5};

std::atomic<Completer*> completer{nullptr};

}  // namespace

RingWork::RingWork(std::weak_ptr<Core> core, c10d::OpType type, const char* title, uint64_t seq,
                   const std::vector<at::Tensor>& inputs, std::vector<at::Tensor> outputs, Place place)
    : Work(-1, type, title, inputs),
      core_(std::move(core)),
      title_(title),
      seq_(seq),
      pid_(::getpid()),
      outputs_(std::move(outputs)),
      place_(std::move(place)) {}

bool RingWork::wait(std::chrono::milliseconds timeout) {
  const WithoutGil released;
  wait_for_host(timeout);
  if (exception_) std::rethrow_exception(exception_);
  if (place_.on_gpu()) wait_for_gpu(timeout);
  for (const auto& part : parts_) part->wait(timeout);
  return true;
}

void RingWork::wait_for_host(std::chrono::milliseconds timeout) {
  const auto start = std::chrono::steady_clock::now();
  std::unique_lock<std::mutex> lock(mutex_);
  while (!completed_) {
    std::chrono::milliseconds slice = kSignalCheck;
    if (timeout != kNoTimeout) {
      const auto left = timeout - (std::chrono::steady_clock::now() - start);
      if (left.count() <= 0) throw_timeout(timeout);
      slice = std::min(slice, std::chrono::ceil<std::chrono::milliseconds>(left));
    }
    if (cv_.wait_for(lock, slice, [this] { return completed_; })) return;
    lock.unlock();
    check_waiter();
    lock.lock();
  }
}

void RingWork::wait_for_gpu(std::chrono::milliseconds timeout) {
  const auto start = std::chrono::steady_clock::now();
  auto next_check = start + kSignalCheck;
  while (timeout != kNoTimeout && !place_.passed()) {
    const auto now = std::chrono::steady_clock::now();
    if (now - start >= timeout) throw_timeout(timeout);
    if (now >= next_check) {
      check_waiter();
      next_check = now + kSignalCheck;
    }
    std::this_thread::sleep_for(kPoll);
  }
  // What a kernel found shows on the host as a fault of the group.
  if (const auto core = core_.lock()) core->throw_fault();
  place_.join();
}

void RingWork::check_waiter() const {
  if (::getpid() != pid_) {
    C10_THROW_ERROR(DistBackendError,
                    c10::str(title_, " #", seq_, " belongs to the parent process; a forked child cannot wait for it"));
  }
  try {
    check_python_signals();
  } catch (...) {
    if (const auto core = core_.lock())
      core->abort(c10::str("it was interrupted while it waited for ", title_, " #", seq_));
    throw;
  }
}

void RingWork::throw_timeout(std::chrono::milliseconds timeout) const {
  C10_THROW_ERROR(DistBackendError, c10::str("Operation timed out! Timed out waiting ", timeout.count(), "ms for ",
                                             title_, " #", seq_, " operation to complete; the call itself goes on"));
}

bool RingWork::isCompleted() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!completed_) return false;
    if (exception_) return true;
  }
  return place_.passed() &&
         std::all_of(parts_.begin(), parts_.end(), [](const auto& part) { return part->isCompleted(); });
}

c10::intrusive_ptr<c10::ivalue::Future> RingWork::getFuture() {
  bool settle_now = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!future_) {
      future_ =
          c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()), place_.devices());
    }
    settle_now = completed_ && !std::exchange(settled_, completed_ || settled_);
  }
  if (settle_now) settle(future_);  // nobody has attached a callback yet
  return future_;
}

int RingWork::sourceRank() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return source_rank_;
}

void RingWork::complete(std::exception_ptr error, int source_rank) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    source_rank_ = source_rank;
    try {
      if (!error) place_.end();
    } catch (...) {  // a GPU that is broken
      error = std::current_exception();
    }
  }
  finish(error);
  c10::intrusive_ptr<c10::ivalue::Future> future;
  std::vector<std::function<void(std::exception_ptr)>> listeners;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (future_ && !std::exchange(settled_, true)) future = future_;
    listeners.swap(listeners_);
  }
  for (const auto& listener : listeners) listener(error);
  if (!future) return;
  auto self = c10::intrusive_ptr<RingWork>::unsafe_reclaim_from_nonowning(this);
  Completer::instance().post([self = std::move(self), future = std::move(future)] { self->settle(future); });
}

void RingWork::on_complete(std::function<void(std::exception_ptr)> listener) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!completed_) {
      listeners_.push_back(std::move(listener));
      return;
    }
  }
  listener(exception_);
}

void RingWork::settle(const c10::intrusive_ptr<c10::ivalue::Future>& future) const {
  // The future's values are there when the stream that is current now has come here.
  c10::OptionalStreamGuard guard;
  place_.enter(guard);
  if (exception_) {
    future->setError(exception_);
  } else {
    future->markCompleted(c10::IValue(outputs_));
  }
}

// ---- Completer -----------------------------------------------------------------------------------

Completer& Completer::instance() {
  // A forked child has none of the parent's threads, so it starts with a new one.
  static const int registered = ::pthread_atfork(nullptr, nullptr, [] { completer.store(nullptr); });
  static_cast<void>(registered);
  Completer* found = completer.load(std::memory_order_acquire);
  if (found == nullptr) {
    auto* fresh = new Completer();
    if (completer.compare_exchange_strong(found, fresh)) return *fresh;
    delete fresh;
  }
  return *found;
}

void Completer::post(std::function<void()> task) {
  std::unique_lock<std::mutex> lock(mutex_);
  tasks_.push_back(std::move(task));
  if (idle_ >= tasks_.size()) {
    posted_.notify_one();
    return;
  }
  try {
    std::thread([this] { loop(); }).detach();
  } catch (const std::system_error&) {
    // No more threads: those that run take it, or there are none and this one does.
    if (running_ > 0 || idle_ > 0) return;
    std::function<void()> own = std::move(tasks_.front());
    tasks_.pop_front();
    lock.unlock();
    own();
  }
}

void Completer::loop() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    ++idle_;
    const bool found = posted_.wait_for(lock, kIdle, [this] { return !tasks_.empty(); });
    --idle_;
    if (!found) return;
    std::function<void()> task = std::move(tasks_.front());
    tasks_.pop_front();
    ++running_;
    lock.unlock();
    try {
      task();
    } catch (const std::exception& error) {
      TORCH_WARN("ringcomm: a callback of a future raised: ", error.what());
    }
    task = nullptr;  // what it holds may need the GIL to go; not under the lock
    lock.lock();
    --running_;
    if (running_ == 0 && tasks_.empty()) drained_.notify_all();
  }
}

void Completer::drain(std::chrono::milliseconds timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  drained_.wait_for(lock, timeout, [this] { return running_ == 0 && tasks_.empty(); });
}

}  // namespace ringcomm::adapter
