// Events that are used again: creating one costs as much as queueing a small kernel. Thread-safe.
#pragma once

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "base/runtime.h"

namespace ringcomm {

class EventPool {
 public:
  explicit EventPool(int device) : free_(std::make_shared<Free>(device)) {}

  // An event of the device, which may have been recorded before: record() comes first. Comes back when it is let go,
  // also after the pool has gone.
  std::shared_ptr<runtime::Event> take() {
    return {free_->pop().release(), [free = free_](runtime::Event* event) { free->push(event); }};
  }

 private:
  struct Free {
    explicit Free(int of_device) : device(of_device) {}
    std::unique_ptr<runtime::Event> pop() {
      {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!events.empty()) {
          std::unique_ptr<runtime::Event> event = std::move(events.back());
          events.pop_back();
          return event;
        }
      }
      return std::make_unique<runtime::Event>(device);
    }
    void push(runtime::Event* event) {
      const std::lock_guard<std::mutex> lock(mutex);
      events.emplace_back(event);
    }

    const int device;
    std::mutex mutex;
    std::vector<std::unique_ptr<runtime::Event>> events;
  };
  const std::shared_ptr<Free> free_;
};

}  // namespace ringcomm
