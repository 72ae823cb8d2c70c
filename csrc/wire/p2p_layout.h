// Point-to-point messages: what the slab of each rank holds for them, after the buffers of the
// collectives. A rank writes only its own slab: as sender its messages, as receiver what it has taken
// and what it asks for. The one exception is the doorbell, which peers silence when they wake a rank.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "base/partition.h"
#include "wire/shared_layout.h"

namespace ringcomm {

// 1 while the rank sleeps in the kernel until a peer changes something; also the futex word.
struct alignas(kCacheLine) Doorbell {
  std::atomic<uint32_t> asleep;
  char pad[kCacheLine - 4];
};
static_assert(sizeof(Doorbell) == kCacheLine, "wire layout");

// Powers of two, so that numbers that wrap around still find their place.
constexpr uint32_t kMessageSlots = 8;   // messages on the way from one rank to another
constexpr uint32_t kGrants = 4;         // long messages that a receiver has asked for ahead
constexpr uint32_t kStreamBuffers = 4;  // pieces of long messages on the way from one rank

// What one rank tells one peer: the first line as sender, the second as receiver. Counters are
// monotonic and wrap around; whoever raises one has written before what it announces.
struct alignas(kCacheLine) Mailbox {
  std::atomic<uint32_t> posted;        // messages put into slots
  std::atomic<uint32_t> streamed;      // pieces put into stream buffers for this peer
  uint32_t buffer_of[kStreamBuffers];  // piece number p lies in stream buffer buffer_of[p % kStreamBuffers]
  char pad[kCacheLine - 8 - sizeof(buffer_of)];
  std::atomic<uint32_t> taken;    // of the peer's messages, off its slots
  std::atomic<uint32_t> granted;  // of the peer's long messages, asked for
  std::atomic<uint32_t> drained;  // of the peer's pieces, copied out
  uint32_t grants[kGrants];       // grant number g asks for the message with this id
  char pad2[kCacheLine - 12 - sizeof(grants)];
};
static_assert(sizeof(Mailbox) == 2 * kCacheLine && offsetof(Mailbox, taken) == kCacheLine, "wire layout");

// A message of at most eager_bytes follows its header in the slot; a longer one waits for its grant.
struct MessageHeader {
  int64_t num_bytes;
  int32_t tag;
  uint32_t id;  // of a long message: what its grant names
};
static_assert(sizeof(MessageHeader) == 16, "wire layout");

//   doorbell                                   one line
//   mailbox 0, 1, ... (by peer)                two lines each
//   slots for peer 0, 1, ... kMessageSlots each: MessageHeader + payload
//   stream buffer 0, 1, ...                    page aligned
struct P2pLayout {
  int64_t begin;  // of all this in the slab
  int world_size;
  int64_t eager_bytes;  // payload of one slot
  int64_t chunk_bytes;  // one stream buffer: one piece of a long message

  // At 128 ranks slots take 320 KiB; few ranks get larger ones.
  static constexpr P2pLayout make(const StagingLayout& staging, int world_size) {
    int64_t eager_bytes = kMaxEagerBytes;
    while (eager_bytes > kMinEagerBytes && eager_bytes * world_size > kEagerBudget) eager_bytes /= 2;
    const int64_t chunk_bytes = round_down(staging.half_bytes / kBufferShare, StagingLayout::kPage);
    return P2pLayout{staging.total_bytes(), world_size, eager_bytes,
                     std::clamp(chunk_bytes, StagingLayout::kPage, kMaxChunkBytes)};
  }
  constexpr int64_t doorbell_offset() const { return begin; }
  constexpr int64_t mailbox_offset(int peer) const {
    return begin + static_cast<int64_t>(sizeof(Doorbell)) + peer * static_cast<int64_t>(sizeof(Mailbox));
  }
  constexpr int64_t slot_offset(int peer, uint32_t number) const {
    return mailbox_offset(world_size) + (peer * int64_t{kMessageSlots} + number % kMessageSlots) * slot_bytes();
  }
  constexpr int64_t stream_offset(uint32_t buffer) const {
    return round_up(slot_offset(world_size, 0), StagingLayout::kPage) + buffer * chunk_bytes;
  }
  constexpr int64_t end() const { return stream_offset(kStreamBuffers); }

  static constexpr int64_t kMaxEagerBytes = 4096;
  static constexpr int64_t kMinEagerBytes = 256;
  static constexpr int64_t kEagerBudget = 32 * 1024;  // of eager_bytes x world_size
  static constexpr int64_t kMaxChunkBytes = 128 * 1024;
  static constexpr int64_t kBufferShare = 4;  // a collective's buffer is this many times as large

 private:
  constexpr int64_t slot_bytes() const {
    return round_up(static_cast<int64_t>(sizeof(MessageHeader)) + eager_bytes, static_cast<int64_t>(kCacheLine));
  }
};

}  // namespace ringcomm
