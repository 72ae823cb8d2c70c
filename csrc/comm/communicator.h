// A communicator: calls in order, synchronous or on a progress thread, with statistics.
//
// Any thread may call; calls run one at a time in the order in which they were made, which must be
// the same on all ranks. A call made while asynchronous ones are pending waits for its turn.
// Point-to-point messages (messages.cpp) take no part in that order: they and the collectives do not
// wait for each other.
#pragma once

#include <array>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "algo/collective.h"
#include "algo/on_device.h"
#include "comm/coalesced.h"
#include "comm/flight_recorder.h"
#include "comm/selection.h"
#include "comm/work.h"
#include "transport/p2p_engine.h"
#include "transport/shm_group.h"

namespace ringcomm {

struct OpStats {
  uint64_t calls = 0;
  uint64_t bytes = 0;       // of the caller's arrays (Collective::num_bytes)
  uint64_t bytes_sent = 0;  // handed to peers
  double seconds = 0;       // inside the collective, waiting included
};

class Communicator {
 public:
  using Clock = std::chrono::steady_clock;

  // limits: see Tuning; the same on all ranks.
  Communicator(const GroupConfig& config, const FlightRecorderConfig& recorder, const Limits& limits);
  ~Communicator();
  Communicator(const Communicator&) = delete;

  int rank() const { return rank_; }
  int world_size() const { return world_size_; }
  int64_t inline_bytes() const { return inline_bytes_; }
  // See encoded_sums_of. on_device: of arrays on GPUs.
  std::vector<Range> encoded_sums(int64_t num_elems, bool on_device) const;

  // Arrays on GPUs are taken from now on; once, between two calls, on all ranks. The group's slabs are open. tuning:
  // the same on all ranks.
  void attach_device(std::shared_ptr<DeviceGroup> devices, const Tuning& tuning);
  // Null: none is attached.
  std::shared_ptr<DeviceGroup> devices() const;
  // Of arrays on GPUs, once it is attached.
  const Tuning& device_tuning() const { return device_tuning_; }

  // algo: null lets the table choose. call.algo is ignored. With arrays on GPUs, returns when the call is queued, if
  // the device group queues.
  void run(Collective call, const Algo* algo, const std::string& tag);
  // The arrays must stay alive until the work is done. With arrays on GPUs, the call comes after what is on its stream
  // now, on a stream of the communicator's.
  std::shared_ptr<Work> submit(Collective call, const Algo* algo, const std::string& tag);
  // The same for a list of arrays (comm/coalesced.h). `like` says all but the arrays.
  void run_list(const Collective& like, const std::vector<ListedArray>& arrays, const std::string& tag);
  std::shared_ptr<Work> submit_list(const Collective& like, const std::vector<ListedArray>& arrays,
                                    const std::string& tag);

  // Maps symmetric memory, of which every rank has a segment of num_bytes; the same calls in the same order
  // on all ranks. Arrays inside it take the direct path as long as the region lives.
  std::shared_ptr<SymmetricRegion> map_symmetric(int64_t num_bytes, const std::vector<int>& fds);
  // Copies between the host and a GPU for a message, in the order of the stream; blocks until it is done, at most the
  // deadline. Takes no part in the order of collectives either.
  void copy_across(int device, void* to, const void* from, int64_t num_bytes, Stream stream) const;
  // Starts a message; goes on by itself if background, else while somebody waits for messages. data
  // must stay alive until the work is done, which for a send means that the caller may change it. A
  // message from this rank to itself has to be in the background or to find its receive posted.
  std::shared_ptr<Work> send(const void* data, int64_t num_bytes, int dst, int tag, bool background);
  // Starts a receive of exactly num_bytes bytes; src: kAnySource takes whichever message with this tag
  // comes first. The work's source() says whose it was.
  std::shared_ptr<Work> recv(void* data, int64_t num_bytes, int src, int tag, bool background);
  // Blocks until a message is done; rethrows its error. An interrupt ends the group, as in run().
  void finish_message(const Work& work) { wait_interruptibly(work, "while it waited for a message"); }

