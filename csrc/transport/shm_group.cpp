#include "transport/shm_group.h"

#include <unistd.h>

#include <algorithm>
#include <thread>
#include <tuple>

#include "base/log.h"
#include "transport/fault.h"
#include "transport/p2p_channel.h"

namespace ringcomm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::microseconds kShortestNap{20};
constexpr std::chrono::microseconds kLongestNap{1000};

int64_t nanoseconds_of(double timeout_s) {
  RC_CHECK(timeout_s > 0, "timeout must be positive, not ", timeout_s, " s");
  return static_cast<int64_t>(timeout_s * 1e9);
}

}  // namespace

void ShmGroup::format_control(int control_fd, int world_size, uint32_t first_seq) {
  Mapping mapping(control_fd, control_bytes(world_size));
  auto* page = reinterpret_cast<ControlPage*>(mapping.data());
  page->magic = kControlMagic;
  page->version = kSharedLayoutVersion;
  page->world_size = static_cast<uint32_t>(world_size);
  for (int rank = 0; rank < world_size; ++rank) {
    RankLine& line = page->ranks[rank];
    line.step.value.store(first_seq, std::memory_order_relaxed);
    line.entered_seq.store(first_seq, std::memory_order_relaxed);
    line.completed_seq.store(first_seq, std::memory_order_relaxed);
  }
}

void ShmGroup::format_staging(int staging_fd, int64_t buffer_bytes, int world_size, uint32_t first_seq) {
  const StagingLayout layout = StagingLayout::make(buffer_bytes);
  Mapping mapping(staging_fd, staging_bytes(buffer_bytes, world_size));
  for (const int parity : {0, 1}) {
    auto* slot = reinterpret_cast<SlotHeader*>(mapping.data() + layout.slot_offset(parity));
    slot->seq.value.store(first_seq, std::memory_order_relaxed);
  }
  P2pChannel::format(P2pLayout::make(layout, world_size), mapping.data(), first_seq);
}

ShmGroup::ShmGroup(const GroupConfig& config)
    : rank_(config.rank),
      world_size_(config.world_size),
      name_(config.name),
      timeout_ns_(nanoseconds_of(config.timeout_s)),
      layout_(StagingLayout::make(config.buffer_bytes)),
      p2p_layout_(P2pLayout::make(layout_, config.world_size)),
      pids_(config.pids),
      first_seq_(config.first_seq),
      check_interrupt_(config.check_interrupt),
      control_(config.control_fd, control_bytes(config.world_size)),
      seq_(config.first_seq),
      step_base_(config.first_seq),
      checked_seq_(static_cast<size_t>(config.world_size), config.first_seq) {
  RC_CHECK(world_size_ >= 1 && world_size_ <= kMaxRanks, "world_size must be 1 to ", kMaxRanks, ", not ", world_size_);
  RC_CHECK(rank_ >= 0 && rank_ < world_size_, "rank must be 0 to ", world_size_ - 1, ", not ", rank_);
  const size_t expected = static_cast<size_t>(world_size_);
  RC_CHECK(config.staging_fds.size() == expected && config.pidfds.size() == expected && config.pids.size() == expected,
           "need one staging segment, pidfd and pid per rank");
  // The smallest piece that any algorithm gives a rank is one cache line (or one block of 32 16-bit values).
  RC_CHECK(layout_.half_bytes >= static_cast<int64_t>(kCacheLine) * world_size_, "a staging buffer of ",
           layout_.half_bytes, " bytes is too small for ", world_size_, " ranks; raise RINGCOMM_STAGING_KIB");
  page_ = reinterpret_cast<ControlPage*>(control_.data());
  if (page_->magic != kControlMagic || page_->version != kSharedLayoutVersion ||
      page_->world_size != static_cast<uint32_t>(world_size_)) {
    RC_FAIL(wire, "the control page of group '", name_, "' says layout version ", page_->version, " for ",
            page_->world_size, " ranks, expected version ", kSharedLayoutVersion, " for ", world_size_,
            "; do all ranks run the same ringcomm?");
  }
  std::vector<LivenessMonitor::Peer> peers;
  for (int peer = 0; peer < world_size_; ++peer) {
    const size_t i = static_cast<size_t>(peer);
    slabs_.emplace_back(config.staging_fds[i], p2p_layout_.end());
    if (peer == rank_) continue;
    UniqueFd pidfd(config.pidfds[i] < 0 ? -1 : ::dup(config.pidfds[i]));
    if (pidfd.get() < 0) log(LogLevel::info, "INIT", "no pidfd of rank ", peer, ": /proc tells whether it lives");
    peers.push_back({peer, config.pids[i], std::move(pidfd)});
  }
  line(rank_).pid.store(pids_[static_cast<size_t>(rank_)], std::memory_order_relaxed);
  if (world_size_ > 1) {
    monitor_ = std::make_unique<LivenessMonitor>(std::move(peers), [this](int peer) { on_peer_death(peer); });
  }
  line(rank_).lifecycle.store(static_cast<uint32_t>(Lifecycle::live), std::memory_order_release);
}

