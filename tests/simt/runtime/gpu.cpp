#include "gpu.h"

#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>

#include "base/error.h"
#include "machine.h"

namespace simt {
namespace {

// While all that is resident waits for somebody else, other processes need the processor.
class BackOff {
 public:
  void ran() { idle_ = 0; }
  void polled() {
    if (++idle_ < kBusyRounds * (num_spinners() + 1)) return;
    idle_ = 0;
    if (++pauses_ % kPausesPerSleep != 0) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

 private:
  static constexpr uint64_t kBusyRounds = 4;
  static constexpr uint64_t kPausesPerSleep = 8;
  uint64_t idle_ = 0;
  uint64_t pauses_ = 0;
};

Config config_of_environment() {
  Config config;
  config.max_resident_blocks = 1 << 20;  // blocks of all ranks on a device wait for one another
  config.schedule = Schedule::random;
  if (const char* const name = getenv("RINGCOMM_SIMT_SCHEDULE")) {
    const char* const names[] = {"forward", "reverse", "random", "priority"};
    int found = -1;
    for (int i = 0; i < 4; ++i) {
      if (strcmp(name, names[i]) == 0) found = i;
    }
    RC_CHECK(found >= 0, "RINGCOMM_SIMT_SCHEDULE must be forward, reverse, random or priority, not '", name, "'");
    config.schedule = static_cast<Schedule>(found);
  }
  if (const char* const seed = getenv("RINGCOMM_SIMT_SEED")) config.seed = strtoull(seed, nullptr, 10);
  return config;
}

}  // namespace

Gpu& Gpu::get() {
  static Gpu gpu;  // its thread ends before the machine that it drives, which is as old as the module
  return gpu;
}

Gpu::~Gpu() {
  if (pid_ == 0) return;
  if (pid_ != getpid()) {  // forked: the thread is the parent's
    thread_.detach();
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    news_ = true;
  }
  news_arrived_.notify_one();
  thread_.join();
}

void Gpu::start() {
  if (pid_ == getpid()) return;
  if (pid_ != 0) {
    RC_FAIL(device, "process ", getpid(), " was forked from process ", pid_,
            ", which had used its (emulated) GPU already: fork before, or start processes with spawn");
  }
  const Config config = config_of_environment();
  thread_ = std::thread([this, config] {
    prepare(config);
    serve();
  });
  pid_ = getpid();
}

void Gpu::queue(const CUstream_st& stream, std::function<bool()> command) {
  const Key key{stream.rank, stream.id};
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    start();
    throw_failure();
    const auto capture = captures_.find(key);
    if (capture != captures_.end()) {
      capture->second->items.push_back({key, std::move(command)});
      return;
    }
    put({key, std::move(command)});
  }
  news_arrived_.notify_one();
}

void Gpu::put(Item item) {
  ++tickets_[item.key].queued;
  inbox_.push_back(std::move(item));
  news_ = true;
}

void Gpu::begin_capture(const CUstream_st& stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const bool is_new = captures_.emplace(Key{stream.rank, stream.id}, std::make_shared<Capture>()).second;
  RC_CHECK(is_new, "this stream is being captured already");
}

Gpu::CapturePtr Gpu::end_capture(const CUstream_st& stream) {
  const CapturePtr capture = capture_of(stream);
  RC_CHECK(capture != nullptr, "this stream is not being captured");
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto entry = captures_.begin(); entry != captures_.end();) {
      entry = entry->second == capture ? captures_.erase(entry) : std::next(entry);
    }
    capture->ended = true;
  }
  if (!capture->spoilt.empty()) RC_FAIL(device, "the capture is no good: ", capture->spoilt);
  return capture;
}

void Gpu::join(const CUstream_st& stream, const CapturePtr& capture) {
  const std::lock_guard<std::mutex> lock(mutex_);
  captures_[Key{stream.rank, stream.id}] = capture;
}

Gpu::CapturePtr Gpu::capture_of(const CUstream_st& stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = captures_.find(Key{stream.rank, stream.id});
  return found == captures_.end() ? nullptr : found->second;
}

