// What CUDA devices this process can see. base/device_cuda.cu asks the CUDA runtime, which is linked
// statically; base/device_nocuda.cpp is its twin in a build without CUDA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ringcomm {

struct DeviceInfo {
  std::string name;
  int compute_major = 0;  // compute capability, such as 9.0
  int compute_minor = 0;
  int64_t total_bytes = 0;
  int num_multiprocessors = 0;
};

struct DeviceProbe {
  int count = 0;            // == devices.size()
  std::string reason;       // why count is 0; empty when it is not
  int driver_version = 0;   // CUDA version that the driver supports, 1000 * major + 10 * minor; 0: no driver
  int runtime_version = 0;  // of the CUDA runtime in this build, likewise; 0: built without CUDA
  std::vector<DeviceInfo> devices;
};

// Never throws for a missing driver or device, never exits; may take a second the first time.
// Initialises the CUDA driver (but creates no context), so a process that forks later must not call it.
DeviceProbe probe_devices();

}  // namespace ringcomm
