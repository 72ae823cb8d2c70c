// Notices the death of a peer process: a kernel fact, not a heartbeat.
#pragma once

#include <functional>
#include <thread>
#include <vector>

#include "transport/segment.h"

namespace ringcomm {

// One sleeping thread that watches the processes of all peers. A pidfd that the peer opened on
// itself becomes readable within a millisecond of its death, also while it is a zombie and while a
// child it forked still runs. Where the kernel has no pidfd (fd -1) it reads /proc/<pid>/stat every
// 50 ms instead. A stopped or slow peer is never reported.
class LivenessMonitor {
 public:
  struct Peer {
    int rank;
    int pid;
    UniqueFd pidfd;
  };
  // on_death(rank) runs on the monitor's thread, once per peer. still_well(), if any, runs there about
  // every half second, until it returns false.
  LivenessMonitor(std::vector<Peer> peers, std::function<void(int)> on_death, std::function<bool()> still_well = {});
  ~LivenessMonitor();  // joins the thread

 private:
  void watch();

  std::vector<Peer> peers_;
  std::vector<uint64_t> start_times_;  // of peers without pidfd
  std::function<void(int)> on_death_;
  std::function<bool()> still_well_;
  UniqueFd stop_;
  std::thread thread_;
};

// State letter of /proc/<pid>/stat ('R', 'S', 'T', 'Z', ...) and start time; letter 0 if there is no such process.
struct ProcessState {
  char letter = 0;
  uint64_t start_time = 0;
};
ProcessState read_process_state(int pid);

}  // namespace ringcomm
