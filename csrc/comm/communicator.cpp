#include "comm/communicator.h"

#include <algorithm>
#include <utility>

#include "base/process.h"
#include "comm/checks.h"

namespace ringcomm {
namespace {

// An all_to_all from one array into another, as one of parts.
void cut_evenly(Collective& call, int world_size) {
  const int64_t part_bytes = call.num_bytes() / world_size;
  for (int rank = 0; rank < world_size; ++rank) {
    call.sends.push_back({bytes_at(call.input, rank * part_bytes), call.count / world_size});
    call.receives.push_back({bytes_at(call.output, rank * part_bytes), call.count / world_size});
  }
}

}  // namespace

Communicator::Communicator(const GroupConfig& config, const FlightRecorderConfig& recorder, const Limits& limits)
    : fork_generation_(fork_count()),
      rank_(config.rank),
      world_size_(config.world_size),
      recorder_(mutex_, recorder, config.rank, config.name, config.timeout_s, config.first_seq),
      group_(std::make_unique<ShmGroup>(config)),
      inline_bytes_(group_->inline_bytes()),
      buffer_bytes_(group_->buffer_bytes()),
      tuning_(limits, inline_bytes_),
      check_interrupt_(config.check_interrupt),
      messages_(std::make_shared<P2pEngine>(*group_, config.num_cores)) {
  if (!recorder_.dumps_after_failure()) return;
  // A rank that makes no call when the others fail dumps as well: it may be the one that they wait for.
  group_->watch([this, group = group_.get()] {
    if (!group->has_failed()) return true;
    recorder_.dump_after_failure(false);
    return false;
  });
}

Communicator::~Communicator() {
  if (fork_generation_ == fork_count()) {
    finish_and_leave({});
  } else {
    // The parent's memory and threads: only the parent may take them down.
    static_cast<void>(group_.release());
    static_cast<void>(new std::shared_ptr<P2pEngine>(messages_));
    static_cast<void>(new std::shared_ptr<DeviceGroup>(devices_));
    if (progress_thread_.joinable()) progress_thread_.detach();
  }
}

void Communicator::check_usable() const {
  check_not_forked(fork_generation_);
  if (closed_.load(std::memory_order_acquire)) RC_FAIL(aborted, "this communicator is closed; init() a new one");
}

Communicator::Prepared Communicator::prepare(Collective call, const Algo* algo, const std::string& tag) const {
  check_usable();
  check_call(call, rank_, world_size_);
  const bool has_codec = call.codec.up != CodecId::none;
  RC_CHECK(tag.size() <= kTagBytes, "a tag has at most ", kTagBytes, " bytes, '", tag, "' has ", tag.size());
  RC_CHECK(!call.on_device || has_devices_.load(std::memory_order_acquire),
           "this communicator has not been set up for ", "arrays on GPUs");
  choose(call, algo);
  if (call.algo != Algo::direct) {
    call.region.reset();
    if (call.op == OpKind::all_to_all && call.sends.empty()) cut_evenly(call, world_size_);
  }
  if (call.on_device) check_on_device(call, *devices_, world_size_);

  Descriptor descriptor;
  descriptor.op = call.op;
  descriptor.dtype = call.dtype;
  descriptor.reduce_op = call.reduce_op;
  descriptor.root = call.root;
  descriptor.region = call.region ? call.region->id() : 0;
  if (!is_exchange(call.op) || call.algo == Algo::direct) {
    descriptor.algo = call.algo;
    descriptor.count = call.count;
  }
  if (has_codec) {
    descriptor.codec_up = static_cast<uint8_t>(call.codec.up);
    descriptor.codec_down = static_cast<uint8_t>(call.codec.down);
    if (call.codec.rounding == Rounding::stochastic) descriptor.flags |= kFlagStochastic;
    if (call.codec.owner_residual != nullptr) descriptor.flags |= kFlagOwnerResidual;
  }
  if (call.on_device) descriptor.flags |= kFlagOnDevice;
  if (call.list.num_arrays >= 0) {
    descriptor.flags |= kFlagList;
    descriptor.root = call.list.num_arrays;
    descriptor.region ^= call.list.fingerprint();
  }
  std::memcpy(descriptor.tag, tag.data(), tag.size());
  return {std::move(call), descriptor};
}

std::vector<Communicator::Prepared> Communicator::prepare_list(const Collective& like,
                                                               const std::vector<ListedArray>& arrays,
                                                               const std::string& tag) const {
  std::vector<Prepared> prepared;
  for (Collective& call : calls_of_list(like, arrays, rank_, world_size_)) {
    prepared.push_back(prepare(std::move(call), nullptr, tag));
  }
  return prepared;
}

void Communicator::choose(Collective& call, const Algo* algo) const {
  const bool has_codec = call.codec.up != CodecId::none;
  if (call.on_device && devices_->mode() != DeviceMode::host) {
    const DeviceMode mode = devices_->mode();
    const DeviceLayout& layout = devices_->layout();
    const int64_t direct_bytes = premultiplies(call) ? -1 : devices_->direct_bytes();
    if (algo != nullptr) check_device_algo(*algo, call.op, call.num_bytes(), has_codec, mode, layout);
    call.algo = algo != nullptr ? *algo
                                : choose_device_algo(device_tuning_, call.op, call.num_bytes(), world_size_, has_codec,
                                                     mode, layout, direct_bytes)
                                      .algo;
    return;
  }
  if (num_regions_.load(std::memory_order_relaxed) > 0 && !call.on_device) call.region = region_of(call);
  const bool symmetric = call.region != nullptr;
  if (algo != nullptr) {
    check_algo(*algo, call.op, call.num_bytes(), world_size_, has_codec, symmetric, inline_bytes_);
    call.algo = *algo;
  } else {
    call.algo = choose_algo(tuning_, call.op, call.num_bytes(), world_size_, has_codec, symmetric, inline_bytes_).algo;
  }
}

bool Communicator::take_turn(const Prepared& prepared, Clock::time_point* start) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (busy_ || !queue_.empty() || stop_) return false;
  busy_ = true;
  *start = Clock::now();
  recorder_.add(prepared.call, prepared.descriptor, *start);
  recorder_.start(*start);
  return true;
}

