// Watches every access of kernels to memory: is it inside of a buffer, is it aligned, was shared memory
// written before, and is it ordered after the accesses of other threads to the same bytes?
//
// Two accesses race if they touch a common byte, one of them writes, not both are atomic, and neither happened
// before the other. What orders: the program, within a thread; __syncthreads(); __syncwarp(), within its mask; a
// release and the acquire that reads it; a relaxed store after a fence and a fence after the relaxed load
// that reads it; launches on one stream. Shuffles and votes move values but order no memory.
//
// The emulated memory itself is sequentially consistent: a missing fence shows as a race, not as a wrong value.
#include <dlfcn.h>

#include <cstring>
#include <sstream>
#include <unordered_map>

#include "machine.h"
#include "simt/memory_order.h"

namespace simt {
namespace {

constexpr size_t kArenaBytes = 256 << 20;
constexpr size_t kGapBytes = 256;  // at least, before the first buffer and between two

struct Buffer {
  size_t bytes;
  std::string name;
};

uintptr_t arena = 0;
size_t arena_used = 0;
Cell* arena_shadow = nullptr;                    // one cell for 4 bytes
uintptr_t last_begin = 0, last_end = 0;          // of the buffer that was found last
std::map<uintptr_t, Buffer> buffers;             // by their address
std::vector<std::vector<Access>> read_lists;     // Cell::more_reads
std::unordered_map<uintptr_t, Knowledge> words;  // what acquiring a word teaches
std::map<std::pair<int, int>, Knowledge> stream_ends;

void* reserve(size_t bytes) {
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no address space for emulated device memory");
  return memory;
}

size_t cells_for(size_t bytes) { return (bytes + 3) / 4; }

// A return address; the instruction before it belongs to the access.
std::string at_code(uint32_t code) {
  std::ostringstream text;
  text << "@0x" << std::hex << code - 1;
  return text.str();
}

const std::pair<const uintptr_t, Buffer>* buffer_at_or_before(uintptr_t address) {
  auto after = buffers.upper_bound(address);
  return after == buffers.begin() ? nullptr : &*--after;
}

bool happened_before(const Access& access, const Thread& thread) {
  if (access.bytes == 0) return true;
  const Block& block = *thread.block;
  if (access.block == block.number) {
    if (access.thread == thread.index || access.clock <= block.barrier_clocks[access.thread]) return true;
    if (access.thread / 32 == thread.index / 32 &&
        access.clock <= block.warp_clocks[thread.index][access.thread % 32]) {
      return true;
    }
  }
  const uint32_t launch = machine().block_names[access.block].launch;
  return block.acquired.holds(access.block, launch, access.thread, access.clock) ||
         thread.acquired.holds(access.block, launch, access.thread, access.clock);
}

// All that the thread has done or learned.
Knowledge knowledge_of(const Thread& thread) {
  const Block& block = *thread.block;
  Clocks clocks = block.barrier_clocks;
  const uint32_t first = thread.index & ~31u;
  for (uint32_t lane = 0; lane < 32 && first + lane < clocks.size(); ++lane) {
    clocks[first + lane] = std::max(clocks[first + lane], block.warp_clocks[thread.index][lane]);
  }
  clocks[thread.index] = thread.clock;
  Knowledge all = block.acquired;
  all.learn(thread.acquired);
  all.learn(block.number, std::make_shared<const Clocks>(std::move(clocks)));
  return all;
}

struct Finding {
  uintptr_t address;
  unsigned bytes;
  bool write;
  uint32_t code;

