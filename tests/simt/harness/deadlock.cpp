// Says what threads wait for that nobody will ever do.
#include <cstring>
#include <map>
#include <sstream>

#include "machine.h"

namespace simt {
namespace {

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

}  // namespace

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
    if (queue.front()->started == queue.front()->total) continue;
    const Launch& launch = *queue.front();
    text << ' ' << launch.total - launch.started << " blocks of kernel " << launch.name << ", rank " << launch.rank
         << ", have not started: not more than " << machine().config.max_resident_blocks
         << " are resident, so no block may wait for a later one.";
  }
  report(text.str(), "deadlock");
}

}  // namespace simt
