// Arrays on GPUs that all ranks of a group have mapped, so that kernels use them where they are: those of comm.empty(),
// and the user's own.
//
// The user's allocations are registered when a collective that would gain by it first finds them: its owner announces
// a handle (wire/device_arrays.h), all others map it, and all agree on whether all of them could. Every rank reads what
// every rank announces, in the same calls, so all know the same. What cannot be registered goes through the slabs.
//
// Freed memory is never used: an allocation is known by an id that CUDA gives to no other, the owner asks for it before
// every call, and a call names only what is there. What the peers have mapped of memory that is gone, and so keep from
// others, they let go soon: the owner looks at one slot more in every call. So they do with what was not used for
// longest when all slots are taken. What a captured graph uses stays mapped until the group ends.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "base/runtime.h"
#include "transport/shm_group.h"
#include "wire/device_arrays.h"
#include "wire/device_layout.h"

namespace ringcomm {

// GPU memory of comm.empty(): as much on every rank, mapped by all. What is dropped is freed when a later array is
// allocated: whoever used it may have queued more, so that waits for the GPU, on which a kernel of another rank may
// wait for the very thread that drops it.
class DeviceRegion {
 public:
  // memory: by rank.
  DeviceRegion(uint32_t id, int rank, int device, int64_t num_bytes, std::vector<runtime::SharedMemory> memory)
      : id_(id), rank_(rank), device_(device), num_bytes_(num_bytes), memory_(std::move(memory)) {}
  ~DeviceRegion();
  DeviceRegion(const DeviceRegion&) = delete;

  uint32_t id() const { return id_; }
  int64_t num_bytes() const { return num_bytes_; }
  uint8_t* of(int rank) const { return memory_[static_cast<size_t>(rank)].data(); }
  uint8_t* own() const { return of(rank_); }
  // Where an array begins in this rank's part; -1: it is not inside.
  int64_t offset_of(const void* data, int64_t num_bytes) const {
    const int64_t offset = static_cast<const uint8_t*>(data) - own();
    return offset >= 0 && offset + num_bytes <= num_bytes_ ? offset : -1;
  }

  // Frees what was dropped since the last time, by this process. Waits for its GPUs; for set-up.
  static void free_dropped();

 private:
  const uint32_t id_;
  const int rank_;
  const int device_;
  const int64_t num_bytes_;
  std::vector<runtime::SharedMemory> memory_;
};

// By whoever has the communicator's turn, but for what says otherwise.
class DeviceArrays {
 public:
  DeviceArrays(int rank, int world_size, int device) : rank_(rank), world_size_(world_size), device_(device) {}
  DeviceArrays(const DeviceArrays&) = delete;

  // handles, fds: of all ranks' memory, or of nobody's; own: this rank's. The same calls in the same order on all
  // ranks.
  std::shared_ptr<DeviceRegion> map_region(runtime::SharedMemory own, int64_t num_bytes,
                                           const std::vector<runtime::MemoryHandle>& handles,
                                           const std::vector<int>& fds);

  // Where an array lies; registers it if need be and possible. Null: nowhere. Before ShmGroup::announce().
  ArrayPlace find(const void* array, int64_t num_bytes, bool is_captured, DeviceArraysRecord& record);
  // After wait_all_announced(): maps what is new. records: of all ranks; the own one is written to. finish() is called
  // before anything is let go of, and returns when all earlier calls of this rank are done. Returns the steps that this
  // took, the same on all ranks.
  uint32_t meet(ShmGroup& group, const std::vector<DeviceArraysRecord*>& records, const std::function<void()>& finish);
  // After meet(): where this rank's kernels reach what `rank` announced; null: they do not, and nor do other ranks'.
  // is_captured: it must stay so for a graph.
  uint8_t* reach(const std::vector<DeviceArraysRecord*>& records, int rank, const ArrayPlace& place, bool is_captured);

  // Lets go of all that peers registered. No kernel of this rank may run; else abandon() keeps it for ever.
  void close();
  void abandon();

  // Collectives that used arrays where they are. Any thread reads it.
  std::atomic<uint64_t> num_direct_calls{0};

 private:
  struct Own {
    runtime::Allocation allocation;  // of 0 bytes: the slot is free
    bool is_usable = false;          // everybody has mapped it
    bool is_pinned = false;          // a graph uses it
    uint64_t last_use = 0;
  };
  struct Mapped {
    runtime::SharedMemory memory;
    bool is_usable = false;
    bool is_pinned = false;
  };

  Own* free_slot(DeviceArraysRecord& record);
  void drop(Own& own, DeviceArraysRecord& record);
  void drop_stale(const runtime::Allocation& allocation, DeviceArraysRecord& record);
  void drop_next_if_gone(DeviceArraysRecord& record);
  void let_go(Mapped& mapped);
  Mapped& mapped_at(int rank, int64_t slot) { return mapped_[static_cast<size_t>(rank)][static_cast<size_t>(slot)]; }
  std::shared_ptr<DeviceRegion> region(uint32_t id) const;

  const int rank_;
  const int world_size_;
  const int device_;
  std::array<Own, kRegistrationSlots> own_;
  using MappedOfRank = std::array<Mapped, kRegistrationSlots>;
  std::array<MappedOfRank, kMostDeviceRanks> mapped_;  // by owner; nothing of this rank's is mapped
  std::vector<runtime::SharedMemory> kept_for_graphs_;
  std::vector<std::shared_ptr<DeviceRegion>> regions_in_graphs_;
  uint64_t num_uses_ = 0;
  size_t next_looked_at_ = 0;  // of own_

  mutable std::mutex mutex_;  // guards what follows
  std::vector<std::weak_ptr<DeviceRegion>> regions_;
  uint32_t num_regions_ = 0;  // ever mapped
};

}  // namespace ringcomm
