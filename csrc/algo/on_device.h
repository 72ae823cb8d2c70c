// Collectives on GPU arrays, as the host drives them: what it launches, and where it waits.
#pragma once

#include <functional>

#include "algo/collective.h"
#include "algo/device_collective.h"
#include "transport/device_group.h"

namespace ringcomm {

// A group of which every kernel is loaded and the own slab is ready for peers.
std::shared_ptr<DeviceGroup> make_device_group(int rank, int world_size, int device, const DeviceSetup& setup);

// Throws UsageError unless the call can run on the group's GPUs: a stream that is being captured is for calls that
// queue. Sends nothing.
void check_on_device(const Collective& call, const DeviceGroup& devices, int world_size);

// Runs a call that has begun, on every rank; returns the bytes that this rank hands to its peers. In-kernel mode
// returns when the call is queued, the other modes when it is done. Throws the group's fault.
// run_on_host: the same call on memory of the host.
int64_t run_on_device(ShmGroup& group, DeviceGroup& devices, const Collective& call,
                      const std::function<int64_t(const Collective&)>& run_on_host);
// The call of a single rank; queues and returns.
void run_on_device_alone(DeviceGroup& devices, const Collective& call);

}  // namespace ringcomm
