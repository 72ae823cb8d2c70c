#include "transport/p2p_engine.h"

#include <sched.h>

#include <algorithm>
#include <utility>

#include "transport/fault.h"

namespace ringcomm {
namespace {

// How often deadlines and peers that left are looked at.
constexpr std::chrono::milliseconds kCheckInterval{5};
// A round of drive() takes the lock and looks at every peer: five times as long as one flag.
constexpr int kLooksPerRound = 5;

// The end of a limit in seconds, which may be any number; negative: never.
std::chrono::steady_clock::time_point end_of(double limit_s) {
  constexpr double kYear = 3e7;
  const auto now = std::chrono::steady_clock::now();
  if (limit_s < 0 || limit_s > kYear) return std::chrono::steady_clock::time_point::max();
  return now + std::chrono::nanoseconds(static_cast<int64_t>(limit_s * 1e9));
}

}  // namespace

P2pEngine::P2pEngine(ShmGroup& group, int num_cores)
    : group_(group),
      doorbell_(*reinterpret_cast<Doorbell*>(group.slab(group.rank()) + group.p2p_layout().doorbell_offset())),
      wait_budget_(WaitBudget::make(group.world_size(), num_cores, kLooksPerRound)),
      // The thread in the background must not take the core of the one that computes.
      background_budget_(WaitBudget::make(2 * group.world_size(), num_cores, kLooksPerRound)),
      queues_(group) {}

P2pEngine::~P2pEngine() = default;

// A failure ends all messages. Usually it is the group's fault; anything else would leave the peers waiting.
template <typename Step>
void P2pEngine::guard(const Step& step) {
  try {
    step();
  } catch (const std::exception& error) {
    group_.report(Error(ErrorKind::aborted,
                        concat("rank ", group_.rank(), " failed in a message of group '", group_.name(),
                               "': ", error.what(), ". ", kCommunicatorLost),
                        group_.rank()));
    try {
      group_.throw_if_failed();
    } catch (const Error&) {
      queues_.fail_all(std::current_exception());
    }
  }
}

void P2pEngine::post(P2pOp op, bool background) {
  P2pOps one;
  one.push_back(std::move(op));
  const P2pOp& message = one.front();
  Lock lock = enter();
  if (closing_) RC_FAIL(aborted, "this communicator is closed; init() a new one");
  group_.throw_if_failed();
  const bool to_itself = message.is_send && message.peer == group_.rank();
  RC_CHECK(background || !to_itself || queues_.awaits_own(message.tag), "rank ", group_.rank(),
           " sends to itself with tag ", message.tag,
           " but no matching recv is posted: call recv(async_op=True) first, or send with async_op=True");
  ++num_unfinished_;
  guard([&] { queues_.post(std::move(one)); });
  pump(lock);
  if (!background || num_unfinished_ == 0) return;
  if (!thread_.joinable()) thread_ = std::thread([this] { run_in_background(); });
  if (waiters_ == 0) changed_.notify_all();
}

bool P2pEngine::pump(Lock& lock) {
  bool moved = false;
  guard([&] { moved = queues_.progress(); });
  P2pOps finished = queues_.take_finished();
  if (finished.empty()) return moved;
  lock.unlock();
  for (P2pOp& op : finished) op.on_finish(op.error, op.peer);
  lock.lock();
  num_unfinished_ -= static_cast<int64_t>(finished.size());
  changed_.notify_all();
  if (sleepers_ > 0) {  // they wait for the doorbell, but perhaps for one of these
    doorbell_.asleep.store(0, std::memory_order_relaxed);
    futex_wake_all(doorbell_.asleep);
  }
  return true;
}

// ---- driving -------------------------------------------------------------------------------------

P2pEngine::Lock P2pEngine::enter() {
  contenders_.fetch_add(1, std::memory_order_relaxed);
  Lock lock(mutex_);
  contenders_.fetch_sub(1, std::memory_order_relaxed);
  return lock;
}

// Moves messages until done() is true, or until `until` has passed.
void P2pEngine::drive(Lock& lock, const WaitBudget& budget, const std::function<bool()>& done,
                      Clock::time_point until) {
  Clock::time_point check_due = Clock::now() + kCheckInterval;
  for (int round = 1;; ++round) {
    if (pump(lock)) round = 0;
    if (done()) return;
    if (round % kRoundsPerCheck == 0 || round > budget.spin_rounds) {
      const Clock::time_point now = Clock::now();
      if (now >= until) return;
      if (now >= check_due) {
        guard([&] { queues_.check(now); });
        check_due = now + kCheckInterval;
      }
    }
    if (round > budget.spin_rounds + budget.yield_rounds) {
      sleep(lock, std::min<std::chrono::nanoseconds>(kMaxSleep, until - Clock::now()));
      continue;
    }
    lock.unlock();
    relax();
    if (round > budget.spin_rounds) ::sched_yield();
    while (contenders_.load(std::memory_order_relaxed) > 0) ::sched_yield();
    lock.lock();
  }
}

// Sleeps until a peer rings, unless there is something to move.
void P2pEngine::sleep(Lock& lock, std::chrono::nanoseconds at_most) {
  ++sleepers_;
  doorbell_.asleep.store(1, std::memory_order_relaxed);
  // Either the look that follows sees what a peer wrote, or the peer sees the sleeper (P2pChannel::ring).
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (!pump(lock)) {
    lock.unlock();
    futex_wait(doorbell_.asleep, 1, at_most);
    lock.lock();
  }
  if (--sleepers_ == 0) doorbell_.asleep.store(0, std::memory_order_relaxed);
}

// A thread inside wait(). One of them drives, the others sleep until it has something for them or leaves.
class P2pEngine::Waiter {
 public:
  Waiter(P2pEngine& engine, Lock& lock) : engine_(engine), lock_(lock) { ++engine_.waiters_; }
  ~Waiter() {
    if (!lock_.owns_lock()) lock_.lock();
    if (drives_) engine_.driven_ = false;
    --engine_.waiters_;
    engine_.changed_.notify_all();
  }
  bool may_drive() {
    if (!drives_) drives_ = !std::exchange(engine_.driven_, true);
    return drives_;
  }

