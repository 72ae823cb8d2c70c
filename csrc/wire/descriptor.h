// What a rank says it is doing: one 48-byte record per collective, compared by the others before
// they touch a byte of data.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "base/dtype.h"

namespace ringcomm {

// Wire ids: append, never renumber.
enum class OpKind : uint8_t {
  barrier = 0,
  all_reduce = 1,
  broadcast = 2,
  all_gather = 3,
  reduce_scatter = 4,
  reduce = 5,
  gather = 6,
  scatter = 7,
  all_to_all = 8,
  monitored_barrier = 9,
};
constexpr int kNumOps = 10;

constexpr bool is_barrier(OpKind op) { return op == OpKind::barrier || op == OpKind::monitored_barrier; }
// Operations whose counts may differ from one pair of ranks to the next: every rank announces its own
// (wire/exchange_layout.h), the descriptor has none.
constexpr bool is_exchange(OpKind op) {
  return op == OpKind::gather || op == OpKind::scatter || op == OpKind::all_to_all;
}
constexpr bool has_root(OpKind op) {
  return op == OpKind::broadcast || op == OpKind::reduce || op == OpKind::gather || op == OpKind::scatter;
}
constexpr bool reduces(OpKind op) {
  return op == OpKind::all_reduce || op == OpKind::reduce_scatter || op == OpKind::reduce;
}

enum class Algo : uint8_t { one_shot = 0, two_shot = 1, ring = 2, staged = 3, direct = 4 };
constexpr int kNumAlgos = 5;

constexpr const char* op_name(OpKind op) {
  switch (op) {
    case OpKind::barrier:
      return "barrier";
    case OpKind::all_reduce:
      return "all_reduce";
    case OpKind::broadcast:
      return "broadcast";
    case OpKind::all_gather:
      return "all_gather";
    case OpKind::reduce_scatter:
      return "reduce_scatter";
    case OpKind::reduce:
      return "reduce";
    case OpKind::gather:
      return "gather";
    case OpKind::scatter:
      return "scatter";
    case OpKind::all_to_all:
      return "all_to_all";
    case OpKind::monitored_barrier:
      return "monitored_barrier";
  }
  return "?";
}

constexpr const char* algo_name(Algo algo) {
  switch (algo) {
    case Algo::one_shot:
      return "one_shot";
    case Algo::two_shot:
      return "two_shot";
    case Algo::ring:
      return "ring";
    case Algo::staged:
      return "staged";
    case Algo::direct:
      return "direct";
  }
  return "?";
}

// offset  bytes  field
//      0      1  op
//      1      1  dtype
//      2      1  reduce_op      (0 where the operation reduces nothing)
//      3      1  algo           (0 in an exchange that is not direct: every rank's own choice)
//      4      1  codec_up       CodecId
//      5      1  codec_down     CodecId
//      6      2  flags          bit 0: codec, stochastic rounding; bit 1: codec, owner residual; bit 2: arrays on GPUs;
//                               bit 3: of a list of arrays
//      8      4  root           (-1 where there is none); of a list: how many arrays it has
//     12      4  region         of symmetric memory, as they were allocated, from 1; 0 without one; of a list: XOR the
//                               fingerprint of all its dtypes and sizes (wire/packed_layout.h)
//     16      8  count          elements per rank, as op defines it (0 in an exchange that is not direct)
//     24     24  tag            the caller's label, zero padded
constexpr int kTagBytes = 24;
constexpr uint16_t kFlagStochastic = 1;
constexpr uint16_t kFlagOwnerResidual = 2;
constexpr uint16_t kFlagOnDevice = 4;
constexpr uint16_t kFlagList = 8;
struct Descriptor {
  OpKind op = OpKind::barrier;
  DType dtype = DType::uint8;
  ReduceOp reduce_op = ReduceOp::sum;
  Algo algo = Algo::one_shot;
  uint8_t codec_up = 0;
  uint8_t codec_down = 0;
  uint16_t flags = 0;
  int32_t root = -1;
  uint32_t region = 0;
  int64_t count = 0;
  char tag[kTagBytes] = {};

  bool operator==(const Descriptor& other) const { return std::memcmp(this, &other, sizeof(*this)) == 0; }
};
static_assert(sizeof(Descriptor) == 48 && std::is_trivially_copyable<Descriptor>::value, "wire layout");

// "all_reduce #17 (float32 x 1000, sum, two_shot, tag 'bucket0')"
std::string describe(const Descriptor& descriptor, uint32_t seq);

}  // namespace ringcomm
