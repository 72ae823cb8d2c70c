// Where threads of a block meet: __syncthreads() and the operations of a warp.
#include <cstring>

#include "machine.h"

namespace simt {
namespace {

void open_barrier(Block& block) {
  barrier_orders(block);
  block.at_barrier = 0;
  block.outcome = block.vote;
  block.vote = false;
  made_progress();
  for (Thread& thread : block.threads) {
    if (thread.state == State::at_barrier) make_ready(thread);
  }
}

// Some threads wait at a barrier to which others will never come.
void report_divergent(const Block& block, const Thread& waiting) {
  report("divergent barrier: " + where(waiting) + " waits at __syncthreads() (" + at(waiting.place) + "), but " +
             std::to_string(block.threads.size() - block.alive) +
             " threads of its block have ended without it: every thread of a block must reach every barrier",
         "divergent" + at(waiting.place));
}

// Lanes of its warp wait for a thread that has ended.
void report_awaited(const Thread& ended) {
  const uint32_t first = ended.index / 32 * 32;
  for (uint32_t i = first; i < first + 32 && i < ended.block->threads.size(); ++i) {
    const Thread& waiting = ended.block->threads[i];
    if (waiting.state != State::in_collective || (waiting.mask >> ended.index % 32 & 1) == 0) continue;
    report("warp operation: " + where(waiting) + " (" + at(waiting.place) + "): the mask names lane " +
               std::to_string(ended.index % 32) + ", which has ended: compute the mask before lanes leave",
           "warp" + at(waiting.place));
  }
}

}  // namespace

std::string at(Place place) {
  const char* const slash = strrchr(place.file, '/');
  return std::string(slash == nullptr ? place.file : slash + 1) + ":" + std::to_string(place.line);
}

void ended(Thread& thread) {
  Block& block = *thread.block;
  report_awaited(thread);
  if (block.alive == 0 || block.at_barrier != block.alive) return;
  for (const Thread& waiting : block.threads) {
    if (waiting.state != State::at_barrier) continue;
    report_divergent(block, waiting);
    break;
  }
  open_barrier(block);
}

bool block_barrier(bool predicate, Place place) {
  Inside inside;
  Thread& self = *machine().current;
  Block& block = *self.block;
  self.place = place;
  for (const Thread& other : block.threads) {
    if (other.state != State::at_barrier) continue;
    if (other.place.line != place.line || strcmp(other.place.file, place.file) != 0) {
      report("divergent barrier: " + where(self) + " is at __syncthreads() (" + at(place) + ") while thread " +
                 std::to_string(other.index) + " of its block is at another one (" + at(other.place) +
                 "): every thread of a block must reach the same barriers in the same order",
             "divergent" + at(place));
    }
    break;
  }
  self.state = State::at_barrier;
  block.vote = block.vote || predicate;
  if (++block.at_barrier == block.alive) {
    if (block.alive != block.threads.size()) report_divergent(block, self);
    open_barrier(block);
  }
  leave();
  return block.outcome;
}

uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, int argument, int width, Place place) {
  Inside inside;
  Machine& m = machine();
  Thread& self = *m.current;
  Block& block = *self.block;
  const uint32_t lane = self.index % 32;
  const uint32_t first = self.index - lane;
  const auto complain = [&](const std::string& what) {
    report("warp operation: " + where(self) + " (" + at(place) + "): " + what, "warp" + at(place));
  };
  if ((mask >> lane & 1) == 0) {
    complain("its own lane is not in the mask: a thread may only name masks that it is in");
    return value;
  }
  for (uint32_t other = 0; other < 32; ++other) {
    if ((mask >> other & 1) == 0) continue;
    if (first + other < block.threads.size() && block.threads[first + other].state != State::done) continue;
    complain("the mask names lane " + std::to_string(other) + ", which has ended: compute the mask before lanes leave");
    mask &= ~(1u << other);
  }
  self.kind = kind;
  self.mask = mask;
  self.value = value;
  self.argument = argument;
  self.width = width;
  self.place = place;
  const auto in_mask = [&](uint32_t other) { return (mask >> other & 1) != 0; };
  for (uint32_t other = 0; other < 32; ++other) {
    if (!in_mask(other) || other == lane) continue;
    const Thread& thread = block.threads[first + other];
    if (thread.state == State::in_collective && thread.mask == mask) continue;
    self.state = State::in_collective;
    leave();
    return self.value;
  }

  // The last one to arrive computes for all.
  uint32_t votes = 0;
  for (uint32_t other = 0; other < 32; ++other) {
    if (!in_mask(other)) continue;
    const Thread& thread = block.threads[first + other];
    if (thread.kind != kind)
      complain("lanes of one mask meet in different operations, here and at " + at(thread.place));
    if (thread.value != 0) votes |= 1u << other;
  }
  uint64_t results[32] = {};
  for (uint32_t other = 0; other < 32; ++other) {
    if (!in_mask(other)) continue;
    const Thread& thread = block.threads[first + other];
    const int own = static_cast<int>(other);
    const int base = own & ~(thread.width - 1);
    const auto of_lane = [&](int source) {
      if (source < base || source >= base + thread.width) source = own;
      if (!in_mask(static_cast<uint32_t>(source))) {
        complain("lane " + std::to_string(own) + " reads lane " + std::to_string(source) + " outside of the mask");
        return uint64_t{0xA5A5A5A5A5A5A5A5};
      }
      return block.threads[first + static_cast<uint32_t>(source)].value;
    };
    switch (kind) {
      case Collective::sync:
        break;
      case Collective::ballot:
        results[other] = votes;
        break;
      case Collective::any:
        results[other] = votes != 0;
        break;
      case Collective::all:
        results[other] = votes == mask;
        break;
      case Collective::shuffle:
        results[other] = of_lane(base + (thread.argument & (thread.width - 1)));
        break;
      case Collective::shuffle_up:
        results[other] = of_lane(own - thread.argument);
        break;
      case Collective::shuffle_down:
        results[other] = of_lane(own + thread.argument);
        break;
      case Collective::shuffle_xor:
        results[other] = of_lane(own ^ thread.argument);
        break;
    }
  }
  if (kind == Collective::sync) warp_orders(block, first, mask);  // the others order no memory
  made_progress();
  for (uint32_t other = 0; other < 32; ++other) {
    if (!in_mask(other)) continue;
    Thread& thread = block.threads[first + other];
    thread.value = results[other];
    if (other != lane) make_ready(thread);
  }
  if (is_random()) {
    make_ready(self);
    leave();
  }
  return self.value;
}

}  // namespace simt
