// Launches are queued, and run() executes all of them until nothing is left.
#include <utility>

#include "machine.h"
#include "simt/memory_order.h"

namespace simt {
namespace {

// Rounds that every waiting thread gets without anything changing before it is called a deadlock.
constexpr uint64_t kIdleRounds = 200;
// Where they look at a clock it goes forward first, so often.
constexpr int kMostTicks = 10;
constexpr uint64_t kTick = 1'000'000'000;

// When nothing changes any more. False if nobody waits for a later time either.
bool tick() {
  Machine& m = machine();
  if (!m.looked_at_clock || m.idle_ticks == kMostTicks) return false;
  m.looked_at_clock = false;
  ++m.idle_ticks;
  m.now += kTick;
  return true;
}

void run_queues() {
  Machine& m = machine();
  uint64_t idle = 0;
  while (!m.abandoned) {
    switch (step()) {
      case Step::nothing:
        return;
      case Step::stuck:
        return report_deadlock();
      case Step::polled:
        if (++idle <= kIdleRounds * (num_spinners() + 1)) break;
        if (!tick()) return report_deadlock();
        idle = 0;
        break;
      case Step::ran:
        idle = 0;
        break;
    }
  }
}

}  // namespace

void enqueue(const char* name, dim3 grid, dim3 block, size_t shared_bytes, CUstream_st* stream, const Closure* owned) {
  static CUstream_st default_stream;
  const CUstream_st& on = stream == nullptr ? default_stream : *stream;
  submit(make_launch(name, on, grid, block, shared_bytes, owned));
}

std::vector<std::string> run(const Config& config) {
  Machine& m = machine();
  prepare(config);
  m.reports.clear();
  run_queues();
  abandon_all();
  forget_accesses();
  m.num_launches = 0;
  m.looked_at_clock = false;
  return m.reports;
}

uint64_t nanoseconds() {
  machine().looked_at_clock = true;
  return machine().now;
}

Counts counts() { return machine().counts; }

std::set<uint32_t> kernels_ended() {
  std::set<uint32_t> offsets;
  for (const void* code : std::exchange(machine().kernels_ended, {})) offsets.insert(offset_in_module(code));
  return offsets;
}

}  // namespace simt
