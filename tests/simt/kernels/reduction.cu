// Kernels that synchronise threads of one block, and blocks of one grid; each with its bugs.
#include <simt/export.h>

#include "base/launch.h"

using namespace ringcomm;

namespace {

constexpr int kThreads = 256;

enum BlockSumBug { kBlockSumRight, kNoFirstBarrier, kNoTreeBarrier, kNoSyncwarp };

// One sum per block: a tree in shared memory, whose last five steps are within a warp.
template <int kBug>
__global__ void block_sum_kernel(const int* values, int num_elems, int* sums) {
  __shared__ int partial[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  int sum = 0;
  for (int i = static_cast<int>(blockIdx.x) * kThreads + thread; i < num_elems;
       i += static_cast<int>(gridDim.x) * kThreads) {
    sum += values[i];
  }
  partial[thread] = sum;
  if (kBug != kNoFirstBarrier) __syncthreads();
  for (int distance = kThreads / 2; distance >= 32; distance /= 2) {
    if (thread < distance) partial[thread] += partial[thread + distance];
    if (kBug != kNoTreeBarrier) __syncthreads();
  }
  if (thread >= 32) return;
  for (int distance = 16; distance > 0; distance /= 2) {
    const int other = partial[thread + distance];
    if (kBug != kNoSyncwarp) __syncwarp();
    partial[thread] += other;
    if (kBug != kNoSyncwarp) __syncwarp();
  }
  if (thread == 0) sums[blockIdx.x] = partial[0];
}

enum GridSumBug { kGridSumRight, kNoFenceBeforeTicket, kNoFenceAfterTicket };

// One sum of all: the last block to finish adds up what the others left. Dynamic shared memory.
template <int kBug>
__global__ void grid_sum_kernel(const int* values, int num_elems, int* block_sums, unsigned* ticket, int* total) {
  RC_DYNAMIC_SHARED(int, partial);
  __shared__ bool is_last;
  const int thread = static_cast<int>(threadIdx.x);
  const int num_threads = static_cast<int>(blockDim.x);
  int sum = 0;
  for (int i = static_cast<int>(blockIdx.x) * num_threads + thread; i < num_elems;
       i += static_cast<int>(gridDim.x) * num_threads) {
    sum += values[i];
  }
  partial[thread] = sum;
  __syncthreads();
  if (thread == 0) {
    for (int i = 1; i < num_threads; ++i) sum += partial[i];
    block_sums[blockIdx.x] = sum;
    if (kBug != kNoFenceBeforeTicket) __threadfence();
    is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last || thread != 0) return;
  if (kBug != kNoFenceAfterTicket) __threadfence();
  sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += block_sums[i];
  *total = sum;
}

}  // namespace

SIMT_EXPORT int simt_block_sum(int bug, const int* values, int num_elems, int* sums, int num_blocks) {
  const auto kernel = bug == kNoFirstBarrier  ? block_sum_kernel<kNoFirstBarrier>
                      : bug == kNoTreeBarrier ? block_sum_kernel<kNoTreeBarrier>
                      : bug == kNoSyncwarp    ? block_sum_kernel<kNoSyncwarp>
                                              : block_sum_kernel<kBlockSumRight>;
  const LaunchShape shape{dim3(static_cast<unsigned>(num_blocks)), dim3(kThreads), 0};
  return simt::guarded([&] { launch("block_sum", shape, nullptr, kernel, values, num_elems, sums); });
}

SIMT_EXPORT int simt_grid_sum(int bug, const int* values, int num_elems, int* block_sums, unsigned* ticket, int* total,
                              int num_blocks) {
  const auto kernel = bug == kNoFenceBeforeTicket  ? grid_sum_kernel<kNoFenceBeforeTicket>
                      : bug == kNoFenceAfterTicket ? grid_sum_kernel<kNoFenceAfterTicket>
                                                   : grid_sum_kernel<kGridSumRight>;
  const LaunchShape shape{dim3(static_cast<unsigned>(num_blocks)), dim3(64), 64 * sizeof(int)};
  return simt::guarded(
      [&] { launch("grid_sum", shape, nullptr, kernel, values, num_elems, block_sums, ticket, total); });
}
