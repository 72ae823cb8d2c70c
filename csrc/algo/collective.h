// One call of one collective, and the algorithms that can run it. Each algorithm is a pure function
// of the call on every rank: same steps, same order. It returns the bytes that this rank handed to
// its peers. Blocks until the result is in `output`; throws the group's fault.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "algo/pack.h"
#include "base/cache_lines.h"
#include "base/dtype.h"
#include "codec/codec.h"
#include "transport/shm_group.h"
#include "transport/symmetric.h"
#include "wire/descriptor.h"
#include "wire/packed_layout.h"

namespace ringcomm {

// Compression of an all_reduce. up == none: exact.
struct CodecOptions {
  CodecId up = CodecId::none;    // contributions
  CodecId down = CodecId::none;  // sums
  Rounding rounding = Rounding::nearest_even;
  uint64_t seed = 0;
  uint64_t step = 0;
  float* residual = nullptr;        // count values or null: error feedback of this rank's contribution
  float* owner_residual = nullptr;  // count values or null: of the sums; a rank touches only what it owns
};

// One rank's part of an array that is handed out or put together.
struct SendPart {
  const void* data = nullptr;
  int64_t count = 0;  // elements
};
struct ReceivePart {
  void* data = nullptr;
  int64_t count = 0;
};

struct Collective {
  OpKind op = OpKind::barrier;
  Algo algo = Algo::one_shot;
  DType dtype = DType::uint8;
  ReduceOp reduce_op = ReduceOp::sum;
  double factor = 1;  // premul_sum: this rank's; the communicator scales the input, algorithms just sum
  // all_reduce, broadcast: elements of input and output. all_gather: elements of input (output has
  // world_size times as many). reduce_scatter: elements of output (input has world_size times as many).
  // reduce: of input (and of output on the root). gather: of input. scatter: of output.
  // all_to_all: all that this rank sends; it takes part in statistics only.
  int64_t count = 0;
  int root = -1;
  const void* input = nullptr;
  // May equal input for all_reduce, broadcast and reduce, and a rank's own part may be in place
  // elsewhere; no other overlap. reduce: unused (null) but on the root.
  void* output = nullptr;
  // By rank; empty where an operation has none.
  //   scatter (root), all_to_all, reduce_scatter of a list        what goes to each rank
  //   gather (root), all_to_all, all_gather into a list           what comes from each rank
  // reduce_scatter, all_gather and all_to_all without them use input and output as one array.
  std::vector<SendPart> sends;
  std::vector<ReceivePart> receives;
  // all_reduce, all_gather, reduce_scatter: what is packed into a buffer (wire/packed_layout.h) that stands for input
  // and output, which are null, and what comes out of it. Algorithms see the buffer only: call_on_buffer().
  std::vector<Piece> packed;
  std::vector<Piece> unpacked;
  ListMark list;  // of the list that the call's arrays are a part of (comm/coalesced.h)
  CodecOptions codec;
  // The symmetric memory that input is in, if peers are to read it there (direct).
  std::shared_ptr<const SymmetricRegion> region;
  // Arrays, residuals included, lie on this rank's GPU and are used in the order of this stream. Then the call is
  // not run by the algorithms below but by those of algo/device_collective.h.
  bool on_device = false;
  Stream stream = nullptr;
  double timeout_s = 0;         // deadline of this call; 0: the communicator's
  bool wait_all_ranks = false;  // monitored_barrier: an error says of every late rank where it is

