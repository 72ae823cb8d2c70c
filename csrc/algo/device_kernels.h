// What each of the algo/*_cuda.cu files gives to algo/device_collective_cuda.cu. Calls have been checked.
#pragma once

#include "algo/device_collective.h"

namespace ringcomm::cuda {

struct CollectiveKernels {
  DevicePlan (*plan)(const DeviceCall& call, const DeviceLayout& layout);
  void (*launch)(const DeviceCall& call, const DevicePlan& plan, const GroupView& group, const DeviceRounds& rounds,
                 Stream stream);
  void (*load)();  // see load_kernels
};

// two_shot_cuda.cu: exact all_reduce with two_shot; reduce; reduce_scatter
const CollectiveKernels& two_shot_kernels();
// encoded_cuda.cu: all_reduce with a codec
const CollectiveKernels& encoded_kernels();
// one_shot_cuda.cu: small all_reduce by packets. In-kernel mode only.
const CollectiveKernels& one_shot_kernels();
// ring_cuda.cu: all_reduce
const CollectiveKernels& ring_kernels();
// move_cuda.cu: broadcast (staged and ring), all_gather, all_to_all, gather, scatter
const CollectiveKernels& move_kernels();
// direct_cuda.cu: whatever works on the arrays where they are
const CollectiveKernels& direct_kernels();

}  // namespace ringcomm::cuda