  std::string what() const {
    std::ostringstream text;
    text << where(*machine().current) << (write ? " writes " : " reads ") << bytes << " bytes at "
         << describe_address(address) << " (" << at_code(code) << ")";
    return text.str();
  }
  void report_as(const char* kind, const std::string& advice) const {
    report(std::string(kind) + ": " + what() + ", " + advice, kind + std::to_string(code));
  }
};

void check_order(const Access& earlier, const Access& now, const Finding& finding, bool earlier_wrote) {
  if ((earlier.bytes & now.bytes) == 0 || (earlier.atomic && now.atomic)) return;
  if (happened_before(earlier, *machine().current)) return;
  const BlockName& name = machine().block_names[earlier.block];
  std::ostringstream text;
  text << "race: " << finding.what() << ", which kernel " << name.kernel << ", rank " << name.rank << ", block "
       << name.id.x << ", thread " << earlier.thread << (earlier_wrote ? " wrote (" : " read (")
       << at_code(earlier.code)
       << ") with nothing that orders the two: __syncthreads() inside a block, __syncwarp() inside a warp, a release "
          "and an acquire (or fences) between blocks and ranks";
  report(text.str(), "race" + std::to_string(finding.code) + "/" + std::to_string(earlier.code));
}

bool same_instant(const Access& a, const Access& b) {
  return a.block == b.block && a.thread == b.thread && a.clock == b.clock && a.atomic == b.atomic;
}

void note_write(Cell& cell, Access now) {
  Access& last = cell.writes[0];
  if (same_instant(last, now)) {
    now.bytes |= last.bytes;
  } else if ((last.bytes & ~now.bytes) != 0) {
    cell.writes[1] = last;
  }
  last = now;
  if ((cell.writes[1].bytes & ~now.bytes) == 0) cell.writes[1] = Access{};
  cell.written |= now.bytes;
  if (now.bytes == 15) {
    cell.read = Access{};
    if (cell.more_reads != 0) read_lists[cell.more_reads - 1].clear();
  }
}

// Takes the place of an earlier read that `now` says everything about; false if there is more to remember.
bool replaces(Access& earlier, Access now) {
  if (same_instant(earlier, now)) now.bytes |= earlier.bytes;
  if ((earlier.bytes & ~now.bytes) != 0 || !happened_before(earlier, *machine().current)) return false;
  earlier = now;
  return true;
}

void note_read(Cell& cell, const Access& now) {
  if (replaces(cell.read, now)) return;
  if (cell.more_reads == 0) {
    read_lists.emplace_back();
    cell.more_reads = static_cast<uint32_t>(read_lists.size());
  }
  std::vector<Access>& more = read_lists[cell.more_reads - 1];
  for (Access& access : more) {
    if (replaces(access, now)) return;
  }
  more.push_back(now);
}

void check_words(Cell* cells, uintptr_t base, bool shared, const Finding& finding, bool atomic) {
  const Thread& self = *machine().current;
  const uintptr_t end = finding.address + finding.bytes;
  for (uintptr_t word = finding.address & ~uintptr_t{3}; word < end; word += 4) {
    unsigned bytes = 15;
    if (word < finding.address) bytes &= 15u << (finding.address - word);
    if (word + 4 > end) bytes &= 15u >> (word + 4 - end);
    Access now;
    now.block = self.block->number;
    now.clock = self.clock;
    now.code = finding.code;
    now.thread = static_cast<uint16_t>(self.index);
    now.bytes = static_cast<uint8_t>(bytes);
    now.atomic = atomic;
    Cell& cell = cells[(word - base) / 4];
    check_order(cell.writes[0], now, finding, true);
    check_order(cell.writes[1], now, finding, true);
    if (finding.write) {
      check_order(cell.read, now, finding, false);
      if (cell.more_reads != 0) {
        for (const Access& read : read_lists[cell.more_reads - 1]) check_order(read, now, finding, false);
      }
      note_write(cell, now);
    } else {
      if (shared && (bytes & ~cell.written) != 0) {
        finding.report_as("uninitialised", "which no thread of the block has written: write shared memory first");
      }
      note_read(cell, now);
    }
  }
}

}  // namespace

uint32_t offset_in_module(const void* code) {
  static const uintptr_t base = [] {
    Dl_info info{};
    dladdr(reinterpret_cast<const void*>(&reserve), &info);
    return reinterpret_cast<uintptr_t>(info.dli_fbase);
  }();
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(code) - base);
}

void* allocate(size_t bytes, const std::string& name) {
  if (arena == 0) {
    arena = reinterpret_cast<uintptr_t>(reserve(kArenaBytes));
    arena_shadow = static_cast<Cell*>(reserve(cells_for(kArenaBytes) * sizeof(Cell)));
  }
  const size_t begin = (arena_used + 2 * kGapBytes - 1) / kGapBytes * kGapBytes;
  if (begin + bytes + kGapBytes > kArenaBytes) {
    throw std::runtime_error("no room for " + std::to_string(bytes) + " bytes of emulated device memory: " +
                             std::to_string(arena_used) + " of " + std::to_string(kArenaBytes) + " are in use");
  }
  arena_used = begin + bytes;
  buffers[arena + begin] = Buffer{bytes, name};
  return reinterpret_cast<void*>(arena + begin);
}

