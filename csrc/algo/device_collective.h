// A collective on GPU arrays, as the host starts it; kernels in algo/*_cuda.cu. Same arguments, same rounds on every
// rank.
//
// In-kernel mode runs all rounds in one launch, in which blocks wait for those of their peers: peers must be able to
// run at the same time. Stepped mode launches every round on its own and lets the host wait between two; nothing
// waits on the GPU. Both write the same bytes.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "base/partition.h"
#include "base/stream.h"
#include "codec/codec.h"
#include "wire/descriptor.h"
#include "wire/device_layout.h"

namespace ringcomm {

// What one rank hands to, or gets from, another.
struct DevicePart {
  void* data = nullptr;
  int64_t count = 0;  // elements
};

struct DeviceCodec {
  CodecId up = CodecId::none;    // contributions; none: exact
  CodecId down = CodecId::none;  // sums
  Rounding rounding = Rounding::nearest_even;
  uint64_t seed = 0;
  uint64_t step = 0;
  float* residual = nullptr;        // count values on this rank's GPU, or null
  float* owner_residual = nullptr;  // likewise; only what this rank owns is touched
};

// Where this rank's GPU reaches the arrays of a direct collective, by rank, its own among them.
struct DevicePeers {
  const void* inputs[kMostDeviceRanks] = {};  // exchanges: of each rank, the part for this one. broadcast: the root's
  void* outputs[kMostDeviceRanks] = {};       // all_reduce, broadcast: everyone's. reduce: the root's. Others: none
};

// Arrays lie on this rank's GPU, at multiples of their element's size, and overlap only where a rank's own part is
// in place (or input == output).
struct DeviceCall {
  OpKind op = OpKind::all_reduce;
  // all_reduce: one_shot (in-kernel mode only), two_shot or ring; broadcast: staged or ring; reduce: two_shot or
  // staged, which are the same; others: staged. All of them: direct, without a codec, lists and premul_sum
  Algo algo = Algo::two_shot;
  DType dtype = DType::float32;
  ReduceOp reduce_op = ReduceOp::sum;
  double factor = 1;  // premul_sum: inputs are multiplied by it, each rounded to dtype, before they are summed
  // As in Collective (algo/collective.h): all_reduce, broadcast, reduce: of input and output. all_gather: of what
  // each rank gives. reduce_scatter: of what each rank gets. Exchanges use sends and receives.
  int64_t count = 0;
  int root = -1;
  const void* input = nullptr;
  void* output = nullptr;  // reduce: used on the root only
  // By rank. all_to_all, gather, scatter: what goes to and comes from each rank (count 0: nothing). reduce_scatter of a
  // list: sends; all_gather into a list: receives; else these two are not used by them.
  DevicePart sends[kMostDeviceRanks] = {};
  DevicePart receives[kMostDeviceRanks] = {};
  bool has_parts = false;       // reduce_scatter, all_gather: use sends / receives
  int64_t most_part_elems = 0;  // exchanges: the largest part between any two ranks of the group
  DevicePeers peers;            // direct
  DeviceCodec codec;            // all_reduce with two_shot; dtype float32, bfloat16 or float16, op sum or avg
};

// The same on every rank.
struct DevicePlan {
  int64_t num_rounds = 0;  // >= 1; two rounds have one wait between them
  int num_blocks = 0;      // of the grid: 1 to layout.num_blocks
};

// Rounds [begin, end) of a plan.
struct DeviceRounds {
  int64_t begin = 0;
  int64_t end = 0;
  bool in_kernel = true;  // waits in the kernel; epochs are counted on the GPU. Else: one round, of this epoch
  uint32_t epoch = 0;
};

namespace cuda {

// Throws UsageError unless the collective can run on GPUs (reduction_refusal, world sizes, dtypes of codecs).
void check_collective(const DeviceCall& call, const DeviceLayout& layout);
DevicePlan plan_collective(const DeviceCall& call, const DeviceLayout& layout);
// As encoded_sums_of in algo/collective.h: what `rank` owns in an all_reduce with a codec. Whole chunks.
Range encoded_sums_of(int rank, int64_t num_elems, int world_size);
// Queues rounds on the stream; does not wait. The array arguments must stay until the stream has passed.
void launch_collective(const DeviceCall& call, const DevicePlan& plan, const GroupView& group,
                       const DeviceRounds& rounds, Stream stream);
// Zeroes epochs, arrivals and packets of a new slab.
void launch_format(const GroupView& group, Stream stream);
// Loads every kernel of the collectives onto the current device: one that is loaded late, while another waits for a
// peer, can deadlock.
void load_kernels();

}  // namespace cuda
}  // namespace ringcomm
