// The GPUs of a group: how their kernels reach each other, and what may run where.
//
// Set-up, in which every step needs what the last one brought from all ranks:
//     device_facts -> reachable_devices -> agree_on_devices -> DeviceGroup (own slab) -> open (the peers' slabs)
// Everything up to agree_on_devices is plain bytes, and the same verdict on every rank.
//
// Slabs are freed by their owners, and nobody writes into one that its owner has freed: a rank leaves when its own
// stream is done, and then no kernel of a collective that it took part in writes to it any more
// (wire/device_layout.h). What a peer starts later ends with an error on that peer's host; until then the driver
// keeps memory that was handed over as a descriptor, and for all other memory the owner waits until all have left.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/event_pool.h"
#include "base/runtime.h"
#include "transport/device_arrays.h"
#include "transport/shm_group.h"
#include "wire/device_layout.h"

namespace ringcomm {

// in_kernel  one launch a collective; blocks wait for those of peers. Queues and returns. Ranks that share a GPU need
//            MPS, or, as threads of one process, streams of their own.
// stepped    one launch a round, the host waits in between. Blocks until the collective is done. For GPUs that
//            several ranks share.
// host       through host memory and the collectives of the CPU. Blocks. For GPUs that do not reach each other.
enum class DeviceMode : uint32_t { in_kernel = 0, stepped = 1, host = 2 };
constexpr int kNumDeviceModes = 3;
constexpr const char* device_mode_name(DeviceMode mode) {
  switch (mode) {
    case DeviceMode::in_kernel:
      return "in_kernel";
    case DeviceMode::stepped:
      return "stepped";
    case DeviceMode::host:
      return "host";
  }
  return "?";
}

// What a rank says of its GPU. Plain bytes: it travels.
struct DeviceFacts {
  runtime::DeviceUuid uuid;
  ProcessToken process;
  int32_t device;               // in that process
  int32_t num_multiprocessors;  // of the GPU
  int32_t is_concurrent;        // processes that share it run at the same time
  int32_t wanted_mode;          // a DeviceMode; -1: whichever fits
  int64_t slab_bytes;           // the most that a slab may take
  int64_t direct_bytes;         // arrays from this size on are used where they are if they can; -1: none is
};
DeviceFacts device_facts(int device, std::optional<DeviceMode> wanted, int64_t slab_bytes, int64_t direct_bytes);

// Where the GPU of each rank is among those that this process sees; -1: nowhere.
std::vector<int> ordinals_of(const std::vector<DeviceFacts>& facts);

// Bit r: kernels of `device`, this process's, reach memory of rank r's GPU.
uint32_t reachable_devices(int device, const std::vector<DeviceFacts>& facts);

struct DeviceSetup {
  DeviceMode mode = DeviceMode::in_kernel;
  std::string reason;        // for the mode
  DeviceLayout layout = {};  // host: of nothing
  int64_t direct_bytes = -1;
};
// By rank. Throws UsageError if the ranks want different things, or what they want cannot be.
DeviceSetup agree_on_devices(const std::vector<DeviceFacts>& facts, const std::vector<uint32_t>& reachable);

// One thread at a time, but for what says otherwise.
class DeviceGroup {
 public:
  // Allocates this rank's slab, zeroed (none with a single rank, nor in host mode).
  DeviceGroup(int rank, int world_size, int device, DeviceSetup setup);
  ~DeviceGroup();
  DeviceGroup(const DeviceGroup&) = delete;

  // How peers get at the slab. The descriptor, -1 for none, is the caller's.
  bool has_slab() const { return !slabs_.empty(); }
  const runtime::MemoryHandle& handle() const { return slabs_[static_cast<size_t>(rank_)].handle(); }
  int export_descriptor() const { return slabs_[static_cast<size_t>(rank_)].export_descriptor(); }
  // Maps the peers' slabs. By rank; fds are borrowed.
  void open(const std::vector<runtime::MemoryHandle>& handles, const std::vector<int>& fds);

