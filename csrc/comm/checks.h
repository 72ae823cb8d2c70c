// What a caller may ask for.
#pragma once

#include "algo/collective.h"

namespace ringcomm {

// Throws UsageError unless this rank's arguments make sense: counts, root, codec, one part per rank
// where the call has parts, and no array that is written while it is still needed. Sends nothing.
void check_call(const Collective& call, int rank, int world_size);

}  // namespace ringcomm
