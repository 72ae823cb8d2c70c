#include "base/cuda_check.h"
#include "base/device.h"

namespace ringcomm {

DeviceProbe probe_devices() {
  DeviceProbe probe;
  // Both work, and report 0, without a driver.
  cudaRuntimeGetVersion(&probe.runtime_version);
  cudaDriverGetVersion(&probe.driver_version);
  if (probe.driver_version == 0) {
    cudaGetLastError();
    probe.reason = "no CUDA driver on this machine (libcuda.so.1 cannot be loaded)";
    return probe;
  }
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    probe.reason = "cudaGetDeviceCount: " + cuda_error_text(status);
    return probe;
  }
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    const cudaError_t device_status = cudaGetDeviceProperties(&properties, device);
    if (device_status != cudaSuccess) {
      probe.reason = "cudaGetDeviceProperties: " + cuda_error_text(device_status);
      probe.devices.clear();
      return probe;
    }
    DeviceInfo info;
    info.name = properties.name;
    info.compute_major = properties.major;
    info.compute_minor = properties.minor;
    info.total_bytes = static_cast<int64_t>(properties.totalGlobalMem);
    info.num_multiprocessors = properties.multiProcessorCount;
    probe.devices.push_back(info);
  }
  probe.count = count;
  if (count == 0) probe.reason = "the CUDA driver reports no device (is CUDA_VISIBLE_DEVICES empty?)";
  return probe;
}

}  // namespace ringcomm
