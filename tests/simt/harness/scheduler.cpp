// Runs the threads of all resident blocks of all ranks, one at a time.
#include <link.h>

#include <cstdlib>
#include <cstring>
#include <sstream>

#include "machine.h"

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

// Writing it gives this thread its copy of the module's thread-locals, which it gets late when the module was loaded
// late.
thread_local volatile char touched = 0;

std::deque<Thread*> spinners;
Block* loaded = nullptr;  // whose shared memory lies in the thread-locals
uint64_t random_state = 1;
bool may_start = true;  // blocks, before the next step

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
  block->number = ++m.num_blocks;
  block->id =
      uint3{index % launch.grid.x, index / launch.grid.x % launch.grid.y, index / launch.grid.x / launch.grid.y};
  block->priority = static_cast<uint32_t>(random_bits());
  block->shared.assign(m.shared_bytes, static_cast<char>(0xA5));
  block->dynamic_shared.assign(launch.shared_bytes + 16, static_cast<char>(0xA5));
  const uint32_t count = launch.block.x * launch.block.y * launch.block.z;
  block->alive = count;
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
  watch(*block);
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
    Launch& launch = *queue.front();
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
  watch_end(*block);
  for (Thread& thread : block->threads) m.stacks.give_back(thread.stack);
  if (loaded == block) loaded = nullptr;
  for (auto& resident : m.resident) {
    if (resident.get() != block) continue;
    std::swap(resident, m.resident.back());
    m.resident.pop_back();
    break;
  }
  if (++launch.ended != launch.total) return;
  ++m.launches_ended;
  m.kernels_ended.insert(launch.closure->code());
  watch_end(launch);
  const auto queue = m.queues.find({launch.rank, launch.stream});
  queue->second.pop_front();
  if (queue->second.empty()) m.queues.erase(queue);
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

void prepare(const Config& config) {
  touched = 1;
  dl_iterate_phdr(find_shared, nullptr);
  machine().config = config;
  random_state = config.seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  for (int i = 0; i < 8; ++i) random_bits();
  made_progress();
}

std::unique_ptr<Launch> make_launch(const char* name, const CUstream_st& on, dim3 grid, dim3 block, size_t shared_bytes,
                                    const Closure* owned) {
  auto launch = std::make_unique<Launch>();
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
  return launch;
}

void submit(std::unique_ptr<Launch> launch) {
  Machine& m = machine();
  launch->number = ++m.num_launches;
  m.queues[{launch->rank, launch->stream}].push_back(std::move(launch));
  may_start = true;
}

Step step() {
  Machine& m = machine();
  const uint64_t progress = m.last_progress;
  if (may_start) start_blocks();
  may_start = false;
  if (m.resident.empty()) return Step::nothing;
  Thread* const thread = choose();
  if (thread == nullptr) return Step::stuck;
  Block* const block = thread->block;
  resume(thread);
  const bool polled = m.last_progress == progress && thread->state == State::spinning;
  may_start = block->ready.empty();
  if (block->alive == 0) end_block(block);
  return polled ? Step::polled : Step::ran;
}

size_t num_spinners() { return spinners.size(); }

void abandon_all() {
  Machine& m = machine();
  for (auto& block : m.resident) {
    for (Thread& thread : block->threads) m.stacks.give_back(thread.stack);
  }
  m.resident.clear();
  m.queues.clear();
  spinners.clear();
  loaded = nullptr;
  may_start = true;
  m.abandoned = false;
}

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

void sleep() {
  Inside inside;
  spin(nullptr, 0);
}

void* dynamic_shared() { return machine().current->block->dynamic_begin(); }

// The scheduling point of a load; see detector.cpp for its order.
void let_others_run(const void* word, unsigned bytes) { spin(word, bytes); }

}  // namespace simt
