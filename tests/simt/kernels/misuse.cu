// Single mistakes, each in the least kernel that makes it. `place` is an array of 64 ints.
#include <simt/export.h>

#include "base/launch.h"
#include "base/ptx.h"

using namespace ringcomm;

namespace {

__global__ void nothing_wrong(int* place) { place[threadIdx.x] = static_cast<int>(threadIdx.x); }

__global__ void past_the_end(int* place) { place[threadIdx.x + 1] = 1; }

__global__ void before_the_start(int* place) {
  if (threadIdx.x == 0) place[1] = place[-1];
}

__global__ void far_away(int* place) {
  if (threadIdx.x == 0) place[int64_t{1} << 40] = 1;
}

__global__ void past_dynamic_shared(int* place) {
  RC_DYNAMIC_SHARED(int, shared);
  shared[threadIdx.x] = 1;
  __syncthreads();
  place[threadIdx.x] = shared[threadIdx.x];
}

__global__ void past_an_array(int* place) {
  __shared__ int shared[64];
  shared[threadIdx.x] = 1;
  __syncthreads();
  place[threadIdx.x] = shared[threadIdx.x + 1];
}

__global__ void misaligned_vector(int* place) {
  if (threadIdx.x == 0) {
    const uint4 word = *reinterpret_cast<const uint4*>(place + 1);
    place[0] = static_cast<int>(word.x + word.y + word.z + word.w);
  }
}

__global__ void misaligned_word(int* place) {
  if (threadIdx.x == 0) *reinterpret_cast<int*>(reinterpret_cast<char*>(place) + 2) = 1;
}

__global__ void unwritten_shared(int* place) {
  __shared__ int shared[64];
  if (threadIdx.x != 5) shared[threadIdx.x] = 1;
  __syncthreads();
  place[threadIdx.x] = shared[threadIdx.x];
}

__global__ void same_place(int* place) { place[0] = static_cast<int>(threadIdx.x); }

__global__ void barrier_for_half(int*) {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void two_barriers(int* place) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    place[threadIdx.x] = 1;
    __syncthreads();
  }
}

__global__ void barrier_against_warp(int*) {
  if (threadIdx.x != 5) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

__global__ void foreign_mask(int* place) {
  if (threadIdx.x < 32) place[threadIdx.x] = __any_sync(0x0000FFFFu, 1);
}

__global__ void shuffle_from_outside(int* place) {
  if (threadIdx.x < 16) place[threadIdx.x] = __shfl_xor_sync(0x0000FFFFu, static_cast<int>(threadIdx.x), 16);
}

__global__ void ended_lanes(int* place) {
  if (threadIdx.x % 32 >= 16) return;
  place[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x), 1);
}

__global__ void mixed_operations(int* place) {
  if (threadIdx.x % 2 == 0) {
    place[threadIdx.x] = __any_sync(0xFFFFFFFFu, 1);
  } else {
    place[threadIdx.x] = __all_sync(0xFFFFFFFFu, 1);
  }
}

__global__ void flag_that_never_comes(int* place) {
  while (load_acquire_system(reinterpret_cast<const uint32_t*>(place) + 9) == 0) {
  }
}

// Looks at a clock, but never gives up.
__global__ void clock_without_deadline(int* place) {
  const uint64_t begin = global_nanoseconds();
  while (load_relaxed_system(reinterpret_cast<const uint64_t*>(place) + 5) == 0 && global_nanoseconds() >= begin) {
  }
}

// Every block waits for all: more blocks than are resident wait for ever.
__global__ void grid_barrier(int* place) {
  unsigned* const arrived = reinterpret_cast<unsigned*>(place);
  if (threadIdx.x == 0) {
    atomicAdd(arrived, 1u);
    while (load_acquire_system(arrived) < gridDim.x) {
    }
  }
  __syncthreads();
}

__global__ void loop_without_end(int* place) {
  volatile int* const values = place;
  while (values[0] == 0) {
  }
}

struct Misuse {
  const char* name;
  void (*kernel)(int*);
  int num_blocks;
  size_t shared_bytes;
};
constexpr Misuse kMisuses[] = {
    {"nothing_wrong", nothing_wrong, 1, 0},
    {"past_the_end", past_the_end, 1, 0},
    {"before_the_start", before_the_start, 1, 0},
    {"far_away", far_away, 1, 0},
    {"past_dynamic_shared", past_dynamic_shared, 1, 63 * sizeof(int)},
    {"past_an_array", past_an_array, 1, 0},
    {"misaligned_vector", misaligned_vector, 1, 0},
    {"misaligned_word", misaligned_word, 1, 0},
    {"unwritten_shared", unwritten_shared, 1, 0},
    {"same_place", same_place, 1, 0},
    {"barrier_for_half", barrier_for_half, 1, 0},
    {"two_barriers", two_barriers, 1, 0},
    {"barrier_against_warp", barrier_against_warp, 1, 0},
    {"foreign_mask", foreign_mask, 1, 0},
    {"shuffle_from_outside", shuffle_from_outside, 1, 0},
    {"ended_lanes", ended_lanes, 1, 0},
    {"mixed_operations", mixed_operations, 1, 0},
    {"flag_that_never_comes", flag_that_never_comes, 1, 0},
    {"clock_without_deadline", clock_without_deadline, 1, 0},
    {"grid_barrier", grid_barrier, 4, 0},
    {"loop_without_end", loop_without_end, 1, 0},
};

}  // namespace

SIMT_EXPORT int simt_misuse(const char* name, int* place) {
  return simt::guarded([&] {
    for (const Misuse& misuse : kMisuses) {
      if (std::string(misuse.name) != name) continue;
      const LaunchShape shape{dim3(static_cast<unsigned>(misuse.num_blocks)), dim3(64), misuse.shared_bytes};
      return launch(misuse.name, shape, nullptr, misuse.kernel, place);
    }
    RC_FAIL(usage, "no kernel is called ", name);
  });
}