void Gpu::launch(const CapturePtr& capture) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    start();
    throw_failure();
    RC_CHECK(!capture->items.empty(), "what was captured has been launched, or was nothing");
    for (Item& item : capture->items) put(std::move(item));
    capture->items.clear();
  }
  news_arrived_.notify_one();
}

void Gpu::launch(const CUstream_st& stream, const char* name, dim3 grid, dim3 block, size_t shared_bytes,
                 std::unique_ptr<const Closure> closure) {
  // std::function copies what it holds.
  auto launch = std::make_shared<std::unique_ptr<Launch>>();
  *launch = make_launch(name, stream, grid, block, shared_bytes, closure.release());
  const Key key{stream.rank, stream.id};
  queue(stream, [launch, key] {
    if (*launch != nullptr) submit(std::move(*launch));
    return machine().queues.count(key) == 0;
  });
}

void Gpu::synchronize(const CUstream_st& stream) {
  const Key key{stream.rank, stream.id};
  std::unique_lock<std::mutex> lock(mutex_);
  if (pid_ != getpid()) return;
  const uint64_t queued = tickets_[key].queued;
  something_done_.wait(lock, [&] { return !failure_.empty() || tickets_[key].done >= queued; });
  throw_failure();
}

void Gpu::synchronize() {
  std::unique_lock<std::mutex> lock(mutex_);
  if (pid_ != getpid()) return;
  const std::map<Key, Ticket> before = tickets_;
  something_done_.wait(lock, [&] {
    for (const auto& [key, ticket] : before) {
      if (failure_.empty() && tickets_[key].done < ticket.queued) return false;
    }
    return true;
  });
}

void Gpu::check() {
  const std::lock_guard<std::mutex> lock(mutex_);
  throw_failure();
}

void Gpu::throw_failure() const {
  if (!failure_.empty()) RC_FAIL(device, "the emulated GPU has failed: ", failure_);
}

void Gpu::take_in() {
  if (!news_.exchange(false)) return;
  std::vector<Item> items;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    items.swap(inbox_);
  }
  for (Item& item : items) streams_[item.key].push_back(std::move(item.command));
}

// Goes on with every stream as far as it gets.
void Gpu::advance() {
  for (bool again = true; again;) {
    again = false;
    for (auto entry = streams_.begin(); entry != streams_.end();) {
      auto& [key, commands] = *entry;
      uint64_t done = 0;
      for (; !commands.empty() && commands.front()(); ++done) commands.pop_front();
      if (done > 0) {
        again = true;
        const std::lock_guard<std::mutex> lock(mutex_);
        tickets_[key].done += done;
        something_done_.notify_all();
      }
      entry = commands.empty() ? streams_.erase(entry) : std::next(entry);
    }
  }
}

void Gpu::sleep_until_news() {
  std::unique_lock<std::mutex> lock(mutex_);
  news_arrived_.wait(lock, [&] { return news_.load(); });
}

void Gpu::fail(const std::string& what) {
  abandon_all();
  streams_.clear();
  const std::lock_guard<std::mutex> lock(mutex_);
  failure_ = what;
  inbox_.clear();
  something_done_.notify_all();
}

void Gpu::serve() {
  Machine& m = machine();
  BackOff back_off;
  uint32_t launches_ended = 0;
  while (true) {
    if (news_ || m.launches_ended != launches_ended) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (stop_) return;
      }
      take_in();
      launches_ended = m.launches_ended;
      advance();
      back_off.ran();
    }
    switch (step()) {
      case Step::ran:
        back_off.ran();
        break;
      case Step::polled:
        back_off.polled();
        break;
      case Step::stuck:
        report_deadlock();
        break;
      case Step::nothing:
        // A stream that waits for an event goes on when another one gets there, and none of them is at work.
        sleep_until_news();
        break;
    }
    if (!m.reports.empty()) {
      fail(m.reports.front());
      m.reports.clear();
    }
  }
}

}  // namespace simt
