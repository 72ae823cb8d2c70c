// SharedMemory of base/runtime.h.
//
// CUDA's virtual memory management exports memory as a descriptor that is sent over a socket; it works with whatever
// allocator the user has. Where there is no such descriptor (some containers and virtual machines), cudaMalloc's memory
// has an old kind of handle. Where there is neither, only threads of this process share the memory.
#include <unistd.h>

#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "base/cuda_driver.h"
#include "base/cuda_scope.h"
#include "base/log.h"
#include "base/runtime.h"

namespace ringcomm::runtime {
namespace {

constexpr auto kDescriptor = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
// cudaMalloc puts less together in one piece, all of which its handle would give away.
constexpr int64_t kLegacyGranularity = 2 << 20;

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

bool device_has(CUdevice_attribute attribute, int device) {
  int value = 0;
  return cuda_driver().device_get_attribute(&value, attribute, device) == CUDA_SUCCESS && value != 0;
}

// This process's number of the GPU; -1: it does not see it.
int ordinal_of(const DeviceUuid& uuid) {
  const int count = device_count();
  for (int device = 0; device < count; ++device) {
    if (device_uuid(device) == uuid) return device;
  }
  return -1;
}

// Kernels of `device` reach all that cudaMalloc gives on `peer` from now on. Uses both.
void enable_peer_access(int device, int peer) {
  if (device == peer) return;
  const cudaError_t status = cudaDeviceEnablePeerAccess(peer, 0);
  if (status == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();
  } else {
    RC_CUDA(status, "letting CUDA device ", device, " reach device ", peer, " failed");
  }
}

// Kernels of `device` reach the mapped range from now on.
void allow_access(CUdeviceptr address, size_t num_bytes, int device) {
  CUmemAccessDesc access{};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = device;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  RC_CUDA(cuda_driver().set_access(address, num_bytes, &access, 1), "letting CUDA device ", device,
          " reach shared memory failed");
}

// Addresses with memory behind them. Both calls need the size that was mapped.
class VirtualRange {
 public:
  VirtualRange() = default;
  // Takes over the allocation, also when it throws.
  VirtualRange(CUmemGenericAllocationHandle allocation, size_t num_bytes)
      : allocation_(allocation), owns_allocation_(true), num_bytes_(num_bytes) {
    try {
      const CudaDriver& driver = cuda_driver();
      RC_CUDA(driver.address_reserve(&address_, num_bytes, 0, 0, 0), "reserving ", num_bytes,
              " addresses of GPU memory failed");
      RC_CUDA(driver.map(address_, num_bytes, 0, allocation_, 0), "mapping ", num_bytes, " bytes of GPU memory failed");
      mapped_ = true;
    } catch (...) {
      clear();
      throw;
    }
  }
  VirtualRange(const VirtualRange&) = delete;
  VirtualRange& operator=(VirtualRange&& other) noexcept {
    std::swap(allocation_, other.allocation_);
    std::swap(owns_allocation_, other.owns_allocation_);
    std::swap(num_bytes_, other.num_bytes_);
    std::swap(address_, other.address_);
    std::swap(mapped_, other.mapped_);
    return *this;
  }
  ~VirtualRange() { clear(); }

  CUdeviceptr address() const { return address_; }
  CUmemGenericAllocationHandle allocation() const { return allocation_; }
  bool empty() const { return !owns_allocation_; }

 private:
  void clear() {
    if (!owns_allocation_) return;
    const CudaDriver& driver = cuda_driver();
    if (mapped_) driver.unmap(address_, num_bytes_);
    if (address_ != 0) driver.address_free(address_, num_bytes_);
    driver.release(allocation_);
    owns_allocation_ = mapped_ = false;
    address_ = 0;
  }