ShmGroup::~ShmGroup() { leave(); }

void ShmGroup::watch(std::function<bool()> still_well) {
  if (monitor_) monitor_->watch(std::move(still_well));
}

void ShmGroup::say_closing() {
  line(rank_).lifecycle.store(static_cast<uint32_t>(Lifecycle::closing), std::memory_order_seq_cst);
  wake_everyone();
}

void ShmGroup::leave() {
  line(rank_).lifecycle.store(static_cast<uint32_t>(Lifecycle::closed), std::memory_order_seq_cst);
  wake_everyone();
  monitor_.reset();
}

// ---- one collective ------------------------------------------------------------------------------

void ShmGroup::set_timeout(double timeout_s) { timeout_ns_.store(nanoseconds_of(timeout_s)); }

void ShmGroup::begin(const Descriptor& descriptor, const Patience& patience) {
  throw_if_failed();
  entering_ = descriptor;
  patience_ = patience;
  line(rank_).entered_seq.store(seq_ + 1, std::memory_order_relaxed);
  // A rank may be one collective ahead of a peer, not two (a broadcast's root does not wait):
  // this keeps slots readable and finds a mismatch at the latest here.
  deadline_set_ = false;
  const uint32_t last = seq_;
  for (int peer = 0; peer < world_size_; ++peer) {
    if (peer == rank_ || checked_seq_[static_cast<size_t>(peer)] == last) continue;
    wait_flag(slot(peer, last).seq, last, peer);
    check_descriptor(peer, last, current_);
  }
  current_ = descriptor;
  ++seq_;
}

void ShmGroup::announce(int64_t offset) {
  SlotHeader& mine = slot(rank_, seq_);
  mine.offset = offset;
  mine.descriptor = current_;
  set_flag(mine.seq, seq_);
}

void ShmGroup::wait_announced(int peer) {
  if (peer == rank_) return;
  wait_flag(slot(peer, seq_).seq, seq_, peer);
  check_descriptor(peer, seq_, current_);
}

void ShmGroup::wait_all_announced() {
  for (int peer = 0; peer < world_size_; ++peer) wait_announced(peer);
}

void ShmGroup::end(uint32_t num_steps) {
  step_base_ += num_steps;
  line(rank_).completed_seq.store(seq_, std::memory_order_relaxed);
}

void ShmGroup::publish_step(uint32_t step) { set_flag(line(rank_).step, step_base_ + step); }

void ShmGroup::wait_step(int peer, uint32_t step) {
  if (peer != rank_) wait_flag(line(peer).step, step_base_ + step, peer);
}

void ShmGroup::wait_all_steps(uint32_t step) {
  for (int peer = 0; peer < world_size_; ++peer) wait_step(peer, step);
}

void ShmGroup::check_descriptor(int peer, uint32_t seq, const Descriptor& mine) {
  const Descriptor theirs = slot(peer, seq).descriptor;
  checked_seq_[static_cast<size_t>(peer)] = seq;
  if (theirs == mine) return;
  const int low = std::min(rank_, peer);
  const std::string my_text = describe(mine, seq);
  const std::string their_text = describe(theirs, seq);
  fail(Error(ErrorKind::mismatch,
             concat("ranks of group '", name_, "' called different operations: rank ", low, " called ",
                    low == rank_ ? my_text : their_text, ", rank ", std::max(rank_, peer), " called ",
                    low == rank_ ? their_text : my_text,
                    ((mine.flags | theirs.flags) & kFlagOnDevice) != 0 ? ". Output buffers are undefined. "
                                                                       : ". No data was reduced. ",
                    kCommunicatorLost)));
}

