// The emulated GPUs of this process: one OS thread executes what is queued on their streams, in stream order and
// otherwise in the order of the schedule, while the host goes on. Kernels of different streams are resident together,
// so they may wait for one another, for the host, and for kernels of other processes. Such a wait is no deadlock: it
// ends by the kernel's own deadline.
//
// The thread starts with the first command. A process that forks afterwards has none, and is told so.
//
// What goes wrong in a kernel (a barrier that not all threads reach) is an error for good, as on a GPU: every later
// call throws it.
//
//   RINGCOMM_SIMT_SCHEDULE   forward, reverse, random (default) or priority; see harness/control.h
//   RINGCOMM_SIMT_SEED       of random and priority (default 0)
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "simt/launch.h"

namespace simt {

class Gpu {
  using Key = std::pair<int, int>;  // device and stream
  struct Item {
    Key key;
    std::function<bool()> command;
  };

 public:
  static Gpu& get();
  ~Gpu();

  // Queues work on a stream. `command` is called by the GPU's thread, again and again, until it returns true.
  void queue(const CUstream_st& stream, std::function<bool()> command);
  void launch(const CUstream_st& stream, const char* name, dim3 grid, dim3 block, size_t shared_bytes,
              std::unique_ptr<const Closure> closure);
  // Blocks until all is done that is queued, on a stream or on all.
  void synchronize(const CUstream_st& stream);
  void synchronize();
  // Throws what the GPU has failed with.
  void check();

  // What is queued on a stream from here to end_capture() is kept instead, and so is what is queued on streams that
  // join. Queued for good by launch(), once.
  struct Capture {
    std::vector<Item> items;
    std::string spoilt;  // by which call; empty: by none
    bool ended = false;
  };
  using CapturePtr = std::shared_ptr<Capture>;
  void begin_capture(const CUstream_st& stream);
  CapturePtr end_capture(const CUstream_st& stream);
  void join(const CUstream_st& stream, const CapturePtr& capture);
  CapturePtr capture_of(const CUstream_st& stream);  // null: none
  void launch(const CapturePtr& capture);

 private:
  struct Ticket {
    uint64_t queued = 0, done = 0;
  };

  Gpu() = default;
  void put(Item item);
  void start();
  void serve();
  void take_in();
  void advance();
  void sleep_until_news();
  void fail(const std::string& what);
  void throw_failure() const;

  std::mutex mutex_;
  std::condition_variable news_arrived_;    // for the GPU's thread
  std::condition_variable something_done_;  // for those who synchronize
  std::vector<Item> inbox_;
  std::map<Key, Ticket> tickets_;
  std::map<Key, CapturePtr> captures_;  // by the streams that are part of them
  std::string failure_;
  bool stop_ = false;
  int pid_ = 0;  // of the process that the thread is in; 0: not started
  std::atomic<bool> news_{false};
  std::thread thread_;

  // The thread's own.
  std::map<Key, std::deque<std::function<bool()>>> streams_;
};

// The same as the members, of what the runtime calls a stream.
void capture(CUstream_st* stream);
Gpu::CapturePtr end_capture(CUstream_st* stream);

}  // namespace simt
