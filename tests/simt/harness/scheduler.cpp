// Runs the threads of all resident blocks of all ranks, one at a time.
#include <link.h>

#include <cstdlib>
#include <cstring>
#include <sstream>

#include "machine.h"
#include "simt/memory_order.h"

// The built-in variables; kernels see them as constants, which they are for each thread.
uint3 simt_thread_index __asm__("threadIdx");
uint3 simt_block_index __asm__("blockIdx");
dim3 simt_block_size __asm__("blockDim");
dim3 simt_grid_size __asm__("gridDim");

#if defined(__x86_64__)
__asm__(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
#endif

namespace simt {
namespace {

// Rounds that every waiting thread gets without anything changing before it is called a deadlock.
constexpr uint64_t kIdleRounds = 200;
// Where they look at a clock it goes forward first, so often.
constexpr int kMostTicks = 100;
constexpr uint64_t kTick = 1'000'000'000;

// Writing it gives this thread its copy of the module's thread-locals, which it gets late when the module was loaded
// late.
thread_local volatile char touched = 0;

std::deque<Thread*> spinners;
Block* loaded = nullptr;  // whose shared memory lies in the thread-locals
std::map<std::pair<int, int>, Knowledge> stream_ends;
uint64_t random_state = 1;

int find_shared(dl_phdr_info* info, size_t, void*) {
  const uintptr_t self = reinterpret_cast<uintptr_t>(&find_shared);
  bool ours = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    ours = ours || (header.p_type == PT_LOAD && self - begin < header.p_memsz);
  }
  for (int i = 0; ours && i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
    machine().shared_begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
    machine().shared_bytes = info->dlpi_phdr[i].p_memsz;
  }
  return ours ? 1 : 0;
}

void load(Block* block) {
  Machine& m = machine();
  if (loaded == block) return;
  char* const shared = reinterpret_cast<char*>(m.shared_begin);
  if (loaded != nullptr) memcpy(loaded->shared.data(), shared, m.shared_bytes);
  memcpy(shared, block->shared.data(), m.shared_bytes);
  loaded = block;
  simt_block_index = block->id;
  simt_block_size = block->launch->block;
  simt_grid_size = block->launch->grid;
}

void resume(Thread* thread) {
  Machine& m = machine();
  load(thread->block);
  simt_thread_index = thread->id;
  m.current = thread;
  ++m.counts.switches;
  m.scheduler.switch_to(thread->context);
  m.current = nullptr;
}

void thread_main() {
  Machine& m = machine();
  Thread* const self = m.current;
  Block& block = *self->block;
  m.inside = false;
  block.launch->closure->call();
  m.inside = true;
  self->state = State::done;
  --block.alive;
  made_progress();
  ended(*self);
  leave();
  abort();  // nobody resumes it
}

void start_block(Launch& launch) {
  Machine& m = machine();
  auto block = std::make_unique<Block>();
  uint32_t index = launch.started++;
  if (m.config.schedule == Schedule::reverse) index = launch.total - 1 - index;
  block->launch = &launch;
  block->number = static_cast<uint32_t>(m.block_names.size());
  block->id =
      uint3{index % launch.grid.x, index / launch.grid.x % launch.grid.y, index / launch.grid.x / launch.grid.y};
  block->priority = static_cast<uint32_t>(random_bits());
  block->acquired = launch.before;
  block->shared.assign(m.shared_bytes, static_cast<char>(0xA5));
  block->dynamic_shared.assign(launch.shared_bytes + 16, static_cast<char>(0xA5));
  block->shadow.resize(shadow_cells(m.shared_bytes, launch.shared_bytes));
  m.block_names.push_back(BlockName{launch.name, launch.rank, launch.number, block->id});
  const uint32_t count = launch.block.x * launch.block.y * launch.block.z;
  block->alive = count;
  block->barrier_clocks.assign(count, 0);
  block->warp_clocks.assign(count, {});
  block->threads = std::vector<Thread>(count);
  for (uint32_t i = 0; i < count; ++i) {
    Thread& thread = block->threads[i];
    thread.block = block.get();
    thread.index = i;
    thread.id = uint3{i % launch.block.x, i / launch.block.x % launch.block.y, i / launch.block.x / launch.block.y};
    thread.priority = static_cast<uint32_t>(random_bits());
    thread.stack = m.stacks.take();
    thread.context.prepare(thread.stack, &thread_main);
    block->ready.push_back(i);
  }
  m.counts.threads += count;
  m.resident.push_back(std::move(block));
  made_progress();
}

// Brings in blocks of the first launch of every stream, but not more than keep the machine busy: fibers cost memory.
void start_blocks() {
  Machine& m = machine();
  const int most_busy = is_random() ? 4 : 1;
  std::map<int, int> on_rank;
  for (const auto& block : m.resident) ++on_rank[block->launch->rank];
  for (auto& [key, queue] : m.queues) {
    if (queue.empty()) continue;
    Launch& launch = *queue.front();
    if (launch.started == 0) launch.before = stream_ends[key];
    int busy = 0;
    for (const auto& block : m.resident) busy += block->launch == &launch && !block->ready.empty();
    while (launch.started < launch.total && on_rank[key.first] < m.config.max_resident_blocks && busy < most_busy) {
      start_block(launch);
      ++on_rank[key.first];
      ++busy;
    }
  }
}

void end_block(Block* block) {
  Machine& m = machine();
  Launch& launch = *block->launch;
  launch.after.learn(block->acquired);
  for (Thread& thread : block->threads) {
    if (!thread.acquired.empty()) launch.after.learn(thread.acquired);
    m.stacks.give_back(thread.stack);
  }
  if (loaded == block) loaded = nullptr;
  for (auto& resident : m.resident) {
    if (resident.get() != block) continue;
    std::swap(resident, m.resident.back());
    m.resident.pop_back();
    break;
  }
  if (++launch.ended != launch.total) return;
  const std::pair<int, int> key{launch.rank, launch.stream};
  Knowledge& end = stream_ends[key];
  end.learn(launch.after);
  end.learn_launch(launch.number);
  end.forget_finished([&](uint32_t number) { return m.block_names[number].launch; });
  m.queues[key].pop_front();
}

Thread* take_spinner(size_t which) {
  Thread* const thread = spinners[which];
  spinners.erase(spinners.begin() + static_cast<std::ptrdiff_t>(which));
  return thread;
}

Thread* take_ready(Block& block, size_t which) {
  const uint32_t index = block.ready[which];
  block.ready[which] = block.ready.back();
  block.ready.pop_back();
  return &block.threads[index];
}

Block* choose_block() {
  Machine& m = machine();
  Block* chosen = nullptr;
  uint64_t found = 0;
  for (const auto& block : m.resident) {
    if (block->ready.empty()) continue;
    ++found;
    switch (m.config.schedule) {
      case Schedule::forward:
        if (chosen == nullptr || block->number < chosen->number) chosen = block.get();
        break;
      case Schedule::reverse:
        if (chosen == nullptr || block->number > chosen->number) chosen = block.get();
        break;
      case Schedule::random:
        if (random_bits() % found == 0) chosen = block.get();
        break;
      case Schedule::priority:
        if (chosen == nullptr || block->priority > chosen->priority) chosen = block.get();
        break;
    }
  }
  return chosen;
}

// Whoever runs next; null if nobody can. Waiting threads are served fairly under every schedule: priorities among
// them could starve the one that the others wait for.
Thread* choose() {
  Machine& m = machine();
  const bool spinner_first = is_random() && !spinners.empty() && random_bits() % 8 == 0;
  Block* const block = spinner_first ? nullptr : choose_block();
  if (block == nullptr) {
    if (spinners.empty()) return nullptr;
    return take_spinner(is_random() ? random_bits() % spinners.size() : 0);
  }
  std::deque<uint32_t>& ready = block->ready;
  switch (m.config.schedule) {
    case Schedule::forward: {
      const uint32_t index = ready.front();
      ready.pop_front();
      return &block->threads[index];
    }
    case Schedule::reverse:
      return take_ready(*block, ready.size() - 1);
    case Schedule::random:
      return take_ready(*block, random_bits() % ready.size());
    case Schedule::priority: {
      size_t best = 0;
      for (size_t i = 1; i < ready.size(); ++i) {
        if (block->threads[ready[i]].priority > block->threads[ready[best]].priority) best = i;
      }
      return take_ready(*block, best);
    }
  }
  return nullptr;
}

uint64_t value_of_word(const Thread& thread) {
  uint64_t value = 0;  // little endian
  memcpy(&value, thread.waits_for, thread.waits_for_bytes);
  return value;
}

std::string waiting_for(const Thread& thread) {
  switch (thread.state) {
    case State::at_barrier:
      return "at __syncthreads(), " + at(thread.place);
    case State::in_collective:
      return "for the other lanes of a warp operation, " + at(thread.place);
    case State::spinning:
      if (thread.waits_for == nullptr) return "in __nanosleep()";
      return "for another value than " + std::to_string(value_of_word(thread)) + " in " +
             describe_address(reinterpret_cast<uintptr_t>(thread.waits_for));
    case State::ready:
    case State::done:
      break;
  }
  return "to run";
}

void report_deadlock() {
  std::map<std::string, std::pair<int, std::string>> groups;  // what is waited for: how many, the first of them
  for (const auto& block : machine().resident) {
    for (const Thread& thread : block->threads) {
      if (thread.state == State::done) continue;
      auto& [count, first] = groups[block->launch->name + waiting_for(thread)];
      if (count++ == 0) first = where(thread) + " waits " + waiting_for(thread);
    }
  }
  std::ostringstream text;
  text << "deadlock: nothing changes any more.";
  int listed = 0;
  for (const auto& [what, group] : groups) {
    if (++listed > 8) {
      text << " And " << groups.size() - 8 << " more.";
      break;
    }
    text << ' ' << group.second;
    if (group.first > 1) text << " (" << group.first << " threads like it)";
    text << '.';
  }
  for (const auto& [key, queue] : machine().queues) {
    if (queue.empty() || queue.front()->started == queue.front()->total) continue;
    const Launch& launch = *queue.front();
    text << ' ' << launch.total - launch.started << " blocks of kernel " << launch.name << ", rank " << launch.rank
         << ", have not started: not more than " << machine().config.max_resident_blocks
         << " are resident, so no block may wait for a later one.";
  }
  report(text.str(), "deadlock");
}

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
  uint64_t progress = m.last_progress;
  bool may_start = true;
  while (!m.abandoned) {
    if (may_start) start_blocks();
    may_start = false;
    if (m.resident.empty()) return;
    Thread* const thread = choose();
    if (thread == nullptr) return report_deadlock();
    Block* const block = thread->block;
    resume(thread);
    idle = m.last_progress == progress && thread->state == State::spinning ? idle + 1 : 0;
    progress = m.last_progress;
    if (idle > kIdleRounds * (spinners.size() + 1)) {
      if (!tick()) return report_deadlock();
      idle = 0;
    }
    may_start = block->ready.empty();
    if (block->alive == 0) end_block(block);
  }
}

void clear() {
  Machine& m = machine();
  for (auto& block : m.resident) {
    for (Thread& thread : block->threads) m.stacks.give_back(thread.stack);
  }
  m.resident.clear();
  m.queues.clear();
  spinners.clear();
  stream_ends.clear();
  loaded = nullptr;
  m.num_launches = 0;
  m.abandoned = false;
  m.looked_at_clock = false;
  forget_accesses();
}

void spin(const void* word, unsigned bytes) {
  Thread& self = *machine().current;
  self.waits_for = word;
  self.waits_for_bytes = bytes;
  self.state = State::spinning;
  spinners.push_back(&self);
  leave();
}

}  // namespace

