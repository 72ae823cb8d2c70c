#include "transport/device_group.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "base/log.h"
#include "base/process.h"

namespace ringcomm {
namespace {

using Clock = std::chrono::steady_clock;

// A kernel notices its own deadline, which began later than the host's, and that it is told to end.
constexpr std::chrono::seconds kGrace{2};
constexpr std::chrono::milliseconds kNap{1};
// After a failure, until the hosts of all ranks know of it: ShmGroup::watch() with some to spare.
constexpr std::chrono::milliseconds kUntilAllKnow{700};

constexpr int64_t kBoxGranule = 512;
constexpr int64_t kPacketGranule = 16;

DeviceWatch& watch_in(const runtime::PinnedMemory& memory) { return *reinterpret_cast<DeviceWatch*>(memory.host()); }

// Kept for the next group: freeing page-locked memory waits for the whole GPU, on which a kernel of another rank may
// wait for this very thread. The end of a group comes when Python's garbage collector finds it, in any thread.
std::shared_ptr<runtime::PinnedMemory> take_watch() {
  static std::mutex& mutex = *new std::mutex;
  static auto& kept = *new std::vector<std::unique_ptr<runtime::PinnedMemory>>;
  std::unique_ptr<runtime::PinnedMemory> memory;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!kept.empty()) {
      memory = std::move(kept.back());
      kept.pop_back();
    }
  }
  if (memory == nullptr) memory = std::make_unique<runtime::PinnedMemory>(static_cast<int64_t>(sizeof(DeviceWatch)));
  watch_in(*memory) = DeviceWatch{};
  return {memory.release(), [](runtime::PinnedMemory* unused) {
            const std::lock_guard<std::mutex> lock(mutex);
            kept.emplace_back(unused);
          }};
}

// Where the GPU of a peer is among those that this process sees; -1: nowhere.
int ordinal_of(const DeviceFacts& peer) {
  if (peer.process == process_token()) return peer.device;
  for (int device = 0; device < runtime::device_count(); ++device) {
    if (runtime::device_uuid(device) == peer.uuid) return device;
  }
  return -1;
}

template <typename Value, typename Text>
void check_same(const std::vector<DeviceFacts>& facts, const char* variable, Value DeviceFacts::* field,
                const Text& text) {
  for (size_t rank = 1; rank < facts.size(); ++rank) {
    RC_CHECK(facts[rank].*field == facts[0].*field, variable, " is ", text(facts[0].*field), " on rank 0 and ",
             text(facts[rank].*field), " on rank ", rank, "; set the same on all ranks");
  }
}

std::string mode_text(int32_t mode) { return mode < 0 ? "auto" : device_mode_name(static_cast<DeviceMode>(mode)); }

// Why kernels cannot work on each other's memory; empty: they can.
std::string reason_for_host(const std::vector<DeviceFacts>& facts, const std::vector<uint32_t>& reachable) {
  if (facts.size() > kMostDeviceRanks) {
    return concat("there are ", facts.size(), " ranks, and kernels work with ", kMostDeviceRanks, " at most");
  }
  for (size_t rank = 0; rank < facts.size(); ++rank) {
    for (size_t peer = 0; peer < facts.size(); ++peer) {
      if ((reachable[rank] >> peer & 1u) != 0) continue;
      return concat("the GPU of rank ", rank, " does not reach the memory of rank ", peer, "'s");
    }
  }
  return {};
}

// Why ranks cannot wait for each other inside kernels; empty: they can.
std::string reason_for_steps(const std::vector<DeviceFacts>& facts) {
  for (size_t rank = 0; rank < facts.size(); ++rank) {
    for (size_t peer = 0; peer < rank; ++peer) {
      const DeviceFacts& a = facts[peer];
      const DeviceFacts& b = facts[rank];
      if (a.uuid != b.uuid) continue;
      // A kernel that waits for the next one on its stream waits for ever.
      if (a.process == b.process) {
        return concat("rank ", peer, " and rank ", rank, " are one process on one GPU, and may share a stream");
      }
      if (a.is_concurrent != 0 && b.is_concurrent != 0) continue;
      return concat("the processes of rank ", peer, " and rank ", rank, " take turns on one GPU, without MPS");
    }
  }
  return {};
}

