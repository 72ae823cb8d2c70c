// all_reduce with a codec on GPUs, in one kernel: two_shot (algo/two_shot.cpp) whose contributions and sums travel
// encoded. Values are in registers between the array and a box, and between boxes.
//
// Rank c owns chunk c of the array. A block has a slice of every chunk, and cuts it into pieces that take a box when
// they are encoded.
//
// Steps       contribute   encode input (+ residual) of a piece of every chunk into the box at its owner
//             sum          decode all contributions to the own piece in rank order, add them up in float32, divide
//                          for avg, encode (+ owner_residual) into the boxes at all ranks
//             collect      decode the sums of all owners into the output
//             Round 2k: collect(k - 1), contribute(k); round 2k + 1: sum(k). A rank has boxes at itself, so its own
//             pieces go the way of the others: everyone decodes the same bytes.
// Rounds      2 x pieces + 1
// Wire bytes  (n-1)/n x (the array in the codec up + the array in the codec down) per rank
// Ordering    algo/rounds.h. What is read in a round was written in the one before, into the other half of boxes. In
//             place: a thread's block has read piece k of all chunks in round 2k and writes it in round 2k + 2; no
//             other block touches it.
//
// Equal bits: codecs work on blocks of 32 values and everything here is cut between those; so the result is that of
// cpu two_shot, and does not depend on how the array is cut.
#include "algo/device_kernels.h"
#include "algo/rounds.h"
#include "algo/slices.h"
#include "codec/share_device.h"

namespace ringcomm::cuda {
namespace {

// Values of a run between boxes, where there is no array to say so.
constexpr int kSumRun = Shares<float>::kRun;

struct EncodedArgs {
  GroupView group;
  DeviceRounds rounds;
  const void* input;
  void* output;
  float* residual;
  float* owner_residual;
  uint64_t seed;
  uint64_t step;
  int64_t num_elems;
  int64_t chunk_elems;  // of the first chunk; the last ones may be shorter
  Slices slices;        // in elements
  CodecId down;
  bool stochastic;
  bool average;
  bool vectors;  // arrays are aligned for 16-byte accesses
};

template <CodecId kUp, typename T>
class EncodedShots {
 public:
  __device__ __forceinline__ EncodedShots(const EncodedArgs& args, const RoundsOfBlock& block)
      : args_(args), block_(block), rank_(args.group.rank), world_size_(args.group.layout.world_size) {}

  __device__ __forceinline__ void contribute(int64_t k) const {
    ShareRounding rounding = rounding_of(static_cast<uint32_t>(rank_));
    for (int step = 0; step < world_size_; ++step) {
      const int owner = block_.peer_at(step);
      const Range piece = piece_of(owner, k);
      const CodecLayout layout = codec_layout(kUp, piece.count());
      uint8_t* const box = block_.box_at(owner);
      for_each_share<Shares<T>::kRun>(piece, args_.vectors, [&](const SharePlace& place) {
        Share<Shares<T>::kRun> values;
        load_share(static_cast<const T*>(args_.input), place, values);
        encode<kUp>(values, place, rounding, args_.residual,
                    [&](const auto& encoded) { ShareCodecOf<kUp>::store(encoded, box, layout, place); });
      });
    }
  }