void Communicator::run(Collective call, const Algo* algo, const std::string& tag) {
  run(prepare(std::move(call), algo, tag));
}

void Communicator::run_list(const Collective& like, const std::vector<ListedArray>& arrays, const std::string& tag) {
  for (const Prepared& prepared : prepare_list(like, arrays, tag)) run(prepared);
}

void Communicator::run(const Prepared& prepared) {
  Clock::time_point start;
  if (!take_turn(prepared, &start)) {
    std::unique_lock<std::mutex> lock(mutex_);
    const std::shared_ptr<Work> work = enqueue(prepared);
    lock.unlock();
    return wait_interruptibly(*work, "while a call waited for its turn");
  }
  const OpKind op = prepared.call.op;
  try {
    finish_turn(op, start, execute(prepared, start));
  } catch (...) {
    finish_turn(op, start, {});
    throw;
  }
}

std::shared_ptr<Work> Communicator::submit(Collective call, const Algo* algo, const std::string& tag) {
  std::vector<Prepared> calls;
  calls.push_back(prepare(std::move(call), algo, tag));
  return submit(std::move(calls));
}

std::shared_ptr<Work> Communicator::submit_list(const Collective& like, const std::vector<ListedArray>& arrays,
                                                const std::string& tag) {
  return submit(prepare_list(like, arrays, tag));
}

