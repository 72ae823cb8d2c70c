// The CUDA runtime as the rest of ringcomm uses it: devices, memory that peers can map, streams, events. Twins:
// base/runtime_cuda.cu with base/shared_memory_cuda.cu; base/runtime_nocuda.cpp, in a build without CUDA; and
// tests/simt/runtime, where kernels run on the CPU. Nothing else calls the CUDA runtime or driver, but base/launch.h
// and base/device.h.
//
// Failures throw DeviceError. No function waits for a device unless it says so; freeing memory always does, for all
// that runs there.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "base/process.h"
#include "base/stream.h"

namespace ringcomm::runtime {

// Which twin this is: "cuda", "none", or "simt" for the one of tests/simt.
const char* name();
// Whether there is a device to run on; else why not.
bool available(std::string* reason = nullptr);
int device_count();
int current_device();

// Makes a device current for a scope; afterwards all is as before. Uses no other device: a context that a process has
// on a GPU takes hundreds of MiB of it.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  bool changed_ = false;
};

// What identifies a GPU among all processes of a host.
using DeviceUuid = std::array<uint8_t, 16>;
DeviceUuid device_uuid(int device);
// Threads of kernels that a device can run at once, for what may wait for each other: multiprocessors.
int num_multiprocessors(int device);
// Whether kernels on `device` can reach memory of `peer` (true if they are the same). Uses neither.
bool reaches(int device, int peer);
// For people.
struct Link {
  std::string kind;    // "same", "NVLink", "PCIe" (any other peer access), or "none"
  std::string source;  // how that is known: "NVML", "CUDA", or why it is a guess
};
Link link_between(int device, int peer);
// Whether processes that share this GPU run kernels at the same time (the MPS daemon is there).
bool shares_device_concurrently(int device);

// The device whose memory this is; -1: it is the host's.
int device_of(const void* address);

// A piece of device memory as somebody allocated it.
struct Allocation {
  uint64_t address = 0;
  int64_t num_bytes = 0;  // 0: nothing is known of it
  uint64_t id = 0;        // no other allocation of this process has or had it
};
Allocation allocation_of(const void* address);

// How peers get at a piece of device memory. Plain bytes: it travels.
struct MemoryHandle {
  // local: by its own process and device only. none: by its own process, and devices that reach it
  enum class Kind : uint32_t { none = 0, descriptor = 1, legacy = 2, local = 3 };
  Kind kind;
  int32_t pid;        // of the owner, for messages
  uint64_t address;   // in the owner
  int64_t num_bytes;  // as allocated
  int32_t device;     // in the owner
  DeviceUuid uuid;
  ProcessToken owner;  // whose threads use `address`
  uint8_t legacy[64];  // cudaIpcMemHandle_t
};

// Of memory that is not ringcomm's, on `device`: legacy or local.
MemoryHandle handle_of(int device, const Allocation& allocation);

// Device memory that is shared with peers: allocated here (CUDA's virtual memory management, or cudaMalloc where that
// cannot be exported), zeroed; or mapped from a peer's handle. Unmapped or freed with the object, at once: no kernel
// may use it any more. Movable.
class SharedMemory {
 public:
  SharedMemory();
  static SharedMemory allocate(int device, int64_t num_bytes);
  // fd: what the owner's export_descriptor() became here, or -1; borrowed. In the owner's own process nothing is
  // mapped.
  static SharedMemory open(int device, const MemoryHandle& handle, int fd);
  SharedMemory(SharedMemory&& other) noexcept;
  SharedMemory& operator=(SharedMemory&& other) noexcept;
  ~SharedMemory();

  uint8_t* data() const;
  const MemoryHandle& handle() const;
  // A descriptor that the caller closes; -1 if the handle needs none.
  int export_descriptor() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Device memory of this process alone.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(int device, int64_t num_bytes);
  DeviceMemory(DeviceMemory&& other) noexcept;
  DeviceMemory& operator=(DeviceMemory&& other) noexcept;
  ~DeviceMemory();
  uint8_t* data() const { return data_; }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  uint8_t* data_ = nullptr;
  int64_t num_bytes_ = 0;
  int device_ = 0;
};

// Host memory that kernels of any device can reach, zeroed. Made through the current device.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  explicit PinnedMemory(int64_t num_bytes);
  PinnedMemory(PinnedMemory&& other) noexcept;
  PinnedMemory& operator=(PinnedMemory&& other) noexcept;
  ~PinnedMemory();
  uint8_t* host() const { return host_; }
  uint8_t* device() const { return device_; }  // as kernels see it

 private:
  uint8_t* host_ = nullptr;
  uint8_t* device_ = nullptr;
  int owner_ = 0;  // the device that was current
};

// A stream of its own, of high priority, that does not wait for the default stream.
class OwnStream {
 public:
  OwnStream() = default;
  explicit OwnStream(int device);
  OwnStream(OwnStream&& other) noexcept;
  OwnStream& operator=(OwnStream&& other) noexcept;
  ~OwnStream();
  Stream get() const { return stream_; }

 private:
  Stream stream_ = nullptr;
  int device_ = 0;
};

// Marks a point of a stream of its device. No timing.
class Event {
 public:
  Event() = default;
  explicit Event(int device);
  Event(Event&& other) noexcept;
  Event& operator=(Event&& other) noexcept;
  ~Event();
  void record(Stream stream);
  // Whether the stream has passed the point (true if nothing was recorded); throws what the device failed with.
  bool passed() const;
  // Whatever is queued on `stream` from now on waits for the point.
  void hold_back(Stream stream) const;

 private:
  void* event_ = nullptr;
  int device_ = 0;
};

void copy_async(void* to, const void* from, int64_t num_bytes, Stream stream);
void fill_async(void* to, int value, int64_t num_bytes, Stream stream);
// Blocks until the stream has done all that is queued. For set-up and ends, not for collectives: it has no deadline.
void synchronize(Stream stream);
// Blocks until all is done that is queued on any stream of the device. As above; and it ruins the graph that a stream
// of the device is being captured into.
void synchronize_device(int device);
// Whether the stream is being captured into a graph.
bool is_capturing(Stream stream);

}  // namespace ringcomm::runtime