  int64_t num_bytes() const { return count * static_cast<int64_t>(dtype_size(dtype)); }
  // all_gather: where the part of `rank` goes. reduce_scatter: where it is.
  uint8_t* part_from(int rank) const {
    return receives.empty() ? static_cast<uint8_t*>(output) + rank * num_bytes()
                            : static_cast<uint8_t*>(receives[static_cast<size_t>(rank)].data);
  }
  const uint8_t* part_for(int rank) const {
    return static_cast<const uint8_t*>(sends.empty() ? input : sends[static_cast<size_t>(rank)].data) +
           (sends.empty() ? rank * num_bytes() : 0);
  }
};

// Inputs are multiplied before they are summed, each rank's by a factor of its own.
inline bool premultiplies(const Collective& call) { return reduces(call.op) && call.reduce_op == ReduceOp::premul_sum; }
inline bool is_packed(const Collective& call) { return !call.unpacked.empty(); }
// Of a packed call.
inline int64_t buffer_bytes(const Collective& call, int world_size) {
  return call.num_bytes() * (call.op == OpKind::all_reduce ? 1 : world_size);
}
// A packed call on its buffer: packed goes to its input, unpacked comes from its output. A rank's own part is in place.
inline Collective call_on_buffer(const Collective& call, int rank, uint8_t* buffer) {
  Collective whole = call;
  whole.packed.clear();
  whole.unpacked.clear();
  whole.input = buffer + (call.op == OpKind::all_gather ? rank * call.num_bytes() : 0);
  whole.output = buffer + (call.op == OpKind::reduce_scatter ? rank * call.num_bytes() : 0);
  return whole;
}

// Memory that a communicator keeps between calls.
class Scratch {
 public:
  float* floats(int64_t count) {
    if (static_cast<int64_t>(floats_.size()) < count) floats_.resize(static_cast<size_t>(count));
    return floats_.data();
  }
  uint8_t* bytes(int64_t count) {
    if (static_cast<int64_t>(bytes_.size()) < count) bytes_.resize(static_cast<size_t>(count));
    return bytes_.data();
  }

 private:
  std::vector<float> floats_;
  std::vector<uint8_t> bytes_;
};

int64_t barrier(ShmGroup& group);
int64_t one_shot(ShmGroup& group, const Collective& call);
// all_reduce, and reduce without a codec.
int64_t two_shot(ShmGroup& group, const Collective& call, Scratch& scratch);
// The elements of an array whose sums `rank` encodes in a two_shot all_reduce with a codec: those of its
// owner residual that it reads and writes.
std::vector<Range> encoded_sums_of(int rank, int64_t num_elems, int world_size, int64_t buffer_bytes);
int64_t ring_all_reduce(ShmGroup& group, const Collective& call);
int64_t staged_broadcast(ShmGroup& group, const Collective& call);
int64_t staged_all_gather(ShmGroup& group, const Collective& call);
int64_t staged_reduce_scatter(ShmGroup& group, const Collective& call);
// inline_limit: up to how many bytes for others a rank puts beside its flag if they fit; the same on all ranks.
// What goes to and comes from every rank in an exchange: world_size parts each, also of a gather or scatter.
struct ExchangeParts {
  std::vector<SendPart> sends;
  std::vector<ReceivePart> receives;

  static ExchangeParts of(const Collective& call, int world_size);
};
// Writes their counts into the inline payload, before announce().
void write_counts(ShmGroup& group, const ExchangeParts& parts);
// After wait_all_announced(): fails the group unless every rank sends what the others expect. Returns the largest part
// between any two ranks, in elements.
int64_t check_counts(ShmGroup& group);
int64_t exchange(ShmGroup& group, const Collective& call, int64_t inline_limit);
int64_t direct(ShmGroup& group, const Collective& call);

inline const uint8_t* bytes_at(const void* base, int64_t byte_offset) {
  return static_cast<const uint8_t*>(base) + byte_offset;
}
inline uint8_t* bytes_at(void* base, int64_t byte_offset) { return static_cast<uint8_t*>(base) + byte_offset; }

// memcpy that accepts 0 bytes from null and skips copying a buffer onto itself.
inline void copy_bytes(void* to, const void* from, int64_t num_bytes) {
  if (num_bytes > 0 && to != from) std::memcpy(to, from, static_cast<size_t>(num_bytes));
}

// The same into the output of a call that writes output_bytes in all. What is larger than a cache is written
// past it, which spares reading it first (measured, 64 MiB all_gather of 2 ranks: 0.7 of the time).
inline void copy_to_output(void* to, const void* from, int64_t num_bytes, int64_t output_bytes) {
  constexpr int64_t kLargerThanCache = 16 * 1024 * 1024;
  if (output_bytes < kLargerThanCache || num_bytes <= 0 || to == from) return copy_bytes(to, from, num_bytes);
  stream_copy(to, from, static_cast<size_t>(num_bytes));
  stream_fence();
}

}  // namespace ringcomm