std::shared_ptr<Work> Communicator::submit(std::vector<Prepared> calls) {
  const bool on_device = calls.front().call.on_device;
  if (on_device) {
    const Stream stream = devices_->branch(calls.front().call.stream);
    for (Prepared& prepared : calls) prepared.call.stream = stream;
  }
  std::shared_ptr<Work> last;
  Clock::time_point start;
  size_t next = 0;
  // A call that is over when it is queued needs no thread of its own.
  for (; next < calls.size() && on_device && devices_->queues() && take_turn(calls[next], &start); ++next) {
    const Prepared& prepared = calls[next];
    last = std::make_shared<Work>();
    std::exception_ptr error;
    OpStats stats;
    try {
      stats = execute(prepared, start);
      mark_end(*last, prepared.call);
    } catch (const Interrupted&) {
      finish_turn(prepared.call.op, start, {});
      throw;
    } catch (...) {
      error = std::current_exception();
    }
    finish_turn(prepared.call.op, start, stats);
    last->finish(error);
    if (error) return last;
  }
  // All or none of them, if the communicator is being closed.
  std::lock_guard<std::mutex> lock(mutex_);
  for (; next < calls.size(); ++next) last = enqueue(std::move(calls[next]));
  return last;
}

// The call has just been queued.
void Communicator::mark_end(Work& work, const Collective& call) const {
  if (!call.on_device || !devices_->queues()) return;
  const runtime::DeviceGuard guard(devices_->device());
  auto end = devices_->mark(call.stream);
  std::lock_guard<std::mutex> lock(work.mutex_);
  work.is_captured_ = runtime::is_capturing(call.stream);
  work.end_ = std::move(end);
  work.devices_ = devices_;
}

void Communicator::wait_interruptibly(const Work& work, const std::string& where) {
  try {
    work.wait(-1, [&] { check_interrupt(where); });
  } catch (const Interrupted&) {
    try {
      work.wait();  // soon: the group has failed. Afterwards nobody writes to the caller's arrays
    } catch (const Error&) {
    }
    throw;
  }
}

void Communicator::check_interrupt(const std::string& where) {
  if (!check_interrupt_) return;
  try {
    check_interrupt_();
  } catch (const std::exception& error) {
    report_interrupt(error, where);
    throw Interrupted{std::current_exception()};
  }
}

void Communicator::report_interrupt(const std::exception& error, const std::string& where) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (group_) group_->report_interrupt(error, where);
}

std::shared_ptr<Work> Communicator::enqueue(Prepared prepared) {
  if (stop_) RC_FAIL(aborted, "this communicator is closed; init() a new one");
  if (!progress_thread_.joinable()) progress_thread_ = std::thread([this] { progress(); });
  recorder_.add(prepared.call, prepared.descriptor, Clock::now());
  queue_.push_back({std::move(prepared), std::make_shared<Work>()});
  changed_.notify_all();
  return queue_.back().work;
}

void Communicator::progress() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return !busy_ && (stop_ || !queue_.empty()); });
    if (queue_.empty()) return;
    const Pending pending = queue_.front();
    queue_.pop_front();
    busy_ = true;
    const Clock::time_point start = Clock::now();
    recorder_.start(start);
    lock.unlock();
    std::exception_ptr error;
    OpStats stats;
    try {
      stats = execute(pending.prepared, start);
      mark_end(*pending.work, pending.prepared.call);
    } catch (...) {
      error = std::current_exception();
    }
    finish_turn(pending.prepared.call.op, start, stats);
    pending.work->finish(error);
    lock.lock();
  }
}

void Communicator::finish_turn(OpKind op, Clock::time_point start, const OpStats& stats) {
  const bool failed = stats.calls == 0;
  // Before the turn ends: nobody can close the group meanwhile.
  const bool lost = failed && group_ && group_->has_failed();
  std::unique_lock<std::mutex> lock(mutex_);
  const auto spent = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(stats.seconds));
  recorder_.finish(!failed, failed ? Clock::now() : start + spent);
  if (lost) {
    lock.unlock();
    recorder_.dump_after_failure(!std::exchange(dumped_, true));
    lock.lock();
  }
  OpStats& total = stats_[static_cast<size_t>(op)];
  total.calls += stats.calls;
  total.bytes += stats.bytes;
  total.bytes_sent += stats.bytes_sent;
  total.seconds += stats.seconds;
  busy_ = false;
  changed_.notify_all();
}

