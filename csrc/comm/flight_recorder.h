// The last calls of a communicator, for the time after something went wrong.
//
// A call costs two writes into a record that is there already: no allocation, no clock and no lock but
// those that the communicator needs anyway. A dump is a file in the format of torch's flight recorder
// (version 2.10), one per rank, which `torchfrtrace` compares. It holds all communicators that the rank
// has in this process, as torch's does. It is written here and not in Python: what it is for includes a
// process whose Python does not move any more.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "algo/collective.h"

namespace ringcomm {

struct FlightRecord {
  enum class State : uint8_t { scheduled, started, completed, failed };

  uint64_t id = 0;   // counts the calls of this rank in this process, over all communicators
  uint32_t seq = 0;  // number of the call in its group: the "#17" of errors
  State state = State::scheduled;
  Descriptor descriptor;
  Algo algo = Algo::one_shot;
  int64_t count = 0;     // Collective::count
  int64_t received = 0;  // all_to_all: elements
  // steady_clock, ns; 0: not yet.
  int64_t created_ns = 0;
  int64_t started_ns = 0;
  int64_t ended_ns = 0;
};

const char* state_name(FlightRecord::State state);

struct FlightRecorderConfig {
  int64_t capacity = 256;         // calls; 0: records nothing
  std::string file;               // where a dump goes when the communicator is lost; empty: nowhere
  std::vector<int> global_ranks;  // in the job, of every rank of the group
};

class FlightRecorder {
 public:
  using Clock = std::chrono::steady_clock;

  // guard: held by whoever calls add(), start() and finish(); taken by all others. Outlives this.
  FlightRecorder(std::mutex& guard, FlightRecorderConfig config, int rank, const std::string& name, double timeout_s,
                 uint32_t first_seq);
  ~FlightRecorder();
  FlightRecorder(const FlightRecorder&) = delete;
  // Its communicator is closed: no other one dumps it any more.
  void leave();

  // Calls start in the order in which they were added, and one ends before the next starts.
  void add(const Collective& call, const Descriptor& descriptor, Clock::time_point now);
  void start(Clock::time_point now);
  void finish(bool ok, Clock::time_point now);

  // Oldest first.
  std::vector<FlightRecord> records() const;

  // Writes what all open communicators of this rank in this process, and this one, did last. Throws Error (system).
  void dump(const std::string& path) const;
  // Writes the configured file, if any, and says so in the log. Never throws. `again`: also if it was
  // written before.
  void dump_after_failure(bool again) noexcept;
  bool dumps_after_failure() const { return !file_.empty(); }

 private:
  struct Registry;
  static Registry& registry();
  void unregister();
  FlightRecord* at(uint64_t number);
  uint64_t oldest_id(const std::vector<FlightRecord>& records) const;

  std::mutex& guard_;
  const std::string file_;
  const std::vector<int> global_ranks_;
  const int global_rank_;
  const double timeout_s_;
  std::string label_;  // the group's name, numbered if this process has another one of that name
  uint32_t next_seq_;
  std::shared_ptr<std::atomic<uint64_t>> next_id_;  // shared by the communicators of this rank in this process
  std::vector<FlightRecord> ring_;
  uint64_t num_added_ = 0;
  uint64_t num_started_ = 0;
  std::atomic<bool> dumped_{false};
};

}  // namespace ringcomm
