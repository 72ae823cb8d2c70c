// An all_reduce, all_gather or reduce_scatter of a list of arrays: the calls that it becomes.
#pragma once

#include <vector>

#include "algo/collective.h"

namespace ringcomm {

// One of them, as Collective says it.
struct ListedArray {
  const void* input = nullptr;
  void* output = nullptr;
  int64_t count = 0;
  DType dtype = DType::uint8;
};

// The calls, the same on all ranks: dtypes as they first appear, and of each the arrays in the order of the list, small
// ones packed together. A call on one array is an ordinary one, and there is one call at least, so that an empty list
// meets those of the peers. Every call carries the mark of the whole list. Bits are those of one call per array. Throws
// UsageError unless each of those could be made, and where arrays share memory of which some is written.
//
// like: operation, operator, factor, place and deadline of all calls; no codec, whose result would depend on where
// arrays begin in a buffer (blocks of 32 values, counters of stochastic rounding).
std::vector<Collective> calls_of_list(const Collective& like, const std::vector<ListedArray>& arrays, int rank,
                                      int world_size);

}  // namespace ringcomm