Machine the_machine;

bool is_random() {
  return machine().config.schedule == Schedule::random || machine().config.schedule == Schedule::priority;
}

void leave() {
  Machine& m = machine();
  m.current->context.switch_to(m.scheduler);
}

void make_ready(Thread& thread) {
  thread.state = State::ready;
  thread.block->ready.push_back(thread.index);
}

uint64_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

std::string where(const Thread& thread) {
  const Launch& launch = *thread.block->launch;
  const uint3 id = thread.block->id;
  std::ostringstream text;
  text << "kernel " << launch.name << ", rank " << launch.rank << ", block " << id.x;
  if (launch.grid.y > 1 || launch.grid.z > 1) text << ',' << id.y << ',' << id.z;
  text << ", thread " << thread.id.x;
  if (launch.block.y > 1 || launch.block.z > 1) text << ',' << thread.id.y << ',' << thread.id.z;
  return text.str();
}

void report(const std::string& text, const std::string& key) {
  static std::vector<std::string> keys;
  if (machine().reports.empty()) keys.clear();
  for (const std::string& known : keys) {
    if (known == key) return;
  }
  keys.push_back(key);
  machine().reports.push_back(text);
}

void abandon() {
  machine().abandoned = true;
  machine().inside = true;
  leave();
  abort();  // nobody resumes it
}

