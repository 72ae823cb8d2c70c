// one_shot on GPUs: everyone writes its input to everyone, four bytes at a time, each beside the number of the call;
// and sums. All_reduce; in-kernel mode only.
//
// Steps       1. write packets to all peers   2. poll the packets of the peers in own memory and sum in rank order
// Wire bytes  2 (n-1) x input per rank
// Scratch     the packets
// Ordering    none but that of a packet's own 8 bytes: who sees the epoch has the data. Two halves alternate. A rank
//             writes into a half again in the second call after, which follows its having seen packets of the first
//             call after from every peer; which the peer's block wrote when it was done with reading the half. So
//             no block may take part in a call without a packet: an empty call counts no epoch.
//             After 2^32 calls an epoch comes again; a packet that was not written in all of them would be taken
//             for a new one.
// Best for    small messages: one trip, no barrier
//
// Equal bits: everyone sums each element in rank order.
#include "algo/device_kernels.h"
#include "algo/reduction_kernels.h"
#include "algo/rounds.h"
#include "base/partition.h"

namespace ringcomm::cuda {
namespace {

constexpr int64_t kPacketData = 4;

struct OneShotArgs {
  GroupView group;
  const void* input;
  void* output;
  int64_t num_bytes;
  int64_t block_bytes;  // of each block but the last
  double factor;        // premul_sum
};

__device__ __forceinline__ Packet make_packet(uint32_t data, uint32_t epoch) {
  return static_cast<uint64_t>(epoch) << 32 | data;
}
__device__ __forceinline__ uint32_t epoch_of(Packet packet) { return static_cast<uint32_t>(packet >> 32); }

template <typename T, typename Op, bool kScales>
class OneShot {
 public:
  __device__ __forceinline__ explicit OneShot(const OneShotArgs& args)
      : args_(args),
        rank_(args.group.rank),
        world_size_(args.group.layout.world_size),
        block_(static_cast<int>(blockIdx.x)),
        epoch_(line()->packet_epoch + 1),
        first_elem_(args.block_bytes * block_ / kElemBytes),
        num_elems_(static_cast<int>(at_most(args.num_bytes - args.block_bytes * block_, args.block_bytes)) /
                   kElemBytes) {}

  __device__ __forceinline__ void push() const {
    for (int item = static_cast<int>(threadIdx.x); item < num_items(); item += kCollectiveThreads) {
      uint32_t data[kPackets];
      read_own(item, data);
      for (int step = 1; step < world_size_; ++step) {
        const int peer = rank_ + step < world_size_ ? rank_ + step : rank_ + step - world_size_;
#pragma unroll
        for (int k = 0; k < kPackets; ++k)
          store_relaxed_system(packet(peer, rank_, item, k), make_packet(data[k], epoch_));
      }
    }
  }

  // False if a peer did not come.
  __device__ __forceinline__ bool sum() const {
    for (int item = static_cast<int>(threadIdx.x); item < num_items(); item += kCollectiveThreads) {
      Accumulator<T> totals[kElems];
#pragma unroll 1
      for (int first = 0; first < world_size_; first += kRanksInFlight) {
        Packet packets[kRanksInFlight][kPackets];
        if (!receive(first, item, packets)) return false;
#pragma unroll
        for (int i = 0; i < kRanksInFlight; ++i) {
          if (first + i < world_size_) add(first + i, item, packets[i], totals);
        }
      }
#pragma unroll
      for (int i = 0; i < kElems; ++i) totals[i] = Op().finish(totals[i], world_size_);
      write(item, totals);
    }
    return true;
  }

  // By one thread, when all are done.
  __device__ __forceinline__ void finish() const { line()->packet_epoch = epoch_; }

 private:
  static constexpr int kElemBytes = static_cast<int>(sizeof(T));
  // An item is what a thread takes at once: elements and packets that begin and end at the same byte.
  static constexpr int kItemBytes = kElemBytes < kPacketData ? kPacketData : kElemBytes;
  static constexpr int kElems = kItemBytes / kElemBytes;
  static constexpr int kPackets = kItemBytes / kPacketData;
  static constexpr int kRanksInFlight = kPackets == 1 ? 8 : kPackets == 2 ? 4 : 2;

  __device__ __forceinline__ int num_items() const { return (num_elems_ + kElems - 1) / kElems; }
  __device__ __forceinline__ BlockLine* line() const {
    return reinterpret_cast<BlockLine*>(args_.group.slabs[rank_] + args_.group.layout.line_offset(block_));
  }
  __device__ __forceinline__ Packet* packet(int at, int writer, int item, int k) const {
    const int64_t offset = args_.group.layout.packets_offset(static_cast<int>(epoch_ & 1u), writer, block_);
    const int items_of_box = static_cast<int>(args_.block_bytes) / kItemBytes;
    return reinterpret_cast<Packet*>(args_.group.slabs[at] + offset) + (k * items_of_box + item);
  }

  // The last item may be short.
  __device__ __forceinline__ int elems_of(int item) const {
    return kElems == 1 || (item + 1) * kElems <= num_elems_ ? kElems : num_elems_ - item * kElems;
  }

  __device__ __forceinline__ void read_own(int item, uint32_t (&data)[kPackets]) const {
    const T* const from = static_cast<const T*>(args_.input) + first_elem_ + item * kElems;
    T elements[kElems] = {};
    if (elems_of(item) == kElems && is_aligned(from, kItemBytes)) {
      load_vector(from, elements);
    } else {
#pragma unroll
      for (int i = 0; i < kElems; ++i) {
        if (i < elems_of(item)) elements[i] = from[i];
      }
    }
    if constexpr (kScales) {
#pragma unroll
      for (int i = 0; i < kElems; ++i) elements[i] = scaled_element(elements[i], args_.factor);
    }
    memcpy(data, elements, kItemBytes);
  }

