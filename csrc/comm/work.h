// The handle of an asynchronous call.
#pragma once

#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>

#include "base/runtime.h"
#include "transport/device_group.h"
#include "transport/p2p_engine.h"

namespace ringcomm {

// Throws AbortedError in a child of the process that has this fork_count().
void check_not_forked(uint64_t fork_generation);

// A call on GPU arrays may be queued only when wait() returns: hold_back() orders a stream behind it.
class Work {
 public:
  Work();
  bool done() const;
  // Blocks until the call has finished or is queued on a GPU, at most timeout_s (negative: no limit of its own; the
  // communicator's deadline bounds every call). True if it finished; rethrows its error.
  // check_interrupt, if any, runs every kInterruptCheck and may throw; the call itself goes on.
  bool wait(double timeout_s = -1, const std::function<void()>& check_interrupt = {}) const;
  // After wait(): what is queued on the stream from now on comes after the call. Does not block.
  void hold_back(Stream stream) const;
  // Calls back once, after wait() has been released, with the error or null and source(): in the
  // thread that finishes the call, or here and now if it has finished. Must not block or throw. One callback.
  using Callback = std::function<void(const std::exception_ptr& error, int source)>;
  void on_done(Callback callback);
  // Of a receive that is done: the rank that sent the message. Else -1.
  int source() const;

 private:
  friend class Communicator;
  void finish(std::exception_ptr error, int source = -1);

  const uint64_t fork_generation_;
  mutable std::mutex mutex_;
  mutable std::condition_variable finished_;
  bool done_ = false;
  std::exception_ptr error_;
  Callback callback_;
  int source_ = -1;
  // Of a call that is queued on a GPU: its end, unless a graph has captured it. Set when done_ is.
  std::shared_ptr<runtime::Event> end_;
  bool is_captured_ = false;
  std::shared_ptr<DeviceGroup> devices_;
  // Of a message: whoever waits for it moves it.
  std::shared_ptr<P2pEngine> messages_;
};

}  // namespace ringcomm
