// Launches are queued, and run() executes all of them until nothing is left.
#include "machine.h"

namespace simt {
namespace {

constexpr uint64_t kTickNanoseconds = 10'000;
// Rounds that every waiting thread gets without anything changing before it is called a deadlock.
constexpr uint64_t kIdleRounds = 200;

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
        if (++idle > kIdleRounds * (num_spinners() + 1)) return report_deadlock();
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
  return m.reports;
}

// Time passes by looking at the clock, so that a run is the same every time. Who waits until a deadline gets there:
// that is no deadlock.
uint64_t nanoseconds() {
  static uint64_t now = 0;
  made_progress();
  return now += kTickNanoseconds;
}

Counts counts() { return machine().counts; }

}  // namespace simt
