// The twin of base/runtime_cuda.cu and base/device_cuda.cu for emulated GPUs. GPU memory is shared memory of the host.
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <set>
#include <utility>

#include "base/device.h"
#include "base/error.h"
#include "base/runtime.h"
#include "devices.h"
#include "gpu.h"
#include "transport/segment.h"

namespace ringcomm {
namespace {

constexpr int kMultiprocessors = 8;  // few: a block costs as many stacks as it has threads
constexpr int64_t kTotalBytes = int64_t{1} << 30;

thread_local int current = 0;

void check_device(int device) {
  const int count = static_cast<int>(simt::visible_devices().size());
  if (device < 0 || device >= count) {
    RC_FAIL(device, "there is no device ", device, ": this process sees ", count, " (emulated) devices");
  }
}

struct Streams {
  std::mutex mutex;
  std::set<Stream> live;
  int last_id = 0;
};
Streams& streams() {
  static Streams* const all = new Streams;  // outlives every static object that has one
  return *all;
}

CUstream_st resolved(Stream stream) {
  if (stream == nullptr) return CUstream_st{current, 0};
  const std::lock_guard<std::mutex> lock(streams().mutex);
  if (streams().live.count(stream) == 0) RC_FAIL(device, "what was given as a stream is no stream, or no longer");
  return *stream;
}

void queue_once(Stream stream, std::function<void()> work) {
  simt::Gpu::get().queue(resolved(stream), [work = std::move(work)] {
    work();
    return true;
  });
}

// The host's memory as a GPU's.
uint8_t* take_memory(int64_t num_bytes, int device, Mapping& mapping, UniqueFd& fd) {
  fd = UniqueFd(create_segment("ringcomm-simt", num_bytes));
  mapping = Mapping(fd.get(), num_bytes);
  simt::place(mapping.data(), num_bytes, device, concat("/proc/", getpid(), "/fd/", fd.get()));
  return mapping.data();
}

void set_legacy(runtime::MemoryHandle& handle, const std::string& path) {
  handle.kind = runtime::MemoryHandle::Kind::legacy;
  snprintf(reinterpret_cast<char*>(handle.legacy), sizeof(handle.legacy), "%s", path.c_str());
}

uint8_t* take_private(int64_t num_bytes, int device) {
  void* const memory = aligned_alloc(512, static_cast<size_t>((num_bytes + 511) / 512 * 512));
  if (memory == nullptr) RC_FAIL(device, "no ", num_bytes, " bytes of memory for an emulated GPU");
  simt::place(memory, num_bytes, device);
  return static_cast<uint8_t*>(memory);
}

// Freeing memory waits for the device, as cudaFree does.
void give_back(uint8_t* memory) {
  if (memory == nullptr) return;
  simt::Gpu::get().synchronize();
  simt::forget_place(memory);
  free(memory);
}

}  // namespace

DeviceProbe probe_devices() {
  DeviceProbe probe;
  for (const int device : simt::visible_devices()) {
    DeviceInfo info;
    info.name = "emulated GPU " + std::to_string(device);
    info.compute_major = 9;
    info.total_bytes = kTotalBytes;
    info.num_multiprocessors = kMultiprocessors;
    probe.devices.push_back(info);
  }
  probe.count = static_cast<int>(probe.devices.size());
  if (probe.count == 0) probe.reason = "no emulated device is visible (RINGCOMM_SIMT_DEVICES, RINGCOMM_SIMT_VISIBLE)";
  return probe;
}

namespace runtime {

const char* name() { return "simt"; }

bool available(std::string* reason) {
  const DeviceProbe probe = probe_devices();
  if (reason != nullptr) *reason = probe.reason;
  return probe.count > 0;
}
int device_count() { return static_cast<int>(simt::visible_devices().size()); }
int current_device() { return current; }

DeviceGuard::DeviceGuard(int device) : previous_(current) {
  check_device(device);
  current = device;
}
DeviceGuard::~DeviceGuard() { current = previous_; }

DeviceUuid device_uuid(int device) {
  check_device(device);
  DeviceUuid uuid{};
  const char text[] = "simt";
  std::copy(text, text + 4, uuid.begin());
  uuid.back() = static_cast<uint8_t>(simt::visible_devices()[static_cast<size_t>(device)]);
  return uuid;
}
int num_multiprocessors(int device) {
  check_device(device);
  return kMultiprocessors;
}
bool enable_peer_access(int device, int peer) {
  check_device(device);
  check_device(peer);
  return device == peer || simt::peers_reach_each_other();
}
std::string link_between(int device, int peer) {
  return device == peer ? "same" : enable_peer_access(device, peer) ? "NVLink" : "none";
}
bool shares_device_concurrently(int device) {
  check_device(device);
  return simt::is_shared_concurrently();
}
int device_of(const void* address) { return simt::device_of(address, current); }

Allocation allocation_of(const void* address) {
  const simt::Placed placed = simt::placed_at(address);
  return {placed.address, placed.num_bytes, placed.id};
}

MemoryHandle handle_of(int device, const Allocation& allocation) {
  MemoryHandle handle{};
  handle.kind = MemoryHandle::Kind::local;
  handle.pid = getpid();
  handle.address = allocation.address;
  handle.num_bytes = allocation.num_bytes;
  handle.device = device;
  handle.uuid = device_uuid(device);
  const std::string path = simt::placed_at(reinterpret_cast<const void*>(allocation.address)).path;
  if (!path.empty()) set_legacy(handle, path);
  return handle;
}

// ---- SharedMemory

struct SharedMemory::State {
  MemoryHandle handle{};
  Mapping mapping;  // empty if the memory is another object's of this process
  UniqueFd fd;      // of the owner
  uint8_t* data = nullptr;