  CUmemGenericAllocationHandle allocation_ = 0;
  bool owns_allocation_ = false;
  size_t num_bytes_ = 0;
  CUdeviceptr address_ = 0;
  bool mapped_ = false;
};

int export_allocation(CUmemGenericAllocationHandle allocation) {
  int fd = -1;
  RC_CUDA(cuda_driver().export_handle(&fd, allocation, kDescriptor, 0), "exporting GPU memory as a descriptor failed");
  return fd;
}

// What CUDA knows of an address; 0 where it knows nothing.
struct PointerFacts {
  CUdeviceptr begin = 0;
  size_t num_bytes = 0;
  unsigned long long id = 0;
  int is_legacy_capable = 0;
};

PointerFacts facts_of(const void* address) {
  PointerFacts facts;
  CUpointer_attribute attributes[] = {CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, CU_POINTER_ATTRIBUTE_RANGE_SIZE,
                                      CU_POINTER_ATTRIBUTE_BUFFER_ID, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE};
  void* values[] = {&facts.begin, &facts.num_bytes, &facts.id, &facts.is_legacy_capable};
  const CUdeviceptr pointer = reinterpret_cast<CUdeviceptr>(address);
  if (cuda_driver().pointer_attributes(4, attributes, values, pointer) != CUDA_SUCCESS) return {};
  return facts;
}

}  // namespace

Allocation allocation_of(const void* address) {
  const PointerFacts facts = facts_of(address);
  if (facts.id == 0 || facts.begin == 0) return {};
  return {facts.begin, static_cast<int64_t>(facts.num_bytes), facts.id};
}

MemoryHandle handle_of(int device, const Allocation& allocation) {
  const HostCall call(device);
  MemoryHandle handle{};
  handle.kind = MemoryHandle::Kind::local;
  handle.pid = getpid();
  handle.owner = process_token();
  handle.address = allocation.address;
  handle.num_bytes = allocation.num_bytes;
  handle.device = device;
  handle.uuid = device_uuid(device);
  void* const begin = reinterpret_cast<void*>(allocation.address);
  cudaIpcMemHandle_t ipc;
  static_assert(sizeof(ipc) == sizeof(handle.legacy), "a handle has 64 bytes");
  if (facts_of(begin).is_legacy_capable != 0 && cudaIpcGetMemHandle(&ipc, begin) == cudaSuccess) {
    std::memcpy(handle.legacy, &ipc, sizeof(ipc));
    handle.kind = MemoryHandle::Kind::legacy;
  }
  cudaGetLastError();
  return handle;
}

// A peer's cudaMalloc. A process can have a handle open once only: those who want the same memory share it.
class OpenedHandle {
 public:
  OpenedHandle(int device, const MemoryHandle& handle) : key_{device, {}} {
    std::memcpy(key_.second.data(), handle.legacy, sizeof(handle.legacy));
    const std::lock_guard<std::mutex> lock(mutex());
    Shared& shared = all()[key_];
    if (shared.num_users == 0) {
      cudaIpcMemHandle_t ipc;
      std::memcpy(&ipc, handle.legacy, sizeof(ipc));
      RC_CUDA(cudaIpcOpenMemHandle(&shared.data, ipc, cudaIpcMemLazyEnablePeerAccess), "mapping memory of process ",
              handle.pid, " for CUDA device ", device, " failed");
    }
    ++shared.num_users;
    data_ = static_cast<uint8_t*>(shared.data);
  }
  ~OpenedHandle() {
    const std::lock_guard<std::mutex> lock(mutex());
    const auto found = all().find(key_);
    if (--found->second.num_users > 0) return;
    cudaIpcCloseMemHandle(found->second.data);
    all().erase(found);
  }
  OpenedHandle(const OpenedHandle&) = delete;
  uint8_t* data() const { return data_; }

 private:
  using Key = std::pair<int, std::array<uint8_t, sizeof(MemoryHandle::legacy)>>;
  struct Shared {
    void* data = nullptr;
    int num_users = 0;
  };
  // Not destroyed: memory may be let go of when the process ends.
  static std::mutex& mutex() {
    static std::mutex& only = *new std::mutex;
    return only;
  }
  static std::map<Key, Shared>& all() {
    static auto& only = *new std::map<Key, Shared>;
    return only;
  }

