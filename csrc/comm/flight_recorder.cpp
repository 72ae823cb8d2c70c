#include "comm/flight_recorder.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <utility>

#include "base/log.h"
#include "comm/pickle.h"
#include "transport/segment.h"

namespace ringcomm {
namespace {

// Of the fields (torch/csrc/distributed/c10d/FlightRecorder.hpp). The names of operations must begin
// with one of the backends that torch's analyzer knows; all versions of it know this one.
constexpr const char* kFormatVersion = "2.10";
constexpr const char* kTitlePrefix = "nccl:";
constexpr const char* kGroupKind = "ringcomm";

int64_t nanoseconds(FlightRecorder::Clock::time_point time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
}

std::string tag_of(const Descriptor& d) { return std::string(d.tag, strnlen(d.tag, kTagBytes)); }

// Shapes as the analyzer compares them between ranks: flat, in elements. Empty where the ranks of one
// call may differ in a way that it would take for a fault.
struct Sizes {
  int64_t input = -1;
  int64_t output = -1;

  static Sizes of(const FlightRecord& record, int64_t world_size) {
    const OpKind op = record.descriptor.op;
    if (is_barrier(op) || op == OpKind::gather || op == OpKind::scatter) return {};
    if (op == OpKind::all_to_all) return {record.count, record.received};
    return {op == OpKind::reduce_scatter ? record.count * world_size : record.count,
            op == OpKind::all_gather ? record.count * world_size : record.count};
  }
};

void write_sizes(Pickle& out, int64_t size) {
  out.list([&] { out.list([&] { size < 0 ? out : out.integer(size); }); });
}

void write_file(const std::string& path, const std::string& bytes) {
  // Whoever reads it never sees half of it, also if two threads write at once.
  const std::string unfinished = concat(path, ".", ::getpid(), ".", static_cast<const void*>(&bytes));
  {
    UniqueFd file(::open(unfinished.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
    RC_SYS(file.get(), "cannot write the flight recorder's file ", unfinished);
    for (size_t done = 0; done < bytes.size();) {
      const ssize_t written = ::write(file.get(), bytes.data() + done, bytes.size() - done);
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) {
        const int reason = errno;
        ::unlink(unfinished.c_str());
        RC_FAIL(system, "cannot write the flight recorder's file ", path, ": ", std::strerror(reason));
      }
      done += static_cast<size_t>(written);
    }
  }
  if (::rename(unfinished.c_str(), path.c_str()) == 0) return;
  const int reason = errno;
  ::unlink(unfinished.c_str());
  RC_FAIL(system, "cannot write the flight recorder's file ", path, ": ", std::strerror(reason));
}

}  // namespace

const char* state_name(FlightRecord::State state) {
  switch (state) {
    case FlightRecord::State::scheduled:
      return "scheduled";
    case FlightRecord::State::started:
      return "started";
    case FlightRecord::State::completed:
      return "completed";
    case FlightRecord::State::failed:
      return "failed";
  }
  return "?";
}

// Who else is in this process. A process may hold several ranks of one group, as threads.
struct FlightRecorder::Registry {
  const int pid = ::getpid();
  std::mutex mutex;
  std::vector<const FlightRecorder*> recorders;
  std::map<int, std::weak_ptr<std::atomic<uint64_t>>> next_ids;  // by global rank; begins anew after the last one
};

// A forked child begins anew: the parent's threads may have held the lock. Never destroyed: threads may
// outlive main().
FlightRecorder::Registry& FlightRecorder::registry() {
  static std::atomic<Registry*> current{nullptr};
  for (;;) {
    Registry* found = current.load();
    if (found != nullptr && found->pid == ::getpid()) return *found;
    auto fresh = std::make_unique<Registry>();
    if (current.compare_exchange_strong(found, fresh.get())) return *fresh.release();
  }
}

FlightRecorder::FlightRecorder(std::mutex& guard, FlightRecorderConfig config, int rank, const std::string& name,
                               double timeout_s, uint32_t first_seq)
    : guard_(guard),
      file_(std::move(config.file)),
      global_ranks_(std::move(config.global_ranks)),
      global_rank_(global_ranks_.at(static_cast<size_t>(rank))),
      timeout_s_(timeout_s),
      next_seq_(first_seq + 1),
      ring_(static_cast<size_t>(config.capacity)) {
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  next_id_ = all.next_ids[global_rank_].lock();
  if (!next_id_) all.next_ids[global_rank_] = next_id_ = std::make_shared<std::atomic<uint64_t>>(0);
  const auto is_taken = [&](const std::string& label) {
    return std::any_of(all.recorders.begin(), all.recorders.end(), [&](const FlightRecorder* other) {
      return other->global_rank_ == global_rank_ && other->label_ == label;
    });
  };
  label_ = name;
  for (int number = 2; is_taken(label_); ++number) label_ = concat(name, " (", number, ")");
  all.recorders.push_back(this);
}

FlightRecorder::~FlightRecorder() { unregister(); }

void FlightRecorder::unregister() {
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.recorders.erase(std::remove(all.recorders.begin(), all.recorders.end(), this), all.recorders.end());
}

void FlightRecorder::leave() {
  unregister();
  std::lock_guard<std::mutex> lock(guard_);
  next_id_ = std::make_shared<std::atomic<uint64_t>>(next_id_->load());
}

void FlightRecorder::add(const Collective& call, const Descriptor& descriptor, Clock::time_point now) {
  const uint64_t id = next_id_->fetch_add(1, std::memory_order_relaxed);
  const uint32_t seq = next_seq_++;
  FlightRecord* record = at(num_added_++);
  if (record == nullptr) return;
  record->id = id;
  record->seq = seq;
  record->state = FlightRecord::State::scheduled;
  record->descriptor = descriptor;
  record->algo = call.algo;
  record->count = call.count;
  record->received = 0;
  if (call.op == OpKind::all_to_all) {
    if (call.receives.empty()) record->received = call.count;
    for (const ReceivePart& part : call.receives) record->received += part.count;
  }
  record->created_ns = nanoseconds(now);
  record->started_ns = record->ended_ns = 0;
}

// Null if newer calls have taken its place.
FlightRecord* FlightRecorder::at(uint64_t number) {
  return number + ring_.size() < num_added_ || ring_.empty() ? nullptr : &ring_[number % ring_.size()];
}

void FlightRecorder::start(Clock::time_point now) {
  FlightRecord* record = at(num_started_++);
  if (record == nullptr) return;
  record->state = FlightRecord::State::started;
  record->started_ns = nanoseconds(now);
}

void FlightRecorder::finish(bool ok, Clock::time_point now) {
  FlightRecord* record = at(num_started_ - 1);
  if (record == nullptr) return;
  record->state = ok ? FlightRecord::State::completed : FlightRecord::State::failed;
  record->ended_ns = nanoseconds(now);
}

std::vector<FlightRecord> FlightRecorder::records() const {
  std::lock_guard<std::mutex> lock(guard_);
  std::vector<FlightRecord> result;
  const uint64_t size = ring_.size();
  for (uint64_t i = num_added_ > size ? num_added_ - size : 0; i < num_added_; ++i) result.push_back(ring_[i % size]);
  return result;
}

// Before which calls of this communicator are forgotten.
uint64_t FlightRecorder::oldest_id(const std::vector<FlightRecord>& records) const {
  return records.size() < ring_.size() || records.empty() ? 0 : records.front().id;
}

void FlightRecorder::dump(const std::string& path) const {
  struct Group {
    const FlightRecorder* recorder;
    std::vector<FlightRecord> records;
  };
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  std::vector<Group> groups;
  uint64_t first_id = 0;
  std::vector<const FlightRecorder*> recorders = all.recorders;
  if (std::find(recorders.begin(), recorders.end(), this) == recorders.end()) recorders.push_back(this);
  for (const FlightRecorder* recorder : recorders) {
    if (recorder->global_rank_ != global_rank_) continue;
    groups.push_back({recorder, recorder->records()});
    first_id = std::max(first_id, recorder->oldest_id(groups.back().records));
  }
  // What is older than the oldest call of some group would look like calls that this rank did not make.
  std::vector<std::pair<size_t, const FlightRecord*>> entries;
  for (size_t i = 0; i < groups.size(); ++i) {
    for (const FlightRecord& record : groups[i].records) {
      if (record.id >= first_id) entries.emplace_back(i, &record);
    }
  }
  std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.second->id < b.second->id; });

