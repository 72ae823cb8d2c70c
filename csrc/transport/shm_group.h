// Ranks of one node over shared memory: flags, announcements, staging buffers, failure.
//
// Every collective runs, on every rank and in the same order, as
//     begin -> [write own inline payload / input buffer] -> announce -> [steps] -> end.
//
// Memory ordering: whatever a rank wrote before announce() or publish_step() is visible to a peer
// after the matching wait returned (release / acquire on one Flag; correct on Arm as on x86).
//
// When buffers may be written:
//   inline payload   from begin() on. begin() has made sure that every peer entered the previous
//                    collective, so nobody reads this slot (two alternate) any more.
//   input buffers    from begin() on. An algorithm that uses them leaves them unread when it ends.
//   result buffers   after wait_all_announced(): peers may read them until they enter the next
//                    collective.
//
// One thread at a time may use a group; Communicator sees to that.
#pragma once

#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "transport/liveness.h"
#include "transport/segment.h"
#include "transport/staging_access.h"
#include "transport/waiting.h"
#include "wire/p2p_layout.h"
#include "wire/shared_layout.h"

namespace ringcomm {

struct GroupConfig {
  int rank = 0;
  int world_size = 1;
  std::string name;              // appears in errors
  double timeout_s = 300;        // the one deadline of every call
  int64_t buffer_bytes = 0;      // of one staging buffer; the same on all ranks
  int num_cores = 1;             // that the ranks of this node share
  int control_fd = -1;           // borrowed
  std::vector<int> staging_fds;  // per rank, borrowed
  std::vector<int> pidfds;       // per rank, borrowed; -1: no pidfd on this kernel
  std::vector<int> pids;         // per rank
  uint32_t first_seq = 0;        // where the wrapping counters start, as format_*() wrote it; for tests
  // Called about every kInterruptCheck by a rank that waits long; throws to interrupt the wait.
  std::function<void()> check_interrupt;
};

// A wait that check_interrupt ended. Not a std::exception: nobody may mistake it for a failed call.
struct Interrupted {
  std::exception_ptr cause;
};
constexpr std::chrono::milliseconds kInterruptCheck{100};

// A collective that has a deadline of its own, and what the error says when it passes.
struct Patience {
  enum class Names { one, all, all_and_where };  // late ranks
  double timeout_s = 0;                          // 0: the group's
  Names names = Names::one;
};

class ShmGroup {
 public:
  // Bytes of the two kinds of segment that the group maps.
  static int64_t control_bytes(int world_size) { return static_cast<int64_t>(ControlPage::bytes(world_size)); }
  static int64_t staging_bytes(int64_t buffer_bytes, int world_size) {
    return P2pLayout::make(StagingLayout::make(buffer_bytes), world_size).end();
  }
  // Prepare the two kinds of segment; once, before any other rank attaches.
  static void format_control(int control_fd, int world_size, uint32_t first_seq);
  static void format_staging(int staging_fd, int64_t buffer_bytes, int world_size, uint32_t first_seq);

  explicit ShmGroup(const GroupConfig& config);
  ~ShmGroup();
  ShmGroup(const ShmGroup&) = delete;

  int rank() const { return rank_; }
  int world_size() const { return world_size_; }
  const std::string& name() const { return name_; }
  int64_t inline_bytes() const { return layout_.inline_bytes; }
  int64_t buffer_bytes() const { return layout_.half_bytes; }

  // Starts collective number seq() with this description. Throws the group's fault if there is one.
  void begin(const Descriptor& descriptor, const Patience& patience = {});
  // Publishes the description, all bytes written so far, and where this rank's array lies in symmetric memory.
  void announce(int64_t offset = 0);
  // What `peer` announced; after the wait for it.
  int64_t announced_offset(int peer) const { return slot(peer, seq_).offset; }
  // Blocks until `peer` has announced this collective; throws MismatchError if it announced another.
  void wait_announced(int peer);
  void wait_all_announced();
  // Finishes; every rank passes the same number of steps, at least the highest it published.
  void end(uint32_t num_steps);

  // Steps count from 1 within one collective. A rank may skip numbers, never go back.
  void publish_step(uint32_t step);
  void wait_step(int peer, uint32_t step);
  void wait_all_steps(uint32_t step);

  // The slot payload of this collective.
  uint8_t* inline_payload(int rank) { return slab(rank) + layout_.slot_offset(parity()) + sizeof(SlotHeader); }
  uint8_t* input_buffer(int rank, int64_t segment) { return slab(rank) + layout_.input_offset(segment & 1); }
  uint8_t* result_buffer(int rank, int64_t segment) { return slab(rank) + layout_.result_offset(segment & 1); }

  // For StagingAccess: what it has learned, this rank's vote, and what most ranks vote for.
  HandoverTuner& handover_tuner() { return handover_tuner_; }
  void vote(int kind, Handover handover);
  Handover elected(int kind) const;

