// The group's one fault: the first failure wins, every rank raises the same sentence.
#pragma once

#include <string>

#include "base/error.h"
#include "wire/shared_layout.h"

namespace ringcomm {

// How sentences about a failure end.
constexpr const char* kCommunicatorLost = "The communicator is lost: close it and init() a new one.";

// Records a failure and wakes every sleeping rank; returns false if there is one already.
// slots: address of each rank's staging slab and its layout are needed to wake waiters; the group
// passes a function that wakes all flags.
template <typename WakeAll>
bool report_fault(ControlPage& page, int reporter_rank, const Error& error, WakeAll wake_all) {
  FaultRecord& fault = page.fault;
  const uint32_t claimed = static_cast<uint32_t>(reporter_rank) + 1;
  uint32_t expected = 0;
  if (!fault.state.compare_exchange_strong(expected, claimed, std::memory_order_acq_rel)) return false;
  fault.kind = static_cast<uint32_t>(error.kind());
  fault.culprit_rank = error.culprit_rank();
  std::strncpy(fault.text, error.what(), kFaultTextBytes - 1);
  fault.state.store(claimed | kFaultReady, std::memory_order_release);
  wake_all();
  return true;
}

inline bool has_fault(const ControlPage& page) { return page.fault.state.load(std::memory_order_acquire) != 0; }

// The error that all ranks raise. Call only after has_fault().
Error fault_error(const ControlPage& page);

}  // namespace ringcomm
