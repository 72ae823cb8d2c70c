// How a thread waits for what another process writes: spin and yield, then sleep.
//
// Spinning answers in well under a microsecond, sleeping costs tens. Which of them is right depends on who
// else wants the core, and that is found out on the way:
//   nobody          sched_yield() returns at once; the spin goes on for some 250 us before it sleeps
//   other ranks     a yield is what they need to answer, whatever the numbers of ranks and cores say
//   somebody else   a yield costs a whole time slice (3 to 4 ms). Who sleeps is scheduled as soon as it is
//                   woken, so where such yields are frequent there are none for a while
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>

namespace ringcomm {

// The same for a thread that looks at many things at once and takes no time to learn: rounds before it
// yields, and before it sleeps. looks_per_round: what one round costs, in looks at a single flag.
struct WaitBudget {
  int spin_rounds;
  int yield_rounds;

  static WaitBudget make(int num_threads, int num_cores, int looks_per_round = 1) {
    return num_threads <= num_cores ? WaitBudget{4000 / looks_per_round, 0} : WaitBudget{40 / looks_per_round, 20};
  }
};
constexpr int kRoundsPerCheck = 64;

// Upper bound of one sleep: a fault that is set between the check and the sleep is seen this late.
constexpr std::chrono::milliseconds kMaxSleep{20};

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// What a thread has learned about its core. One thread at a time.
class SpinWait {
 public:
  // Returns true as soon as arrived(), false when it is time to sleep. check() runs now and then; it may throw.
  template <typename Arrived, typename Check>
  bool operator()(const Arrived& arrived, const Check& check) {
    const bool yields = may_yield();
    const int rounds = yields ? kRounds : kRoundsWithoutYield;
    for (int round = 1; round <= rounds; ++round) {
      relax();
      if (arrived()) return true;
      if (round % kRoundsPerCheck == 0) check();
      if (!yields || round % kRoundsPerYield != 0) continue;
      const bool goes_on = yield();
      if (arrived()) return true;
      if (!goes_on) return false;
    }
    return false;
  }

 private:
  using Clock = std::chrono::steady_clock;

  static constexpr int kRounds = 4000;
  static constexpr int kRoundsWithoutYield = 40;
  static constexpr int kRoundsPerYield = 16;
  static constexpr std::chrono::milliseconds kLostCore{1};
  // In multiples of what a yield lost. One that comes this soon after the last one, or after a pause, begins
  // a pause; others are the price of a core that is shared now and then.
  static constexpr int kTooSoon = 8;
  static constexpr int kPause = 20;

  bool may_yield() {
    if (paused_) {
      const Clock::time_point now = Clock::now();
      if (now < since_) return false;
      paused_ = false;
      since_ = now;
    }
    return true;
  }
  // False if it began a pause.
  bool yield() {
    const Clock::time_point start = Clock::now();
    ::sched_yield();
    const Clock::time_point end = Clock::now();
    const Clock::duration lost = end - start;
    if (lost < kLostCore) return true;
    paused_ = start - since_ < kTooSoon * lost;
    since_ = paused_ ? end + kPause * lost : end;
    return !paused_;
  }

  bool paused_ = false;
  Clock::time_point since_{};  // paused: until when; else the end of the last loss, or of the pause
};

// Sleeps while `word` is `expected`; may return for no reason. The word may be shared by processes.
inline void futex_wait(std::atomic<uint32_t>& word, uint32_t expected, std::chrono::nanoseconds at_most) {
  timespec time;
  time.tv_sec = at_most.count() / 1000000000;
  time.tv_nsec = at_most.count() % 1000000000;
  ::syscall(SYS_futex, &word, FUTEX_WAIT, expected, &time, nullptr, 0);
}

inline void futex_wake_all(std::atomic<uint32_t>& word) {
  ::syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace ringcomm
