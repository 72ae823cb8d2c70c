#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "base/cuda_driver.h"
#include "base/cuda_scope.h"
#include "base/device.h"
#include "base/nvml.h"
#include "base/runtime.h"

namespace ringcomm::runtime {
namespace {

// Whether anything of this process has used the device.
bool has_context(int device) {
  unsigned flags = 0;
  int active = 0;
  return cuda_driver().primary_context_state(device, &flags, &active) == CUDA_SUCCESS && active != 0;
}

// What the runtime works in on a device: the primary context, kept for ever, as the runtime keeps it. Whoever has it
// current need not ask whether cudaDeviceReset() has emptied it: the runtime fills it again.
CUcontext primary_context(int device, CUcontext current) {
  static std::mutex& mutex = *new std::mutex;
  static auto& kept = *new std::map<int, CUcontext>;
  const std::lock_guard<std::mutex> lock(mutex);
  CUcontext& context = kept[device];
  if (context == nullptr || (context != current && !has_context(device))) {
    RC_CUDA(cuda_driver().retain_primary_context(&context, device), "making CUDA device ", device, " of ",
            device_count(), " current failed");
  }
  return context;
}

int attribute_of_pair(cudaDeviceP2PAttr attribute, int device, int peer) {
  int value = 0;
  RC_CUDA(cudaDeviceGetP2PAttribute(&value, attribute, device, peer), "asking how devices ", device, " and ", peer,
          " are linked failed");
  return value;
}

}  // namespace

const char* name() { return "cuda"; }

bool available(std::string* reason) {
  const DeviceProbe probe = probe_devices();
  if (reason != nullptr) *reason = probe.reason;
  return probe.count > 0;
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

int current_device() {
  int device = 0;
  RC_CUDA(cudaGetDevice(&device), "asking for the current CUDA device failed");
  return device;
}

// Not with cudaSetDevice(), the way back of which, from CUDA 12 on, creates a context on the device before: all ranks
// of a host would have one on device 0. The runtime works in whatever context is current, and going back to none at all
// leaves it the device that it had chosen itself.
DeviceGuard::DeviceGuard(int device) {
  CUcontext now = nullptr;
  RC_CUDA(cuda_driver().current_context(&now), "asking for the current CUDA context failed");
  const CUcontext wanted = primary_context(device, now);
  if (now == wanted) return;
  RC_CUDA(cuda_driver().push_context(wanted), "making CUDA device ", device, " of ", device_count(), " current failed");
  changed_ = true;
}
DeviceGuard::~DeviceGuard() {
  CUcontext popped = nullptr;
  if (changed_) cuda_driver().pop_context(&popped);
}

DeviceUuid device_uuid(int device) {
  CUuuid found;
  RC_CUDA(cuda_driver().device_get_uuid(&found, device), "asking for the UUID of CUDA device ", device, " failed");
  DeviceUuid uuid;
  static_assert(sizeof(found.bytes) == sizeof(uuid), "a UUID has 16 bytes");
  std::memcpy(uuid.data(), found.bytes, sizeof(found.bytes));
  return uuid;
}

int num_multiprocessors(int device) {
  int count = 0;
  RC_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
          "asking for the multiprocessors of CUDA device ", device, " failed");
  return count;
}

bool reaches(int device, int peer) {
  if (device == peer) return true;
  int can = 0;
  RC_CUDA(cudaDeviceCanAccessPeer(&can, device, peer), "asking whether CUDA device ", device, " reaches device ", peer,
          " failed");
  return can != 0;
}

// CUDA names no links. It says whether atomics of the one device work in memory of the other, which they do over NVLink
// and do not over PCIe.
Link link_between(int device, int peer) {
  const int count = device_count();
  if (device < 0 || device >= count || peer < 0 || peer >= count) {
    RC_FAIL(device, "there are no devices ", device, " and ", peer, ": this process sees ", count, " CUDA devices");
  }
  if (device == peer) return {"same", "CUDA"};
  if (attribute_of_pair(cudaDevP2PAttrAccessSupported, device, peer) == 0) return {"none", "CUDA"};
  std::string reason;
  if (const auto nvlink = nvml::linked_by_nvlink(device_uuid(device), device_uuid(peer), &reason)) {
    return {*nvlink ? "NVLink" : "PCIe", "NVML"};
  }
  const bool has_atomics = attribute_of_pair(cudaDevP2PAttrNativeAtomicSupported, device, peer) != 0;
  return {has_atomics ? "NVLink" : "PCIe", concat("a guess, by whether atomics work between the two: ", reason)};
}

bool shares_device_concurrently(int device) {
  int value = 0;
  if (cudaDeviceGetAttribute(&value, cudaDevAttrMpsEnabled, device) == cudaSuccess) return value != 0;
  cudaGetLastError();  // a driver that does not know
  return false;
}

// The driver's question, because the runtime's needs a context, and makes one on device 0 in a thread that has none.
int device_of(const void* address) {
  if (device_count() == 0) return -1;
  unsigned type = 0;  // stays so for memory that CUDA does not know
  unsigned is_managed = 0;
  int device = -1;
  CUpointer_attribute wanted[] = {CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_POINTER_ATTRIBUTE_IS_MANAGED,
                                  CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL};
  void* found[] = {&type, &is_managed, &device};
  const CUresult status = cuda_driver().pointer_attributes(3, wanted, found, reinterpret_cast<CUdeviceptr>(address));
  if (status != CUDA_SUCCESS) return -1;
  return type == CU_MEMORYTYPE_DEVICE || is_managed != 0 ? device : -1;
}

// ---- DeviceMemory, PinnedMemory

namespace {

// In a destructor, in whatever thread.
template <typename Call, typename Handle>
void undo(int device, Call call, Handle handle) {
  try {
    const HostCall scope(device);
    if (call(handle) != cudaSuccess) cudaGetLastError();
  } catch (const Error&) {  // the device is lost, and what it had with it
  }
}

}  // namespace

DeviceMemory::DeviceMemory(int device, int64_t num_bytes) : num_bytes_(num_bytes), device_(device) {
  const HostCall call(device);
  void* memory = nullptr;
  RC_CUDA(cudaMalloc(&memory, static_cast<size_t>(num_bytes)), "allocating ", num_bytes, " bytes on CUDA device ",
          device, " failed");
  data_ = static_cast<uint8_t*>(memory);
}
DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(num_bytes_, other.num_bytes_);
  std::swap(device_, other.device_);
  return *this;
}
DeviceMemory::~DeviceMemory() {
  if (data_ != nullptr) undo(device_, cudaFree, data_);
}