// Blocks of all ranks of a GPU are resident at once if they may wait for each other. Those of other groups may wait
// there, too: two groups that begin in another order on one GPU than on the next end each other's waits by the
// deadline, unless both fit. So a rank that has a GPU of its own leaves room for more; what it takes is enough for its
// links.
int num_blocks(const std::vector<DeviceFacts>& facts, DeviceMode mode) {
  constexpr int kGroupsAtOnce = 4;
  std::map<runtime::DeviceUuid, int> ranks_of;
  for (const DeviceFacts& one : facts) ++ranks_of[one.uuid];
  int blocks = kMostCollectiveBlocks;
  for (const DeviceFacts& one : facts) {
    const int ranks = ranks_of[one.uuid];
    const int sharing = mode != DeviceMode::in_kernel ? 1 : ranks > 1 ? ranks : kGroupsAtOnce;
    blocks = std::min(blocks, std::max(1, one.num_multiprocessors / sharing));
  }
  return blocks;
}

// An eighth of the slab for packets, the rest for boxes.
DeviceLayout make_layout(int world_size, int num_blocks, int64_t slab_bytes) {
  const int64_t boxes = int64_t{2} * world_size * num_blocks;
  DeviceLayout layout{};
  layout.world_size = world_size;
  layout.num_blocks = num_blocks;
  layout.packets_per_box = std::max(
      kPacketGranule, round_down(slab_bytes / 8 / boxes / static_cast<int64_t>(sizeof(Packet)), kPacketGranule));
  // Kernels count the bytes of one writer's boxes in 32 bits.
  layout.box_bytes = round_down(
      std::min((slab_bytes - layout.box_offset(0, 0, 0)) / boxes, INT32_MAX / int64_t{num_blocks}), kBoxGranule);
  return layout;
}

}  // namespace

DeviceFacts device_facts(int device, std::optional<DeviceMode> wanted, int64_t slab_bytes, int64_t direct_bytes) {
  std::string reason;
  if (!runtime::available(&reason)) RC_FAIL(device, "no collectives on GPUs here: ", reason);
  RC_CHECK(device >= 0 && device < runtime::device_count(), "there is no CUDA device ", device, ", this process sees ",
           runtime::device_count());
  DeviceFacts facts{};
  facts.uuid = runtime::device_uuid(device);
  facts.process = process_token();
  facts.device = device;
  facts.num_multiprocessors = runtime::num_multiprocessors(device);
  facts.is_concurrent = runtime::shares_device_concurrently(device) ? 1 : 0;
  facts.wanted_mode = wanted ? static_cast<int32_t>(*wanted) : -1;
  facts.slab_bytes = slab_bytes;
  facts.direct_bytes = direct_bytes;
  return facts;
}

std::vector<int> ordinals_of(const std::vector<DeviceFacts>& facts) {
  std::vector<int> ordinals;
  for (const DeviceFacts& one : facts) ordinals.push_back(ordinal_of(one));
  return ordinals;
}

uint32_t reachable_devices(int device, const std::vector<DeviceFacts>& facts) {
  uint32_t reachable = 0;
  for (size_t peer = 0; peer < std::min<size_t>(facts.size(), kMostDeviceRanks); ++peer) {
    const int ordinal = ordinal_of(facts[peer]);
    if (ordinal >= 0 && runtime::reaches(device, ordinal)) reachable |= 1u << peer;
  }
  return reachable;
}