void release_all() {
  if (arena != 0) madvise(reinterpret_cast<void*>(arena), kArenaBytes, MADV_DONTNEED);
  buffers.clear();
  last_begin = last_end = 0;
  arena_used = 0;
}

void watch(Block& block) {
  Machine& m = machine();
  Launch& launch = *block.launch;
  if (m.block_names.empty()) m.block_names.emplace_back();  // number 0 is none
  m.block_names.push_back(BlockName{launch.name, launch.rank, launch.number, block.id});
  if (launch.started == 1) launch.before = stream_ends[{launch.rank, launch.stream}];
  block.acquired = launch.before;
  block.shadow.resize(cells_for(m.shared_bytes) + 1 + cells_for(launch.shared_bytes) + 1);
  block.barrier_clocks.assign(block.threads.size(), 0);
  block.warp_clocks.assign(block.threads.size(), {});
}

void watch_end(Block& block) {
  Launch& launch = *block.launch;
  launch.after.learn(block.acquired);
  for (const Thread& thread : block.threads) {
    if (!thread.acquired.empty()) launch.after.learn(thread.acquired);
  }
}

void watch_end(const Launch& launch) {
  Knowledge& end = stream_ends[{launch.rank, launch.stream}];
  end.learn(launch.after);
  end.learn_launch(launch.number);
  end.forget_finished([](uint32_t number) { return machine().block_names[number].launch; });
}

void forget_accesses() {
  if (arena != 0) madvise(arena_shadow, cells_for(arena_used) * sizeof(Cell), MADV_DONTNEED);
  read_lists.clear();
  words.clear();
  stream_ends.clear();
  machine().block_names.clear();
  machine().num_blocks = 0;
}

std::string describe_address(uintptr_t address) {
  const Machine& m = machine();
  if (address - m.shared_begin < m.shared_bytes) return "a __shared__ variable";
  if (m.current != nullptr) {
    const uintptr_t dynamic = reinterpret_cast<uintptr_t>(m.current->block->dynamic_begin());
    if (address - dynamic <= m.current->block->launch->shared_bytes) {
      return "dynamic shared memory + " + std::to_string(address - dynamic);
    }
  }
  if (address - arena >= kArenaBytes || buffers.empty()) return "an address outside of device memory";
  const auto* const found = buffer_at_or_before(address);
  if (found == nullptr) {
    const auto& [first, buffer] = *buffers.begin();
    return "buffer '" + buffer.name + "' - " + std::to_string(first - address);
  }
  return "buffer '" + found->second.name + "' + " + std::to_string(address - found->first) + " (of " +
         std::to_string(found->second.bytes) + " bytes)";
}

void check_access(uintptr_t address, unsigned bytes, bool write, bool atomic, bool needs_alignment, const void* code) {
  Machine& m = machine();
  Thread& self = *m.current;
  if (address - reinterpret_cast<uintptr_t>(self.stack) < kStackBytes) return;
  const Launch& launch = *self.block->launch;
  if (address - reinterpret_cast<uintptr_t>(launch.closure.get()) < launch.closure->bytes()) return;
  ++m.counts.accesses;
  const Finding finding{address, bytes, write, offset_in_module(code)};
  if (++m.idle_accesses > kMostIdleAccesses) {
    finding.report_as("endless", "and neither it nor any other thread has got anywhere for " +
                                     std::to_string(kMostIdleAccesses) + " accesses: a loop that does not end?");
    abandon();
  }
  if (needs_alignment && address % bytes != 0) {
    finding.report_as("misaligned", "which is not a multiple of " + std::to_string(bytes));
  }
  if (address - m.shared_begin < m.shared_bytes) {
    return check_words(self.block->shadow.data(), m.shared_begin & ~uintptr_t{3}, true, finding, atomic);
  }
  const uintptr_t dynamic = reinterpret_cast<uintptr_t>(self.block->dynamic_begin());
  if (address - dynamic < launch.shared_bytes) {
    if (address + bytes > dynamic + launch.shared_bytes) {
      return finding.report_as("out of bounds",
                               "past the " + std::to_string(launch.shared_bytes) + " bytes of the launch");
    }
    return check_words(self.block->shadow.data() + cells_for(m.shared_bytes) + 1, dynamic, true, finding, atomic);
  }
  if (address - arena < kArenaBytes) {
    if (address < last_begin || address + bytes > last_end) {
      const auto* const found = buffer_at_or_before(address);
      if (found == nullptr || address + bytes > found->first + found->second.bytes) {
        return finding.report_as("out of bounds", "which belongs to no buffer: check the index against the size");
      }
      last_begin = found->first;
      last_end = last_begin + found->second.bytes;
    }
    if (write) made_progress();
    return check_words(arena_shadow, arena, false, finding, atomic);
  }
  Dl_info info{};
  Dl_info own{};
  dladdr(reinterpret_cast<const void*>(&reserve), &own);
  const bool in_module = dladdr(reinterpret_cast<const void*>(address), &info) != 0 && info.dli_fbase == own.dli_fbase;
  if (in_module && !write) return;  // a constant
  finding.report_as("out of bounds", "which no GPU can reach: pass memory of the device, check the index");
  abandon();  // this process may not survive the access either
}