  Key key_;
  uint8_t* data_ = nullptr;
};

struct SharedMemory::State {
  MemoryHandle handle{};
  uint8_t* data = nullptr;
  int device = 0;                        // that uses it
  VirtualRange range;                    // created, or imported
  void* allocated = nullptr;             // by cudaMalloc
  std::unique_ptr<OpenedHandle> opened;  // a peer's

  ~State() {
    if (range.empty() && allocated == nullptr && opened == nullptr) return;
    try {
      const HostCall call(device);
      opened.reset();
      if (allocated != nullptr) cudaFree(allocated);
      range = VirtualRange();
    } catch (const Error&) {  // the device is lost, and its memory with it
    }
    cudaGetLastError();
  }

  void create_virtual(int64_t num_bytes) {
    if (!device_has(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device) ||
        !device_has(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, device)) {
      RC_FAIL(device, "CUDA device ", device, " has no virtual memory management with descriptors");
    }
    const CudaDriver& driver = cuda_driver();
    CUmemAllocationProp properties{};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.requestedHandleTypes = kDescriptor;
    properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    properties.location.id = device;
    size_t granularity = 0;
    RC_CUDA(driver.allocation_granularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
            "asking for the granularity of GPU memory failed");
    const size_t rounded = static_cast<size_t>(round_up(num_bytes, static_cast<int64_t>(granularity)));
    CUmemGenericAllocationHandle allocation = 0;
    RC_CUDA(driver.create(&allocation, rounded, &properties, 0), "creating ", rounded, " bytes on CUDA device ", device,
            " failed");
    VirtualRange created(allocation, rounded);
    ::close(export_allocation(allocation));  // whether it can be: containers may forbid it
    allow_access(created.address(), rounded, device);
    range = std::move(created);
    data = reinterpret_cast<uint8_t*>(range.address());
    handle.kind = MemoryHandle::Kind::descriptor;
    handle.num_bytes = static_cast<int64_t>(rounded);
  }

  void create_legacy(int64_t num_bytes, const std::string& why_not_virtual) {
    const int64_t rounded = round_up(num_bytes, kLegacyGranularity);
    RC_CUDA(cudaMalloc(&allocated, static_cast<size_t>(rounded)), "allocating ", rounded,
            " bytes to share on CUDA device ", device, " failed (", why_not_virtual, ")");
    data = static_cast<uint8_t*>(allocated);
    handle.num_bytes = rounded;
    cudaIpcMemHandle_t ipc;
    static_assert(sizeof(ipc) == sizeof(handle.legacy), "a handle has 64 bytes");
    const cudaError_t status = cudaIpcGetMemHandle(&ipc, allocated);
    if (status == cudaSuccess) {
      std::memcpy(handle.legacy, &ipc, sizeof(ipc));
      handle.kind = MemoryHandle::Kind::legacy;
      log(LogLevel::info, "INIT", "GPU memory is shared by cudaIpcGetMemHandle: ", why_not_virtual);
    } else {
      log(LogLevel::warning, "INIT", "GPU memory is shared by threads of this process only: ", why_not_virtual,
          "; cudaIpcGetMemHandle: ", cuda_error_text(status));
    }
  }

  void import_descriptor(int fd, int owner) {
    if (fd < 0) RC_FAIL(device, "memory of process ", handle.pid, " needs its descriptor, which did not come");
    CUmemGenericAllocationHandle allocation = 0;
    void* const as_pointer = reinterpret_cast<void*>(static_cast<intptr_t>(fd));
    RC_CUDA(cuda_driver().import_handle(&allocation, as_pointer, kDescriptor), "importing memory of process ",
            handle.pid, " on CUDA device ", owner, " failed");
    range = VirtualRange(allocation, static_cast<size_t>(handle.num_bytes));
    allow_access(range.address(), static_cast<size_t>(handle.num_bytes), device);
    data = reinterpret_cast<uint8_t*>(range.address());
  }

