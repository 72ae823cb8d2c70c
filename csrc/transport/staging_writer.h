// How a rank writes the bytes that its peers will read: through the caches, or past them.
//
// Through the caches is fastest while both cores share a last-level cache. Between core complexes or
// sockets, writing a line again that the other core has read is expensive (measured on an EPYC: 64 MiB
// all_reduce of two ranks 39 ms, against 7.8 ms with streaming stores; on one complex 8.3 ms against
// 11.4 ms). Which of the two holds is not knowable from the outside: a scheduler or a hypervisor may move
// ranks at any time. So it is measured: now and then a few segments are written the one way and the other,
// every rank compares what it spent on either, and votes; a writer does what most of its readers ask for.
// Bytes are the same either way, so ranks need not agree at the same moment.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "base/stream_copy.h"
#include "wire/descriptor.h"

namespace ringcomm {

// What a group has learned, by kind of call. Every rank sees the same calls, so all probe at once.
class StoreTuner {
 public:
  // Kinds of call: operation (with a codec: one more) x size class.
  static constexpr int kSizeClasses = 4;
  static constexpr int kKinds = (kNumOps + 1) * kSizeClasses;
  static_assert(kKinds <= 64, "one bit each in RankLine::store_votes");
  static int kind_of(OpKind op, bool encoded, int64_t num_bytes);

  // A probe is kSlots segments, of one call or of several: runs of four with one store, then the other.
  // The first two of a run still find their buffers as the other store left them and do not count.
  static constexpr int64_t kSlots = 16;
  static constexpr bool streams_in(int64_t slot) { return (slot & 4) != 0; }
  static constexpr bool counts(int64_t slot) { return (slot & 2) != 0; }

  // The slot of a call's first segment, kSlots if the call is not part of a probe.
  int64_t first_slot(int kind) const { return kind_at(kind).slot; }
  void record(int kind, int64_t slot, double ns_per_byte) { kind_at(kind).cost[slot] += ns_per_byte; }
  // After a call of num_segments. True if it ended a probe.
  bool advance(int kind, int64_t num_segments);
  // Whether streaming stores won the last probe.
  bool prefers_streaming(int kind) const { return kind_at(kind).streams; }

 private:
  struct Kind {
    int64_t slot = kHaveStreamingStores ? 0 : kSlots;
    int calls_since_probe = 0;
    bool streams = false;
    double cost[kSlots] = {};  // of all timed steps of one segment, ns per byte
  };
  const Kind& kind_at(int kind) const { return kinds_[static_cast<size_t>(kind)]; }
  Kind& kind_at(int kind) { return kinds_[static_cast<size_t>(kind)]; }
  static void decide(Kind& kind);
  std::array<Kind, kKinds> kinds_{};
};

class ShmGroup;

// The writes of one call into this rank's input and result buffers. num_bytes (the call's size) and
// num_segments are the same on all ranks.
class StagingWriter {
 public:
  StagingWriter(ShmGroup& group, OpKind op, bool encoded, int64_t num_bytes, int64_t num_segments);
  ~StagingWriter();
  StagingWriter(const StagingWriter&) = delete;

  bool streams(int64_t segment) const {
    return probes(segment) ? StoreTuner::streams_in(first_slot_ + segment) : streams_;
  }

  // memcpy into a staging buffer. 0 bytes from null and to == from are allowed.
  void copy(int64_t segment, void* to, const void* from, int64_t num_bytes) const {
    if (num_bytes <= 0 || to == from) return;
    if (streams(segment)) {
      stream_copy(to, from, static_cast<size_t>(num_bytes));
    } else {
      std::memcpy(to, from, static_cast<size_t>(num_bytes));
    }
  }

  // Runs `work`, which writes or reads staged bytes of a segment of num_bytes and never waits.
  template <typename Work>
  void timed(int64_t segment, int64_t num_bytes, const Work& work) {
    if (!probes(segment) || !StoreTuner::counts(first_slot_ + segment) || num_bytes == 0) return work();
    const auto start = std::chrono::steady_clock::now();
    work();
    const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - start;
    tuner_.record(kind_, first_slot_ + segment, spent.count() / static_cast<double>(num_bytes));
  }

 private:
  bool probes(int64_t segment) const { return first_slot_ + segment < StoreTuner::kSlots; }

  ShmGroup& group_;
  StoreTuner& tuner_;
  const int kind_;
  const int64_t num_segments_;
  const int64_t first_slot_;
  const bool streams_;  // outside of probes
};

}  // namespace ringcomm