  std::array<OpStats, kNumOps> stats() const;
  struct MessageStats {
    OpStats send, recv;  // seconds: from the call until the message is done
  };
  MessageStats message_stats() const;
  void reset_stats();
  // Blocks until all that this rank has called is done, also on its GPU. The deadline counts from now on.
  void synchronize();
  // The deadline of calls that have not begun to wait yet.
  void set_timeout(double timeout_s);
  // What every later call would throw, or nothing.
  std::optional<Error> fault() const;

  // The last calls, and what a dump of them is.
  const FlightRecorder& recorder() const { return recorder_; }

  // Makes every rank raise AbortedError now and for ever. Never waits.
  void abort(const std::string& reason);
  // Finishes pending calls (bounded by the deadline), tells the peers and releases everything.
  // Idempotent; not collective. If it is interrupted, pending calls fail and it throws Interrupted
  // after it has closed.
  void close();

 private:
  // A call that has been checked.
  struct Prepared {
    Collective call;
    Descriptor descriptor;
  };
  struct Pending {
    Prepared prepared;
    std::shared_ptr<Work> work;
  };

  void run(const Prepared& prepared);
  // Of calls that come one after the other, the work of the last one: an error of another is its error, too.
  std::shared_ptr<Work> submit(std::vector<Prepared> calls);
  // Waits for the turn of a call that found the communicator busy.
  std::shared_ptr<Work> enqueue(Prepared prepared);
  // If nobody has the turn or waits for it.
  bool take_turn(const Prepared& prepared, Clock::time_point* start);
  void mark_end(Work& work, const Collective& call) const;
  void wait_interruptibly(const Work& work, const std::string& where);
  void wait_for_event(const runtime::Event& event) const;
  std::chrono::nanoseconds timeout() const;
  std::shared_ptr<Work> post_message(P2pOp op, bool background);
  // Throws Interrupted, after it has told the peers, if a signal handler raised.
  void check_interrupt(const std::string& where);
  void report_interrupt(const std::exception& error, const std::string& where);
  void finish_and_leave(const std::function<void()>& check_interrupt);
  void check_usable() const;
  Prepared prepare(Collective call, const Algo* algo, const std::string& tag) const;
  // All of them before the first is sent.
  std::vector<Prepared> prepare_list(const Collective& like, const std::vector<ListedArray>& arrays,
                                     const std::string& tag) const;
  OpStats execute(const Prepared& prepared, Clock::time_point start);
  int64_t run_on_host(const Collective& call);
  int64_t run_packed(const Collective& call);
  int64_t dispatch(const Collective& call);
  int64_t dispatch_on_device(const Collective& call);
  void choose(Collective& call, const Algo* algo) const;
  std::shared_ptr<const SymmetricRegion> region_of(const Collective& call) const;
  // premul_sum: the same call on this rank's input times its factor.
  Collective scale_input(Collective call);
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
  const std::shared_ptr<P2pEngine> messages_;
  Scratch scratch_;
  std::shared_ptr<DeviceGroup> devices_;  // guarded; not replaced once it is there
  Tuning device_tuning_;                  // likewise
  std::atomic<bool> has_devices_{false};  // says that it is there

  mutable std::mutex regions_mutex_;
  std::vector<std::weak_ptr<const SymmetricRegion>> regions_;
  std::atomic<uint32_t> num_regions_{0};  // ever mapped

  std::condition_variable changed_;  // of what follows, all of it guarded
  std::deque<Pending> queue_;
  bool busy_ = false;    // somebody has the turn
  bool dumped_ = false;  // a call that failed has dumped; whoever has the turn
  bool stop_ = false;    // close() has begun: nothing is queued any more
  std::atomic<bool> closed_{false};
  std::array<OpStats, kNumOps> stats_;
  MessageStats message_stats_;
  std::thread progress_thread_;  // runs the queue; started by the first call that has to wait or is asynchronous
};

}  // namespace ringcomm
