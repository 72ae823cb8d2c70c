// What tests ask of the emulator.
//
// Kernels are executed for their results and their order, not for their speed: there are no caches, no coalescing
// and no bank conflicts, and nothing says what a GPU does with the same code. Where one is at hand, compare.
//
// A run is deterministic: the same launches, schedule and seed give the same interleaving.
//
//   forward   threads and blocks in their order, each as far as it gets
//   reverse   the other way round
//   random    any thread at any switch; may also switch at any memory access
//   priority  the thread of the highest of random priorities, which are drawn anew now and then (Burckhardt et
//             al.: A Randomized Scheduler with Probabilistic Guarantees of Finding Bugs, 2010); likewise
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "simt/launch.h"

namespace simt {

enum class Schedule : int { forward = 0, reverse = 1, random = 2, priority = 3 };

struct Config {
  Schedule schedule = Schedule::forward;
  uint64_t seed = 0;
  double switch_probability = 0.01;  // at an access to memory, under random and priority
  int max_resident_blocks = 64;      // per rank: further blocks wait until one has ended
};

// Memory that kernels may touch, on every rank, zeroed and 256-byte aligned; between two buffers lies a gap
// that belongs to none. The name is for reports.
void* allocate(size_t bytes, const std::string& name);
void release_all();

// Executes all that is queued until it is over, or cannot go on. Returns what was wrong, a sentence each (empty:
// nothing). Places in the module are written @0x..., see emulator.py.
std::vector<std::string> run(const Config& config);

struct Counts {
  uint64_t switches;
  uint64_t accesses;
  uint64_t threads;
};
Counts counts();  // since the module was loaded

// The kernels of all launches that have come to their end since the last call, by their offset in the module.
std::set<uint32_t> kernels_ended();

}  // namespace simt
