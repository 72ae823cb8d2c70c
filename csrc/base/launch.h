// The one way to start a kernel. For .cu files, which use <<<>>> nowhere else: tests/simt compiles them with
// RC_SIMT, so that a launch runs on the CPU instead.
//
// What that asks of a kernel: warps are whole (block sizes are multiples of 32), masks are explicit, a
// __shared__ variable has a plain type, and PTX stands in base/ptx.h only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/error.h"
#include "base/stream.h"

#if defined(RC_SIMT)
#include <simt/launch.h>
#else
#include <cuda_runtime.h>

#include "base/cuda_check.h"
#include "base/cuda_scope.h"
#endif

// Declares `name`, a T* to the dynamic shared memory of the launch, 16-byte aligned.
#if defined(RC_SIMT)
#define RC_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::simt::dynamic_shared())
#else
#define RC_DYNAMIC_SHARED(T, name)                                         \
  extern __shared__ __align__(16) unsigned char ringcomm_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(ringcomm_dynamic_shared)
#endif

namespace ringcomm {

constexpr int kWarpLanes = 32;

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;  // of dynamic shared memory
};

// Queues kernel(args...) on the stream and returns; throws DeviceError if the launch is refused. `name` is for
// error messages and stays valid for ever. Arguments are copied.
template <typename... Params, typename... Args>
void launch(const char* name, const LaunchShape& shape, Stream stream, void (*kernel)(Params...), Args&&... args) {
#if defined(RC_SIMT)
  simt::launch(name, shape.grid, shape.block, shape.shared_bytes, stream, kernel, static_cast<Params>(args)...);
#else
  // clang-format off: it takes the brackets apart
  kernel<<<shape.grid, shape.block, shape.shared_bytes, stream>>>(static_cast<Params>(args)...);
  // clang-format on
  RC_CUDA(cudaGetLastError(), "kernel ", name, " was not launched, with ", shape.grid.x, " blocks of ", shape.block.x,
          " threads and ", shape.shared_bytes, " bytes of shared memory");
#endif
}

// Has the kernel on the current device before it is launched; throws DeviceError if it cannot be. May wait for
// everything that runs there.
template <typename... Params>
void load_kernel(const char* name, void (*kernel)(Params...)) {
#if defined(RC_SIMT)
  static_cast<void>(name);
  static_cast<void>(kernel);
#else
  const RelaxedCapture relaxed;
  cudaFuncAttributes attributes;
  RC_CUDA(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "kernel ", name,
          " cannot be loaded (is ringcomm built for this GPU?)");
#endif
}

// More blocks fill no GPU better and cost their start. Few in tests, so that threads go round.
#if defined(RC_SIMT)
constexpr int64_t kMostBlocks = 3;
#else
constexpr int64_t kMostBlocks = 4096;
#endif

// Of a block in a collective's grid. Its blocks are at most as many as multiprocessors, so that all run at the same
// time, and a kernel may need the registers of a whole one: __launch_bounds__(kCollectiveThreads, 1). Fewer in tests.
#if defined(RC_SIMT)
constexpr int kCollectiveThreads = 64;
#else
constexpr int kCollectiveThreads = 512;
#endif

// Blocks for a kernel whose threads share num_items (> 0) items.
inline LaunchShape spread(int64_t num_items, int block_threads) {
  const int64_t blocks = (num_items + block_threads - 1) / block_threads;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks));
  shape.block = dim3(static_cast<unsigned>(block_threads));
  return shape;
}

// A thread's share of them: every item_step()-th from first_item() on.
__device__ __forceinline__ int64_t first_item() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t item_step() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

}  // namespace ringcomm
