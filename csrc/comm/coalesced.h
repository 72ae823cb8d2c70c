// An all_reduce of a list of arrays: the calls that it becomes.
#pragma once

#include <vector>

#include "algo/collective.h"

namespace ringcomm {

// In place, of this dtype.
struct ListedArray {
  void* data = nullptr;
  int64_t count = 0;  // elements
  DType dtype = DType::uint8;
};

// In bytes of the buffer that arrays are packed into; the same on all ranks.
struct PackLimits {
  int64_t most_array;  // a larger array travels by itself, where it is
  int64_t most_call;   // a call holds no more than this
};
// on_device: of arrays on GPUs.
PackLimits pack_limits(bool on_device, int world_size);

// The calls, in an order that follows from dtypes and counts alone: dtypes as they first appear, and of each the arrays
// in the order of the list, small ones packed together. A call on one array is one without `arrays`, and there is one
// call at least, so that an empty list meets those of the peers. Every call carries the mark of the whole list.
// Bits are those of one all_reduce per array. Throws UsageError for a dtype that is not reduced, and where arrays
// overlap.
//
// like: operator, factor, place and deadline of all calls; no codec, whose result would depend on where arrays begin
// in a buffer (blocks of 32 values, counters of stochastic rounding).
std::vector<Collective> calls_of_list(const Collective& like, const std::vector<ListedArray>& arrays,
                                      const PackLimits& limits);

}  // namespace ringcomm
