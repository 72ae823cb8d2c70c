// Before a collective on GPUs: all ranks say where their arrays are, and decide alike whether it works on them there.
#pragma once

#include "algo/collective.h"
#include "algo/device_collective.h"
#include "transport/device_group.h"

namespace ringcomm {

// What runs a call whose algorithm is direct if not all arrays are mapped.
Algo staged_algo(const Collective& call, const DeviceGroup& devices, int world_size);

// Announces the call. If its algorithm is direct, or it is an exchange, waits for all ranks, maps what of their arrays
// is new, and makes device_call direct if all of them can be used where they are. In an exchange, brings the largest
// part. Returns the steps that this took, the same on all ranks.
uint32_t announce_arrays(ShmGroup& group, DeviceGroup& devices, const Collective& call, DeviceCall& device_call);

}  // namespace ringcomm