  template <CodecId kDown>
  __device__ __forceinline__ void sum(int64_t k) const {
    // No rank's own random numbers, and the same whoever owns the chunk.
    ShareRounding rounding = rounding_of(static_cast<uint32_t>(world_size_));
    const Range piece = piece_of(rank_, k);
    const CodecLayout layout_up = codec_layout(kUp, piece.count());
    const CodecLayout layout_down = codec_layout(kDown, piece.count());
    for_each_share<kSumRun>(piece, args_.vectors, [&](const SharePlace& place) {
      Share<kSumRun> total{};
      if (place.present) {
        ShareCodecOf<kUp>::load(block_.box_from(0), layout_up, place, total);
#pragma unroll 2
        for (int peer = 1; peer < world_size_; ++peer) {
          Share<kSumRun> values;
          ShareCodecOf<kUp>::load(block_.box_from(peer), layout_up, place, values);
          add_share(total, values);
        }
        if (args_.average) divide_share(total, static_cast<float>(world_size_));
      }
      encode<kDown>(total, place, rounding, args_.owner_residual, [&](const auto& encoded) {
        for (int step = 0; step < world_size_; ++step) {
          ShareCodecOf<kDown>::store(encoded, block_.box_at(block_.peer_at(step)), layout_down, place);
        }
      });
    });
  }

  template <CodecId kDown>
  __device__ __forceinline__ void collect(int64_t k) const {
    for (int step = 0; step < world_size_; ++step) {
      const int owner = block_.peer_at(step);
      const Range piece = piece_of(owner, k);
      const CodecLayout layout = codec_layout(kDown, piece.count());
      const uint8_t* const box = block_.box_from(owner);
      for_each_share<Shares<T>::kRun>(piece, args_.vectors, [&](const SharePlace& place) {
        if (!place.present) return;
        Share<Shares<T>::kRun> values;
        ShareCodecOf<kDown>::load(box, layout, place, values);
        store_share(static_cast<T*>(args_.output), place, values);
      });
    }
  }

 private:
  // This block's piece k of a chunk, in the array.
  __device__ __forceinline__ Range piece_of(int owner, int64_t k) const {
    const int64_t chunk = at_most(args_.chunk_elems * owner, args_.num_elems);
    const int64_t chunk_elems = at_most(args_.chunk_elems, args_.num_elems - chunk);
    const Range piece = args_.slices.of(static_cast<int>(blockIdx.x), k, chunk_elems);
    return Range{chunk + piece.begin, chunk + piece.end};
  }

  __device__ __forceinline__ ShareRounding rounding_of(uint32_t random_stream) const {
    return ShareRounding{args_.stochastic, RandomKeys(args_.seed, args_.step, random_stream)};
  }

  // store(encoded): only where there is something to store.
  template <CodecId kCodec, int kRun, typename Store>
  __device__ __forceinline__ void encode(Share<kRun>& values, const SharePlace& place, ShareRounding& rounding,
                                         float* residual, Store store) const {
    if (residual != nullptr) {
      Share<kRun> lost_before;
      load_share(residual, place, lost_before);
      add_share(values, lost_before);
    }
    typename ShareCodecOf<kCodec>::template Encoded<kRun> encoded;
    ShareCodecOf<kCodec>::encode(values, place, rounding, residual, encoded);
    if (place.present) store(encoded);
  }