// Everything before the barrier happened before everything after it, in the whole block.
void barrier_orders(Block& block) {
  for (Thread& thread : block.threads) {
    if (!thread.acquired.empty()) {
      block.acquired.learn(thread.acquired);
      thread.acquired.clear();
    }
    block.barrier_clocks[thread.index] = thread.clock++;
  }
}

void warp_orders(Block& block, uint32_t first_thread, unsigned mask) {
  std::array<uint32_t, 32> clocks{};
  Knowledge acquired;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    const Thread& thread = block.threads[first_thread + lane];
    for (uint32_t other = 0; other < 32; ++other) {
      clocks[other] = std::max(clocks[other], block.warp_clocks[thread.index][other]);
    }
    acquired.learn(thread.acquired);
  }
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0) clocks[lane] = block.threads[first_thread + lane].clock;
  }
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    Thread& thread = block.threads[first_thread + lane];
    block.warp_clocks[thread.index] = clocks;
    thread.acquired = acquired;
    ++thread.clock;
  }
}

// ---- Order between blocks and ranks

void fence() {
  Inside inside;
  Thread& self = *machine().current;
  if (!self.unfenced.empty()) {
    self.acquired.learn(self.unfenced);
    self.unfenced.clear();
  }
  self.fenced = std::make_shared<const Knowledge>(knowledge_of(self));
  ++self.clock;
}

namespace {

template <typename Word>
Word load_word(const Word* word, Order order, const void* code) {
  Inside inside;
  check_access(reinterpret_cast<uintptr_t>(word), sizeof(Word), false, true, true, code);
  let_others_run(word, sizeof(Word));
  Thread& self = *machine().current;
  const auto taught = words.find(reinterpret_cast<uintptr_t>(word));
  if (taught != words.end()) (order == Order::acquire ? self.acquired : self.unfenced).learn(taught->second);
  return *word;
}

template <typename Word>
void store_word(Word* word, Word value, Order order, const void* code) {
  Inside inside;
  maybe_switch();
  check_access(reinterpret_cast<uintptr_t>(word), sizeof(Word), true, true, true, code);
  Thread& self = *machine().current;
  Knowledge& taught = words[reinterpret_cast<uintptr_t>(word)];
  taught.clear();
  if (order == Order::release) {
    taught = knowledge_of(self);
    ++self.clock;
  } else if (self.fenced != nullptr) {
    taught = *self.fenced;
  }
  *word = value;
}

}  // namespace

uint32_t load(const uint32_t* word, Order order) { return load_word(word, order, __builtin_return_address(0)); }
uint64_t load(const uint64_t* word, Order order) { return load_word(word, order, __builtin_return_address(0)); }
void store(uint32_t* word, uint32_t value, Order order) { store_word(word, value, order, __builtin_return_address(0)); }
void store(uint64_t* word, uint64_t value, Order order) { store_word(word, value, order, __builtin_return_address(0)); }

// Read-modify-writes are relaxed and continue the release that they read.
void atomic_access(const volatile void* address, unsigned bytes) {
  Inside inside;
  maybe_switch();
  check_access(reinterpret_cast<uintptr_t>(address), bytes, true, true, true, __builtin_return_address(0));
  Thread& self = *machine().current;
  Knowledge& taught = words[reinterpret_cast<uintptr_t>(address)];
  self.unfenced.learn(taught);
  if (self.fenced != nullptr) taught.learn(*self.fenced);
}

}  // namespace simt
