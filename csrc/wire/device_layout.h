// The slab that a rank shares in GPU memory. Peers map it and write into it; nobody reads a peer's slab.
//
// A collective on GPUs is a sequence of rounds. In a round a rank writes into its boxes at its peers and reads
// what they wrote into its own in the round before. Two halves of boxes alternate with the epoch, which counts
// the ends of rounds, through all collectives: what is written in epoch e lies in half e & 1, is read in epoch
// e + 1, and is written again in epoch e + 2 at the earliest. So one wait for all peers between two rounds is
// all the order there is, and none is needed between collectives.
//
// Every block of a grid has boxes, packets, arrivals and epochs of its own, for ever: block b of one rank meets
// block b of the others and no other block, in every collective. Blocks never wait for one another.
//
//   offset             bytes                                      content
//   0                  128 x num_blocks                           BlockLine
//   packets(h, r, b)   8 x packets_per_box                        half h, written by rank r, block b: packets
//   box(h, r, b)       box_bytes                                  likewise, a box
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/host_device.h"

namespace ringcomm {

constexpr int kMostDeviceRanks = 16;        // GPU ranks of one group
constexpr int kMostCollectiveBlocks = 128;  // blocks of a collective's grid
constexpr uint32_t kDeviceLayoutVersion = 1;

// Of one block. `arrived[r]` is written by rank r: the epoch that its block has begun. The counters are this
// rank's own and live on the GPU, so that a captured graph goes on counting when it is replayed.
struct alignas(128) BlockLine {
  uint32_t arrived[kMostDeviceRanks];
  uint32_t epoch;         // the one that begins; of rounds
  uint32_t packet_epoch;  // the last one; of packets (algo/one_shot_cuda.cu)
};
static_assert(sizeof(BlockLine) == 128, "wire layout");

// Four bytes of data and the epoch in which they were written, stored and loaded in one access: whoever sees
// the epoch has the data. data is the lower half.
using Packet = uint64_t;

struct DeviceLayout {
  int world_size;
  int num_blocks;
  int64_t box_bytes;        // a multiple of 512
  int64_t packets_per_box;  // a multiple of 16

  RC_HD_METHOD constexpr int64_t line_offset(int block) const {
    return block * static_cast<int64_t>(sizeof(BlockLine));
  }
  RC_HD_METHOD constexpr int64_t packets_offset(int half, int writer, int block) const {
    return line_offset(num_blocks) +
           index(half, writer, block) * packets_per_box * static_cast<int64_t>(sizeof(Packet));
  }
  RC_HD_METHOD constexpr int64_t box_offset(int half, int writer, int block) const {
    return packets_offset(2, 0, 0) + index(half, writer, block) * box_bytes;
  }
  RC_HD_METHOD constexpr int64_t total_bytes() const { return box_offset(2, 0, 0); }

 private:
  RC_HD_METHOD constexpr int64_t index(int half, int writer, int block) const {
    return (static_cast<int64_t>(half) * world_size + writer) * num_blocks + block;
  }
};

// Memory of the host that kernels of one rank can reach.
struct alignas(64) DeviceWatch {
  uint32_t abort;      // the host's: not 0 ends every wait
  uint32_t late_rank;  // a kernel's: 1 + the rank that did not come before the deadline; 0: none. Then all waits end
};

// What a kernel knows of its group. A kernel argument.
struct GroupView {
  uint8_t* slabs[kMostDeviceRanks];  // by rank, as this rank's GPU reaches them
  DeviceWatch* watch;                // as this rank's GPU reaches it
  uint64_t timeout_ns;               // of one wait inside a kernel
  DeviceLayout layout;
  int rank;
};

}  // namespace ringcomm
