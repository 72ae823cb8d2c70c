// A thread that runs tasks one after the other. It starts with the first one.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace ringcomm::adapter {

class InOrder {
 public:
  InOrder() = default;
  ~InOrder() { stop(); }
  InOrder(const InOrder&) = delete;

  // Tasks do not throw. False: stopped, and the task is not run.
  bool post(std::function<void()> task);
  // Runs what is left, and nothing any more. Idempotent; not called by a task.
  void stop();

 private:
  void loop();

  std::mutex mutex_;
  std::condition_variable posted_;
  std::deque<std::function<void()>> tasks_;
  std::thread thread_;
  bool stopped_ = false;
};

}  // namespace ringcomm::adapter