  __device__ __forceinline__ void write(int item, const Accumulator<T> (&totals)[kElems]) const {
    T* const to = static_cast<T*>(args_.output) + first_elem_ + item * kElems;
    T elements[kElems];
    to_elements<T>(totals, elements);
    if (elems_of(item) == kElems && is_aligned(to, kItemBytes)) return store_vector(to, elements);
#pragma unroll
    for (int i = 0; i < kElems; ++i) {
      if (i < elems_of(item)) to[i] = elements[i];
    }
  }

  // Packets of ranks from `first` on; all their loads are under way at once. The own rank's are not set.
  __device__ __forceinline__ bool receive(int first, int item, Packet (&packets)[kRanksInFlight][kPackets]) const {
#pragma unroll
    for (int i = 0; i < kRanksInFlight; ++i) {
#pragma unroll
      for (int k = 0; k < kPackets; ++k) packets[i][k] = make_packet(0, ~epoch_);
    }
    return wait_until_none(args_.group, [&] {
      int missing = -1;
#pragma unroll
      for (int i = 0; i < kRanksInFlight; ++i) {
        const int rank = first + i;
        if (rank >= world_size_ || rank == rank_) continue;
#pragma unroll
        for (int k = 0; k < kPackets; ++k) {
          if (epoch_of(packets[i][k]) != epoch_) packets[i][k] = load_relaxed_system(packet(rank_, rank, item, k));
        }
      }
#pragma unroll
      for (int i = 0; i < kRanksInFlight; ++i) {
        const int rank = first + i;
        if (rank >= world_size_ || rank == rank_) continue;
#pragma unroll
        for (int k = 0; k < kPackets; ++k) {
          if (epoch_of(packets[i][k]) != epoch_) missing = rank;
        }
      }
      return missing;
    });
  }

  __device__ __forceinline__ void add(int rank, int item, const Packet (&packets)[kPackets],
                                      Accumulator<T> (&totals)[kElems]) const {
    uint32_t data[kPackets];
    if (rank == rank_) {
      read_own(item, data);
    } else {
#pragma unroll
      for (int k = 0; k < kPackets; ++k) data[k] = static_cast<uint32_t>(packets[k]);
    }
    T elements[kElems];
    memcpy(elements, data, kItemBytes);
#pragma unroll
    for (int i = 0; i < kElems; ++i) {
      const Accumulator<T> value = InKernels<T>::load(elements[i]);
      totals[i] = rank == 0 ? value : Op().combine(totals[i], value);
    }
  }

  const OneShotArgs& args_;
  const int rank_;
  const int world_size_;
  const int block_;
  const uint32_t epoch_;
  const int64_t first_elem_;
  const int num_elems_;
};

template <typename T, typename Op, bool kScales>
__global__ void __launch_bounds__(kCollectiveThreads, 1) one_shot_kernel(const __grid_constant__ OneShotArgs args) {
  if (args.num_bytes == 0) return;
  const OneShot<T, Op, kScales> shot(args);
  shot.push();
  if (__syncthreads_or(!shot.sum()) != 0) return;
  if (threadIdx.x == 0) shot.finish();
}

struct Kernels {
  using Args = OneShotArgs;
  static constexpr const char* kName = "one_shot";
  template <typename T, typename Op, bool kScales>
  static constexpr auto kernel = one_shot_kernel<T, Op, kScales>;
};

int64_t num_bytes_of(const DeviceCall& call) { return call.count * static_cast<int64_t>(dtype_size(call.dtype)); }

// Elements of all dtypes and packets begin there.
int64_t block_bytes(int64_t num_bytes, int64_t num_blocks) {
  return round_up(ceil_div(num_bytes, num_blocks), kVectorBytes);
}

DevicePlan plan(const DeviceCall& call, const DeviceLayout& layout) {
  const int64_t num_bytes = num_bytes_of(call);
  const int64_t of_box = layout.packets_per_box * kPacketData;
  RC_CHECK(num_bytes <= of_box * layout.num_blocks, "one_shot takes at most ", of_box * layout.num_blocks,
           " bytes on a GPU, got ", num_bytes, "; use two_shot");
  DevicePlan plan;
  plan.num_rounds = 1;
  plan.num_blocks = 1;
  if (num_bytes > 0) {
    const int64_t busy = ceil_div(num_bytes, at_most(kCollectiveThreads * kPacketData, of_box));
    // No block without an item.
    plan.num_blocks = static_cast<int>(ceil_div(num_bytes, block_bytes(num_bytes, at_most(busy, layout.num_blocks))));
  }
  return plan;
}

void launch_one_shot(const DeviceCall& call, const DevicePlan& plan, const GroupView& group, const DeviceRounds& rounds,
                     Stream stream) {
  RC_CHECK(rounds.in_kernel, "one_shot waits inside of the kernel, so it cannot be run in steps; use two_shot");
  const int64_t num_bytes = num_bytes_of(call);
  const OneShotArgs args{group,      call.input, call.output, num_bytes, block_bytes(num_bytes, plan.num_blocks),
                         call.factor};
  const LaunchShape shape{dim3(static_cast<unsigned>(plan.num_blocks)), dim3(kCollectiveThreads), 0};
  launch(Kernels::kName, shape, stream, ReductionKernels<Kernels>::of(call).kernel, args);
}

}  // namespace

const CollectiveKernels& one_shot_kernels() {
  static constexpr CollectiveKernels kernels{plan, launch_one_shot, ReductionKernels<Kernels>::load};
  return kernels;
}

}  // namespace ringcomm::cuda
