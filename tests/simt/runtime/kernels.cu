#include "base/launch.h"
#include "base/ptx.h"
#include "kernels.h"

namespace ringcomm::cuda {
namespace {

constexpr int kThreads = 64;

__global__ void meet_kernel(const MeetArgs args) {
  __shared__ bool late;
  if (threadIdx.x == 0) {
    late = false;
    if (args.tell != nullptr) store_release_system(args.tell, args.value);
    const uint64_t begin = global_nanoseconds();
    while (load_acquire_system(args.word) < args.wait_value) {
      if (global_nanoseconds() - begin > args.timeout_ns) {
        late = true;
        break;
      }
      __nanosleep(20);
    }
    args.outcome[blockIdx.x] = late ? 2 : 1;
  }
  __syncthreads();
  if (late) return;
  for (int64_t i = first_item(); i < args.num_elems; i += item_step()) ++args.values[i];
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 32) __syncthreads();
}

}  // namespace

void launch_meet(const MeetArgs& args, int num_blocks, Stream stream) {
  const LaunchShape shape{dim3(static_cast<unsigned>(num_blocks)), dim3(kThreads), 0};
  launch("meet", shape, stream, meet_kernel, args);
}

void launch_divergent_barrier(Stream stream) {
  launch("divergent_barrier", {dim3(1), dim3(kThreads), 0}, stream, divergent_barrier_kernel);
}

}  // namespace ringcomm::cuda
