// Which GPUs the emulation has, and whose memory is where.
//
//   RINGCOMM_SIMT_DEVICES      how many GPUs this host has (default 1)
//   RINGCOMM_SIMT_VISIBLE      what CUDA_VISIBLE_DEVICES is for CUDA: which of them this process sees, as in "1,0"
//   RINGCOMM_SIMT_PEERS        1 (default): every GPU reaches the memory of every other; 0: of none
//   RINGCOMM_SIMT_CONCURRENT   1: as if the MPS daemon were there; 0 (default). Kernels of several processes do run at
//                              the same time, whatever it says
//   RINGCOMM_SIMT_EXPORT       descriptor (default), or legacy: as where GPU memory cannot be exported as a descriptor
//
// Kernels reach every byte of the process. Memory that this emulation did not allocate counts as the current device's,
// so that NumPy arrays can stand for GPU arrays; place() says otherwise.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace simt {

// By the process's ordinal: the number of the GPU in the host.
const std::vector<int>& visible_devices();
bool peers_reach_each_other();
bool is_shared_concurrently();
bool exports_descriptors();

// Those on which this process has made a context, in order.
std::vector<int> devices_with_context();
// How many events this process has created.
int64_t num_events_made();

// From now on, memory is on this device; -1: on the host. path: of a file that it is, for other processes; "": none.
void place(const void* address, int64_t num_bytes, int device, const std::string& path = {});
void forget_place(const void* address);
// Of the range that the address is in, or `otherwise`.
int device_of(const void* address, int otherwise);
struct Placed {
  uint64_t address = 0;
  int64_t num_bytes = 0;  // 0: it is in no range
  uint64_t id = 0;        // of its place()
  std::string path;
};
Placed placed_at(const void* address);

}  // namespace simt
