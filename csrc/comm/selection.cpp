#include "comm/selection.h"

#include <algorithm>

#include "base/error.h"
#include "wire/exchange_layout.h"

namespace ringcomm {
namespace {

struct Rule {
  OpKind op;
  int max_world_size;
  int64_t max_bytes;  // of Collective::num_bytes()
  Algo algo;
  const char* reason;
};

constexpr int64_t kKiB = 1024;
constexpr int64_t kAny = INT64_MAX;

// First match wins. Limits of one_shot for all_reduce: its traffic grows with world_size x bytes, so
// it stops earlier with more ranks.
constexpr Rule kRules[] = {
    {OpKind::barrier, kMaxRanks, kAny, Algo::one_shot, "a barrier moves no data"},
    {OpKind::all_reduce, 4, 8 * kKiB, Algo::one_shot, "small: one flag hop, data beside the flag"},
    {OpKind::all_reduce, 8, 4 * kKiB, Algo::one_shot, "small: one flag hop, data beside the flag"},
    {OpKind::all_reduce, kMaxRanks, 2 * kKiB, Algo::one_shot, "small: one flag hop, data beside the flag"},
    {OpKind::all_reduce, kMaxRanks, kAny, Algo::direct, "symmetric memory: peers use it where it is"},
    {OpKind::all_reduce, kMaxRanks, kAny, Algo::two_shot, "large: each rank sums one chunk, least bytes moved"},
    {OpKind::broadcast, kMaxRanks, 32 * kKiB, Algo::one_shot, "small: data beside the flag"},
    {OpKind::broadcast, kMaxRanks, kAny, Algo::direct, "symmetric memory: peers use it where it is"},
    {OpKind::broadcast, kMaxRanks, kAny, Algo::staged, "large: pipelined through two staging buffers"},
    {OpKind::all_gather, kMaxRanks, 32 * kKiB, Algo::one_shot, "small: data beside the flag"},
    {OpKind::all_gather, kMaxRanks, kAny, Algo::direct, "symmetric memory: peers use it where it is"},
    {OpKind::all_gather, kMaxRanks, kAny, Algo::staged, "large: pipelined through two staging buffers"},
    {OpKind::reduce_scatter, kMaxRanks, 32 * kKiB, Algo::one_shot, "small: data beside the flag"},
    {OpKind::reduce_scatter, kMaxRanks, kAny, Algo::direct, "symmetric memory: peers use it where it is"},
    {OpKind::reduce_scatter, kMaxRanks, kAny, Algo::staged, "large: pipelined through two staging buffers"},
    {OpKind::reduce, 4, 32 * kKiB, Algo::one_shot, "small: one flag hop, data beside the flag"},
    {OpKind::reduce, kMaxRanks, 8 * kKiB, Algo::one_shot, "small: one flag hop, data beside the flag"},
    {OpKind::reduce, kMaxRanks, kAny, Algo::direct, "symmetric memory: peers use it where it is"},
    {OpKind::reduce, kMaxRanks, kAny, Algo::two_shot, "large: each rank sums one chunk, the root collects"},
    {OpKind::gather, kMaxRanks, kAny, Algo::one_shot, "small: data beside the flag"},
    {OpKind::gather, kMaxRanks, kAny, Algo::staged, "large: pipelined through two staging buffers"},
    {OpKind::scatter, kMaxRanks, kAny, Algo::one_shot, "small: data beside the flag"},
    {OpKind::scatter, kMaxRanks, kAny, Algo::staged, "large: pipelined through two staging buffers"},
    {OpKind::all_to_all, kMaxRanks, kAny, Algo::one_shot, "small: data beside the flag"},
    {OpKind::all_to_all, kMaxRanks, kAny, Algo::direct, "symmetric memory: peers use it where it is"},
    {OpKind::all_to_all, kMaxRanks, kAny, Algo::staged, "large: pipelined through two staging buffers"},
    {OpKind::monitored_barrier, kMaxRanks, kAny, Algo::one_shot, "a barrier moves no data"},
};

constexpr const char* kWhereMapped =
    "large: used where they are if all ranks' arrays are mapped, else through the slabs";

// Of arrays on GPUs; first match wins. Orders of magnitude of NVLink and of other libraries, until
// `python -m ringcomm.tune --device cuda` has measured those of one_shot in an all_reduce and of staged in a broadcast.
constexpr Rule kDeviceRules[] = {
    {OpKind::all_reduce, 2, 256 * kKiB, Algo::one_shot, "small: data and flags in packets, no wait between rounds"},
    {OpKind::all_reduce, 4, 128 * kKiB, Algo::one_shot, "small: data and flags in packets, no wait between rounds"},
    {OpKind::all_reduce, 8, 64 * kKiB, Algo::one_shot, "small: data and flags in packets, no wait between rounds"},
    {OpKind::all_reduce, kMaxRanks, 32 * kKiB, Algo::one_shot,
     "small: data and flags in packets, no wait between rounds"},
    {OpKind::all_reduce, kMaxRanks, kAny, Algo::direct, kWhereMapped},
    {OpKind::all_reduce, kMaxRanks, kAny, Algo::two_shot, "each rank sums one chunk, least bytes moved"},
    {OpKind::reduce, kMaxRanks, kAny, Algo::direct, kWhereMapped},
    {OpKind::reduce, kMaxRanks, kAny, Algo::two_shot, "each rank sums one chunk, the root collects"},
    {OpKind::broadcast, kMaxRanks, kAny, Algo::direct, kWhereMapped},
    {OpKind::broadcast, 2, kAny, Algo::staged, "through the peers' boxes"},
    {OpKind::broadcast, kMaxRanks, 1024 * kKiB, Algo::staged, "through the peers' boxes"},
    {OpKind::broadcast, kMaxRanks, kAny, Algo::ring, "large: every rank hands it on, so no link is used twice"},
    {OpKind::all_gather, kMaxRanks, kAny, Algo::direct, kWhereMapped},
    {OpKind::all_gather, kMaxRanks, kAny, Algo::staged, "through the peers' boxes"},
    {OpKind::reduce_scatter, kMaxRanks, kAny, Algo::direct, kWhereMapped},
    {OpKind::reduce_scatter, kMaxRanks, kAny, Algo::staged, "through the peers' boxes"},
    {OpKind::gather, kMaxRanks, kAny, Algo::staged, "through the peers' boxes"},
    {OpKind::scatter, kMaxRanks, kAny, Algo::staged, "through the peers' boxes"},
    {OpKind::all_to_all, kMaxRanks, kAny, Algo::staged, "through the peers' boxes"},
};

// What the packets of all blocks hold.
int64_t packet_data_bytes(const DeviceLayout& layout) {
  return layout.num_blocks * layout.packets_per_box * static_cast<int64_t>(sizeof(Packet) / 2);
}

// What a rank hands to peers in an exchange with equal parts; the root in a scatter, the others in a gather.
int64_t exchange_bytes(OpKind op, int64_t num_bytes, int world_size) {
  if (op == OpKind::scatter) return num_bytes * (world_size - 1);
  return op == OpKind::gather ? num_bytes : num_bytes - num_bytes / world_size;
}

// What a rank puts beside its flag in one_shot.
int64_t inline_payload_bytes(OpKind op, int64_t num_bytes, int world_size) {
  if (is_exchange(op)) return exchange_bytes(op, num_bytes, world_size) + ExchangeCounts::bytes(world_size);
  return op == OpKind::reduce_scatter ? num_bytes * world_size : num_bytes;
}

}  // namespace

Tuning::Tuning(const Limits& limits, int64_t inline_bytes) : Tuning() {
  for (const auto& [op, limit] : limits) {
    RC_CHECK(!is_barrier(op), "a ", op_name(op), " has no limit to tune");
    RC_CHECK(limit >= 0 && limit <= inline_bytes, "one_shot's limit for ", op_name(op), " is ", limit,
             " bytes, expected 0 to ", inline_bytes);
    limits_[static_cast<size_t>(op)] = limit;
  }
}

Tuning Tuning::of_devices(const Limits& limits) {
  Tuning tuning;
  for (const auto& [op, limit] : limits) {
    RC_CHECK(op == OpKind::all_reduce || op == OpKind::broadcast, op_name(op),
             " of arrays on GPUs has no limit to tune: one algorithm runs it, whatever its size");
    RC_CHECK(limit >= 0, "the limit for ", op_name(op), " on GPUs is ", limit, " bytes, expected 0 or more");
    tuning.limits_[static_cast<size_t>(op)] = limit;
  }
  return tuning;
}

Choice choose_algo(const Tuning& tuning, OpKind op, int64_t num_bytes, int world_size, bool has_codec, bool symmetric,
                   int64_t inline_bytes) {
  if (has_codec) return {Algo::two_shot, "codec: two quantizations whatever the world size"};
  const bool tuned = tuning.has_limit(op);
  for (const Rule& rule : kRules) {
    if (rule.op != op || world_size > rule.max_world_size) continue;
    if (rule.algo == Algo::direct && !symmetric) continue;
    if (rule.algo != Algo::one_shot) {
      if (num_bytes > rule.max_bytes) continue;
    } else {
      const int64_t bytes = tuned && is_exchange(op) ? exchange_bytes(op, num_bytes, world_size) : num_bytes;
      if (bytes > (tuned ? tuning.limit(op) : rule.max_bytes)) continue;
      if (inline_payload_bytes(op, num_bytes, world_size) > inline_bytes) continue;
    }
    return {rule.algo, rule.reason, tuning.limit(op)};
  }
  RC_FAIL(usage, "no algorithm for ", op_name(op));
}

std::string Choice::explanation() const {
  if (tuned_limit < 0) return reason;
  return concat(reason, "; ", algo_name(limited), " up to ", tuned_limit, " bytes, measured by tune");
}

void check_algo(Algo algo, OpKind op, int64_t num_bytes, int world_size, bool has_codec, bool symmetric,
                int64_t inline_bytes) {
  const bool fits = inline_payload_bytes(op, num_bytes, world_size) <= inline_bytes;
  RC_CHECK(!is_exchange(op), op_name(op), " takes no algo: every rank decides by the size of what it sends");
  bool known = false;
  switch (algo) {
    case Algo::one_shot:
      RC_CHECK(fits, "algo='one_shot' takes at most ", inline_bytes, " bytes per rank, this ", op_name(op), " has ",
               inline_payload_bytes(op, num_bytes, world_size), "; leave algo=None");
      known = true;
      break;
    case Algo::two_shot:
      known = op == OpKind::all_reduce || op == OpKind::reduce;
      break;
    case Algo::ring:
      known = op == OpKind::all_reduce;
      break;
    case Algo::staged:
      known = op == OpKind::broadcast || op == OpKind::all_gather || op == OpKind::reduce_scatter;
      break;
    case Algo::direct:
      known = op == OpKind::all_reduce || op == OpKind::reduce || op == OpKind::broadcast || op == OpKind::all_gather ||
              op == OpKind::reduce_scatter;
      RC_CHECK(!known || symmetric, "algo='direct' takes arrays in symmetric memory, made with comm.empty()");
      break;
  }
  RC_CHECK(known, "algo='", algo_name(algo), "' does not do ", op_name(op));
  RC_CHECK(!has_codec || algo == Algo::two_shot, "a codec runs with algo='two_shot', not '", algo_name(algo), "'");
}

Choice choose_device_algo(const Tuning& tuning, OpKind op, int64_t num_bytes, int world_size, bool has_codec,
                          DeviceMode mode, const DeviceLayout& layout, int64_t direct_bytes) {
  if (has_codec) return {Algo::two_shot, "codec: two quantizations whatever the world size"};
  const bool waits_inside = mode == DeviceMode::in_kernel;
  const Algo limited = op == OpKind::broadcast ? Algo::staged : Algo::one_shot;
  int64_t tuned_limit = waits_inside ? tuning.limit(op) : -1;
  if (limited == Algo::one_shot) tuned_limit = std::min(tuned_limit, packet_data_bytes(layout));
  for (const Rule& rule : kDeviceRules) {
    if (rule.op != op || world_size > rule.max_world_size) continue;
    if (num_bytes > (tuned_limit >= 0 && rule.algo == limited ? tuned_limit : rule.max_bytes)) continue;
    if (rule.algo == Algo::direct && (direct_bytes < 0 || num_bytes < direct_bytes)) continue;
    if (rule.algo == Algo::one_shot && (!waits_inside || num_bytes > packet_data_bytes(layout))) continue;
    if (op == OpKind::broadcast && rule.algo == Algo::ring && !waits_inside) return {Algo::staged, "fewest rounds"};
    return {rule.algo, rule.reason, tuned_limit, limited};
  }
  RC_FAIL(usage, "no algorithm for ", op_name(op), " on GPUs");
}

void check_device_algo(Algo algo, OpKind op, int64_t num_bytes, bool has_codec, DeviceMode mode,
                       const DeviceLayout& layout) {
  RC_CHECK(!is_exchange(op), op_name(op), " takes no algo");
  const bool known = algo == Algo::direct       ? true
                     : op == OpKind::all_reduce ? algo != Algo::staged
                     : op == OpKind::reduce     ? algo == Algo::two_shot
                     : op == OpKind::broadcast  ? algo == Algo::staged || algo == Algo::ring
                                                : algo == Algo::staged;
  RC_CHECK(known, "algo='", algo_name(algo), "' does not do ", op_name(op), " of arrays on GPUs");
  RC_CHECK(!has_codec || algo == Algo::two_shot, "a codec runs with algo='two_shot', not '", algo_name(algo), "'");
  if (algo != Algo::one_shot) return;
  RC_CHECK(mode == DeviceMode::in_kernel, "algo='one_shot' waits inside a kernel, and this group's mode is ",
           device_mode_name(mode), "; leave algo=None");
  RC_CHECK(num_bytes <= packet_data_bytes(layout), "algo='one_shot' takes at most ", packet_data_bytes(layout),
           " bytes per rank on these GPUs, this ", op_name(op), " has ", num_bytes, "; leave algo=None");
}

int64_t exact_wire_bytes(OpKind op, Algo algo, int64_t num_bytes, int world_size) {
  const int64_t others = world_size - 1;
  if (is_exchange(op)) return exchange_bytes(op, num_bytes, world_size);
  if (op == OpKind::reduce) return num_bytes;
  if (op == OpKind::all_reduce && algo != Algo::one_shot) return ceil_div(2 * others * num_bytes, world_size);
  if (algo == Algo::one_shot) return inline_payload_bytes(op, num_bytes, world_size) * others;
  return num_bytes * others;
}

}  // namespace ringcomm