void ShmGroup::vote(int kind, Handover handover) {
  line(rank_).handover_votes[kind].store(static_cast<uint8_t>(handover), std::memory_order_relaxed);
}

Handover ShmGroup::elected(int kind) const {
  int votes[kNumHandovers] = {};
  for (int rank = 0; rank < world_size_; ++rank) {
    ++votes[line(rank).handover_votes[kind].load(std::memory_order_relaxed) % kNumHandovers];
  }
  return static_cast<Handover>(std::max_element(votes, votes + kNumHandovers) - votes);
}

// ---- flags ---------------------------------------------------------------------------------------

void ShmGroup::set_flag(Flag& flag, uint32_t value) {
  stream_fence();
  // Sequentially consistent with the sleeper's increment: either the sleeper sees the new value or
  // this sees the sleeper.
  flag.value.store(value, std::memory_order_seq_cst);
  if (flag.sleepers.load(std::memory_order_seq_cst) != 0) futex_wake_all(flag.value);
}

void ShmGroup::wait_flag(Flag& flag, uint32_t target, int peer) {
  if (!reached(flag.value.load(std::memory_order_acquire), target)) wait_flag_slowly(flag, target, peer);
}

void ShmGroup::wait_flag_slowly(Flag& flag, uint32_t target, int peer) {
  const auto arrived = [&] { return reached(flag.value.load(std::memory_order_acquire), target); };
  if (spin_wait_(arrived, [this] { throw_if_failed(); })) return;
  start_clock();
  for (;;) {
    const Clock::time_point now = Clock::now();
    check_wait(now);
    throw_if_peer_left(peer, flag, target);
    const std::chrono::nanoseconds left = deadline_ - now;
    if (left.count() <= 0 && !arrived()) fail_deadline(peer);
    flag.sleepers.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t seen = flag.value.load(std::memory_order_seq_cst);
    if (!reached(seen, target) && left.count() > 0) {
      futex_wait(flag.value, seen, std::min<std::chrono::nanoseconds>(left, kMaxSleep));
    }
    flag.sleepers.fetch_sub(1, std::memory_order_seq_cst);
    if (arrived()) return;
  }
}

// Of the waits of one collective together.
void ShmGroup::start_clock() {
  if (deadline_set_) return;
  deadline_ = Clock::now() + call_timeout();
  interrupt_check_due_ = Clock::now() + kInterruptCheck;
  deadline_set_ = true;
}

void ShmGroup::check_wait(Clock::time_point now) {
  throw_if_failed();
  if (now < interrupt_check_due_) return;
  throw_if_interrupted();
  interrupt_check_due_ = now + kInterruptCheck;
}

void ShmGroup::wait_for_device(const std::function<bool()>& done) {
  if (done() || spin_wait_(done, [this] { throw_if_failed(); })) return;
  start_clock();
  // Nothing wakes this thread: naps double, and cost at most their own length.
  for (std::chrono::nanoseconds nap = kShortestNap;; nap = std::min<std::chrono::nanoseconds>(2 * nap, kLongestNap)) {
    if (done()) return;
    const Clock::time_point now = Clock::now();
    check_wait(now);
    if (now >= deadline_) fail_deadline_on_device();
    std::this_thread::sleep_for(nap);
  }
}

void ShmGroup::wait_for_device_outside(const std::function<bool()>& done) {
  throw_if_failed();
  patience_ = {};
  deadline_set_ = false;
  for (int peer = 0; peer < world_size_ && seq_ != first_seq_; ++peer) {
    if (checked_seq_[static_cast<size_t>(peer)] != seq_) wait_announced(peer);
  }
  wait_for_device(done);
}

bool ShmGroup::wait_until_all_left() const {
  const Clock::time_point until = Clock::now() + timeout();
  for (int peer = 0; peer < world_size_; ++peer) {
    const auto is_gone = [&] {
      const char state = read_process_state(pids_[static_cast<size_t>(peer)]).letter;
      return state == 0 || state == 'Z' || state == 'X';
    };
    while (lifecycle(peer) != Lifecycle::closed && !is_gone()) {
      if (Clock::now() >= until) return false;
      std::this_thread::sleep_for(kLongestNap);
    }
  }
  return true;
}

