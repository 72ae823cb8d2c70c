// Every byte that ranks of one node share: the control page (one per group) and the staging slab
// (one per rank). Both are memory segments that all ranks map; nothing else computes an offset.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "base/partition.h"
#include "wire/descriptor.h"

namespace ringcomm {

constexpr size_t kCacheLine = 64;
constexpr uint64_t kControlMagic = 0x31304D4D4F434352ull;  // "RCCOMM01" in memory
constexpr uint32_t kSharedLayoutVersion = 5;
constexpr int kMaxRanks = 128;

// A monotonic counter with one writer. Readers wait until it reaches a value (wrap-safe); it is
// never reset. value is also the futex word.
struct Flag {
  std::atomic<uint32_t> value;
  std::atomic<uint32_t> sleepers;  // readers asleep in the kernel; the writer wakes them if not 0
};
static_assert(sizeof(Flag) == 8 && std::atomic<uint32_t>::is_always_lock_free, "wire layout");

// True once a counter that read `value` has reached `target`, also across wrap-around.
constexpr bool reached(uint32_t value, uint32_t target) { return static_cast<int32_t>(value - target) >= 0; }
static_assert(reached(5, 5) && reached(2, 0xFFFFFFFEu) && !reached(0xFFFFFFFEu, 2), "wrap-safe compare");

// closing: finishes the messages that have begun, starts nothing any more.
enum class Lifecycle : uint32_t { absent = 0, live = 1, closed = 2, closing = 3 };

// Written by its rank only: one cache line for the flag others wait on, one for what others read only
// when something went wrong, and one that hardly ever changes.
struct alignas(kCacheLine) RankLine {
  Flag step;  // progress inside staged collectives
  char pad[kCacheLine - sizeof(Flag)];
  std::atomic<uint32_t> lifecycle;
  std::atomic<int32_t> pid;
  std::atomic<uint32_t> entered_seq;    // the collective this rank is in or was in last
  std::atomic<uint32_t> completed_seq;  // the last one it finished
  char pad2[kCacheLine - 16];
  std::atomic<uint8_t> handover_votes[kCacheLine];  // by HandoverTuner::kind_of(): a Handover
};
static_assert(sizeof(RankLine) == 3 * kCacheLine, "wire layout");

// The first failure of the group. Whoever swaps `state` from 0 writes the text; everyone raises it.
constexpr size_t kFaultTextBytes = 960;
constexpr uint32_t kFaultReady = 1u << 31;
struct alignas(kCacheLine) FaultRecord {
  std::atomic<uint32_t> state;  // 0: none; reporter rank + 1: being written; the same | kFaultReady
  uint32_t kind;                // ErrorKind
  int32_t culprit_rank;
  char pad[kCacheLine - 12];
  char text[kFaultTextBytes];  // zero terminated
};
static_assert(sizeof(FaultRecord) == 1024, "wire layout");

// offset               bytes                      content
//      0                  64                      magic, version, world_size
//     64                1024                      FaultRecord
//   1088 -> 1088         192 x world_size         RankLine of rank 0, 1, ...
struct alignas(kCacheLine) ControlPage {
  uint64_t magic;
  uint32_t version;
  uint32_t world_size;
  char pad[kCacheLine - 16];
  FaultRecord fault;
  RankLine ranks[1];  // world_size of them

  static constexpr size_t bytes(int world_size) {
    return offsetof(ControlPage, ranks) + sizeof(RankLine) * static_cast<size_t>(world_size);
  }
};
static_assert(offsetof(ControlPage, fault) == 64 && offsetof(ControlPage, ranks) == 1088, "wire layout");

// Announces one collective. The payload of small collectives follows the header directly, so that
// flag, descriptor and data arrive together.
struct alignas(kCacheLine) SlotHeader {
  Flag seq;        // number of the collective that this slot describes
  int64_t offset;  // of the array in this rank's segment of the descriptor's region
  Descriptor descriptor;
};
static_assert(sizeof(SlotHeader) == kCacheLine, "wire layout");

// The staging slab of one rank.
//   slot 0, slot 1   SlotHeader + inline payload; collective number seq uses slot seq & 1
//   input  0, 1      what this rank hands to the owners of chunks
//   result 0, 1      what this rank hands to everyone
//   then             point-to-point messages, see p2p_layout.h
struct StagingLayout {
  int64_t inline_bytes;  // payload beside the flag
  int64_t half_bytes;    // one of the input / result buffers

  // buffer_bytes: wanted size of one input or result buffer, in bytes.
  static constexpr StagingLayout make(int64_t buffer_bytes) {
    return StagingLayout{kDefaultInlineBytes, round_up(buffer_bytes, kPage)};
  }
  constexpr int64_t slot_offset(int parity) const { return parity * round_up(slot_bytes(), kPage); }
  constexpr int64_t input_offset(int parity) const { return slot_offset(2) + parity * half_bytes; }
  constexpr int64_t result_offset(int parity) const { return input_offset(2) + parity * half_bytes; }
  constexpr int64_t total_bytes() const { return result_offset(2); }

  static constexpr int64_t kPage = 4096;
  static constexpr int64_t kDefaultInlineBytes = 32 * 1024;

 private:
  constexpr int64_t slot_bytes() const { return static_cast<int64_t>(sizeof(SlotHeader)) + inline_bytes; }
};

}  // namespace ringcomm