  uint32_t seq() const { return seq_; }
  // Records a failure for all ranks (the first one wins) and throws the one that won.
  [[noreturn]] void fail(const Error& error);
  // The same without throwing; any thread. Whether this one won.
  bool report(const Error& error);
  void throw_if_failed() const;
  bool has_failed() const;
  // What every call throws from now on; after has_failed().
  Error fault() const;
  // Calls still_well() about twice a second, on a thread of the group's, until it returns false. It is called within
  // about half a second of a failure, whichever rank noticed it. Never with a single rank.
  void watch(std::function<bool()> still_well);
  // Records that this rank's GPU gave up waiting for `peer`; any thread.
  void report_late_on_device(int peer);
  // Records for all ranks that check_interrupt threw `error`; any thread. `where` follows "interrupted".
  void report_interrupt(const std::exception& error, const std::string& where);
  // The group's deadline from the next wait on; any thread.
  void set_timeout(double timeout_s);
  // Tells the peers that this rank will not come back; they fail only if they wait for it.
  void leave();
  std::string describe_current() const { return describe(current_, seq_); }

  // ---- what this rank's GPU does. done() polls, and may throw

  // Blocks until done(), within a collective and its deadline.
  void wait_for_device(const std::function<bool()>& done);
  // The same between two collectives, with a deadline of its own, once all ranks have announced the last one.
  void wait_for_device_outside(const std::function<bool()>& done);
  // After leave(): blocks until all peers have left too, or are gone; false if timeout() passed first.
  bool wait_until_all_left() const;

  // ---- for P2pEngine, which shares the slabs and the fate of the group and is not ordered with its calls; any thread

  uint8_t* slab(int rank) const { return slabs_[static_cast<size_t>(rank)].data(); }
  const P2pLayout& p2p_layout() const { return p2p_layout_; }
  uint32_t first_seq() const { return first_seq_; }
  std::chrono::nanoseconds timeout() const { return std::chrono::nanoseconds(timeout_ns_.load()); }
  Lifecycle lifecycle(int rank) const {
    return static_cast<Lifecycle>(line(rank).lifecycle.load(std::memory_order_seq_cst));
  }
  // This rank starts nothing any more but still finishes what has begun.
  void say_closing();
  std::string name_with_pid(int rank) const {
    return concat("rank ", rank, " (pid ", pids_[static_cast<size_t>(rank)], ")");
  }
  // Which collective a rank is in, or was in last; and whether its process is stopped.
  std::string where_is(int rank) const;

 private:
  Doorbell& doorbell(int rank) const {
    return *reinterpret_cast<Doorbell*>(slab(rank) + p2p_layout_.doorbell_offset());
  }
  int parity() const { return static_cast<int>(seq_ & 1u); }
  SlotHeader& slot(int rank, uint32_t seq) const {
    return *reinterpret_cast<SlotHeader*>(slab(rank) + layout_.slot_offset(static_cast<int>(seq & 1u)));
  }
  RankLine& line(int rank) const { return page_->ranks[rank]; }
  void set_flag(Flag& flag, uint32_t value);
  void wait_flag(Flag& flag, uint32_t target, int peer);
  void wait_flag_slowly(Flag& flag, uint32_t target, int peer);
  void start_clock();
  void check_wait(std::chrono::steady_clock::time_point now);
  void check_descriptor(int peer, uint32_t seq, const Descriptor& mine);
  void throw_if_interrupted();
  void throw_if_peer_left(int peer, const Flag& flag, uint32_t target);
  int furthest_behind(int peer) const;
  std::chrono::nanoseconds call_timeout() const;  // of the current collective
  [[noreturn]] void fail_deadline(int peer);
  [[noreturn]] void fail_deadline_on_device();
  [[noreturn]] void fail_monitored(int peer);
  void on_peer_death(int peer);
  void wake_everyone();

  const int rank_;
  const int world_size_;
  const std::string name_;
  std::atomic<int64_t> timeout_ns_;
  const StagingLayout layout_;
  const P2pLayout p2p_layout_;
  const std::vector<int> pids_;
  const uint32_t first_seq_;
  const std::function<void()> check_interrupt_;
  SpinWait spin_wait_;
  Mapping control_;
  ControlPage* page_ = nullptr;
  std::vector<Mapping> slabs_;
  std::unique_ptr<LivenessMonitor> monitor_;

  HandoverTuner handover_tuner_;
  uint32_t seq_;                       // of the current or last collective; the first is first_seq + 1
  Descriptor entering_;                // what begin() was called with last
  Patience patience_;                  // ... and that
  uint32_t step_base_;                 // steps of all finished collectives
  Descriptor current_;                 // of collective seq_
  std::vector<uint32_t> checked_seq_;  // per peer: the last collective whose announcement was seen and compared
  bool deadline_set_ = false;          // the clock starts at the first wait that is not over at once
  std::chrono::steady_clock::time_point deadline_;
  std::chrono::steady_clock::time_point interrupt_check_due_;
};

}  // namespace ringcomm
