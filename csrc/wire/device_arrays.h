// What a rank announces of its arrays before a collective on GPUs that may use them where they are: where they lie in
// memory that the peers have mapped, and what of it is new to them.
//
// In the inline payload of every rank: at its start, in an exchange behind the counts (wire/exchange_layout.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/runtime.h"

namespace ringcomm {

constexpr int kRegistrationSlots = 64;    // allocations that a rank has registered at once
constexpr int kMostNewRegistrations = 2;  // in one call: the input's and the output's

struct ArrayPlace {
  // region: memory of comm.empty(), which has the same number on all ranks. allocation: the user's own, in a slot.
  enum class Kind : uint32_t { none = 0, region = 1, allocation = 2 };
  Kind kind;
  uint32_t id;     // of the region; or the slot
  int64_t offset;  // of the array's first byte
};

struct Registration {
  runtime::MemoryHandle handle;
  int64_t slot;
};

struct DeviceArraysRecord {
  ArrayPlace input;
  ArrayPlace output;
  uint64_t dropped;  // a bit for every slot whose memory is not used any more; before what is added
  int64_t num_added;
  Registration added[kMostNewRegistrations];
  // Written later than the rest, and read after the first step: a bit for every registration that this rank has mapped.
  uint64_t mapped;

  static constexpr uint64_t mapped_bit(int owner, int64_t number) {
    return uint64_t{1} << (owner * kMostNewRegistrations + number);
  }
};

}  // namespace ringcomm
