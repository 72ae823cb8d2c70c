// Which algorithm runs a call: one data table, a pure function of the call, the same on every rank.
#pragma once

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "algo/collective.h"
#include "transport/device_group.h"

namespace ringcomm {

// By operation: the largest call that its first algorithm runs, in bytes of Collective::num_bytes().
using Limits = std::vector<std::pair<OpKind, int64_t>>;

// Measured limits of one group, in place of built-in ones; the same on all ranks. What is not given
// stays as it is built in.
class Tuning {
 public:
  Tuning() { limits_.fill(-1); }
  // Of one_shot; in a gather, scatter or all_to_all, limits are of what a rank hands to others. Throws UsageError
  // unless 0 to inline_bytes.
  Tuning(const Limits& limits, int64_t inline_bytes);
  // Of arrays on GPUs whose kernels wait for each other: of one_shot in an all_reduce, of staged in a broadcast. More
  // than the packets hold is as much as they hold. Throws UsageError for other operations, and below 0.
  static Tuning of_devices(const Limits& limits);

  bool has_limit(OpKind op) const { return limits_[static_cast<size_t>(op)] >= 0; }
  int64_t limit(OpKind op) const { return limits_[static_cast<size_t>(op)]; }

 private:
  std::array<int64_t, kNumOps> limits_;
};

struct Choice {
  Algo algo;
  const char* reason;
  int64_t tuned_limit = -1;       // if it was measured
  Algo limited = Algo::one_shot;  // by it

  std::string explanation() const;
};

// inline_bytes: what fits beside a flag (ShmGroup::inline_bytes). In a gather, scatter or all_to_all
// this is what a rank that hands out equal parts does (one_shot or staged); with uneven parts every rank
// decides for itself. symmetric: the array is in symmetric memory on every rank.
Choice choose_algo(const Tuning& tuning, OpKind op, int64_t num_bytes, int world_size, bool has_codec, bool symmetric,
                   int64_t inline_bytes);

// Throws UsageError unless `algo` can run the call.
void check_algo(Algo algo, OpKind op, int64_t num_bytes, int world_size, bool has_codec, bool symmetric,
                int64_t inline_bytes);

// The same two for arrays on GPUs; in host mode they are those above. direct: where all ranks' arrays are mapped, which
// shows when they meet (algo/direct_on_device.h); not below direct_bytes, -1: never.
Choice choose_device_algo(const Tuning& tuning, OpKind op, int64_t num_bytes, int world_size, bool has_codec,
                          DeviceMode mode, const DeviceLayout& layout, int64_t direct_bytes);
void check_device_algo(Algo algo, OpKind op, int64_t num_bytes, bool has_codec, DeviceMode mode,
                       const DeviceLayout& layout);

// What one rank hands to its peers, in bytes, if the call is exact: the root in a broadcast or scatter, the
// others in a reduce or gather (float32 partial sums in a ring of
// 16-bit values are not counted here); for explain() and tests.
int64_t exact_wire_bytes(OpKind op, Algo algo, int64_t num_bytes, int world_size);

}  // namespace ringcomm
