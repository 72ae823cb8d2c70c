#include "transport/device_arrays.h"

#include <algorithm>
#include <map>
#include <utility>

#include "base/log.h"

namespace ringcomm {
namespace {

struct Dropped {
  std::mutex mutex;
  std::map<int, std::vector<runtime::SharedMemory>> memory;  // by the device that uses it
};
Dropped& dropped() {
  static Dropped& all = *new Dropped;  // arrays end in any thread, also when the process does
  return all;
}

bool contains(const runtime::Allocation& allocation, const void* array, int64_t num_bytes) {
  const uint64_t begin = reinterpret_cast<uint64_t>(array);
  return begin >= allocation.address &&
         begin + static_cast<uint64_t>(num_bytes) <= allocation.address + static_cast<uint64_t>(allocation.num_bytes);
}

bool overlap(const runtime::Allocation& a, const runtime::Allocation& b) {
  return a.address < b.address + static_cast<uint64_t>(b.num_bytes) &&
         b.address < a.address + static_cast<uint64_t>(a.num_bytes);
}

bool is_there_still(const runtime::Allocation& allocation) {
  const runtime::Allocation now = runtime::allocation_of(reinterpret_cast<const void*>(allocation.address));
  return now.num_bytes > 0 && now.id == allocation.id && now.address == allocation.address;
}

}  // namespace

// ---- DeviceRegion --------------------------------------------------------------------------------

DeviceRegion::~DeviceRegion() {
  const std::lock_guard<std::mutex> lock(dropped().mutex);
  for (runtime::SharedMemory& memory : memory_) dropped().memory[device_].push_back(std::move(memory));
}

void DeviceRegion::free_dropped() {
  std::map<int, std::vector<runtime::SharedMemory>> memory;
  {
    const std::lock_guard<std::mutex> lock(dropped().mutex);
    memory.swap(dropped().memory);
  }
  for (const auto& of_device : memory) runtime::synchronize_device(of_device.first);
}

// ---- DeviceArrays --------------------------------------------------------------------------------

std::shared_ptr<DeviceRegion> DeviceArrays::map_region(runtime::SharedMemory own, int64_t num_bytes,
                                                       const std::vector<runtime::MemoryHandle>& handles,
                                                       const std::vector<int>& fds) {
  const size_t num_ranks = static_cast<size_t>(world_size_);
  RC_CHECK(handles.size() == fds.size() && (handles.empty() || handles.size() == num_ranks),
           "need one handle and descriptor per rank");
  DeviceRegion::free_dropped();
  std::vector<runtime::SharedMemory> memory(num_ranks);
  for (size_t peer = 0; peer < handles.size(); ++peer) {
    if (static_cast<int>(peer) == rank_) continue;
    if (handles[peer].num_bytes < num_bytes) {
      RC_FAIL(wire, "the array of rank ", peer, " has ", handles[peer].num_bytes, " bytes, expected ", num_bytes);
    }
    memory[peer] = runtime::SharedMemory::open(device_, handles[peer], fds[peer]);
  }
  memory[static_cast<size_t>(rank_)] = std::move(own);
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto is_gone = [](const std::weak_ptr<DeviceRegion>& region) { return region.expired(); };
  regions_.erase(std::remove_if(regions_.begin(), regions_.end(), is_gone), regions_.end());
  const auto region = std::make_shared<DeviceRegion>(++num_regions_, rank_, device_, num_bytes, std::move(memory));
  regions_.push_back(region);
  return region;
}

std::shared_ptr<DeviceRegion> DeviceArrays::region(uint32_t id) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& weak : regions_) {
    std::shared_ptr<DeviceRegion> region = weak.lock();
    if (region && region->id() == id) return region;
  }
  return nullptr;
}

ArrayPlace DeviceArrays::find(const void* array, int64_t num_bytes, bool is_captured, DeviceArraysRecord& record) {
  constexpr ArrayPlace kNowhere{ArrayPlace::Kind::none, 0, 0};
  // Kernels would go through anything else byte by byte.
  constexpr uint64_t kAlignment = 16;
  if (array == nullptr || num_bytes == 0 || reinterpret_cast<uint64_t>(array) % kAlignment != 0) return kNowhere;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& weak : regions_) {
      const std::shared_ptr<DeviceRegion> region = weak.lock();
      const int64_t offset = region ? region->offset_of(array, num_bytes) : -1;
      if (offset >= 0) return {ArrayPlace::Kind::region, region->id(), offset};
    }
  }
  if (!is_captured) drop_next_if_gone(record);
  const runtime::Allocation allocation = runtime::allocation_of(array);
  if (allocation.num_bytes == 0 || !contains(allocation, array, num_bytes)) return kNowhere;
  Own* found = nullptr;
  for (Own& own : own_) {
    if (own.allocation.num_bytes > 0 && own.allocation.id == allocation.id) found = &own;
  }
  if (found == nullptr) {
    // A capture must not be disturbed, nor wait for the GPU.
    if (is_captured) return kNowhere;
    drop_stale(allocation, record);
    found = free_slot(record);
    if (found == nullptr) return kNowhere;
    *found = Own{allocation, true, false, 0};
    record.added[record.num_added++] = {runtime::handle_of(device_, allocation), found - own_.data()};
  }
  found->last_use = ++num_uses_;
  if (!found->is_usable) return kNowhere;
  const int64_t offset = static_cast<int64_t>(reinterpret_cast<uint64_t>(array) - allocation.address);
  return {ArrayPlace::Kind::allocation, static_cast<uint32_t>(found - own_.data()), offset};
}