  int rank() const { return rank_; }
  int device() const { return device_; }
  DeviceMode mode() const { return setup_.mode; }
  const std::string& reason() const { return setup_.reason; }
  const DeviceLayout& layout() const { return setup_.layout; }
  int64_t direct_bytes() const { return setup_.direct_bytes; }
  // Whether calls return when they are queued. Else they return when they are done.
  bool queues() const { return setup_.mode == DeviceMode::in_kernel; }
  GroupView view(std::chrono::nanoseconds timeout) const;

  // Of in-kernel and stepped mode.
  DeviceArrays arrays;
  // Of stepped mode: the epoch of the round that begins.
  uint32_t epoch = 0;
  // Page-locked memory of the host, until the next call asks for it.
  uint8_t* scratch(int64_t num_bytes);
  // kPackBytes on this GPU, from the start, for arrays that one collective moves as one; null with a single rank.
  // Allocated with the group: later, it might wait for a kernel that waits for this very thread, and never while a
  // graph is captured. For one call at a time, between enter() and leave().
  uint8_t* pack_buffer() const { return pack_buffer_.data(); }
  static constexpr int64_t kPackBytes = int64_t{16} << 20;

  // ---- order on this GPU. Nothing of it happens while `stream` is captured: a graph orders itself

  // What is queued on `stream` from now on comes after all calls so far, whatever stream they were on.
  void enter(Stream stream);
  // A call ends here.
  void leave(Stream stream);
  // This group's own stream, which continues where `stream` is now. Any thread.
  Stream branch(Stream stream);
  Stream own_stream() const { return own_stream_.get(); }
  // Where `stream` is now. Any thread.
  std::shared_ptr<runtime::Event> mark(Stream stream);
  // Blocks until `stream` has come here; inside a collective.
  void finish(Stream stream, ShmGroup& group);
  // Blocks until all calls so far are done; inside a collective.
  void finish_calls(ShmGroup& group);
  // Whether all calls so far are done; false while one waits. Throws the group's fault, and reports the one that a
  // kernel found.
  bool is_idle(ShmGroup& group);

  // ---- failure; any thread

  // Ends all waits of this rank's kernels, now and for ever. `error`: what throw_if_failed() throws.
  void abort(const Error& error);
  void throw_if_failed() const;
  // After abort(): blocks until no peer begins to write into this rank's arrays any more, less than a second after the
  // failure. A kernel that a peer has queued, and that starts late, knows of it only when that peer's host does.
  void let_peers_stop() const;
  // Tells the group if a kernel gave up waiting for a peer.
  void report_late(ShmGroup& group) const;

  // ---- the end

  // Blocks until all calls are done, at most about the group's deadline, and lets go of the peers' slabs. If the group
  // fails meanwhile, waits inside kernels end. check() runs now and then and does not throw.
  void drain(ShmGroup& group, const std::function<void()>& check);
  // After drain() and ShmGroup::leave(): frees the own slab.
  void release(const ShmGroup& group);

 private:
  const int rank_;
  const int world_size_;
  const int device_;
  const DeviceSetup setup_;
  std::vector<runtime::SharedMemory> slabs_;  // by rank; empty: there are none
  bool driver_keeps_slab_ = true;             // for those that have mapped it, when its owner lets go
  std::shared_ptr<runtime::PinnedMemory> watch_;
  runtime::OwnStream own_stream_;
  EventPool events_;      // for any thread
  runtime::Event last_;   // the end of the last call
  runtime::Event round_;  // ... of the last round
  runtime::PinnedMemory scratch_;
  runtime::DeviceMemory pack_buffer_;
  int64_t scratch_bytes_ = 0;

  mutable std::mutex mutex_;  // guards what follows
  std::optional<Error> error_;
  std::chrono::steady_clock::time_point failed_at_;
  std::atomic<bool> failed_{false};
};

}  // namespace ringcomm
