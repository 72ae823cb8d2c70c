// Notices the death of a peer process: a kernel fact, not a heartbeat.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
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
  // on_death(rank) runs on the monitor's thread, once per peer.
  LivenessMonitor(std::vector<Peer> peers, std::function<void(int)> on_death);
  ~LivenessMonitor();  // joins the thread

  // still_well() runs on the monitor's thread, soon, about every half second and after a death, until it returns
  // false. Any thread.
  void watch(std::function<bool()> still_well);

 private:
  void run();
  bool look();  // whether anybody still wants to

  std::vector<Peer> peers_;
  std::vector<uint64_t> start_times_;  // of peers without pidfd
  std::function<void(int)> on_death_;
  UniqueFd doorbell_;
  std::atomic<bool> stop_{false};
  std::mutex mutex_;  // guards what follows
  std::vector<std::function<bool()>> watches_;
  std::thread thread_;
};

// State letter of /proc/<pid>/stat ('R', 'S', 'T', 'Z', ...) and start time; letter 0 if there is no such process.
struct ProcessState {
  char letter = 0;
  uint64_t start_time = 0;
};
ProcessState read_process_state(int pid);

}  // namespace ringcomm
