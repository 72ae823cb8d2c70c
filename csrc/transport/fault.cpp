#include "transport/fault.h"

#include <chrono>
#include <thread>

namespace ringcomm {

Error fault_error(const ControlPage& page) {
  const FaultRecord& fault = page.fault;
  // The reporter needs microseconds to write its text; only its own death in between makes this wait last.
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::milliseconds(200);
  uint32_t state = fault.state.load(std::memory_order_acquire);
  while ((state & kFaultReady) == 0 && std::chrono::steady_clock::now() < give_up) {
    std::this_thread::yield();
    state = fault.state.load(std::memory_order_acquire);
  }
  if ((state & kFaultReady) == 0) {
    const int reporter = static_cast<int>(state) - 1;
    return Error(ErrorKind::peer_lost,
                 concat("rank ", reporter, " died while it reported another failure. The communicator is lost."),
                 reporter);
  }
  return Error(static_cast<ErrorKind>(fault.kind), std::string(fault.text, strnlen(fault.text, kFaultTextBytes)),
               fault.culprit_rank);
}

}  // namespace ringcomm
