#include "transport/liveness.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "base/error.h"

namespace ringcomm {
namespace {

constexpr int kProcPollMs = 50;
constexpr int kWellPollMs = 500;

bool is_gone(const ProcessState& state, uint64_t start_time) {
  return state.letter == 0 || state.letter == 'Z' || state.letter == 'X' || state.start_time != start_time;
}

void ring(const UniqueFd& doorbell) {
  const uint64_t one = 1;
  if (::write(doorbell.get(), &one, sizeof(one)) != sizeof(one)) std::terminate();  // cannot happen: it counts far
}

}  // namespace

ProcessState read_process_state(int pid) {
  char path[64];
  std::snprintf(path, sizeof(path), "/proc/%d/stat", pid);
  std::FILE* file = std::fopen(path, "re");
  if (file == nullptr) return {};
  char line[1024];
  const size_t length = std::fread(line, 1, sizeof(line) - 1, file);
  std::fclose(file);
  line[length] = 0;
  const char* after_name = std::strrchr(line, ')');  // the name may hold spaces and brackets
  if (after_name == nullptr) return {};
  ProcessState state;
  unsigned long long start_time = 0;
  // Fields 3 (state) and 22 (start time).
  std::sscanf(after_name + 2, "%c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu",
              &state.letter, &start_time);
  state.start_time = start_time;
  return state;
}

LivenessMonitor::LivenessMonitor(std::vector<Peer> peers, std::function<void(int)> on_death)
    : peers_(std::move(peers)), on_death_(std::move(on_death)), doorbell_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  RC_SYS(doorbell_.get(), "eventfd failed");
  for (const Peer& peer : peers_) start_times_.push_back(read_process_state(peer.pid).start_time);
  thread_ = std::thread([this] { run(); });
}

LivenessMonitor::~LivenessMonitor() {
  stop_.store(true);
  ring(doorbell_);
  thread_.join();
}

void LivenessMonitor::watch(std::function<bool()> still_well) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    watches_.push_back(std::move(still_well));
  }
  ring(doorbell_);
}

bool LivenessMonitor::look() {
  std::vector<std::function<bool()>> watches;  // they run without the lock
  {
    std::lock_guard<std::mutex> lock(mutex_);
    watches.swap(watches_);
  }
  watches.erase(std::remove_if(watches.begin(), watches.end(), [](const auto& still_well) { return !still_well(); }),
                watches.end());
  std::lock_guard<std::mutex> lock(mutex_);
  watches_.insert(watches_.end(), watches.begin(), watches.end());
  return !watches_.empty();
}

void LivenessMonitor::run() {
  std::vector<pollfd> entries{{doorbell_.get(), POLLIN, 0}};
  bool poll_proc = false;
  for (const Peer& peer : peers_) {
    entries.push_back({peer.pidfd.get(), POLLIN, 0});  // poll ignores negative descriptors
    poll_proc = poll_proc || peer.pidfd.get() < 0;
  }
  std::vector<bool> reported(peers_.size(), false);
  for (;;) {
    const bool looks = look();
    const int patience_ms = poll_proc ? kProcPollMs : looks ? kWellPollMs : -1;
    if (::poll(entries.data(), entries.size(), patience_ms) < 0 && errno != EINTR) return;
    if (stop_.load()) return;
    uint64_t rings = 0;
    if (entries[0].revents != 0 && ::read(doorbell_.get(), &rings, sizeof(rings)) < 0 && errno != EAGAIN) return;
    for (size_t i = 0; i < peers_.size(); ++i) {
      if (reported[i]) continue;
      const bool died = entries[i + 1].fd >= 0 ? entries[i + 1].revents != 0
                                               : is_gone(read_process_state(peers_[i].pid), start_times_[i]);
      if (!died) continue;
      reported[i] = true;
      entries[i + 1].fd = -1;
      on_death_(peers_[i].rank);
    }
  }
}

}  // namespace ringcomm