void made_progress() {
  ++machine().last_progress;
  machine().idle_accesses = 0;
  machine().idle_ticks = 0;
}

void maybe_switch() {
  Machine& m = machine();
  if (!is_random() || m.config.switch_probability <= 0) return;
  if (static_cast<double>(random_bits() >> 40) >= m.config.switch_probability * (1 << 24)) return;
  Thread& self = *m.current;
  self.priority = static_cast<uint32_t>(random_bits());
  self.block->priority = static_cast<uint32_t>(random_bits());
  make_ready(self);
  leave();
}

void enqueue(const char* name, dim3 grid, dim3 block, size_t shared_bytes, CUstream_st* stream, const Closure* owned) {
  static CUstream_st default_stream;
  Machine& m = machine();
  const CUstream_st& on = stream == nullptr ? default_stream : *stream;
  auto launch = std::make_unique<Launch>();
  launch->number = ++m.num_launches;
  launch->name = name;
  launch->rank = on.rank;
  launch->stream = on.id;
  launch->grid = grid;
  launch->block = block;
  launch->shared_bytes = shared_bytes;
  launch->closure.reset(owned);
  launch->total = grid.x * grid.y * grid.z;
  const uint32_t threads = block.x * block.y * block.z;
  if (launch->total == 0 || threads == 0 || threads > 1024) {
    throw std::runtime_error("kernel " + launch->name + " needs at least one block of 1 to 1024 threads, got " +
                             std::to_string(launch->total) + " of " + std::to_string(threads));
  }
  m.queues[{on.rank, on.id}].push_back(std::move(launch));
}

std::vector<std::string> run(const Config& config) {
  Machine& m = machine();
  touched = 1;
  dl_iterate_phdr(find_shared, nullptr);
  m.config = config;
  m.reports.clear();
  m.block_names.assign(1, BlockName{});  // number 0 is none
  random_state = config.seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  for (int i = 0; i < 8; ++i) random_bits();
  made_progress();
  run_queues();
  clear();
  return m.reports;
}

Counts counts() { return machine().counts; }

void sleep() {
  Inside inside;
  spin(nullptr, 0);
}

void* dynamic_shared() { return machine().current->block->dynamic_begin(); }

// The scheduling point of a load; see detector.cpp for its order.
void let_others_run(const void* word, unsigned bytes) { spin(word, bytes); }

uint64_t nanoseconds() {
  machine().looked_at_clock = true;
  return machine().now;
}

}  // namespace simt
