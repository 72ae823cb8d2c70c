// Which file's kernels run a collective on GPUs, and what they ask of a call.
#include "algo/device_kernels.h"
#include "algo/pack.h"
#include "base/error.h"
#include "base/launch.h"
#include "base/vector_access.h"
#include "reduce/reduce.h"

namespace ringcomm::cuda {
namespace {

const CollectiveKernels& kernels_of(const DeviceCall& call) {
  if (call.algo == Algo::direct) return direct_kernels();
  if (!reduces(call.op)) return move_kernels();
  if (call.codec.up != CodecId::none) return encoded_kernels();
  if (call.op == OpKind::all_reduce && call.algo == Algo::one_shot) return one_shot_kernels();
  if (call.op == OpKind::all_reduce && call.algo == Algo::ring) return ring_kernels();
  return two_shot_kernels();
}

bool has_kernels(OpKind op, Algo algo) {
  if (algo == Algo::direct) return !is_barrier(op);
  switch (op) {
    case OpKind::barrier:
    case OpKind::monitored_barrier:
      return false;
    case OpKind::all_reduce:
      return algo == Algo::one_shot || algo == Algo::two_shot || algo == Algo::ring;
    case OpKind::broadcast:
      return algo == Algo::staged || algo == Algo::ring;
    case OpKind::reduce:
      return algo == Algo::two_shot || algo == Algo::staged;
    case OpKind::all_gather:
    case OpKind::reduce_scatter:
    case OpKind::gather:
    case OpKind::scatter:
    case OpKind::all_to_all:
      return algo == Algo::staged;
  }
  return false;
}

void check_layout(const DeviceLayout& layout) {
  RC_CHECK(layout.world_size >= 1 && layout.world_size <= kMostDeviceRanks, "a group on GPUs has 1 to ",
           kMostDeviceRanks, " ranks, got ", layout.world_size);
  RC_CHECK(layout.num_blocks >= 1 && layout.num_blocks <= kMostCollectiveBlocks, "a collective's grid has 1 to ",
           kMostCollectiveBlocks, " blocks, got ", layout.num_blocks);
  RC_CHECK(layout.box_bytes > 0 && layout.box_bytes % 512 == 0, "a box has a multiple of 512 bytes, got ",
           layout.box_bytes);
  RC_CHECK(layout.packets_per_box > 0 && layout.packets_per_box % 16 == 0, "a box has a multiple of 16 packets, got ",
           layout.packets_per_box);
  // Kernels step from one writer's boxes to the next one's in 32 bits.
  RC_CHECK(layout.box_bytes <= INT32_MAX / layout.num_blocks, "the boxes of one writer have at most ", INT32_MAX,
           " bytes, got ", layout.num_blocks, " of ", layout.box_bytes);
  RC_CHECK(layout.packets_per_box <= INT32_MAX / static_cast<int64_t>(sizeof(Packet)), "packets of a box have at most ",
           INT32_MAX, " bytes, got ", layout.packets_per_box, " of ", sizeof(Packet));
}

void check_codec(const DeviceCall& call) {
  const DeviceCodec& codec = call.codec;
  RC_CHECK((codec.up == CodecId::none) == (codec.down == CodecId::none),
           "contributions and sums are both encoded, or neither is; got ", codec_name(codec.up), " and ",
           codec_name(codec.down));
  if (codec.up == CodecId::none) {
    RC_CHECK(codec.residual == nullptr && codec.owner_residual == nullptr,
             "a residual needs a codec: nothing is lost in an exact ", op_name(call.op));
    return;
  }
  RC_CHECK(call.op == OpKind::all_reduce, op_name(call.op), " takes no codec");
  RC_CHECK(call.algo == Algo::two_shot, "all_reduce with a codec is done by two_shot on a GPU, got ",
           algo_name(call.algo));
  RC_CHECK(codec_takes(call.dtype), "codec ", codec_name(codec.up), " takes float32, bfloat16 and float16, not ",
           dtype_name(call.dtype), "; use codec=None for an exact result");
  RC_CHECK(call.reduce_op == ReduceOp::sum || call.reduce_op == ReduceOp::avg,
           "a codec works with op='sum' and 'avg', not '", reduce_op_name(call.reduce_op), "'");
}

// Kernels read elements, and all of one in one access.
void check_array(const char* name, const void* array, int64_t count, size_t elem_bytes, DType dtype) {
  if (count == 0) return;
  RC_CHECK(array != nullptr, name, ": null, expected ", count, " elements on this rank's GPU");
  RC_CHECK(is_aligned(array, elem_bytes), name, ": an array of ", dtype_name(dtype), " must lie at a multiple of ",
           elem_bytes, " bytes on a GPU, got address ", array, ": copy it to an array of its own");
}

void check_parts(const char* name, const DeviceCall& call, const DevicePart (&parts)[kMostDeviceRanks],
                 int world_size) {
  for (int rank = 0; rank < world_size; ++rank) {
    const int64_t count = parts[rank].count;
    RC_CHECK(count >= 0, name, ": the part of rank ", rank, " has a negative count, ", count);
    RC_CHECK(is_exchange(call.op) || count == call.count, name, ": the part of rank ", rank, " has ", count,
             " elements, expected ", call.count, "; all parts of ", op_name(call.op), " are equally long");
    RC_CHECK(!is_exchange(call.op) || count <= call.most_part_elems, name, ": the part of rank ", rank, " has ", count,
             " elements, expected at most ", call.most_part_elems, ", the largest of the group");
    check_array(name, parts[rank].data, count, dtype_size(call.dtype), call.dtype);
  }
}

// What peers would have to know besides where the arrays are.
void check_direct(const DeviceCall& call) {
  if (call.algo != Algo::direct) return;
  RC_CHECK(!reduces(call.op) || call.reduce_op != ReduceOp::premul_sum,
           "algo='direct' does not multiply by factors that only their ranks know; leave algo=None");
  RC_CHECK(call.op != OpKind::reduce_scatter || !call.has_parts,
           "algo='direct' takes a reduce_scatter of one array, not of a list; leave algo=None");
}

void check_arrays(const DeviceCall& call, int world_size) {
  const size_t elem_bytes = dtype_size(call.dtype);
  RC_CHECK(call.count >= 0, "count must not be negative, got ", call.count);
  if (is_exchange(call.op) || (call.has_parts && call.op == OpKind::reduce_scatter)) {
    check_parts("x", call, call.sends, world_size);
  } else if (call.op != OpKind::broadcast || call.input != nullptr) {  // of a broadcast only the root has one
    check_array("x", call.input, call.count, elem_bytes, call.dtype);
  }
  if (is_exchange(call.op) || (call.has_parts && call.op == OpKind::all_gather)) {
    check_parts("out", call, call.receives, world_size);
  } else if (call.op != OpKind::reduce || call.output != nullptr) {  // of a reduce, likewise
    check_array("out", call.output, call.count, elem_bytes, call.dtype);
  }
  if (call.codec.residual != nullptr) {
    check_array("residual", call.codec.residual, call.count, sizeof(float), DType::float32);
  }
  if (call.codec.owner_residual != nullptr) {
    check_array("owner_residual", call.codec.owner_residual, call.count, sizeof(float), DType::float32);
  }
}

// Packets are told from older ones by their epochs, so those go, too.
__global__ void __launch_bounds__(kCollectiveThreads) format_kernel(uint4* slab, int64_t num_vectors) {
  for (int64_t i = first_item(); i < num_vectors; i += item_step()) slab[i] = uint4{};
}

}  // namespace

void check_collective(const DeviceCall& call, const DeviceLayout& layout) {
  check_layout(layout);
  RC_CHECK(has_kernels(call.op, call.algo), op_name(call.op), " cannot be done by ", algo_name(call.algo), " on a GPU");
  RC_CHECK(!has_root(call.op) || (call.root >= 0 && call.root < layout.world_size), op_name(call.op), ": root ",
           call.root, " is no rank of this group, expected 0 to ", layout.world_size - 1);
  if (reduces(call.op)) check_reduction(call.dtype, call.reduce_op);
  check_codec(call);
  check_direct(call);
  check_arrays(call, layout.world_size);
  plan_collective(call, layout);  // checks what its algorithm asks for
}

DevicePlan plan_collective(const DeviceCall& call, const DeviceLayout& layout) {
  return kernels_of(call).plan(call, layout);
}

Range encoded_sums_of(int rank, int64_t num_elems, int world_size) {
  return chunk_of(num_elems, world_size, rank, kBlockElems);
}

void launch_collective(const DeviceCall& call, const DevicePlan& plan, const GroupView& group,
                       const DeviceRounds& rounds, Stream stream) {
  RC_CHECK(0 <= rounds.begin && rounds.begin < rounds.end && rounds.end <= plan.num_rounds, op_name(call.op),
           ": rounds ", rounds.begin, " to ", rounds.end, " of ", plan.num_rounds);
  RC_CHECK(rounds.in_kernel ? rounds.end - rounds.begin == plan.num_rounds : rounds.end - rounds.begin == 1,
           op_name(call.op), ": a launch has all ", plan.num_rounds, " rounds, or a single one if the host waits; got ",
           rounds.end - rounds.begin);
  kernels_of(call).launch(call, plan, group, rounds, stream);
}

void launch_format(const GroupView& group, Stream stream) {
  const int64_t num_vectors = group.layout.box_offset(0, 0, 0) / kVectorBytes;
  launch("format", spread(num_vectors, kCollectiveThreads), stream, format_kernel,
         reinterpret_cast<uint4*>(group.slabs[group.rank]), num_vectors);
}

void load_kernels() {
  for (const CollectiveKernels* kernels : {&two_shot_kernels(), &encoded_kernels(), &one_shot_kernels(),
                                           &ring_kernels(), &move_kernels(), &direct_kernels()}) {
    kernels->load();
  }
  load_kernel("format", format_kernel);
  load_pack_kernels();
}

}  // namespace ringcomm::cuda