  const EncodedArgs& args_;
  const RoundsOfBlock& block_;
  const int rank_;
  const int world_size_;
};

// What a round has of the codec down.
template <CodecId kDown, typename Shots>
__device__ __forceinline__ void go_down(const Shots& shots, int64_t round) {
  if (round % 2 != 0) {
    shots.template sum<kDown>(round / 2);
  } else if (round > 0) {
    shots.template collect<kDown>(round / 2 - 1);
  }
}

// The codec down is the same for all threads: as a template parameter it would make 4 times as many kernels, of which
// nearly all are never used.
template <CodecId kUp, typename T>
__global__ void __launch_bounds__(kCollectiveThreads, 1) encoded_kernel(const __grid_constant__ EncodedArgs args) {
  RoundsOfBlock block(args.group, args.rounds);
  const EncodedShots<kUp, T> shots(args, block);
  for (int64_t round = args.rounds.begin; round < args.rounds.end; ++round) {
    if (round > args.rounds.begin && !block.next_round()) return;
    if (round % 2 == 0) shots.contribute(round / 2);
    switch (args.down) {
      case CodecId::none:
        break;
      case CodecId::bf16:
        go_down<CodecId::bf16>(shots, round);
        break;
      case CodecId::fp16:
        go_down<CodecId::fp16>(shots, round);
        break;
      case CodecId::int8:
        go_down<CodecId::int8>(shots, round);
        break;
      case CodecId::int4:
        go_down<CodecId::int4>(shots, round);
        break;
    }
  }
  block.finish();
}

using Kernel = void (*)(const EncodedArgs);

template <CodecId kUp>
Kernel kernel_from(DType dtype) {
  if (dtype == DType::float32) return encoded_kernel<kUp, float>;
  if (dtype == DType::bfloat16) return encoded_kernel<kUp, Bfloat16Element>;
  return encoded_kernel<kUp, Float16Element>;
}

Kernel kernel_of(CodecId up, DType dtype) {
  switch (up) {
    case CodecId::none:
      break;
    case CodecId::bf16:
      return kernel_from<CodecId::bf16>(dtype);
    case CodecId::fp16:
      return kernel_from<CodecId::fp16>(dtype);
    case CodecId::int8:
      return kernel_from<CodecId::int8>(dtype);
    case CodecId::int4:
      break;
  }
  return kernel_from<CodecId::int4>(dtype);  // the checks let nothing else through
}

int64_t chunk_elems(const DeviceCall& call, const DeviceLayout& layout) {
  return chunk_of(call.count, layout.world_size, 0, kBlockElems).count();
}

Slices slices_of(const DeviceCall& call, const DeviceLayout& layout, int num_blocks) {
  const auto block_bytes = [](CodecId codec) {
    return static_cast<int64_t>(codec_layout(codec, kBlockElems).total_bytes);
  };
  const int64_t most = at_least(block_bytes(call.codec.up), block_bytes(call.codec.down));
  return Slices(chunk_elems(call, layout), num_blocks, layout.box_bytes / most * kBlockElems);
}

DevicePlan plan(const DeviceCall& call, const DeviceLayout& layout) {
  DevicePlan plan;
  const int64_t elem_bytes = static_cast<int64_t>(dtype_size(call.dtype));
  plan.num_blocks = Slices::num_blocks(chunk_elems(call, layout) * elem_bytes, layout);
  plan.num_rounds = 2 * slices_of(call, layout, plan.num_blocks).num_pieces() + 1;
  return plan;
}

void launch_encoded(const DeviceCall& call, const DevicePlan& plan, const GroupView& group, const DeviceRounds& rounds,
                    Stream stream) {
  const DeviceCodec& codec = call.codec;
  const bool vectors = is_aligned(call.input, kVectorBytes) && is_aligned(call.output, kVectorBytes) &&
                       is_aligned(codec.residual, kVectorBytes) && is_aligned(codec.owner_residual, kVectorBytes);
  const EncodedArgs args{group,
                         rounds,
                         call.input,
                         call.output,
                         codec.residual,
                         codec.owner_residual,
                         codec.seed,
                         codec.step,
                         call.count,
                         chunk_elems(call, group.layout),
                         slices_of(call, group.layout, plan.num_blocks),
                         codec.down,
                         codec.rounding == Rounding::stochastic,
                         call.reduce_op == ReduceOp::avg,
                         vectors};
  const LaunchShape shape{dim3(static_cast<unsigned>(plan.num_blocks)), dim3(kCollectiveThreads)};
  launch("encoded all_reduce", shape, stream, kernel_of(call.codec.up, call.dtype), args);
}

void load() {
  for (const CodecId up : {CodecId::bf16, CodecId::fp16, CodecId::int8, CodecId::int4}) {
    for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
      load_kernel("encoded all_reduce", kernel_of(up, dtype));
    }
  }
}

}  // namespace

const CollectiveKernels& encoded_kernels() {
  static constexpr CollectiveKernels kKernels{plan, launch_encoded, load};
  return kKernels;
}

}  // namespace ringcomm::cuda