 private:
  P2pEngine& engine_;
  Lock& lock_;
  bool drives_ = false;
};

bool P2pEngine::wait(const std::function<bool()>& done, double limit_s, const std::function<void()>& check_interrupt) {
  if (done()) return true;
  const Clock::time_point limit = end_of(limit_s);
  Lock lock = enter();
  Waiter waiter(*this, lock);
  while (!done()) {
    const Clock::time_point check_due = check_interrupt ? Clock::now() + kInterruptCheck : Clock::time_point::max();
    const Clock::time_point until = std::min(limit, check_due);
    while (!done() && Clock::now() < until) {
      if (waiter.may_drive()) {
        drive(lock, wait_budget_, done, until);
      } else {
        changed_.wait_for(lock, kMaxSleep);
      }
    }
    if (done()) break;
    if (until == limit) return false;
    lock.unlock();
    check_interrupt();
    lock.lock();
  }
  return true;
}

void P2pEngine::run_in_background() {
  Lock lock(mutex_);
  while (!stop_) {
    if (waiters_ > 0 || num_unfinished_ == 0) {
      changed_.wait(lock);
      continue;
    }
    drive(
        lock, background_budget_, [this] { return stop_ || waiters_ > 0 || num_unfinished_ == 0; },
        Clock::time_point::max());
  }
}

// ---- the end -------------------------------------------------------------------------------------

void P2pEngine::shut_down(const std::function<void()>& check_interrupt) {
  {
    Lock lock = enter();
    closing_ = true;
    while (pump(lock)) {
    }
    queues_.fail_unmatched(std::make_exception_ptr(
        Error(ErrorKind::aborted,
              concat("rank ", group_.rank(), " closed group '", group_.name(), "' before this message was matched"),
              group_.rank())));
    pump(lock);
  }
  group_.say_closing();
  wait([this] { return num_unfinished_ == 0; }, -1, check_interrupt);
  Lock lock = enter();
  stop_ = true;
  changed_.notify_all();
  changed_.wait(lock, [this] { return waiters_ == 0; });
  lock.unlock();
  if (thread_.joinable()) thread_.join();
}

}  // namespace ringcomm
