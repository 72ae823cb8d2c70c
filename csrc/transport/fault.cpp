#include "transport/fault.h"

#include <chrono>
#include <thread>

#include "transport/liveness.h"

namespace ringcomm {
namespace {

// A reporter needs microseconds to write its text. If it dies in between, the others find out here.
constexpr std::chrono::milliseconds kDeadCheck{20};
// A reporter that lives but was stopped in between.
constexpr std::chrono::milliseconds kGiveUp{1000};

}  // namespace

Error fault_error(const ControlPage& page) {
  const FaultRecord& fault = page.fault;
  const auto start = std::chrono::steady_clock::now();
  auto next_check = start + kDeadCheck;
  for (;;) {
    const uint32_t state = fault.state.load(std::memory_order_acquire);
    if ((state & kFaultReady) != 0) break;
    const int reporter = static_cast<int>(state) - 1;
    const auto now = std::chrono::steady_clock::now();
    if (now < next_check) {
      std::this_thread::yield();
      continue;
    }
    next_check = now + kDeadCheck;
    const int pid = page.ranks[reporter].pid.load(std::memory_order_relaxed);
    const char process = read_process_state(pid).letter;
    if (process == 0 || process == 'Z' || process == 'X') {
      return Error(ErrorKind::peer_lost,
                   concat("rank ", reporter, " (pid ", pid,
                          ") died while it reported another failure. The communicator is lost."),
                   reporter);
    }
    if (now - start > kGiveUp) {
      return Error(ErrorKind::deadline,
                   concat("rank ", reporter, " (pid ", pid,
                          ") found a failure but did not say which: it is stopped. The communicator is lost."),
                   reporter);
    }
  }
  return Error(static_cast<ErrorKind>(fault.kind), std::string(fault.text, strnlen(fault.text, kFaultTextBytes)),
               fault.culprit_rank);
}

}  // namespace ringcomm