void DeviceArrays::drop(Own& own, DeviceArraysRecord& record) {
  record.dropped |= uint64_t{1} << (&own - own_.data());
  own = Own{};
}

void DeviceArrays::drop_stale(const runtime::Allocation& allocation, DeviceArraysRecord& record) {
  for (Own& own : own_) {
    if (own.allocation.num_bytes == 0) continue;
    if (overlap(own.allocation, allocation) || !is_there_still(own.allocation)) drop(own, record);
  }
}

void DeviceArrays::drop_next_if_gone(DeviceArraysRecord& record) {
  Own& own = own_[next_looked_at_++ % own_.size()];
  if (own.allocation.num_bytes > 0 && !is_there_still(own.allocation)) drop(own, record);
}

// A free one, or the one that was not used for longest; null: graphs use all of them.
DeviceArrays::Own* DeviceArrays::free_slot(DeviceArraysRecord& record) {
  Own* oldest = nullptr;
  for (Own& own : own_) {
    if (own.allocation.num_bytes == 0) return &own;
    if (!own.is_pinned && (oldest == nullptr || own.last_use < oldest->last_use)) oldest = &own;
  }
  if (oldest != nullptr) drop(*oldest, record);
  return oldest;
}

void DeviceArrays::let_go(Mapped& mapped) {
  if (mapped.is_pinned) kept_for_graphs_.push_back(std::move(mapped.memory));
  mapped = Mapped{};
}

uint32_t DeviceArrays::meet(ShmGroup& group, const std::vector<DeviceArraysRecord*>& records,
                            const std::function<void()>& finish) {
  bool any_added = false;
  bool any_dropped = false;
  for (int owner = 0; owner < world_size_; ++owner) {
    const DeviceArraysRecord& record = *records[static_cast<size_t>(owner)];
    any_added = any_added || record.num_added > 0;
    for (int slot = 0; slot < kRegistrationSlots && owner != rank_; ++slot) {
      if ((record.dropped >> slot & 1u) == 0) continue;
      if (!std::exchange(any_dropped, true)) finish();
      let_go(mapped_at(owner, slot));
    }
  }
  if (!any_added) return 0;

  uint64_t mapped = 0;
  for (int owner = 0; owner < world_size_; ++owner) {
    const DeviceArraysRecord& record = *records[static_cast<size_t>(owner)];
    for (int64_t k = 0; k < record.num_added; ++k) {
      const Registration& added = record.added[k];
      try {
        if (owner != rank_) {
          mapped_at(owner, added.slot).memory = runtime::SharedMemory::open(device_, added.handle, -1);
        }
        mapped |= DeviceArraysRecord::mapped_bit(owner, k);
      } catch (const Error& error) {
        log(LogLevel::info, "INIT", "rank ", rank_, " of group '", group.name(), "' cannot map an array of rank ",
            owner, ", which goes through the slab: ", error.what());
      }
    }
  }
  records[static_cast<size_t>(rank_)]->mapped = mapped;
  group.publish_step(1);
  group.wait_all_steps(1);

  uint64_t by_all = ~uint64_t{0};
  for (const DeviceArraysRecord* record : records) by_all &= record->mapped;
  for (int owner = 0; owner < world_size_; ++owner) {
    const DeviceArraysRecord& record = *records[static_cast<size_t>(owner)];
    for (int64_t k = 0; k < record.num_added; ++k) {
      const int64_t slot = record.added[k].slot;
      const bool is_usable = (by_all & DeviceArraysRecord::mapped_bit(owner, k)) != 0;
      if (owner == rank_) own_[static_cast<size_t>(slot)].is_usable = is_usable;
      mapped_at(owner, slot).is_usable = is_usable;
    }
  }
  return 1;
}

uint8_t* DeviceArrays::reach(const std::vector<DeviceArraysRecord*>& records, int rank, const ArrayPlace& place,
                             bool is_captured) {
  switch (place.kind) {
    case ArrayPlace::Kind::none:
      return nullptr;
    case ArrayPlace::Kind::region: {
      // Whoever has dropped it does not name it, and has let go of the others' parts.
      const auto names = [&](const ArrayPlace& one) { return one.kind == place.kind && one.id == place.id; };
      const auto has_it = [&](const DeviceArraysRecord* record) {
        return names(record->input) || names(record->output);
      };
      if (!std::all_of(records.begin(), records.end(), has_it)) return nullptr;
      const std::shared_ptr<DeviceRegion> found = region(place.id);
      if (is_captured) regions_in_graphs_.push_back(found);
      return found->of(rank) + place.offset;
    }
    case ArrayPlace::Kind::allocation: {
      Mapped& mapped = mapped_at(rank, place.id);
      if (!mapped.is_usable) return nullptr;
      Own& own = own_[place.id];
      if (is_captured) (rank == rank_ ? own.is_pinned : mapped.is_pinned) = true;
      if (rank == rank_) return reinterpret_cast<uint8_t*>(own.allocation.address) + place.offset;
      return mapped.memory.data() + place.offset;
    }
  }
  return nullptr;
}

void DeviceArrays::abandon() {
  static_cast<void>(new auto(std::move(mapped_)));
  static_cast<void>(new auto(std::move(kept_for_graphs_)));
  static_cast<void>(new auto(std::move(regions_in_graphs_)));
}

void DeviceArrays::close() {
  for (MappedOfRank& of_rank : mapped_) of_rank = {};
  kept_for_graphs_.clear();
  regions_in_graphs_.clear();
}

}  // namespace ringcomm
