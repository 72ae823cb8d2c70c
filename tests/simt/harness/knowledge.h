// What is known to have happened, for the happens-before order of the race detector.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <vector>

namespace simt {

// Of one block: up to which of its own clock each thread's work is known to be done.
using Clocks = std::vector<uint32_t>;

// A sparse vector clock: blocks by number, and launches that are over as a whole. The clocks are shared
// until they differ.
class Knowledge {
 public:
  bool empty() const { return blocks_.empty() && launches_.empty(); }
  void clear() {
    blocks_.clear();
    launches_.clear();
  }
  void learn(uint32_t block, std::shared_ptr<const Clocks> clocks) { merge_block(block, std::move(clocks)); }
  void learn_launch(uint32_t launch) { launches_.insert(launch); }
  void learn(const Knowledge& other) {
    launches_.insert(other.launches_.begin(), other.launches_.end());
    for (const auto& [block, clocks] : other.blocks_) merge_block(block, clocks);
  }
  bool holds(uint32_t block, uint32_t launch, uint32_t thread, uint32_t clock) const {
    if (launches_.count(launch) != 0) return true;
    const auto found = blocks_.find(block);
    return found != blocks_.end() && clock <= (*found->second)[thread];
  }
  // Launches that are over say more than the blocks they had.
  template <typename LaunchOf>
  void forget_finished(LaunchOf launch_of) {
    for (auto entry = blocks_.begin(); entry != blocks_.end();) {
      entry = launches_.count(launch_of(entry->first)) != 0 ? blocks_.erase(entry) : std::next(entry);
    }
  }

 private:
  void merge_block(uint32_t block, std::shared_ptr<const Clocks> clocks) {
    std::shared_ptr<const Clocks>& mine = blocks_[block];
    if (mine == nullptr) {
      mine = std::move(clocks);
    } else if (mine != clocks) {
      Clocks merged = *mine;
      for (size_t i = 0; i < merged.size(); ++i) merged[i] = std::max(merged[i], (*clocks)[i]);
      mine = std::make_shared<const Clocks>(std::move(merged));
    }
  }

  std::map<uint32_t, std::shared_ptr<const Clocks>> blocks_;
  std::set<uint32_t> launches_;
};

}  // namespace simt
