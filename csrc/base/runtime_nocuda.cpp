// No device: nothing here can be made, so nothing here needs to be undone.
#include "base/error.h"
#include "base/runtime.h"

namespace ringcomm::runtime {
namespace {

constexpr const char* kReason = "ringcomm was built without CUDA";

[[noreturn]] void refuse(const char* what) {
  RC_FAIL(device, what, ": ", kReason,
          "; install it again where nvcc can be found (python -m ringcomm.info says how this copy was built)");
}

}  // namespace

const char* name() { return "none"; }

bool available(std::string* reason) {
  if (reason != nullptr) *reason = kReason;
  return false;
}
int device_count() { return 0; }
int current_device() { refuse("asking for the current CUDA device"); }

DeviceGuard::DeviceGuard(int) { refuse("choosing a CUDA device"); }
DeviceGuard::~DeviceGuard() = default;

DeviceUuid device_uuid(int) { refuse("asking for a CUDA device's UUID"); }
int num_multiprocessors(int) { refuse("asking for a CUDA device's multiprocessors"); }
bool reaches(int, int) { refuse("asking whether a GPU reaches a peer's"); }
Link link_between(int, int) { refuse("asking how two GPUs are linked"); }
bool shares_device_concurrently(int) { refuse("asking how processes share a GPU"); }

int device_of(const void*) { return -1; }
Allocation allocation_of(const void*) { return {}; }
MemoryHandle handle_of(int, const Allocation&) { refuse("sharing an array with peers"); }

struct SharedMemory::State {};

SharedMemory::SharedMemory() = default;
SharedMemory SharedMemory::allocate(int, int64_t) { refuse("allocating memory that GPUs share"); }
SharedMemory SharedMemory::open(int, const MemoryHandle&, int) { refuse("mapping a peer's GPU memory"); }
SharedMemory::SharedMemory(SharedMemory&&) noexcept = default;
SharedMemory& SharedMemory::operator=(SharedMemory&&) noexcept = default;
SharedMemory::~SharedMemory() = default;
uint8_t* SharedMemory::data() const { return nullptr; }
const MemoryHandle& SharedMemory::handle() const {
  static const MemoryHandle none{};
  return none;
}
int SharedMemory::export_descriptor() const { return -1; }

DeviceMemory::DeviceMemory(int, int64_t) { refuse("allocating GPU memory"); }
DeviceMemory::DeviceMemory(DeviceMemory&&) noexcept = default;
DeviceMemory& DeviceMemory::operator=(DeviceMemory&&) noexcept = default;
DeviceMemory::~DeviceMemory() = default;

PinnedMemory::PinnedMemory(int64_t) { refuse("allocating host memory for GPUs"); }
PinnedMemory::PinnedMemory(PinnedMemory&&) noexcept = default;
PinnedMemory& PinnedMemory::operator=(PinnedMemory&&) noexcept = default;
PinnedMemory::~PinnedMemory() = default;

OwnStream::OwnStream(int) { refuse("creating a CUDA stream"); }
OwnStream::OwnStream(OwnStream&&) noexcept = default;
OwnStream& OwnStream::operator=(OwnStream&&) noexcept = default;
OwnStream::~OwnStream() = default;

Event::Event(int) { refuse("creating a CUDA event"); }
Event::Event(Event&&) noexcept = default;
Event& Event::operator=(Event&&) noexcept = default;
Event::~Event() = default;
void Event::record(Stream) { refuse("recording a CUDA event"); }
bool Event::passed() const { return true; }
void Event::hold_back(Stream) const { refuse("waiting for a CUDA event"); }

void copy_async(void*, const void*, int64_t, Stream) { refuse("copying GPU memory"); }
void fill_async(void*, int, int64_t, Stream) { refuse("filling GPU memory"); }
void synchronize(Stream) { refuse("waiting for a CUDA stream"); }
void synchronize_device(int) { refuse("waiting for a CUDA device"); }
bool is_capturing(Stream) { return false; }

}  // namespace ringcomm::runtime