  void open_legacy() {
    opened = std::make_unique<OpenedHandle>(device, handle);
    data = opened->data();
  }
};

SharedMemory::SharedMemory() = default;
SharedMemory::SharedMemory(SharedMemory&&) noexcept = default;
SharedMemory& SharedMemory::operator=(SharedMemory&&) noexcept = default;
SharedMemory::~SharedMemory() = default;

SharedMemory SharedMemory::allocate(int device, int64_t num_bytes) {
  const HostCall call(device);
  SharedMemory memory;
  memory.state_ = std::make_unique<State>();
  State& state = *memory.state_;
  state.device = device;
  try {
    state.create_virtual(num_bytes);
  } catch (const Error& error) {
    state.create_legacy(num_bytes, error.what());
  }
  state.handle.pid = getpid();
  state.handle.owner = process_token();
  state.handle.address = reinterpret_cast<uint64_t>(state.data);
  state.handle.device = device;
  state.handle.uuid = device_uuid(device);
  const OwnStream stream(device);
  fill_async(state.data, 0, state.handle.num_bytes, stream.get());
  synchronize(stream.get());
  return memory;
}

SharedMemory SharedMemory::open(int device, const MemoryHandle& handle, int fd) {
  const int owner = ordinal_of(handle.uuid);
  if (owner < 0) {
    RC_FAIL(device, "memory of process ", handle.pid, " lies on a GPU (its device ", handle.device,
            ") that this process does not see: give all ranks of a host the same CUDA_VISIBLE_DEVICES");
  }
  if (!reaches(device, owner)) {
    RC_FAIL(device, "device ", device, " cannot reach memory of device ", owner, ", which process ", handle.pid,
            " shares");
  }
  const HostCall call(device);
  SharedMemory memory;
  memory.state_ = std::make_unique<State>();
  State& state = *memory.state_;
  state.handle = handle;
  state.device = device;
  if (handle.kind == MemoryHandle::Kind::local && (handle.owner != process_token() || owner != device)) {
    RC_FAIL(device, "GPU memory of process ", handle.pid,
            " is used by its own process and GPU only: its allocator gives no cudaIpcGetMemHandle");
  }
  if (handle.owner == process_token()) {
    state.data = reinterpret_cast<uint8_t*>(handle.address);
    if (handle.kind == MemoryHandle::Kind::descriptor) {
      allow_access(static_cast<CUdeviceptr>(handle.address), static_cast<size_t>(handle.num_bytes), device);
    } else {
      enable_peer_access(device, owner);
    }
    return memory;
  }
  switch (handle.kind) {
    case MemoryHandle::Kind::local:  // refused above
    case MemoryHandle::Kind::none:
      RC_FAIL(device, "GPU memory of process ", handle.pid,
              " cannot be shared with other processes: there, CUDA gives neither descriptors nor "
              "cudaIpcGetMemHandle (its log says why); run the ranks as threads of one process, or on the CPU");
    case MemoryHandle::Kind::descriptor:
      state.import_descriptor(fd, owner);
      break;
    case MemoryHandle::Kind::legacy:
      state.open_legacy();
      break;
  }
  return memory;
}

uint8_t* SharedMemory::data() const { return state_ == nullptr ? nullptr : state_->data; }
const MemoryHandle& SharedMemory::handle() const {
  static const MemoryHandle none{};
  return state_ == nullptr ? none : state_->handle;
}
int SharedMemory::export_descriptor() const {
  if (state_ == nullptr || state_->handle.kind != MemoryHandle::Kind::descriptor || state_->range.empty()) return -1;
  return export_allocation(state_->range.allocation());
}

}  // namespace ringcomm::runtime
