// The state that the scheduler and the detector share. One emulated machine per process, one OS thread drives it.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "control.h"
#include "fiber.h"
#include "knowledge.h"
#include "simt/dialect.h"
#undef __shared__

namespace simt {

struct Block;

// One access in the shadow of a 4-byte word. block 0: none.
struct Access {
  uint32_t block = 0;
  uint32_t clock = 0;
  uint32_t code = 0;  // offset of the instruction in the module
  uint16_t thread = 0;
  uint8_t bytes = 0;  // which of the four, one bit each
  bool atomic = false;
};

// Two writers, because bytes of one word may have different ones; more are forgotten, oldest first.
struct Cell {
  Access writes[2];
  Access read;
  uint8_t written = 0;      // bytes that anybody has ever written
  uint32_t more_reads = 0;  // 1 + index in Machine::read_lists, if readers are unordered among themselves
};

enum class State : uint8_t { ready, spinning, at_barrier, in_collective, done };

struct Thread {
  Context context;
  char* stack = nullptr;
  Block* block = nullptr;
  uint32_t index = 0;  // in the block
  uint3 id{};
  State state = State::ready;
  uint32_t priority = 0;
  Place place{"", 0};               // where it waits
  const void* waits_for = nullptr;  // the word that it last loaded
  unsigned waits_for_bytes = 0;

  // In a warp collective.
  Collective kind = Collective::sync;
  unsigned mask = 0;
  uint64_t value = 0;
  int argument = 0;
  int width = 32;

  // For the detector.
  uint32_t clock = 1;                       // counts what it has published
  Knowledge acquired;                       // since the last block barrier
  Knowledge unfenced;                       // of relaxed loads; counts after a fence
  std::shared_ptr<const Knowledge> fenced;  // what relaxed stores publish
};

struct Launch {
  uint32_t number = 0;
  std::string name;
  int rank = 0;
  int stream = 0;
  dim3 grid, block;
  size_t shared_bytes = 0;
  std::unique_ptr<const Closure> closure;
  uint32_t started = 0, ended = 0, total = 0;  // blocks
  Knowledge before;                            // what ran earlier on the stream
  Knowledge after;                             // what its blocks learned
};

struct Block {
  Launch* launch = nullptr;
  uint32_t number = 0;
  uint3 id{};
  std::vector<Thread> threads;
  std::deque<uint32_t> ready;
  uint32_t alive = 0;
  uint32_t at_barrier = 0;
  bool vote = false;     // of the threads at the barrier
  bool outcome = false;  // at the last one
  uint32_t priority = 0;
  std::vector<char> shared;          // image of the module's thread-locals while another block runs
  std::vector<char> dynamic_shared;  // over-allocated by 16 bytes
  std::vector<Cell> shadow;          // of `shared`, then of `dynamic_shared`

  // What every thread knows since the last barrier, and what lanes know of their warp since its last __syncwarp.
  Clocks barrier_clocks;
  std::vector<std::array<uint32_t, 32>> warp_clocks;
  Knowledge acquired;

  char* dynamic_begin() {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(dynamic_shared.data()) + 15) & ~uintptr_t{15});
  }
};

// How a block is called after it is gone.
struct BlockName {
  std::string kernel;
  int rank = 0;
  uint32_t launch = 0;
  uint3 id{};
};

struct Machine {
  Config config;
  Context scheduler;
  StackPool stacks;
  Thread* current = nullptr;
  bool inside = true;      // in the emulator or on the host: hooks look away
  bool abandoned = false;  // the run cannot go on
  std::map<std::pair<int, int>, std::deque<std::unique_ptr<Launch>>> queues;  // by rank and stream
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<BlockName> block_names;  // by number, from 1 on
  uint32_t num_blocks = 0, num_launches = 0, launches_ended = 0;
  uint64_t last_progress = 0;    // counts changes that a thread could wait for
  uint64_t idle_accesses = 0;    // accesses since the last one
  uint64_t now = 0;              // nanoseconds()
  bool looked_at_clock = false;  // somebody, since it last went forward
  int idle_ticks = 0;            // how often it has, since the last progress
  Counts counts{};
  std::vector<std::string> reports;
  std::set<const void*> kernels_ended;  // since somebody asked
  uintptr_t shared_begin = 0;           // the thread-locals of the module
  size_t shared_bytes = 0;
};
extern Machine the_machine;
inline Machine& machine() { return the_machine; }

// Everything between two pieces of kernel code; a fiber that is switched to leaves its own.
struct Inside {
  Inside() { machine().inside = true; }
  ~Inside() { machine().inside = false; }
};

uint64_t random_bits();
std::string where(const Thread& thread);  // kernel, rank, block and thread
std::string describe_address(uintptr_t address);
// Adds a report unless one of the same kind and key is there.
void report(const std::string& text, const std::string& key);
// Ends the run; does not return to the kernel.
void abandon();
std::string at(Place place);  // file:line

// ---- What drives the machine, on one OS thread: batch.cpp, or ../runtime/gpu.cpp
enum class Step {
  ran,      // a thread got on
  polled,   // a thread looked at what it waits for, and nothing else has changed
  stuck,    // no thread can run, though some have not ended
  nothing,  // is submitted
};
void prepare(const Config& config);  // first of all, on the thread that drives
std::unique_ptr<Launch> make_launch(const char* name, const CUstream_st& on, dim3 grid, dim3 block, size_t shared_bytes,
                                    const Closure* owned);
void submit(std::unique_ptr<Launch> launch);
Step step();  // one thread, until it lets others run
size_t num_spinners();
void abandon_all();  // what is submitted
void report_deadlock();

// ---- The scheduler: of the current thread, unless one is named
bool is_random();  // the schedule
void leave();      // lets others run; returns when the scheduler comes back to the thread
void make_ready(Thread& thread);
void ended(Thread& thread);  // nobody may wait for it any more (meeting.cpp)

// Called by kernel code through the hooks.
void maybe_switch();
void let_others_run(const void* word, unsigned bytes);  // at a load of a word that others may change
void made_progress();
constexpr uint64_t kMostIdleAccesses = 20'000'000;

// ---- The detector (detector.cpp; ../runtime/memory.cpp looks away)
void watch(Block& block);  // it begins
void watch_end(Block& block);
void watch_end(const Launch& launch);
void check_access(uintptr_t address, unsigned bytes, bool write, bool atomic, bool needs_alignment, const void* code);
void barrier_orders(Block& block);
void warp_orders(Block& block, uint32_t first_thread, unsigned mask);
void forget_accesses();
uint32_t offset_in_module(const void* code);

}  // namespace simt