std::shared_ptr<SymmetricRegion> Communicator::map_symmetric(int64_t num_bytes, const std::vector<int>& fds) {
  check_usable();
  RC_CHECK(fds.size() == static_cast<size_t>(world_size_), "need one segment per rank");
  const auto is_gone = [](const std::weak_ptr<const SymmetricRegion>& region) { return region.expired(); };
  std::lock_guard<std::mutex> lock(regions_mutex_);
  const auto region = std::make_shared<SymmetricRegion>(num_regions_ + 1, rank_, num_bytes, fds);
  regions_.erase(std::remove_if(regions_.begin(), regions_.end(), is_gone), regions_.end());
  regions_.push_back(region);
  ++num_regions_;
  return region;
}

// The region that the call's input is in, if the call may be run there.
std::shared_ptr<const SymmetricRegion> Communicator::region_of(const Collective& call) const {
  if (!call.sends.empty()) return nullptr;                                   // parts of their own
  if (premultiplies(call) && call.op != OpKind::all_reduce) return nullptr;  // its input is a scaled copy
  const bool in_place = call.op == OpKind::all_reduce || call.op == OpKind::broadcast;
  if (in_place && call.input != call.output) return nullptr;
  const int64_t num_bytes = call.num_bytes() * (call.op == OpKind::reduce_scatter ? world_size_ : 1);
  if (call.op == OpKind::reduce && rank_ == call.root && call.input != call.output) return nullptr;
  std::lock_guard<std::mutex> lock(regions_mutex_);
  for (const auto& weak : regions_) {
    std::shared_ptr<const SymmetricRegion> region = weak.lock();
    if (region && region->offset_of(call.input, num_bytes) >= 0) return region;
  }
  return nullptr;
}

std::array<OpStats, kNumOps> Communicator::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

void Communicator::reset_stats() {
  std::lock_guard<std::mutex> lock(mutex_);
  stats_ = {};
  message_stats_ = {};
}

void Communicator::set_timeout(double timeout_s) {
  check_usable();
  std::lock_guard<std::mutex> lock(mutex_);
  if (group_) group_->set_timeout(timeout_s);
}

std::chrono::nanoseconds Communicator::timeout() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return group_ ? group_->timeout() : std::chrono::nanoseconds(0);
}

std::optional<Error> Communicator::fault() const {
  try {
    check_usable();
    std::lock_guard<std::mutex> lock(mutex_);
    if (group_) group_->throw_if_failed();
  } catch (const Error& error) {
    return error;
  }
  return {};
}

void Communicator::abort(const std::string& reason) {
  check_usable();
  std::lock_guard<std::mutex> lock(mutex_);
  if (!group_) return;
  group_->report(
      Error(ErrorKind::aborted, concat("rank ", rank_, " aborted group '", group_->name(), "': ", reason), rank_));
  if (devices_) devices_->abort(group_->fault());
}

void Communicator::close() { finish_and_leave(check_interrupt_); }

void Communicator::finish_and_leave(const std::function<void()>& check_interrupt) {
  if (fork_generation_ != fork_count()) return;
  if (closed_.exchange(true)) return;
  std::thread progress_thread;
  std::exception_ptr interrupt;
  const auto check = [&] {
    if (!check_interrupt || interrupt) return;
    try {
      check_interrupt();
    } catch (const std::exception& error) {
      interrupt = std::current_exception();
      report_interrupt(error, "in close()");
    }
  };
  {
    std::unique_lock<std::mutex> lock(mutex_);
    stop_ = true;
    changed_.notify_all();
    while (!changed_.wait_for(lock, kInterruptCheck, [this] { return !busy_ && queue_.empty(); })) {
      lock.unlock();
      check();
      lock.lock();
    }
    progress_thread.swap(progress_thread_);
  }
  if (progress_thread.joinable()) progress_thread.join();
  messages_->shut_down(check);
  if (devices_) devices_->drain(*group_, check);
  std::unique_ptr<ShmGroup> group;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    group.swap(group_);
  }
  group->leave();  // waits for a thread that may want the mutex
  if (devices_) devices_->release(*group);
  group.reset();
  recorder_.leave();
  if (interrupt) throw Interrupted{interrupt};
}

}  // namespace ringcomm