void ShmGroup::wake_everyone() {
  for (int rank = 0; rank < world_size_; ++rank) {
    futex_wake_all(line(rank).step.value);
    futex_wake_all(slot(rank, 0).seq.value);
    futex_wake_all(slot(rank, 1).seq.value);
    doorbell(rank).asleep.store(0, std::memory_order_seq_cst);
    futex_wake_all(doorbell(rank).asleep);
  }
}

// ---- failure -------------------------------------------------------------------------------------

bool ShmGroup::report(const Error& error) {
  return report_fault(*page_, rank_, error, [this] { wake_everyone(); });
}

bool ShmGroup::has_failed() const { return has_fault(*page_); }

Error ShmGroup::fault() const { return fault_error(*page_); }

void ShmGroup::throw_if_failed() const {
  if (has_failed()) throw fault();
}

void ShmGroup::fail(const Error& error) {
  if (report(error)) log(LogLevel::warning, "FAULT", error.what());
  throw fault();
}

void ShmGroup::throw_if_peer_left(int peer, const Flag& flag, uint32_t target) {
  if (lifecycle(peer) != Lifecycle::closed) return;
  if (reached(flag.value.load(std::memory_order_acquire), target)) return;  // it left after it did its part
  fail(Error(
      ErrorKind::peer_lost,
      concat(name_with_pid(peer), " closed group '", name_, "' after ", line(peer).completed_seq.load() - first_seq_,
             " collectives; rank ", rank_, " still waits for it in ", describe_current(),
             ". Every rank must make the same calls before it closes. ", kCommunicatorLost),
      peer));
}

void ShmGroup::throw_if_interrupted() {
  if (!check_interrupt_) return;
  try {
    check_interrupt_();
  } catch (const std::exception& error) {
    report_interrupt(error, concat("in ", describe_current()));
    throw Interrupted{std::current_exception()};
  }
}

void ShmGroup::report_interrupt(const std::exception& error, const std::string& where) {
  const std::string what = error.what();  // "KeyboardInterrupt: ..." and a traceback
  report(Error(ErrorKind::aborted,
               concat(name_with_pid(rank_), " was interrupted (", what.substr(0, what.find_first_of(":\n")), ") ",
                      where, " of group '", name_, "'. ", kCommunicatorLost),
               rank_));
}

// Whom to name when `peer` is late: in a ring, `peer` may itself be waiting for the one that is.
int ShmGroup::furthest_behind(int peer) const {
  const auto progress = [this](int rank) {
    const RankLine& their = line(rank);
    const char state = read_process_state(pids_[static_cast<size_t>(rank)]).letter;
    return std::make_tuple(static_cast<int32_t>(their.entered_seq.load() - seq_), state != 'T' && state != 't',
                           static_cast<int32_t>(their.step.value.load() - step_base_));
  };
  int last = peer;
  for (int rank = 0; rank < world_size_; ++rank) {
    if (rank == rank_ || reached(line(rank).completed_seq.load(), seq_)) continue;
    if (progress(rank) < progress(last)) last = rank;
  }
  return last;
}

std::string ShmGroup::where_is(int peer) const {
  const RankLine& their = line(peer);
  const uint32_t entered = their.entered_seq.load();
  const SlotHeader& announced = slot(peer, entered);
  std::string where;
  if (entered == first_seq_) {
    where = "it has not called any collective yet";
  } else if (!reached(announced.seq.value.load(std::memory_order_acquire), entered)) {
    where = concat("it has just entered collective #", entered);
  } else if (entered == their.completed_seq.load()) {
    // Whether its GPU has come to what the call queued, nobody knows.
    where = concat("its last call, ", describe(announced.descriptor, entered),
                   (announced.descriptor.flags & kFlagOnDevice) != 0 ? ", has returned" : ", is complete");
  } else {
    where = concat("it is inside ", describe(announced.descriptor, entered));
  }
  const ProcessState state = read_process_state(pids_[static_cast<size_t>(peer)]);
  return state.letter == 'T' || state.letter == 't' ? where + ", and the process is stopped" : where;
}

