#include "comm/coalesced.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>

#include "base/error.h"
#include "reduce/reduce.h"
#include "transport/device_group.h"

namespace ringcomm {
namespace {

constexpr int64_t kKiB = 1024;

int64_t bytes_of(const ListedArray& array) { return array.count * static_cast<int64_t>(dtype_size(array.dtype)); }

void check_list(const Collective& like, const std::vector<ListedArray>& arrays) {
  for (const ListedArray& array : arrays) {
    RC_CHECK(array.count >= 0, "count must not be negative, got ", array.count);
    check_reduction(array.dtype, like.reduce_op);
  }
  std::vector<size_t> by_address(arrays.size());
  std::iota(by_address.begin(), by_address.end(), size_t{0});
  const auto begin = [&](size_t i) { return static_cast<const uint8_t*>(arrays[i].data); };
  const auto end_of =
      std::remove_if(by_address.begin(), by_address.end(), [&](size_t i) { return arrays[i].count == 0; });
  by_address.erase(end_of, by_address.end());
  std::sort(by_address.begin(), by_address.end(), [&](size_t a, size_t b) { return begin(a) < begin(b); });
  for (size_t i = 1; i < by_address.size(); ++i) {
    const size_t one = by_address[i - 1], other = by_address[i];
    RC_CHECK(begin(one) + bytes_of(arrays[one]) <= begin(other), "arrays ", std::min(one, other), " and ",
             std::max(one, other), " of the list share memory; pass arrays that do not overlap");
  }
}

// The calls on the arrays of one dtype.
class Packing {
 public:
  Packing(const Collective& like, const PackLimits& limits, std::vector<Collective>& calls)
      : like_(like), limits_(limits), calls_(calls) {}

  void add(const ListedArray& array) {
    const int64_t taken = packed_bytes(bytes_of(array));
    if (taken > limits_.most_array) return alone({array.data, array.count});
    if (taken_ + taken > limits_.most_call) flush();
    packed_.push_back({array.data, array.count});
    taken_ += taken;
  }

  void flush() {
    if (packed_.size() == 1) alone(packed_[0]);
    if (packed_.size() > 1) {
      Collective& call = calls_.emplace_back(like_);
      call.count = taken_ / static_cast<int64_t>(dtype_size(like_.dtype));
      call.arrays.swap(packed_);
    }
    packed_.clear();
    taken_ = 0;
  }

 private:
  void alone(const ReceivePart& array) {
    Collective& call = calls_.emplace_back(like_);
    call.input = call.output = array.data;
    call.count = array.count;
  }

  const Collective& like_;
  const PackLimits limits_;
  std::vector<Collective>& calls_;
  std::vector<ReceivePart> packed_;
  int64_t taken_ = 0;
};

}  // namespace

PackLimits pack_limits(bool on_device, int world_size) {
  if (world_size == 1) return {-1, 0};
  if (on_device) return {2048 * kKiB, DeviceGroup::kPackBytes};
  return {32 * kKiB, 512 * kKiB};
}

std::vector<Collective> calls_of_list(const Collective& like, const std::vector<ListedArray>& arrays,
                                      const PackLimits& limits) {
  check_list(like, arrays);
  Collective of_dtype = like;
  of_dtype.op = OpKind::all_reduce;
  of_dtype.list = ListMark();
  of_dtype.list.num_arrays = 0;
  for (const ListedArray& array : arrays) of_dtype.list.add(array.dtype, array.count);

  std::vector<Collective> calls;
  std::array<bool, kNumDTypes> is_done{};
  for (const ListedArray& first : arrays) {
    if (std::exchange(is_done[static_cast<size_t>(first.dtype)], true)) continue;
    of_dtype.dtype = first.dtype;
    Packing packing(of_dtype, limits, calls);
    for (const ListedArray& array : arrays) {
      if (array.dtype == first.dtype && array.count > 0) packing.add(array);
    }
    packing.flush();
  }
  if (calls.empty()) calls.push_back(of_dtype);
  return calls;
}

}  // namespace ringcomm
