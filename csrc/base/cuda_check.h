// Calls of the CUDA runtime and driver become DeviceErrors. For .cu files that are not emulated by tests/simt.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "base/error.h"

namespace ringcomm {

// The driver's codes are the runtime's, so this is for CUresult as well. Takes the error out of the runtime's memory,
// where the next check of a launch would find it.
inline std::string cuda_error_text(int code) {
  cudaGetLastError();
  const cudaError_t status = static_cast<cudaError_t>(code);
  return std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
}

}  // namespace ringcomm

// A call that returns cudaError_t or CUresult; the message gets CUDA's text.
#define RC_CUDA(call, ...)                                                                                 \
  do {                                                                                                     \
    const int rc_cuda_status = static_cast<int>(call);                                                     \
    if (rc_cuda_status != 0) {                                                                             \
      RC_FAIL(device, ::ringcomm::concat(__VA_ARGS__), ": ", ::ringcomm::cuda_error_text(rc_cuda_status)); \
    }                                                                                                      \
  } while (0)
