#include "comm/coalesced.h"

#include <algorithm>
#include <array>
#include <utility>

#include "base/error.h"
#include "comm/checks.h"
#include "transport/device_group.h"

namespace ringcomm {
namespace {

constexpr int64_t kKiB = 1024;

// Of the buffer that arrays are packed into, in bytes; the same on all ranks. A copy there and back costs less than a
// call up to most_array; a call holds no more than most_call.
struct PackLimits {
  int64_t most_array;
  int64_t most_call;
};

PackLimits pack_limits(bool on_device, int world_size) {
  if (world_size == 1) return {-1, 0};
  // Not measured yet: a launch and a wait of some microseconds, against four times the array at a GPU's bandwidth.
  if (on_device) return {2048 * kKiB, DeviceGroup::kPackBytes};
  // Measured with 64 arrays: just not slower than one call each. Calls of 256 KiB to 1 MiB take equally long: what is
  // packed is in the cache until it is unpacked.
  return {(world_size == 2 ? 16 : 32) * kKiB, 512 * kKiB};
}

// What a rank reads or writes of one array of a list.
struct Span {
  const uint8_t* begin;
  const uint8_t* end;
  size_t index;  // in the list
};

// Others than those of one array may share memory only where none is written.
void check_overlaps(std::vector<Span> reads, std::vector<Span> writes) {
  const auto by_begin = [](const Span& a, const Span& b) { return a.begin < b.begin; };
  const auto check = [](bool apart, const Span& a, const Span& b) {
    RC_CHECK(apart || a.index == b.index, "arrays ", std::min(a.index, b.index), " and ", std::max(a.index, b.index),
             " of the list share memory; pass arrays that do not overlap");
  };
  std::sort(writes.begin(), writes.end(), by_begin);
  for (size_t i = 1; i < writes.size(); ++i) check(writes[i - 1].end <= writes[i].begin, writes[i - 1], writes[i]);
  for (const Span& read : reads) {
    const auto first =
        std::partition_point(writes.begin(), writes.end(), [&](const Span& write) { return write.end <= read.begin; });
    for (auto write = first; write != writes.end() && write->begin < read.end; ++write) check(false, read, *write);
  }
}

void check_list(Collective like, const std::vector<ListedArray>& arrays, int rank, int world_size) {
  std::vector<Span> reads, writes;
  for (const ListedArray& array : arrays) {
    like.dtype = array.dtype;
    like.count = array.count;
    like.input = array.input;
    like.output = array.output;
    check_call(like, rank, world_size);
    if (array.count == 0) continue;
    const size_t index = static_cast<size_t>(&array - arrays.data());
    const auto add = [&](std::vector<Span>& spans, const void* data, int64_t parts) {
      const auto* const begin = static_cast<const uint8_t*>(data);
      spans.push_back({begin, begin + like.num_bytes() * parts, index});
    };
    add(writes, array.output, like.op == OpKind::all_gather ? world_size : 1);
    if (array.input != array.output) add(reads, array.input, like.op == OpKind::reduce_scatter ? world_size : 1);
  }
  check_overlaps(std::move(reads), std::move(writes));
}

// The calls on the arrays of one dtype.
class Packing {
 public:
  Packing(const Collective& like, int world_size, std::vector<Collective>& calls)
      : like_(like),
        parts_(like.op == OpKind::all_reduce ? 1 : world_size),
        limits_(pack_limits(like.on_device, world_size)),
        calls_(calls) {}

  void add(const ListedArray& array) {
    const int64_t part = packed_bytes(bytes_of(array));
    if (part * parts_ > limits_.most_array) return alone(array);
    if ((part_ + part) * parts_ > limits_.most_call) flush();
    arrays_.push_back(array);
    part_ += part;
  }

  void flush() {
    if (arrays_.size() == 1) alone(arrays_[0]);
    if (arrays_.size() > 1) {
      Collective& call = calls_.emplace_back(like_);
      call.count = part_ / static_cast<int64_t>(dtype_size(like_.dtype));
      call.packed = pieces(like_.op == OpKind::reduce_scatter ? parts_ : 1,
                           [](const ListedArray& array) { return const_cast<void*>(array.input); });
      call.unpacked =
          pieces(like_.op == OpKind::all_gather ? parts_ : 1, [](const ListedArray& array) { return array.output; });
    }
    arrays_.clear();
    part_ = 0;
  }

 private:
  int64_t bytes_of(const ListedArray& array) const {
    return array.count * static_cast<int64_t>(dtype_size(array.dtype));
  }

  void alone(const ListedArray& array) {
    Collective& call = calls_.emplace_back(like_);
    call.input = array.input;
    call.output = array.output;
    call.count = array.count;
  }

  // Of all ranks' parts, one rank after the other.
  template <typename DataOf>
  std::vector<Piece> pieces(int num_parts, const DataOf& data_of) const {
    std::vector<Piece> result;
    result.reserve(arrays_.size() * static_cast<size_t>(num_parts));
    for (int part = 0; part < num_parts; ++part) {
      for (const ListedArray& array : arrays_) {
        result.push_back({bytes_at(data_of(array), part * bytes_of(array)), bytes_of(array)});
      }
    }
    return result;
  }

  const Collective& like_;
  const int parts_;  // of the buffer
  const PackLimits limits_;
  std::vector<Collective>& calls_;
  std::vector<ListedArray> arrays_;
  int64_t part_ = 0;  // bytes of them in each
};

}  // namespace

std::vector<Collective> calls_of_list(const Collective& like, const std::vector<ListedArray>& arrays, int rank,
                                      int world_size) {
  RC_CHECK(like.op == OpKind::all_reduce || like.op == OpKind::all_gather || like.op == OpKind::reduce_scatter,
           op_name(like.op), " takes no list of arrays");
  RC_CHECK(like.codec.up == CodecId::none, "a list of arrays takes no codec");
  check_list(like, arrays, rank, world_size);
  Collective of_dtype = like;
  of_dtype.list.num_arrays = 0;
  for (const ListedArray& array : arrays) of_dtype.list.add(array.dtype, array.count);

  std::vector<Collective> calls;
  std::array<bool, kNumDTypes> is_done{};
  for (const ListedArray& first : arrays) {
    if (std::exchange(is_done[static_cast<size_t>(first.dtype)], true)) continue;
    of_dtype.dtype = first.dtype;
    Packing packing(of_dtype, world_size, calls);
    for (const ListedArray& array : arrays) {
      if (array.dtype == first.dtype && array.count > 0) packing.add(array);
    }
    packing.flush();
  }
  if (calls.empty()) calls.push_back(of_dtype);
  return calls;
}

}  // namespace ringcomm
