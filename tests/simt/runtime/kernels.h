// Kernels that tests of the runtime launch.
#pragma once

#include <cstdint>

#include "base/stream.h"

namespace ringcomm::cuda {

// Of every block: stores `value` to *tell (unless null), waits until *word >= wait_value, then adds 1 to each of
// num_elems (at least 1) values. outcome[block] becomes 1; 2 if timeout_ns passed first, and then nothing is added.
struct MeetArgs {
  uint32_t* tell;
  uint32_t value;
  const uint32_t* word;
  uint32_t wait_value;
  uint64_t timeout_ns;
  uint32_t* outcome;
  int32_t* values;
  int64_t num_elems;
};
void launch_meet(const MeetArgs& args, int num_blocks, Stream stream);
// A block whose threads do not all reach the barrier.
void launch_divergent_barrier(Stream stream);

}  // namespace ringcomm::cuda
