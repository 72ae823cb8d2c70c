// The handle of one call as torch sees it, and who completes futures.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

#include "torch/core.h"
#include "torch/place.h"

namespace ringcomm::adapter {

class RingWork final : public c10d::Work {
 public:
  RingWork(std::weak_ptr<Core> core, c10d::OpType type, const char* title, uint64_t seq,
           const std::vector<at::Tensor>& inputs, std::vector<at::Tensor> outputs, Place place = Place());

  // On the CPU: blocks until the call has ended, at most `timeout` (0: the communicator's deadline bounds it).
  // Ctrl-C ends the communicator for all ranks, as in a synchronous call.
  // On a GPU: blocks until the call is queued, and makes the current stream wait for its end; with a timeout, blocks
  // until its end.
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  void synchronize() override { wait(); }
  bool isCompleted() override;
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  std::vector<at::Tensor> result() override { return outputs_; }
  int sourceRank() const override;
  uint64_t getSequencenumber() const override { return seq_; }

  // The call has ended, or all of it is queued on its stream. Waiters go on at once; the future completes on a
  // thread of its own.
  void complete(std::exception_ptr error, int source_rank = -1);
  // Whoever waits for this work waits for that one, too, which is not waited for otherwise. Before complete().
  void include(c10::intrusive_ptr<RingWork> part) { parts_.push_back(std::move(part)); }
  const Place& place() const { return place_; }
  // Calls back once when the call has ended, on the thread that ended it or here and now.
  void on_complete(std::function<void(std::exception_ptr)> listener);

 private:
  void settle(const c10::intrusive_ptr<c10::ivalue::Future>& future) const;
  // Blocks until completed_.
  void wait_for_host(std::chrono::milliseconds timeout);
  void wait_for_gpu(std::chrono::milliseconds timeout);
  // Throws what ends a wait: another process, Ctrl-C.
  void check_waiter() const;
  [[noreturn]] void throw_timeout(std::chrono::milliseconds timeout) const;

  const std::weak_ptr<Core> core_;
  const char* const title_;
  const uint64_t seq_;
  const int pid_;
  const std::vector<at::Tensor> outputs_;
  Place place_;  // its end is written before completed_
  std::vector<c10::intrusive_ptr<RingWork>> parts_;
  int source_rank_ = -1;
  // Guarded by mutex_, made when somebody asks for it. Whoever sees it and completed_ both set completes it.
  c10::intrusive_ptr<c10::ivalue::Future> future_;
  bool settled_ = false;
  std::vector<std::function<void(std::exception_ptr)>> listeners_;
};

// Runs callbacks of futures. A callback may wait for another collective (PowerSGD does), so there is
// always a thread left: one is started whenever none is idle. Idle ones end after a while.
class Completer {
 public:
  // Of this process; never destroyed, because its threads may outlive static destructors.
  static Completer& instance();
  void post(std::function<void()> task);
  // Waits until no task is queued or running, at most `timeout`.
  void drain(std::chrono::milliseconds timeout);

 private:
  void loop();

  std::mutex mutex_;
  std::condition_variable posted_;
  std::condition_variable drained_;
  std::deque<std::function<void()>> tasks_;
  size_t idle_ = 0;
  size_t running_ = 0;
};

}  // namespace ringcomm::adapter
