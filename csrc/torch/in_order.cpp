#include "torch/in_order.h"

#include <utility>

namespace ringcomm::adapter {

bool InOrder::post(std::function<void()> task) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (stopped_) return false;
  if (!thread_.joinable()) thread_ = std::thread([this] { loop(); });
  tasks_.push_back(std::move(task));
  posted_.notify_one();
  return true;
}

void InOrder::stop() {
  std::thread thread;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
    posted_.notify_one();
    thread = std::move(thread_);
  }
  if (!thread.joinable()) return;
  thread.join();
}

void InOrder::loop() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    posted_.wait(lock, [this] { return stopped_ || !tasks_.empty(); });
    if (tasks_.empty()) return;
    std::function<void()> task = std::move(tasks_.front());
    tasks_.pop_front();
    lock.unlock();
    task();
    task = nullptr;
    lock.lock();
  }
}

}  // namespace ringcomm::adapter
