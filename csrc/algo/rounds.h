// How a block of a collective's grid goes through its rounds: where it writes, where it reads, and the wait between
// two rounds. For .cu files. Memory and epochs: wire/device_layout.h.
//
// Ordering: what the block's threads wrote before next_round() is visible to block b of every peer after theirs
// returned. One release per peer and round, at system scope, after a block barrier; one acquire per peer.
#pragma once

#include "algo/device_collective.h"
#include "base/launch.h"
#include "base/ptx.h"

namespace ringcomm {

// Wrap-safe.
__device__ __forceinline__ bool epoch_reached(uint32_t value, uint32_t target) {
  return static_cast<int32_t>(value - target) >= 0;
}

// Whether the host or a kernel of this rank has ended all waits.
__device__ __forceinline__ bool has_ended(const GroupView& group) {
  return load_relaxed_system(&group.watch->abort) != 0 || load_relaxed_system(&group.watch->late_rank) != 0;
}

// Polls until missing(), which returns a rank that has not come yet, returns -1. False if the group was aborted, or if
// the rank did not come in time, which is reported then. By one thread; the others of the block learn of it at the next
// block barrier.
template <typename Missing>
__device__ __forceinline__ bool wait_until_none(const GroupView& group, Missing missing) {
  constexpr uint32_t kPollsPerCheck = 64;
  uint64_t deadline = 0;
  for (uint32_t polls = 0;; ++polls) {
    const int late_rank = missing();
    if (late_rank < 0) return true;
    if (polls % kPollsPerCheck != kPollsPerCheck - 1) continue;
    if (has_ended(group)) return false;
    const uint64_t now = global_nanoseconds();
    if (deadline == 0) deadline = now + group.timeout_ns;
    if (now >= deadline) {
      store_relaxed_system(&group.watch->late_rank, static_cast<uint32_t>(late_rank) + 1);
      return false;
    }
    __nanosleep(20);
  }
}

class RoundsOfBlock {
 public:
  __device__ __forceinline__ RoundsOfBlock(const GroupView& group, const DeviceRounds& rounds)
      : group_(group),
        rounds_(rounds),
        block_(static_cast<int>(blockIdx.x)),
        epoch_(rounds.in_kernel ? line(group.rank)->epoch : rounds.epoch) {}

  __device__ __forceinline__ int world_size() const { return group_.layout.world_size; }
  // The rank that is `step` (0 to world_size - 1) behind this one, around the group: ranks that visit all others in
  // this order are never all at the same one.
  __device__ __forceinline__ int peer_at(int step) const {
    const int peer = group_.rank + step;
    return peer < world_size() ? peer : peer - world_size();
  }

  // Where this rank writes at `peer` in this round: box_bytes, 16-byte aligned.
  __device__ __forceinline__ uint8_t* box_at(int peer) const {
    return group_.slabs[peer] + group_.layout.box_offset(static_cast<int>(epoch_ & 1u), group_.rank, block_);
  }
  // What `peer` wrote here in the round before.
  __device__ __forceinline__ const uint8_t* box_from(int peer) const {
    return group_.slabs[group_.rank] + group_.layout.box_offset(static_cast<int>(~epoch_ & 1u), peer, block_);
  }

  // Ends a round. Called by all threads of the block; returns the same to all: false if the collective failed, and
  // then the kernel returns at once.
  __device__ __forceinline__ bool next_round() {
    ++epoch_;
    if (!rounds_.in_kernel) return true;
    const int thread = static_cast<int>(threadIdx.x);
    bool failed = false;
    __syncthreads();
    if (thread < group_.layout.world_size && thread != group_.rank) {
      store_release_system(&line(thread)->arrived[group_.rank], epoch_);
      const uint32_t* const theirs = &line(group_.rank)->arrived[thread];
      const uint32_t target = epoch_;
      failed =
          !wait_until_none(group_, [=] { return epoch_reached(load_acquire_system(theirs), target) ? -1 : thread; });
    }
    return __syncthreads_or(failed) == 0;
  }

  // Before this rank's threads touch what is not in a slab: a peer that has given up may have got its arrays back,
  // although it came to the round before. Called by all threads of the block; returns the same to all.
  __device__ __forceinline__ bool may_touch_arrays() const {
    return !rounds_.in_kernel || __syncthreads_or(threadIdx.x == 0 && has_ended(group_)) == 0;
  }

  // After the last round; by all threads of the block.
  __device__ __forceinline__ void finish() {
    // After a single round nothing has changed, and no barrier has passed since the others read it.
    if (rounds_.in_kernel && threadIdx.x == 0 && rounds_.end - rounds_.begin > 1) line(group_.rank)->epoch = epoch_;
  }

 private:
  __device__ __forceinline__ BlockLine* line(int rank) const {
    return reinterpret_cast<BlockLine*>(group_.slabs[rank] + group_.layout.line_offset(block_));
  }

  const GroupView& group_;
  const DeviceRounds& rounds_;
  const int block_;
  uint32_t epoch_;
};

}  // namespace ringcomm
