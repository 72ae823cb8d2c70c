#include "transport/staging_access.h"

#include <algorithm>

#include "transport/shm_group.h"

namespace ringcomm {
namespace {

// Calls from probe to probe, by size class: a probe takes a few segments, of which a large call has many.
constexpr int kProbeEvery[HandoverTuner::kSizeClasses] = {1024, 512, 128, 32};
constexpr double kWorthSwitching = 0.9;

static_assert(HandoverTuner::kKinds <= sizeof(RankLine::handover_votes), "a vote for every kind");

}  // namespace

int HandoverTuner::kind_of(OpKind op, bool encoded, int64_t num_bytes) {
  int size_class = 0;
  for (int64_t limit = 128 * 1024; num_bytes > limit && size_class < kSizeClasses - 1; limit *= 8) ++size_class;
  return (encoded ? kNumOps : static_cast<int>(op)) * kSizeClasses + size_class;
}

bool HandoverTuner::advance(int kind, int64_t num_segments) {
  Kind& known = kind_at(kind);
  if (known.slot < kSlots) {
    known.slot = std::min(kSlots, known.slot + num_segments);
    if (known.slot < kSlots) return false;
    decide(known);
    known.calls_since_probe = 0;
    return true;
  }
  if (++known.calls_since_probe == kProbeEvery[kind % kSizeClasses]) {
    known.slot = 0;
    std::fill(std::begin(known.cost), std::end(known.cost), 0.0);
  }
  return false;
}

void HandoverTuner::decide(Kind& kind) {
  // The lower median: a segment may be interrupted, which is not the handover's fault.
  const auto cost_of = [&](Handover handover) {
    double costs[kSlots];
    int found = 0;
    for (int64_t slot = 0; slot < kSlots; ++slot) {
      if (counts(slot) && handover_in(slot) == handover) costs[found++] = kind.cost[slot];
    }
    std::sort(costs, costs + found);
    return costs[(found - 1) / 2];
  };
  double limit = kWorthSwitching * cost_of(kind.best);
  for (const Handover other : {Handover::claimed, Handover::streamed, Handover::cached}) {
    if (other == kind.best || cost_of(other) >= limit) continue;
    limit = cost_of(other);
    kind.best = other;
  }
}

StagingAccess::StagingAccess(ShmGroup& group, OpKind op, bool encoded, int64_t num_bytes, int64_t num_segments)
    : group_(group),
      tuner_(group.handover_tuner()),
      kind_(HandoverTuner::kind_of(op, encoded, num_bytes)),
      num_segments_(num_segments),
      first_slot_(tuner_.first_slot(kind_)),
      elected_(group.elected(kind_)) {}

StagingAccess::~StagingAccess() {
  if (tuner_.advance(kind_, num_segments_)) group_.vote(kind_, tuner_.best(kind_));
}

}  // namespace ringcomm