  ~State() {
    if (mapping.data() == nullptr) return;
    simt::Gpu::get().synchronize();
    simt::forget_place(data);
  }
};

SharedMemory::SharedMemory() = default;
SharedMemory::SharedMemory(SharedMemory&&) noexcept = default;
SharedMemory& SharedMemory::operator=(SharedMemory&&) noexcept = default;
SharedMemory::~SharedMemory() = default;

SharedMemory SharedMemory::allocate(int device, int64_t num_bytes) {
  check_device(device);
  SharedMemory memory;
  memory.state_ = std::make_unique<State>();
  State& state = *memory.state_;
  state.data = take_memory(num_bytes, device, state.mapping, state.fd);
  MemoryHandle& handle = state.handle;
  handle.kind = simt::exports_descriptors() ? MemoryHandle::Kind::descriptor : MemoryHandle::Kind::legacy;
  handle.pid = getpid();
  handle.address = reinterpret_cast<uint64_t>(state.data);
  handle.num_bytes = num_bytes;
  handle.device = device;
  handle.uuid = device_uuid(device);
  if (handle.kind == MemoryHandle::Kind::legacy) set_legacy(handle, simt::placed_at(state.data).path);
  return memory;
}

SharedMemory SharedMemory::open(int device, const MemoryHandle& handle, int fd) {
  check_device(device);
  int owner = -1;
  for (int i = 0; i < device_count(); ++i) {
    if (device_uuid(i) == handle.uuid) owner = i;
  }
  if (owner < 0) {
    RC_FAIL(device, "memory of process ", handle.pid, " lies on a GPU (its device ", handle.device,
            ") that this process does not see: give all ranks of a host the same CUDA_VISIBLE_DEVICES");
  }
  if (!enable_peer_access(device, owner)) {
    RC_FAIL(device, "device ", device, " cannot reach memory of device ", owner, ", which process ", handle.pid,
            " shares");
  }
  SharedMemory memory;
  memory.state_ = std::make_unique<State>();
  State& state = *memory.state_;
  state.handle = handle;
  if (handle.kind == MemoryHandle::Kind::local && (handle.pid != getpid() || owner != device)) {
    RC_FAIL(device, "memory of process ", handle.pid, " is used by its own process and device only");
  }
  if (handle.pid == getpid()) {
    state.data = reinterpret_cast<uint8_t*>(handle.address);
    return memory;
  }
  UniqueFd opened;
  switch (handle.kind) {
    case MemoryHandle::Kind::local:  // refused above
    case MemoryHandle::Kind::none:
      RC_FAIL(device, "process ", handle.pid, " shares no memory: its handle is empty");
    case MemoryHandle::Kind::descriptor:
      if (fd < 0) RC_FAIL(device, "memory of process ", handle.pid, " needs its descriptor, which did not come");
      break;
    case MemoryHandle::Kind::legacy:
      opened = UniqueFd(::open(reinterpret_cast<const char*>(handle.legacy), O_RDWR | O_CLOEXEC));
      RC_SYS(opened.get(), "opening emulated memory of process ", handle.pid, " failed");
      fd = opened.get();
      break;
  }
  state.mapping = Mapping(fd, handle.num_bytes);
  state.data = state.mapping.data();
  simt::place(state.data, handle.num_bytes, owner);
  return memory;
}

uint8_t* SharedMemory::data() const { return state_ == nullptr ? nullptr : state_->data; }
const MemoryHandle& SharedMemory::handle() const {
  static const MemoryHandle none{};
  return state_ == nullptr ? none : state_->handle;
}
int SharedMemory::export_descriptor() const {
  if (state_ == nullptr || state_->handle.kind != MemoryHandle::Kind::descriptor || state_->fd.get() < 0) return -1;
  const int copy = fcntl(state_->fd.get(), F_DUPFD_CLOEXEC, 0);
  RC_SYS(copy, "duplicating the descriptor of emulated GPU memory failed");
  return copy;
}

// ---- DeviceMemory, PinnedMemory

DeviceMemory::DeviceMemory(int device, int64_t num_bytes) : num_bytes_(num_bytes), device_(device) {
  check_device(device);
  data_ = take_private(num_bytes, device);
  memset(data_, 0xA5, static_cast<size_t>(num_bytes));
}
DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(num_bytes_, other.num_bytes_);
  std::swap(device_, other.device_);
  return *this;
}
DeviceMemory::~DeviceMemory() { give_back(data_); }

PinnedMemory::PinnedMemory(int64_t num_bytes) : host_(take_private(num_bytes, -1)), device_(host_) {
  memset(host_, 0, static_cast<size_t>(num_bytes));
}
PinnedMemory::PinnedMemory(PinnedMemory&& other) noexcept { *this = std::move(other); }
PinnedMemory& PinnedMemory::operator=(PinnedMemory&& other) noexcept {
  std::swap(host_, other.host_);
  std::swap(device_, other.device_);
  return *this;
}
PinnedMemory::~PinnedMemory() { give_back(host_); }

// ---- Streams and events

OwnStream::OwnStream(int device) : device_(device) {
  check_device(device);
  const std::lock_guard<std::mutex> lock(streams().mutex);
  stream_ = new CUstream_st{device, ++streams().last_id};
  streams().live.insert(stream_);
}
OwnStream::OwnStream(OwnStream&& other) noexcept { *this = std::move(other); }
OwnStream& OwnStream::operator=(OwnStream&& other) noexcept {
  std::swap(stream_, other.stream_);
  std::swap(device_, other.device_);
  return *this;
}
OwnStream::~OwnStream() {  // what is queued goes on
  const std::lock_guard<std::mutex> lock(streams().mutex);
  streams().live.erase(stream_);
  delete stream_;
}

namespace {

using Point = std::shared_ptr<std::atomic<bool>>;
struct EmulatedEvent {
  int device;
  Point point;  // that was recorded last; null: none
};

}  // namespace

Event::Event(int device) {
  check_device(device);
  event_ = new EmulatedEvent{device, nullptr};
}
Event::Event(Event&& other) noexcept { *this = std::move(other); }
Event& Event::operator=(Event&& other) noexcept {
  std::swap(event_, other.event_);
  return *this;
}
Event::~Event() { delete static_cast<EmulatedEvent*>(event_); }

void Event::record(Stream stream) {
  EmulatedEvent& event = *static_cast<EmulatedEvent*>(event_);
  if (resolved(stream).rank != event.device) {
    RC_FAIL(device, "an event of device ", event.device, " was recorded on a stream of device ", resolved(stream).rank);
  }
  const Point point = std::make_shared<std::atomic<bool>>(false);
  event.point = point;
  queue_once(stream, [point] { *point = true; });
}
bool Event::passed() const {
  if (event_ == nullptr) return true;
  simt::Gpu::get().check();
  const Point& point = static_cast<EmulatedEvent*>(event_)->point;
  return point == nullptr || *point;
}
void Event::hold_back(Stream stream) const {
  const Point point = event_ == nullptr ? nullptr : static_cast<EmulatedEvent*>(event_)->point;
  if (point != nullptr) simt::Gpu::get().queue(resolved(stream), [point] { return point->load(); });
}

void copy_async(void* to, const void* from, int64_t num_bytes, Stream stream) {
  if (num_bytes > 0) queue_once(stream, [=] { memmove(to, from, static_cast<size_t>(num_bytes)); });
}
void fill_async(void* to, int value, int64_t num_bytes, Stream stream) {
  if (num_bytes > 0) queue_once(stream, [=] { memset(to, value, static_cast<size_t>(num_bytes)); });
}
void synchronize(Stream stream) { simt::Gpu::get().synchronize(resolved(stream)); }
bool is_capturing(Stream) { return false; }

}  // namespace runtime
}  // namespace ringcomm

namespace simt {

void enqueue(const char* name, dim3 grid, dim3 block, size_t shared_bytes, CUstream_st* stream, const Closure* owned) {
  std::unique_ptr<const Closure> closure(owned);
  const CUstream_st on = ringcomm::resolved(stream);
  if (on.rank != ringcomm::current) {
    RC_FAIL(device, "kernel ", name, " was not launched: its stream is one of device ", on.rank,
            " but the current device is ", ringcomm::current);
  }
  Gpu::get().launch(on, name, grid, block, shared_bytes, std::move(closure));
}

}  // namespace simt
