#include "transport/staging_writer.h"

#include <algorithm>

#include "transport/shm_group.h"

namespace ringcomm {
namespace {

constexpr uint32_t kFirstProbes = 4;  // calls
// Calls from probe to probe, by size class: a probe takes a few segments, of which a large call has many.
constexpr uint32_t kProbeEvery[StoreTuner::kSizeClasses] = {256, 128, 32, 8};
constexpr double kWorthSwitching = 0.9;

}  // namespace

int StoreTuner::kind_of(OpKind op, int64_t num_bytes) {
  int size_class = 0;
  for (int64_t limit = 128 * 1024; num_bytes > limit && size_class < kSizeClasses - 1; limit *= 8) ++size_class;
  return static_cast<int>(op) * kSizeClasses + size_class;
}

bool StoreTuner::next_is_probe(int kind) {
  const uint32_t call = kinds_[static_cast<size_t>(kind)].calls++;
  return kHaveStreamingStores && (call < kFirstProbes || call % kProbeEvery[kind % kSizeClasses] < 2);
}

void StoreTuner::record(int kind, bool streamed, int step, double ns_per_byte) {
  double& best = kinds_[static_cast<size_t>(kind)].best[streamed ? 1 : 0][step];
  best = best == 0 ? ns_per_byte : std::min(best, ns_per_byte);
}

bool StoreTuner::decide(int kind) {
  Kind& known = kinds_[static_cast<size_t>(kind)];
  double cost[2] = {0, 0};
  for (int step = 0; step < kSteps; ++step) {
    if (known.best[0][step] == 0 || known.best[1][step] == 0) continue;
    for (const int streamed : {0, 1}) cost[streamed] += known.best[streamed][step];
  }
  const int now = known.streams ? 1 : 0;
  if (cost[1 - now] < kWorthSwitching * cost[now]) known.streams = !known.streams;
  for (auto& steps : known.best) std::fill(std::begin(steps), std::end(steps), 0.0);
  return known.streams;
}

StagingWriter::StagingWriter(ShmGroup& group, OpKind op, int64_t num_bytes)
    : group_(group), tuner_(group.store_tuner()), kind_(StoreTuner::kind_of(op, num_bytes)) {
  probe_ = tuner_.next_is_probe(kind_);
  first_streams_ = tuner_.second_of_pair(kind_);
  streams_ = group.peers_want_streaming(kind_);
}

StagingWriter::~StagingWriter() {
  if (probe_ && tuner_.second_of_pair(kind_)) group_.vote_streaming(kind_, tuner_.decide(kind_));
}

}  // namespace ringcomm