DeviceSetup agree_on_devices(const std::vector<DeviceFacts>& facts, const std::vector<uint32_t>& reachable) {
  const int world_size = static_cast<int>(facts.size());
  check_same(facts, "RINGCOMM_CUDA_MODE", &DeviceFacts::wanted_mode, mode_text);
  check_same(facts, "RINGCOMM_CUDA_SLAB_MIB", &DeviceFacts::slab_bytes, [](int64_t bytes) { return bytes >> 20; });
  check_same(facts, "RINGCOMM_CUDA_DIRECT_KIB", &DeviceFacts::direct_bytes,
             [](int64_t bytes) { return bytes < 0 ? bytes : bytes >> 10; });
  if (world_size == 1) return {DeviceMode::in_kernel, "a single rank has nobody to talk to", {}};

  const std::string no_reach = reason_for_host(facts, reachable);
  const std::string no_waits = reason_for_steps(facts);
  DeviceSetup setup;
  if (facts[0].wanted_mode >= 0) {
    setup.mode = static_cast<DeviceMode>(facts[0].wanted_mode);
    setup.reason = "RINGCOMM_CUDA_MODE says so";
    RC_CHECK(setup.mode == DeviceMode::host || no_reach.empty(), "RINGCOMM_CUDA_MODE=", device_mode_name(setup.mode),
             " cannot be: ", no_reach, "; leave it at auto");
  } else if (!no_reach.empty()) {
    setup = {DeviceMode::host, no_reach, {}};
  } else if (!no_waits.empty()) {
    setup = {DeviceMode::stepped, no_waits, {}};
  } else {
    setup = {DeviceMode::in_kernel, "all GPUs reach each other and run at the same time", {}};
  }
  if (setup.mode == DeviceMode::host) return setup;
  setup.direct_bytes = facts[0].direct_bytes;

  const int64_t slab_bytes = facts[0].slab_bytes;
  setup.layout = make_layout(world_size, num_blocks(facts, setup.mode), slab_bytes);
  RC_CHECK(setup.layout.box_bytes >= kBoxGranule, "a slab of ", slab_bytes, " bytes is too small for ", world_size,
           " ranks and ", setup.layout.num_blocks, " blocks; raise RINGCOMM_CUDA_SLAB_MIB");
  return setup;
}

// ---- DeviceGroup ---------------------------------------------------------------------------------

DeviceGroup::DeviceGroup(int rank, int world_size, int device, DeviceSetup setup)
    : arrays(rank, world_size, device),
      rank_(rank),
      world_size_(world_size),
      device_(device),
      setup_(std::move(setup)),
      events_(device) {
  const runtime::DeviceGuard guard(device);
  watch_ = take_watch();
  own_stream_ = runtime::OwnStream(device);
  last_ = runtime::Event(device);
  round_ = runtime::Event(device);
  if (world_size == 1) return;
  pack_buffer_ = runtime::DeviceMemory(device, kPackBytes);
  if (setup_.mode == DeviceMode::host) return;
  slabs_.resize(static_cast<size_t>(world_size));
  slabs_[static_cast<size_t>(rank)] = runtime::SharedMemory::allocate(device, setup_.layout.total_bytes());
}

DeviceGroup::~DeviceGroup() = default;

void DeviceGroup::open(const std::vector<runtime::MemoryHandle>& handles, const std::vector<int>& fds) {
  const size_t expected = slabs_.size();
  RC_CHECK(handles.size() == expected && fds.size() == expected, "need one handle and descriptor per slab");
  const runtime::DeviceGuard guard(device_);
  for (size_t peer = 0; peer < expected; ++peer) {
    if (static_cast<int>(peer) == rank_) continue;
    if (handles[peer].num_bytes < setup_.layout.total_bytes()) {
      RC_FAIL(wire, "the slab of rank ", peer, " has ", handles[peer].num_bytes, " bytes, expected ",
              setup_.layout.total_bytes());
    }
    slabs_[peer] = runtime::SharedMemory::open(device_, handles[peer], fds[peer]);
    driver_keeps_slab_ = driver_keeps_slab_ && handles[peer].owner != process_token();
  }
  driver_keeps_slab_ = driver_keeps_slab_ && (!has_slab() || handle().kind == runtime::MemoryHandle::Kind::descriptor);
}

GroupView DeviceGroup::view(std::chrono::nanoseconds timeout) const {
  GroupView view{};
  for (size_t peer = 0; peer < slabs_.size(); ++peer) view.slabs[peer] = slabs_[peer].data();
  view.watch = reinterpret_cast<DeviceWatch*>(watch_->device());
  view.timeout_ns = static_cast<uint64_t>(timeout.count());
  view.layout = setup_.layout;
  view.rank = rank_;
  return view;
}

uint8_t* DeviceGroup::scratch(int64_t num_bytes) {
  if (scratch_bytes_ < num_bytes) {
    const runtime::DeviceGuard guard(device_);
    scratch_ = runtime::PinnedMemory();
    scratch_bytes_ = 0;
    scratch_ = runtime::PinnedMemory(num_bytes);
    scratch_bytes_ = num_bytes;
  }
  return scratch_.host();
}

