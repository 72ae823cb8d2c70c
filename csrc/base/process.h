// Who this process is. Identities go by tokens: a pid means something within its pid namespace only, and containers
// that share a GPU or memory all have a process 1. Pids are for messages.
#pragma once

#include <array>
#include <cstdint>

namespace ringcomm {

// How many fork()s this process is the child of: what was made under another count is the parent's. Counts from the
// first call on.
uint64_t fork_count();

using ProcessToken = std::array<uint8_t, 16>;
// Random, and this process's alone: of all processes of all hosts. A forked child has one of its own.
ProcessToken process_token();

}  // namespace ringcomm
