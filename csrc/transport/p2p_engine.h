// Moves the messages of one rank: on the threads that wait for one, and on a thread of its own while
// asynchronous ones are pending and nobody waits.
//
// Any thread may call. Independent of the group's collectives; shares its fault: a failure of either
// ends both.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

#include "transport/p2p_queues.h"

namespace ringcomm {

class P2pEngine {
 public:
  // The group must live until shut_down() has returned.
  P2pEngine(ShmGroup& group, int num_cores);
  ~P2pEngine();  // after shut_down()
  P2pEngine(const P2pEngine&) = delete;

  // Starts a message and moves what can be moved at once; never waits. background: it goes on even if
  // nobody waits for it. Throws the group's fault, UsageError for a message from this rank to itself
  // without a receive if it is not in the background, AbortedError after shut_down(). Everything else
  // is told to op.on_finish.
  void post(P2pOp op, bool background);

  // Blocks until done() is true, moving messages meanwhile; false if limit_s seconds passed first
  // (negative: no limit). done() becomes true in some on_finish and may be called with a lock held.
  // check_interrupt, if any, runs every kInterruptCheck without locks held and may throw.
  bool wait(const std::function<bool()>& done, double limit_s, const std::function<void()>& check_interrupt);

  // Ends receives for which no message has come, finishes everything else (bounded by the deadline) and
  // waits for all threads to leave. check_interrupt may run and must not throw.
  void shut_down(const std::function<void()>& check_interrupt);

 private:
  using Lock = std::unique_lock<std::mutex>;
  using Clock = std::chrono::steady_clock;
  class Waiter;

  Lock enter();
  template <typename Step>
  void guard(const Step& step);
  bool pump(Lock& lock);
  void drive(Lock& lock, const WaitBudget& budget, const std::function<bool()>& done, Clock::time_point until);
  void sleep(Lock& lock, std::chrono::nanoseconds at_most);
  void run_in_background();

  ShmGroup& group_;
  Doorbell& doorbell_;
  const WaitBudget wait_budget_;
  const WaitBudget background_budget_;

  std::atomic<int> contenders_{0};  // threads about to take the lock: a driver lets them in
  std::mutex mutex_;                // guards what follows
  std::condition_variable changed_;
  P2pQueues queues_;
  std::atomic<int64_t> num_unfinished_{0};  // operations whose on_finish has not returned
  int waiters_ = 0;                         // threads inside wait()
  bool driven_ = false;                     // one of them drives
  int sleepers_ = 0;                        // threads that sleep, or are about to, until the doorbell rings
  bool closing_ = false;
  bool stop_ = false;
  std::thread thread_;  // started by the first message in the background
};

}  // namespace ringcomm