void DeviceGroup::enter(Stream stream) {
  if (!runtime::is_capturing(stream)) last_.hold_back(stream);
}

void DeviceGroup::leave(Stream stream) {
  if (!runtime::is_capturing(stream)) last_.record(stream);
}

Stream DeviceGroup::branch(Stream stream) {
  mark(stream)->hold_back(own_stream_.get());
  return own_stream_.get();
}

std::shared_ptr<runtime::Event> DeviceGroup::mark(Stream stream) {
  std::shared_ptr<runtime::Event> event = events_.take();
  event->record(stream);
  return event;
}

void DeviceGroup::finish(Stream stream, ShmGroup& group) {
  round_.record(stream);
  group.wait_for_device([this] { return round_.passed(); });
}

void DeviceGroup::finish_calls(ShmGroup& group) {
  group.wait_for_device([this] { return last_.passed(); });
}

bool DeviceGroup::is_idle(ShmGroup& group) {
  const bool passed = last_.passed();
  report_late(group);
  group.throw_if_failed();
  return passed;
}

void DeviceGroup::abort(const Error& error) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) {
      error_ = error;
      failed_at_ = Clock::now();
    }
  }
  failed_.store(true, std::memory_order_release);
  __atomic_store_n(&watch_in(*watch_).abort, 1u, __ATOMIC_SEQ_CST);
}

void DeviceGroup::throw_if_failed() const {
  if (!failed_.load(std::memory_order_acquire)) return;
  let_peers_stop();
  std::lock_guard<std::mutex> lock(mutex_);
  throw Error(*error_);
}

void DeviceGroup::let_peers_stop() const {
  if (arrays.num_direct_calls == 0 || !failed_.load(std::memory_order_acquire)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  const Clock::time_point until = failed_at_ + kUntilAllKnow;
  lock.unlock();
  std::this_thread::sleep_until(until);
}

void DeviceGroup::report_late(ShmGroup& group) const {
  const uint32_t late = __atomic_load_n(&watch_in(*watch_).late_rank, __ATOMIC_RELAXED);
  if (late != 0 && !group.has_failed()) group.report_late_on_device(static_cast<int>(late) - 1);
}

void DeviceGroup::drain(ShmGroup& group, const std::function<void()>& check) {
  const Clock::time_point until = Clock::now() + group.timeout() + kGrace;
  const auto passed = [this] {
    try {
      return last_.passed();
    } catch (const Error&) {
      return true;  // a GPU that has failed runs nothing any more
    }
  };
  while (!passed()) {
    report_late(group);
    if (group.has_failed()) abort(group.fault());
    check();
    if (Clock::now() >= until) {
      log(LogLevel::warning, "FAULT", "rank ", rank_, " of group '", group.name(),
          "' leaves although its GPU has not finished: memory that it may still use is not freed");
      static_cast<void>(new std::vector<runtime::SharedMemory>(std::move(slabs_)));
      static_cast<void>(new std::shared_ptr<runtime::PinnedMemory>(watch_));
      static_cast<void>(new runtime::DeviceMemory(std::move(pack_buffer_)));
      arrays.abandon();
      return;
    }
    std::this_thread::sleep_for(kNap);
  }
  for (size_t peer = 0; peer < slabs_.size(); ++peer) {
    if (static_cast<int>(peer) != rank_) slabs_[peer] = runtime::SharedMemory();
  }
  arrays.close();
}

void DeviceGroup::release(const ShmGroup& group) {
  // The buffer that lists are packed into may be among what peers have mapped.
  const bool peers_hold_memory = !driver_keeps_slab_ || arrays.num_direct_calls > 0;
  if (peers_hold_memory && has_slab() && !group.wait_until_all_left()) {
    log(LogLevel::info, "INIT", "rank ", rank_, " of group '", group.name(),
        "' keeps its shared GPU memory: not all of its peers have left");
    static_cast<void>(new std::vector<runtime::SharedMemory>(std::move(slabs_)));
    static_cast<void>(new runtime::DeviceMemory(std::move(pack_buffer_)));
  }
  slabs_.clear();
  pack_buffer_ = runtime::DeviceMemory();
  scratch_ = runtime::PinnedMemory();
  scratch_bytes_ = 0;
}

}  // namespace ringcomm
