// The twin of base/runtime_cuda.cu and base/device_cuda.cu for emulated GPUs. GPU memory is shared memory of the host.
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

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

// As in CUDA: contexts are current on a stack of the thread's own. A thread that has none yet gets device 0's with the
// first call that needs one.
thread_local std::vector<int> contexts;

struct Made {
  std::mutex mutex;
  std::set<int> devices;  // that have a context of this process
  int64_t num_events = 0;
};
Made& made() {
  static Made* const all = new Made;  // outlives every static object that has one
  return *all;
}

void make_context(int device) {
  const std::lock_guard<std::mutex> lock(made().mutex);
  made().devices.insert(device);
}

int current() { return contexts.empty() ? 0 : contexts.back(); }

// By whatever, in CUDA, fails without a context.
void need_context() {
  if (!contexts.empty()) return;
  contexts.push_back(0);
  make_context(0);
}

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
  need_context();
  if (stream == nullptr) return CUstream_st{current(), 0};
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
  need_context();
  void* const memory = aligned_alloc(512, static_cast<size_t>((num_bytes + 511) / 512 * 512));
  if (memory == nullptr) RC_FAIL(device, "no ", num_bytes, " bytes of memory for an emulated GPU");
  simt::place(memory, num_bytes, device);
  return static_cast<uint8_t*>(memory);
}

// Freeing memory waits for the device, as cudaFree does.
void give_back(uint8_t* memory) {
  if (memory == nullptr) return;
  need_context();
  simt::Gpu::get().synchronize();
  simt::forget_place(memory);
  free(memory);
}

}  // namespace