std::chrono::nanoseconds ShmGroup::call_timeout() const {
  return patience_.timeout_s > 0 ? std::chrono::nanoseconds(nanoseconds_of(patience_.timeout_s)) : timeout();
}

// Names all that have not come, not only the one that this rank happens to wait for.
void ShmGroup::fail_monitored(int peer) {
  constexpr size_t kRoom = kFaultTextBytes - 360;  // the rest of the sentence
  const uint32_t barrier = line(rank_).entered_seq.load();
  std::vector<int> late;
  for (int rank = 0; rank < world_size_; ++rank) {
    if (!reached(line(rank).entered_seq.load(), barrier)) late.push_back(rank);
  }
  if (late.empty()) late.push_back(peer);  // entered, and stopped before it could say so
  std::string names;
  for (size_t i = 0; i < late.size(); ++i) {
    const std::string where =
        i == 0 || patience_.names == Patience::Names::all_and_where ? "; " + where_is(late[i]) : "";
    const std::string name = concat("rank ", late[i], " (pid ", pids_[static_cast<size_t>(late[i])], where, ")");
    if (names.size() + name.size() > kRoom) {
      names += concat(" and ", late.size() - i, " more");
      break;
    }
    names += (i == 0 ? "" : ", ") + name;
  }
  fail(Error(ErrorKind::deadline,
             concat(late.size(), " of ", world_size_, " ranks did not come within ",
                    static_cast<double>(call_timeout().count()) / 1e9, " s to ", describe(entering_, barrier),
                    " of group '", name_, "': ", names,
                    ". Look for a rank that takes another path or is slow, or raise timeout=. ", kCommunicatorLost),
             late.front()));
}

void ShmGroup::fail_deadline(int peer) {
  if (patience_.names != Patience::Names::one) fail_monitored(peer);
  const int late = furthest_behind(peer);
  fail(Error(
      ErrorKind::deadline,
      concat(name_with_pid(late), " did not come within ", static_cast<double>(call_timeout().count()) / 1e9,
             " s: rank ", rank_, " waits for it in ", describe_current(), " of group '", name_, "'; ", where_is(late),
             ". Look for a rank that takes another path or is slow, or raise timeout=. ", kCommunicatorLost),
      late));
}

// A GPU may be many calls behind the thread that queued them: which one it waits in is not known here.
void ShmGroup::report_late_on_device(int peer) {
  const uint32_t entered = line(rank_).entered_seq.load();
  const Error error(
      ErrorKind::deadline,
      concat(name_with_pid(peer), " did not come within ", static_cast<double>(timeout().count()) / 1e9,
             " s: the GPU of rank ", rank_, " waits for it in ", describe(slot(rank_, entered).descriptor, entered),
             " of group '", name_, "', or in an earlier call; ", where_is(peer),
             ". Look for a rank that takes another path or is slow, or raise timeout=. ", kCommunicatorLost),
      peer);
  if (report(error)) log(LogLevel::warning, "FAULT", error.what());
}

void ShmGroup::fail_deadline_on_device() {
  fail(Error(
      ErrorKind::deadline,
      concat("the GPU of ", name_with_pid(rank_), " of group '", name_, "' did not finish within ",
             static_cast<double>(call_timeout().count()) / 1e9, " s what was queued on it up to ", describe_current(),
             ". Look for other work that keeps it or its stream busy, or raise timeout=. ", kCommunicatorLost),
      rank_));
}

void ShmGroup::on_peer_death(int peer) {
  const RankLine& their = line(peer);
  if (lifecycle(peer) == Lifecycle::closed) return;
  const uint32_t entered = their.entered_seq.load();
  const bool inside = entered != their.completed_seq.load();
  // The first form is what rendezvous.py says when a rank dies a moment earlier.
  const std::string where =
      entered == first_seq_
          ? std::string(
                "before its first collective. The communicator is lost: close it and init() a new one, with a fresh "
                "store if this one served an earlier run.")
          : concat(inside ? "inside collective #" : "after collective #", entered,
                   ". Output buffers of unfinished calls are undefined. ", kCommunicatorLost);
  const Error error(ErrorKind::peer_lost, concat(name_with_pid(peer), " of group '", name_, "' died ", where), peer);
  if (report(error)) log(LogLevel::warning, "FAULT", error.what());
}

}  // namespace ringcomm
