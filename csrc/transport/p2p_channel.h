// What two ranks say to each other about messages: this rank's view of the two mailboxes between them.
// Nothing here blocks. One thread at a time may use it (the lock of P2pEngine).
#pragma once

#include <cstring>

#include "transport/waiting.h"
#include "wire/p2p_layout.h"

namespace ringcomm {

class P2pChannel {
 public:
  P2pChannel(const P2pLayout& layout, uint8_t* my_slab, uint8_t* peer_slab, int my_rank, int peer_rank,
             uint32_t first_seq)
      : layout_(layout),
        my_slab_(my_slab),
        peer_slab_(peer_slab),
        my_rank_(my_rank),
        peer_rank_(peer_rank),
        mine_(*reinterpret_cast<Mailbox*>(my_slab + layout.mailbox_offset(peer_rank))),
        theirs_(*reinterpret_cast<Mailbox*>(peer_slab + layout.mailbox_offset(my_rank))),
        doorbell_(*reinterpret_cast<Doorbell*>(peer_slab + layout.doorbell_offset())),
        posted_(first_seq),
        streamed_(first_seq),
        grants_seen_(first_seq),
        taken_(first_seq),
        granted_(first_seq),
        drained_(first_seq) {}

  // Every slab before its first use. first_seq: where the wrapping counters start.
  static void format(const P2pLayout& layout, uint8_t* slab, uint32_t first_seq) {
    for (int peer = 0; peer < layout.world_size; ++peer) {
      auto& mailbox = *reinterpret_cast<Mailbox*>(slab + layout.mailbox_offset(peer));
      for (auto* counter : {&mailbox.posted, &mailbox.streamed, &mailbox.taken, &mailbox.granted, &mailbox.drained}) {
        counter->store(first_seq, std::memory_order_relaxed);
      }
    }
  }

  // ---- to the peer -----------------------------------------------------------------------------

  bool can_post() const { return posted_ - theirs_.taken.load(std::memory_order_acquire) < kMessageSlots; }
  // payload: header.num_bytes of them if that is at most eager_bytes, else nothing is read.
  void post(const MessageHeader& header, const void* payload) {
    uint8_t* slot = my_slab_ + layout_.slot_offset(peer_rank_, posted_);
    std::memcpy(slot, &header, sizeof(header));
    if (header.num_bytes > 0 && header.num_bytes <= layout_.eager_bytes) {
      std::memcpy(slot + sizeof(header), payload, static_cast<size_t>(header.num_bytes));
    }
    announce(mine_.posted, ++posted_);
  }

  bool has_grant() const { return theirs_.granted.load(std::memory_order_acquire) != grants_seen_; }
  // The id of the next message that the peer wants; after has_grant().
  uint32_t take_grant() { return theirs_.grants[grants_seen_++ % kGrants]; }

  // Announces a piece that lies in a stream buffer of this rank. The caller keeps at most
  // kStreamBuffers pieces on the way.
  uint32_t stream(uint32_t buffer) {
    mine_.buffer_of[streamed_ % kStreamBuffers] = buffer;
    announce(mine_.streamed, ++streamed_);
    return streamed_;
  }
  // Whether the peer has copied out the piece for which stream() returned `number`.
  bool has_drained(uint32_t number) const { return reached(theirs_.drained.load(std::memory_order_acquire), number); }
  bool all_drained() const { return has_drained(streamed_); }

  // ---- from the peer ---------------------------------------------------------------------------

  // The next message, its payload right behind it if it is a short one; null if there is none.
  const MessageHeader* front() const {
    if (theirs_.posted.load(std::memory_order_acquire) == taken_) return nullptr;
    return reinterpret_cast<const MessageHeader*>(peer_slab_ + layout_.slot_offset(my_rank_, taken_));
  }
  void pop() { announce(mine_.taken, ++taken_); }

  // Asks for a long message. The caller keeps at most kGrants of them unfinished.
  void grant(uint32_t id) {
    mine_.grants[granted_ % kGrants] = id;
    announce(mine_.granted, ++granted_);
  }
  // The next piece; null if there is none.
  const uint8_t* next_piece() const {
    if (theirs_.streamed.load(std::memory_order_acquire) == drained_) return nullptr;
    return peer_slab_ + layout_.stream_offset(theirs_.buffer_of[drained_ % kStreamBuffers] % kStreamBuffers);
  }
  void release_piece() { announce(mine_.drained, ++drained_); }

  // Wakes the peer if it sleeps.
  void ring() {
    // Either the sleeper's last look sees what was written before this, or this sees the sleeper.
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (doorbell_.asleep.load(std::memory_order_relaxed) == 0) return;
    doorbell_.asleep.store(0, std::memory_order_relaxed);
    futex_wake_all(doorbell_.asleep);
  }

 private:
  void announce(std::atomic<uint32_t>& counter, uint32_t value) {
    counter.store(value, std::memory_order_release);
    ring();
  }

  const P2pLayout layout_;
  uint8_t* const my_slab_;
  uint8_t* const peer_slab_;
  const int my_rank_;
  const int peer_rank_;
  Mailbox& mine_;
  const Mailbox& theirs_;
  Doorbell& doorbell_;
  uint32_t posted_, streamed_, grants_seen_;  // as sender to the peer
  uint32_t taken_, granted_, drained_;        // as receiver from it
};

}  // namespace ringcomm
