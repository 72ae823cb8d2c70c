// What a call of the CUDA runtime needs around it that is not queued on a stream. For .cu files that are not emulated
// by tests/simt.
#pragma once

#include <cuda_runtime_api.h>

#include "base/runtime.h"

namespace ringcomm {

// While any thread captures a CUDA graph in the default mode, cudaMalloc, cudaFree, cudaEventQuery and their like fail
// in every thread, and spoil that graph. Not in a thread that has said it knows what it does, as here for a scope.
// What is illegal on a capturing stream itself stays illegal.
class RelaxedCapture {
 public:
  RelaxedCapture() { exchange(); }
  ~RelaxedCapture() { exchange(); }
  RelaxedCapture(const RelaxedCapture&) = delete;

 private:
  void exchange() {
    if (cudaThreadExchangeStreamCaptureMode(&mode_) != cudaSuccess) cudaGetLastError();
  }
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

namespace runtime {

// Both. In a thread that has no context of its own, such as a garbage collector's, a call without the guard makes one
// on device 0.
class HostCall {
 public:
  explicit HostCall(int device) : guard_(device) {}

 private:
  const DeviceGuard guard_;
  const RelaxedCapture relaxed_;
};

}  // namespace runtime
}  // namespace ringcomm
