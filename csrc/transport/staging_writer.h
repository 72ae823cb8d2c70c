// How a rank writes the bytes that its peers will read: through the caches, or past them.
//
// Through the caches is fastest while both cores share a last-level cache. Between core complexes or
// sockets a line that one core has just written is expensive for the other (measured on an EPYC: 64 MiB
// all_reduce of two ranks 39 ms, against 7.8 ms with streaming stores; on one complex 8.3 ms against
// 11.4 ms). Which of the two holds is not knowable from the outside: a scheduler or a hypervisor may move
// ranks at any time. So it is measured: now and then a call alternates between both kinds from segment to
// segment, every rank compares what it spent on either, and votes; a writer does what most of its readers
// ask for. Bytes are the same either way, so ranks need not agree at the same moment.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "base/stream_copy.h"
#include "wire/descriptor.h"

namespace ringcomm {

// What a group has learned, by kind of call. Every rank sees the same calls, so probes happen together.
class StoreTuner {
 public:
  // Steps of an algorithm that are timed apart: each costs something else per byte.
  static constexpr int kSteps = 3;
  static constexpr int kSizeClasses = 4;
  static constexpr int kKinds = kNumOps * kSizeClasses;
  static_assert(kKinds <= 64, "one bit each in RankLine::store_votes");
  static int kind_of(OpKind op, int64_t num_bytes);

  // Counts a call of this kind. True if it is a probe: calls come in pairs, of which the second starts
  // with the other store, so that calls of one segment are compared too.
  bool next_is_probe(int kind);
  bool second_of_pair(int kind) const { return (state(kind).calls & 1u) == 0; }
  // Of a probe: what a step of one segment took.
  void record(int kind, bool streamed, int step, double ns_per_byte);
  // After the second call of a probe. True if streaming is to be preferred from now on.
  bool decide(int kind);

 private:
  struct Kind {
    uint32_t calls = 0;
    bool streams = false;
    double best[2][kSteps] = {};  // ns per byte, not streamed and streamed; 0: none. The minimum: whatever
                                  // interrupts a step is not the store's fault
  };
  const Kind& state(int kind) const { return kinds_[static_cast<size_t>(kind)]; }
  std::array<Kind, kKinds> kinds_{};
};

class ShmGroup;

// The writes of one call into this rank's input and result buffers. num_bytes: the call's size, the same on
// all ranks.
class StagingWriter {
 public:
  StagingWriter(ShmGroup& group, OpKind op, int64_t num_bytes);
  ~StagingWriter();
  StagingWriter(const StagingWriter&) = delete;

  bool streams(int64_t segment) const { return probes(segment) ? ((segment & 1) != 0) != first_streams_ : streams_; }

  // memcpy into a staging buffer. 0 bytes from null and to == from are allowed.
  void copy(int64_t segment, void* to, const void* from, int64_t num_bytes) const {
    if (num_bytes <= 0 || to == from) return;
    if (streams(segment)) {
      stream_copy(to, from, static_cast<size_t>(num_bytes));
    } else {
      std::memcpy(to, from, static_cast<size_t>(num_bytes));
    }
  }

  // Runs `work`, which writes or reads num_bytes of staged bytes of the segment and never waits.
  template <typename Work>
  void timed(int step, int64_t segment, int64_t num_bytes, const Work& work) {
    if (!probes(segment) || num_bytes == 0) return work();
    const auto start = std::chrono::steady_clock::now();
    work();
    const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - start;
    tuner_.record(kind_, streams(segment), step, spent.count() / static_cast<double>(num_bytes));
  }

 private:
  bool probes(int64_t segment) const { return probe_ && segment < kProbeSegments; }

  ShmGroup& group_;
  StoreTuner& tuner_;
  const int kind_;
  static constexpr int64_t kProbeSegments = 8;
  bool probe_;
  bool first_streams_;  // in a probe: of the even segments
  bool streams_;        // of all others
};

}  // namespace ringcomm
