// How a line of a staging buffer gets from the core that writes it to the core that reads it, and back.
//
// Writing a line again that another core has read is expensive: that core's copy is called back, line by
// line. There are two ways around it, and which of the three is best depends on the processor and on the
// cores that a scheduler or a hypervisor runs the ranks on. Measured on an EPYC, in us, for 64 KiB to be
// written and read in turn (on one core complex; between two):
//   cached     plain stores, plain loads                                            10.3; 40
//   claimed    the reader writes to every line that it has read: the line is its     4.1;  9.5
//              own, and comes back like any line that another core has changed
//   streamed   the writer stores past the caches, the reader reads from memory       8.5;  7.0
// So it is measured: now and then a few segments are handed over in each way, every rank compares what it
// spent, and votes. Bytes are the same in all, so ranks need not agree at the same moment.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "base/cache_lines.h"
#include "wire/descriptor.h"

namespace ringcomm {

enum class Handover : uint8_t { claimed = 0, streamed = 1, cached = 2 };
constexpr int kNumHandovers = 3;

// What a group has learned, by kind of call. Every rank sees the same calls, so all probe at once.
class HandoverTuner {
 public:
  // Kinds of call: operation (with a codec: one more) x size class.
  static constexpr int kSizeClasses = 4;
  static constexpr int kKinds = (kNumOps + 1) * kSizeClasses;
  static int kind_of(OpKind op, bool encoded, int64_t num_bytes);

  // A probe is kSlots segments, of one call or of several: runs of four per handover, twice. The first two
  // of a run still find their buffers as the run before left them and do not count.
  static constexpr int64_t kRun = 4;
  static constexpr int64_t kSlots = 2 * kRun * kNumHandovers;
  static constexpr Handover handover_in(int64_t slot) { return static_cast<Handover>(slot / kRun % kNumHandovers); }
  static constexpr bool counts(int64_t slot) { return slot % kRun >= kRun / 2; }

  // The slot of a call's first segment, kSlots if the call is not part of a probe.
  int64_t first_slot(int kind) const { return kind_at(kind).slot; }
  void record(int kind, int64_t slot, double ns_per_byte) { kind_at(kind).cost[slot] += ns_per_byte; }
  // After a call of num_segments. True if it ended a probe.
  bool advance(int kind, int64_t num_segments);
  // What won the last probe.
  Handover best(int kind) const { return kind_at(kind).best; }

 private:
  struct Kind {
    int64_t slot = 0;
    int calls_since_probe = 0;
    Handover best = Handover::claimed;
    double cost[kSlots] = {};  // of all timed steps of one segment, ns per byte
  };
  const Kind& kind_at(int kind) const { return kinds_[static_cast<size_t>(kind)]; }
  Kind& kind_at(int kind) { return kinds_[static_cast<size_t>(kind)]; }
  static void decide(Kind& kind);
  std::array<Kind, kKinds> kinds_{};
};

class ShmGroup;

// The staging buffers in one call. num_bytes (the call's size) and num_segments are the same on all ranks.
class StagingAccess {
 public:
  StagingAccess(ShmGroup& group, OpKind op, bool encoded, int64_t num_bytes, int64_t num_segments);
  ~StagingAccess();
  StagingAccess(const StagingAccess&) = delete;

  // Whether this rank's buffers should be written with stream_copy(). write() does it.
  bool streams(int64_t segment) const { return handover(segment) == Handover::streamed; }

  // memcpy into a buffer of this rank. 0 bytes from null and to == from are allowed.
  void write(int64_t segment, void* to, const void* from, int64_t num_bytes) const {
    if (num_bytes <= 0 || to == from) return;
    if (streams(segment)) {
      stream_copy(to, from, static_cast<size_t>(num_bytes));
    } else {
      std::memcpy(to, from, static_cast<size_t>(num_bytes));
    }
  }

  // This rank has read these bytes of a peer's buffer for the last time in this segment.
  void has_read(int64_t segment, uint8_t* data, int64_t num_bytes) const {
    if (handover(segment) == Handover::claimed) claim_lines(data, static_cast<size_t>(num_bytes));
  }

  // Runs `work`, which writes or reads staged bytes of a segment of num_bytes and never waits.
  template <typename Work>
  void timed(int64_t segment, int64_t num_bytes, const Work& work) {
    if (!probes(segment) || !HandoverTuner::counts(first_slot_ + segment) || num_bytes == 0) return work();
    const auto start = std::chrono::steady_clock::now();
    work();
    const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - start;
    tuner_.record(kind_, first_slot_ + segment, spent.count() / static_cast<double>(num_bytes));
  }

 private:
  bool probes(int64_t segment) const { return first_slot_ + segment < HandoverTuner::kSlots; }
  Handover handover(int64_t segment) const {
    return probes(segment) ? HandoverTuner::handover_in(first_slot_ + segment) : elected_;
  }

  ShmGroup& group_;
  HandoverTuner& tuner_;
  const int kind_;
  const int64_t num_segments_;
  const int64_t first_slot_;
  const Handover elected_;  // outside of probes
};

}  // namespace ringcomm