PinnedMemory::PinnedMemory(int64_t num_bytes) : owner_(current_device()) {
  const HostCall call(owner_);
  void* memory = nullptr;
  RC_CUDA(cudaHostAlloc(&memory, static_cast<size_t>(num_bytes), cudaHostAllocPortable | cudaHostAllocMapped),
          "allocating ", num_bytes, " bytes of host memory for GPUs failed");
  host_ = static_cast<uint8_t*>(memory);
  std::memset(host_, 0, static_cast<size_t>(num_bytes));
  const cudaError_t status = cudaHostGetDevicePointer(&memory, host_, 0);
  if (status != cudaSuccess) cudaFreeHost(host_);
  RC_CUDA(status, "mapping host memory for GPUs failed");
  device_ = static_cast<uint8_t*>(memory);
}
PinnedMemory::PinnedMemory(PinnedMemory&& other) noexcept { *this = std::move(other); }
PinnedMemory& PinnedMemory::operator=(PinnedMemory&& other) noexcept {
  std::swap(host_, other.host_);
  std::swap(device_, other.device_);
  std::swap(owner_, other.owner_);
  return *this;
}
PinnedMemory::~PinnedMemory() {
  if (host_ != nullptr) undo(owner_, cudaFreeHost, host_);
}

// ---- Streams and events

OwnStream::OwnStream(int device) : device_(device) {
  const HostCall call(device);
  int least = 0;
  int greatest = 0;
  RC_CUDA(cudaDeviceGetStreamPriorityRange(&least, &greatest), "asking for stream priorities failed");
  RC_CUDA(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest), "creating a stream on CUDA device ",
          device, " failed");
}
OwnStream::OwnStream(OwnStream&& other) noexcept { *this = std::move(other); }
OwnStream& OwnStream::operator=(OwnStream&& other) noexcept {
  std::swap(stream_, other.stream_);
  std::swap(device_, other.device_);
  return *this;
}
OwnStream::~OwnStream() {
  if (stream_ != nullptr) undo(device_, cudaStreamDestroy, stream_);
}

Event::Event(int device) : device_(device) {
  const HostCall call(device);
  cudaEvent_t event = nullptr;
  RC_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event on CUDA device ", device,
          " failed");
  event_ = event;
}
Event::Event(Event&& other) noexcept { *this = std::move(other); }
Event& Event::operator=(Event&& other) noexcept {
  std::swap(event_, other.event_);
  std::swap(device_, other.device_);
  return *this;
}
Event::~Event() {
  if (event_ != nullptr) undo(device_, cudaEventDestroy, static_cast<cudaEvent_t>(event_));
}
void Event::record(Stream stream) {
  const DeviceGuard guard(device_);
  RC_CUDA(cudaEventRecord(static_cast<cudaEvent_t>(event_), stream), "recording a CUDA event failed");
}
bool Event::passed() const {
  if (event_ == nullptr) return true;
  const HostCall call(device_);
  const cudaError_t status = cudaEventQuery(static_cast<cudaEvent_t>(event_));
  if (status == cudaErrorNotReady) {
    cudaGetLastError();
    return false;
  }
  RC_CUDA(status, "the GPU failed before a CUDA event was passed");
  return true;
}
void Event::hold_back(Stream stream) const {
  if (event_ == nullptr) return;
  const DeviceGuard guard(device_);
  RC_CUDA(cudaStreamWaitEvent(stream, static_cast<cudaEvent_t>(event_), 0), "holding back a CUDA stream failed");
}

void copy_async(void* to, const void* from, int64_t num_bytes, Stream stream) {
  if (num_bytes <= 0) return;
  RC_CUDA(cudaMemcpyAsync(to, from, static_cast<size_t>(num_bytes), cudaMemcpyDefault, stream), "copying ", num_bytes,
          " bytes of GPU memory failed");
}
void fill_async(void* to, int value, int64_t num_bytes, Stream stream) {
  if (num_bytes <= 0) return;
  RC_CUDA(cudaMemsetAsync(to, value, static_cast<size_t>(num_bytes), stream), "filling ", num_bytes,
          " bytes of GPU memory failed");
}
void synchronize(Stream stream) {
  const RelaxedCapture relaxed;
  RC_CUDA(cudaStreamSynchronize(stream), "work on a CUDA stream failed");
}
void synchronize_device(int device) {
  const HostCall call(device);
  RC_CUDA(cudaDeviceSynchronize(), "work on CUDA device ", device, " failed");
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus found = cudaStreamCaptureStatusNone;
  const cudaError_t status = cudaStreamIsCapturing(stream, &found);
  if (status == cudaErrorStreamCaptureImplicit) {  // the default stream, while another one is being captured
    cudaGetLastError();
    return false;
  }
  RC_CUDA(status, "asking whether a CUDA stream is being captured failed");
  return found != cudaStreamCaptureStatusNone;
}

}  // namespace ringcomm::runtime
