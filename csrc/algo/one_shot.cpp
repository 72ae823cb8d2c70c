// one_shot: every rank puts its data beside its flag; everyone reads everyone.
//
// Steps       1. copy the input into the own slot and announce   2. wait for the announcements that
//             matter   3. reduce / copy straight from the slots, in rank order
// Wire bytes  (n-1) x input per rank (broadcast: the root only; reduce: 1 x input, the root nothing)
// Scratch     none; the payload must fit into inline_bytes()
// Ordering    one release (announce), one acquire per peer; two slots alternate, so there is no
//             second barrier. Every rank computes the same sum in the same order: equal bits.
// Best for    small messages: one flag hop
#include <array>
#include <optional>

#include "algo/collective.h"
#include "reduce/reduce.h"

namespace ringcomm {
namespace {

constexpr int64_t kFewLines = 4096;  // bytes beside a flag that take no harm from plain stores and loads

}  // namespace

int64_t barrier(ShmGroup& group) {
  group.announce();
  group.wait_all_announced();
  group.end(0);
  return 0;
}

int64_t one_shot(ShmGroup& group, const Collective& call) {
  const int world_size = group.world_size();
  const int64_t num_bytes = call.num_bytes();
  const bool is_root = group.rank() == call.root;
  const bool sends = call.op == OpKind::broadcast ? is_root : call.op != OpKind::reduce || !is_root;
  const int64_t input_bytes = call.op == OpKind::reduce_scatter ? num_bytes * world_size : num_bytes;
  std::optional<StagingAccess> staging;
  if (input_bytes > kFewLines) staging.emplace(group, call.op, false, num_bytes, 1);
  const auto timed = [&](const auto& work) { staging ? staging->timed(0, input_bytes, work) : work(); };
  const auto write = [&](uint8_t* to, const void* from) {
    staging ? staging->write(0, to, from, num_bytes) : copy_bytes(to, from, num_bytes);
  };
  const auto has_read = [&](uint8_t* data) {
    if (staging) staging->has_read(0, data, num_bytes);
  };
  uint8_t* payload = group.inline_payload(group.rank());
  timed([&] {
    if (call.op == OpKind::reduce_scatter) {
      for (int owner = 0; owner < world_size; ++owner) write(payload + owner * num_bytes, call.part_for(owner));
    } else if (sends) {
      write(payload, call.input);
    }
  });
  group.announce();

  if (call.op == OpKind::broadcast) {
    if (sends) {
      copy_bytes(call.output, call.input, num_bytes);
    } else {
      group.wait_announced(call.root);
      timed([&] {
        copy_bytes(call.output, group.inline_payload(call.root), num_bytes);
        has_read(group.inline_payload(call.root));
      });
    }
    group.end(0);
    return sends ? input_bytes * (world_size - 1) : 0;
  }
  if (call.op == OpKind::reduce && !is_root) {
    group.end(0);
    return input_bytes;
  }

  group.wait_all_announced();
  const int64_t offset = call.op == OpKind::reduce_scatter ? group.rank() * num_bytes : 0;
  const auto source = [&](int peer) { return group.inline_payload(peer) + offset; };
  timed([&] {
    if (call.op == OpKind::all_gather) {
      for (int peer = 0; peer < world_size; ++peer) copy_bytes(call.part_from(peer), source(peer), num_bytes);
    } else {
      std::array<const void*, kMaxRanks> inputs;
      for (int peer = 0; peer < world_size; ++peer) {
        inputs[static_cast<size_t>(peer)] = peer == group.rank() && !sends ? call.input : source(peer);
      }
      cpu::reduce(call.dtype, call.reduce_op, ReduceArgs{inputs.data(), world_size, call.count, call.output});
    }
    for (int peer = 0; peer < world_size; ++peer) {
      if (peer != group.rank()) has_read(source(peer));
    }
  });
  group.end(0);
  return sends ? input_bytes * (world_size - 1) : 0;
}

}  // namespace ringcomm
