// How a thread waits for what another process writes: spin, give the core away, sleep.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>

namespace ringcomm {

// Spinning answers in well under a microsecond; sleeping costs tens. With a core per thread a waiter
// spins for roughly 100 us before it sleeps; with fewer it gives its core away almost at once.
// looks_per_round: what one round costs, in looks at a single flag.
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