  const int64_t to_wall_clock =
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::system_clock::now().time_since_epoch())
          .count() -
      nanoseconds(Clock::now());
  Pickle out;
  const auto write_time = [&](const char* key, int64_t time_ns) {
    out.text(key);
    time_ns == 0 ? out.none() : out.integer(time_ns + to_wall_clock);
  };
  const auto write_entry = [&](size_t group, const FlightRecord& record) {
    const FlightRecorder& recorder = *groups[group].recorder;
    const Descriptor& d = record.descriptor;
    const Sizes sizes = Sizes::of(record, static_cast<int64_t>(recorder.global_ranks_.size()));
    const bool ended = record.state == FlightRecord::State::completed || record.state == FlightRecord::State::failed;
    const bool failed = record.state == FlightRecord::State::failed;  // to torch, started and never done
    out.text("record_id").integer(static_cast<int64_t>(record.id));
    out.text("pg_id").integer(static_cast<int64_t>(group));
    out.text("process_group").tuple([&] { out.text(recorder.label_).text(kGroupKind); });
    out.text("collective_seq_id").integer(record.seq);
    out.text("p2p_seq_id").integer(0);
    out.text("op_id").integer(record.seq);
    out.text("is_p2p").boolean(false);
    out.text("profiling_name").text(concat(kTitlePrefix, is_barrier(d.op) ? "barrier" : op_name(d.op)));
    for (const auto& [key, size] : {std::pair("input_sizes", sizes.input), std::pair("output_sizes", sizes.output)}) {
      write_sizes(out.text(key), size);
    }
    for (const char* key : {"input_dtypes", "output_dtypes"}) {
      out.text(key).list([&] { out.text(dtype_name(d.dtype)); });
    }
    out.text("state").text(state_name(failed ? FlightRecord::State::started : record.state));
    write_time("time_created_ns", record.created_ns);
    write_time("time_discovered_started_ns", record.started_ns);
    write_time("time_discovered_completed_ns", failed ? 0 : record.ended_ns);
    out.text("retired").boolean(ended);
    out.text("timeout_ms").integer(static_cast<int64_t>(recorder.timeout_s_ * 1e3));
    // ringcomm's own
    out.text("call").text(describe(d, record.seq));
    out.text("algo").text(algo_name(record.algo));
    out.text("tag").text(tag_of(d));
  };
  out.dict([&] {
    out.text("version").text(kFormatVersion);
    out.text("comm_lib_version").text(kGroupKind);
    out.text("pg_config").dict([&] {
      for (const Group& group : groups) {
        std::string ranks;
        for (const int rank : group.recorder->global_ranks_) ranks += concat(ranks.empty() ? "" : ", ", rank);
        out.text(group.recorder->label_).dict([&] {
          out.text("name").text(group.recorder->label_);
          out.text("desc").text(kGroupKind);
          out.text("ranks").text(concat("[", ranks, "]"));
        });
      }
    });
    out.text("pg_status").dict([&] {
      for (size_t i = 0; i < groups.size(); ++i) {
        const auto last = [&](const char* key, FlightRecord::State least) {
          const auto& records = groups[i].records;
          const auto found = std::find_if(records.rbegin(), records.rend(), [&](const FlightRecord& record) {
            return record.state == FlightRecord::State::failed ? least != FlightRecord::State::completed
                                                               : record.state >= least;
          });
          out.text(key).integer(found == records.rend() ? -1 : found->seq);
        };
        out.text(concat(i)).dict([&] {
          last("last_enqueued_collective", FlightRecord::State::scheduled);
          last("last_started_collective", FlightRecord::State::started);
          last("last_completed_collective", FlightRecord::State::completed);
        });
      }
    });
    out.text("entries").list([&] {
      for (const auto& [group, record] : entries) {
        const size_t index = group;
        const FlightRecord& one = *record;
        out.dict([&] { write_entry(index, one); });
      }
    });
  });
  write_file(path, std::move(out).finish());
}

void FlightRecorder::dump_after_failure(bool again) noexcept {
  if (file_.empty() || (dumped_.exchange(true) && !again)) return;
  try {
    dump(file_);
    log(LogLevel::warning, "FAULT", "the last calls of rank ", global_rank_, " are in ", file_);
  } catch (const std::exception& error) {
    try {
      log(LogLevel::warning, "FAULT", error.what());
    } catch (...) {
    }
  }
}

}  // namespace ringcomm
