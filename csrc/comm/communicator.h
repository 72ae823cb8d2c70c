// A communicator: calls in order, synchronous or on a progress thread, with statistics.
//
// Any thread may call; calls run one at a time in the order in which they were made, which must be
// the same on all ranks. A call made while asynchronous ones are pending waits for its turn.
#pragma once

#include <array>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "algo/collective.h"
#include "comm/flight_recorder.h"
#include "comm/selection.h"
#include "transport/shm_group.h"

namespace ringcomm {

// The handle of an asynchronous call.
class Work {
 public:
  bool done() const;
  // Blocks until the call has finished, at most timeout_s (negative: no limit of its own; the
  // communicator's deadline bounds every call). True if it finished; rethrows its error.
  // check_interrupt, if any, runs every kInterruptCheck and may throw; the call itself goes on.
  bool wait(double timeout_s = -1, const std::function<void()>& check_interrupt = {}) const;

 private:
  friend class Communicator;
  void finish(std::exception_ptr error);

  mutable std::mutex mutex_;
  mutable std::condition_variable finished_;
  bool done_ = false;
  std::exception_ptr error_;
};

struct OpStats {
  uint64_t calls = 0;
  uint64_t bytes = 0;       // of the caller's arrays (Collective::num_bytes)
  uint64_t bytes_sent = 0;  // handed to peers
  double seconds = 0;       // inside the collective, waiting included
};

class Communicator {
 public:
  using Clock = std::chrono::steady_clock;

  using OneShotLimits = std::vector<std::pair<OpKind, int64_t>>;

  // limits: see Tuning; the same on all ranks.
  Communicator(const GroupConfig& config, const FlightRecorderConfig& recorder, const OneShotLimits& limits);
  ~Communicator();
  Communicator(const Communicator&) = delete;

  int rank() const { return rank_; }
  int world_size() const { return world_size_; }
  int64_t inline_bytes() const { return inline_bytes_; }
  // See encoded_sums_of.
  std::vector<Range> encoded_sums(int64_t num_elems) const {
    return encoded_sums_of(rank_, num_elems, world_size_, buffer_bytes_);
  }

  // algo: null lets the table choose. call.algo is ignored.
  void run(Collective call, const Algo* algo, const std::string& tag);
  // The arrays must stay alive until the work is done.
  std::shared_ptr<Work> submit(Collective call, const Algo* algo, const std::string& tag);

  std::array<OpStats, kNumOps> stats() const;
  void reset_stats();

  // The last calls, and what a dump of them is.
  const FlightRecorder& recorder() const { return recorder_; }

  // Makes every rank raise AbortedError now and for ever. Never waits.
  void abort(const std::string& reason);
  // Finishes pending calls (bounded by the deadline), tells the peers and releases everything.
  // Idempotent; not collective. If it is interrupted, pending calls fail and it throws Interrupted
  // after it has closed.
  void close();

 private:
  struct Pending {
    Collective call;
    Descriptor descriptor;
    std::shared_ptr<Work> work;
  };

  // Waits for the turn of a call that found the communicator busy.
  std::shared_ptr<Work> enqueue(const Collective& call, const Descriptor& descriptor);
  void wait_interruptibly(const Work& work);
  void report_interrupt(const std::exception& error, const std::string& where);
  void finish_and_leave(const std::function<void()>& check_interrupt);
  void check_usable() const;
  Descriptor prepare(Collective& call, const Algo* algo, const std::string& tag) const;
  OpStats execute(const Collective& call, const Descriptor& descriptor, Clock::time_point start);
  int64_t dispatch(const Collective& call);
  // stats: of no call if it failed.
  void finish_turn(OpKind op, Clock::time_point start, const OpStats& stats);
  void progress();

  const uint64_t fork_generation_;
  const int rank_;
  const int world_size_;
  mutable std::mutex mutex_;         // guards what is marked so; never held while a collective runs
  FlightRecorder recorder_;          // guarded
  std::unique_ptr<ShmGroup> group_;  // used by whoever has the turn
  const int64_t inline_bytes_;
  const int64_t buffer_bytes_;
  const Tuning tuning_;
  const std::function<void()> check_interrupt_;
  Scratch scratch_;

  std::condition_variable changed_;  // of what follows, all of it guarded
  std::deque<Pending> queue_;
  bool busy_ = false;    // somebody has the turn
  bool dumped_ = false;  // a call that failed has dumped; whoever has the turn
  bool stop_ = false;    // close() has begun: nothing is queued any more
  std::atomic<bool> closed_{false};
  std::array<OpStats, kNumOps> stats_;
  std::thread progress_thread_;  // runs the queue; started by the first call that has to wait or is asynchronous
};

}  // namespace ringcomm