DeviceProbe probe_devices() {
  DeviceProbe probe;
  for (size_t i = 0; i < simt::visible_devices().size(); ++i) {
    DeviceInfo info;
    info.name = "emulated GPU";
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
int current_device() { return current(); }

DeviceGuard::DeviceGuard(int device) {
  check_device(device);
  make_context(device);
  if (!contexts.empty() && contexts.back() == device) return;
  contexts.push_back(device);
  changed_ = true;
}
DeviceGuard::~DeviceGuard() {
  if (changed_) contexts.pop_back();
}

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
bool reaches(int device, int peer) {
  check_device(device);
  check_device(peer);
  return device == peer || simt::peers_reach_each_other();
}
Link link_between(int device, int peer) {
  return {device == peer ? "same" : reaches(device, peer) ? "NVLink" : "none", "emulation"};
}
bool shares_device_concurrently(int device) {
  check_device(device);
  return simt::is_shared_concurrently();
}
int device_of(const void* address) { return simt::device_of(address, current()); }

Allocation allocation_of(const void* address) {
  const simt::Placed placed = simt::placed_at(address);
  return {placed.address, placed.num_bytes, placed.id};
}

MemoryHandle handle_of(int device, const Allocation& allocation) {
  MemoryHandle handle{};
  handle.kind = MemoryHandle::Kind::local;
  handle.pid = getpid();
  handle.owner = process_token();
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
  int device = 0;  // that uses it

  ~State() {
    if (mapping.data() == nullptr) return;
    const DeviceGuard guard(device);
    need_context();
    simt::forget_place(data);
  }
};

SharedMemory::SharedMemory() = default;
SharedMemory::SharedMemory(SharedMemory&&) noexcept = default;
SharedMemory& SharedMemory::operator=(SharedMemory&&) noexcept = default;
SharedMemory::~SharedMemory() = default;

SharedMemory SharedMemory::allocate(int device, int64_t num_bytes) {
  const DeviceGuard guard(device);
  SharedMemory memory;
  memory.state_ = std::make_unique<State>();
  State& state = *memory.state_;
  state.device = device;
  state.data = take_memory(num_bytes, device, state.mapping, state.fd);
  MemoryHandle& handle = state.handle;
  handle.kind = simt::exports_descriptors() ? MemoryHandle::Kind::descriptor : MemoryHandle::Kind::legacy;
  handle.pid = getpid();
  handle.owner = process_token();
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
  if (!reaches(device, owner)) {
    RC_FAIL(device, "device ", device, " cannot reach memory of device ", owner, ", which process ", handle.pid,
            " shares");
  }
  SharedMemory memory;
  memory.state_ = std::make_unique<State>();
  State& state = *memory.state_;
  state.device = device;
  state.handle = handle;
  if (handle.kind == MemoryHandle::Kind::local && (handle.owner != process_token() || owner != device)) {
    RC_FAIL(device, "memory of process ", handle.pid, " is used by its own process and device only");
  }
  if (handle.owner == process_token()) {
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
  const DeviceGuard guard(device);
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
DeviceMemory::~DeviceMemory() {
  if (data_ == nullptr) return;
  const DeviceGuard guard(device_);
  give_back(data_);
}

PinnedMemory::PinnedMemory(int64_t num_bytes) : host_(take_private(num_bytes, -1)), device_(host_), owner_(current()) {
  memset(host_, 0, static_cast<size_t>(num_bytes));
}
PinnedMemory::PinnedMemory(PinnedMemory&& other) noexcept { *this = std::move(other); }
PinnedMemory& PinnedMemory::operator=(PinnedMemory&& other) noexcept {
  std::swap(host_, other.host_);
  std::swap(device_, other.device_);
  std::swap(owner_, other.owner_);
  return *this;
}
PinnedMemory::~PinnedMemory() {
  if (host_ == nullptr) return;
  const DeviceGuard guard(owner_);
  give_back(host_);
}

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
  Point point;                    // that was recorded last; null: none
  simt::Gpu::CapturePtr capture;  // that it is part of; null: none
};

// As in CUDA: the call fails, and the capture with it.
[[noreturn]] void spoil(const simt::Gpu::CapturePtr& capture, const char* what) {
  capture->spoilt = what;
  RC_FAIL(device, what, ", which a capture does not permit");
}

}  // namespace

Event::Event(int device) : device_(device) {
  check_device(device);
  event_ = new EmulatedEvent;
  const std::lock_guard<std::mutex> lock(made().mutex);
  ++made().num_events;
}
Event::Event(Event&& other) noexcept { *this = std::move(other); }
Event& Event::operator=(Event&& other) noexcept {
  std::swap(event_, other.event_);
  std::swap(device_, other.device_);
  return *this;
}
Event::~Event() { delete static_cast<EmulatedEvent*>(event_); }

void Event::record(Stream stream) {
  const DeviceGuard guard(device_);
  EmulatedEvent& event = *static_cast<EmulatedEvent*>(event_);
  const CUstream_st on = resolved(stream);
  if (on.rank != device_) {
    RC_FAIL(device, "an event of device ", device_, " was recorded on a stream of device ", on.rank);
  }
  event.capture = simt::Gpu::get().capture_of(on);
  const Point point = std::make_shared<std::atomic<bool>>(false);
  event.point = point;
  queue_once(stream, [point] { *point = true; });
}
bool Event::passed() const {
  if (event_ == nullptr) return true;
  simt::Gpu::get().check();
  const EmulatedEvent& event = *static_cast<EmulatedEvent*>(event_);
  if (event.capture != nullptr) spoil(event.capture, "an event of a captured stream was asked whether it has passed");
  const Point& point = event.point;
  return point == nullptr || *point;
}
void Event::hold_back(Stream stream) const {
  if (event_ == nullptr) return;
  const DeviceGuard guard(device_);
  const EmulatedEvent& event = *static_cast<EmulatedEvent*>(event_);
  simt::Gpu& gpu = simt::Gpu::get();
  const CUstream_st held = resolved(stream);
  const simt::Gpu::CapturePtr capture = gpu.capture_of(held);
  if (capture != nullptr && event.capture != capture) {
    if (event.point == nullptr) return;
    spoil(capture, "a captured stream was to wait for what is not captured");
  }
  if (event.capture != nullptr && capture == nullptr) {
    if (event.capture->ended) RC_FAIL(device, "a stream was to wait for a point of a capture that has ended");
    gpu.join(held, event.capture);
  }
  if (event.point != nullptr) gpu.queue(held, [point = event.point] { return point->load(); });
}

void copy_async(void* to, const void* from, int64_t num_bytes, Stream stream) {
  if (num_bytes > 0) queue_once(stream, [=] { memmove(to, from, static_cast<size_t>(num_bytes)); });
}
void fill_async(void* to, int value, int64_t num_bytes, Stream stream) {
  if (num_bytes > 0) queue_once(stream, [=] { memset(to, value, static_cast<size_t>(num_bytes)); });
}
void synchronize(Stream stream) {
  const CUstream_st on = resolved(stream);
  if (const auto capture = simt::Gpu::get().capture_of(on)) spoil(capture, "a captured stream was waited for");
  simt::Gpu::get().synchronize(on);
}
void synchronize_device(int device) {
  check_device(device);
  simt::Gpu::get().synchronize();
}
bool is_capturing(Stream stream) { return simt::Gpu::get().capture_of(resolved(stream)) != nullptr; }

}  // namespace runtime
}  // namespace ringcomm

namespace simt {

std::vector<int> devices_with_context() {
  const std::lock_guard<std::mutex> lock(ringcomm::made().mutex);
  return {ringcomm::made().devices.begin(), ringcomm::made().devices.end()};
}

int64_t num_events_made() {
  const std::lock_guard<std::mutex> lock(ringcomm::made().mutex);
  return ringcomm::made().num_events;
}

void capture(CUstream_st* stream) { Gpu::get().begin_capture(ringcomm::resolved(stream)); }
Gpu::CapturePtr end_capture(CUstream_st* stream) { return Gpu::get().end_capture(ringcomm::resolved(stream)); }

void enqueue(const char* name, dim3 grid, dim3 block, size_t shared_bytes, CUstream_st* stream, const Closure* owned) {
  std::unique_ptr<const Closure> closure(owned);
  const CUstream_st on = ringcomm::resolved(stream);
  if (on.rank != ringcomm::current()) {
    RC_FAIL(device, "kernel ", name, " was not launched: its stream is one of device ", on.rank,
            " but the current device is ", ringcomm::current());
  }
  Gpu::get().launch(on, name, grid, block, shared_bytes, std::move(closure));
}

}  // namespace simt
