#include "transport/staging_writer.h"

#include <algorithm>

#include "transport/shm_group.h"

namespace ringcomm {
namespace {

// Calls from probe to probe, by size class: a probe takes a few segments, of which a large call has many.
constexpr int kProbeEvery[StoreTuner::kSizeClasses] = {512, 256, 64, 16};
constexpr double kWorthSwitching = 0.9;

}  // namespace

int StoreTuner::kind_of(OpKind op, bool encoded, int64_t num_bytes) {
  int size_class = 0;
  for (int64_t limit = 128 * 1024; num_bytes > limit && size_class < kSizeClasses - 1; limit *= 8) ++size_class;
  return (encoded ? kNumOps : static_cast<int>(op)) * kSizeClasses + size_class;
}

bool StoreTuner::advance(int kind, int64_t num_segments) {
  Kind& known = kind_at(kind);
  if (known.slot < kSlots) {
    known.slot = std::min(kSlots, known.slot + num_segments);
    if (known.slot < kSlots) return false;
    decide(known);
    known.calls_since_probe = 0;
    return true;
  }
  if (kHaveStreamingStores && ++known.calls_since_probe == kProbeEvery[kind % kSizeClasses]) {
    known.slot = 0;
    std::fill(std::begin(known.cost), std::end(known.cost), 0.0);
  }
  return false;
}

void StoreTuner::decide(Kind& kind) {
  // The lower median: a segment may be interrupted, which is not the store's fault.
  const auto cost_of = [&](bool streams) {
    double costs[kSlots];
    int found = 0;
    for (int64_t slot = 0; slot < kSlots; ++slot) {
      if (counts(slot) && streams_in(slot) == streams) costs[found++] = kind.cost[slot];
    }
    std::sort(costs, costs + found);
    return costs[(found - 1) / 2];
  };
  const double now = cost_of(kind.streams);
  if (cost_of(!kind.streams) < kWorthSwitching * now) kind.streams = !kind.streams;
}

StagingWriter::StagingWriter(ShmGroup& group, OpKind op, bool encoded, int64_t num_bytes, int64_t num_segments)
    : group_(group),
      tuner_(group.store_tuner()),
      kind_(StoreTuner::kind_of(op, encoded, num_bytes)),
      num_segments_(num_segments),
      first_slot_(tuner_.first_slot(kind_)),
      streams_(group.peers_want_streaming(kind_)) {}

StagingWriter::~StagingWriter() {
  if (tuner_.advance(kind_, num_segments_)) group_.vote_streaming(kind_, tuner_.prefers_streaming(kind_));
}

}  // namespace ringcomm
