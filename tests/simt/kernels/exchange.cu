// A sum over ranks, each a GPU of its own: the one_shot algorithm in its smallest form, and its bugs.
#include <simt/export.h>

#include "base/launch.h"
#include "base/ptx.h"

using namespace ringcomm;

namespace {

constexpr int kThreads = 64;
constexpr int kMostRanks = 8;

struct ExchangeArgs {
  int* staging[kMostRanks];     // num_buffers * num_elems each
  uint32_t* flags[kMostRanks];  // world_size * num_blocks each: who has arrived, block by block
  const int* input;
  int* output;
  int rank;
  int world_size;
  int num_elems;
  int num_buffers;  // two are needed: a rank may be one epoch ahead of another
  uint32_t epoch;   // from 1
};

enum ExchangeBug { kExchangeRight, kEarlyFlag, kNoWait, kNoBarrierAfterWait, kNoFence, kFenced };

template <int kBug>
__global__ void exchange_kernel(const ExchangeArgs args) {
  const int num_blocks = static_cast<int>(gridDim.x);
  const int block = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  const int per_block = (args.num_elems + num_blocks - 1) / num_blocks;
  const int begin = block * per_block;
  const int end = begin + per_block < args.num_elems ? begin + per_block : args.num_elems;
  const int64_t buffer = static_cast<int64_t>(args.epoch % static_cast<uint32_t>(args.num_buffers)) * args.num_elems;

  for (int i = begin + thread; i < end; i += kThreads) args.staging[args.rank][buffer + i] = args.input[i];
  if (kBug != kEarlyFlag) __syncthreads();
  if (thread < args.world_size) {
    uint32_t* const theirs = args.flags[thread] + args.rank * num_blocks + block;
    const uint32_t* const ours = args.flags[args.rank] + thread * num_blocks + block;
    if (kBug == kNoFence || kBug == kFenced) {
      if (kBug == kFenced) __threadfence_system();
      store_relaxed_system(theirs, args.epoch);
      while (static_cast<int32_t>(load_relaxed_system(ours) - args.epoch) < 0) __nanosleep(20);
      __threadfence_system();
    } else {
      store_release_system(theirs, args.epoch);
      if (kBug != kNoWait) {
        while (static_cast<int32_t>(load_acquire_system(ours) - args.epoch) < 0) {
        }
      }
    }
  }
  if (kBug != kNoBarrierAfterWait) __syncthreads();
  for (int i = begin + thread; i < end; i += kThreads) {
    int sum = 0;
    for (int rank = 0; rank < args.world_size; ++rank) sum += args.staging[rank][buffer + i];
    args.output[i] = sum;
  }
}

}  // namespace

SIMT_EXPORT int simt_exchange(int bug, int* const* staging, uint32_t* const* flags, const int* input, int* output,
                              int rank, int world_size, int num_elems, int num_buffers, uint32_t epoch, int num_blocks,
                              CUstream_st* stream) {
  ExchangeArgs args{};
  for (int i = 0; i < world_size; ++i) {
    args.staging[i] = staging[i];
    args.flags[i] = flags[i];
  }
  args.input = input;
  args.output = output;
  args.rank = rank;
  args.world_size = world_size;
  args.num_elems = num_elems;
  args.num_buffers = num_buffers;
  args.epoch = epoch;
  const auto kernel = bug == kEarlyFlag            ? exchange_kernel<kEarlyFlag>
                      : bug == kNoWait             ? exchange_kernel<kNoWait>
                      : bug == kNoBarrierAfterWait ? exchange_kernel<kNoBarrierAfterWait>
                      : bug == kNoFence            ? exchange_kernel<kNoFence>
                      : bug == kFenced             ? exchange_kernel<kFenced>
                                                   : exchange_kernel<kExchangeRight>;
  const LaunchShape shape{dim3(static_cast<unsigned>(num_blocks)), dim3(kThreads), 0};
  return simt::guarded([&] { launch("exchange", shape, stream, kernel, args); });
}
