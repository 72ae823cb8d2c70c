// The life of a backend, and how an operation becomes calls of the core. What each operation calls
// is in collectives.cpp.
#include "torch/backend.h"

#include <ATen/record_function.h>

#include <mutex>
#include <set>
#include <torch/csrc/distributed/c10d/ParamCommsUtils.hpp>
#include <utility>

namespace ringcomm::adapter {
namespace {

constexpr std::chrono::seconds kDrain{10};

double seconds(std::chrono::milliseconds time) { return static_cast<double>(time.count()) / 1e3; }

// Backends that have not been shut down.
struct Live {
  std::mutex mutex;
  std::set<RingBackend*> backends;
};
Live& live() {
  static auto* instance = new Live();  // never destroyed: a backend may be the last to go
  return *instance;
}

// A queued operation, until the core has called back for each of its calls.
struct Queued {
  Operation operation;
  c10::intrusive_ptr<RingWork> work;
  std::atomic<size_t> left;
  std::mutex mutex;
  std::exception_ptr error;

  Queued(Operation queued_operation, c10::intrusive_ptr<RingWork> its_work, size_t num_calls)
      : operation(std::move(queued_operation)), work(std::move(its_work)), left(num_calls) {}

  void fail(std::exception_ptr reason) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!error) error = std::move(reason);
  }

  // One call has ended; whoever says so last completes the work and deletes this.
  void done(size_t num_calls, int source_rank) {
    if (left.fetch_sub(num_calls, std::memory_order_acq_rel) != num_calls) return;
    const std::unique_ptr<Queued> self(this);
    if (!error) {
      try {
        operation.finish(work->place());
      } catch (...) {
        error = std::current_exception();
      }
    }
    work->complete(error, source_rank);
  }

  static void on_done(void* context, const rc_error* error, int32_t source_rank) {
    auto* queued = static_cast<Queued*>(context);
    if (error != nullptr) queued->fail(to_exception(*error));
    queued->done(1, source_rank);
  }
};

// Runs `call` inside a record_param_comms event if somebody profiles.
template <typename Call>
auto recorded(const Operation& operation, uint64_t seq, bool is_p2p, const std::string& group,
              const std::string& description, int rank, int size, const Call& call) {
  if (!at::hasCallbacks()) return call();
  const auto items = [](const std::vector<at::Tensor>& tensors) {
    int64_t total = 0;
    for (const at::Tensor& tensor : tensors) total += tensor.numel();
    return total;
  };
  const auto& typed = operation.inputs.empty() ? operation.outputs : operation.inputs;
  RECORD_PARAM_COMMS_DATA(std::make_tuple(static_cast<int64_t>(seq), is_p2p), std::make_tuple(group, description),
                          operation.inputs, operation.outputs, rank, operation.name, items(operation.inputs),
                          items(operation.outputs), typed.empty() ? at::kByte : typed[0].scalar_type(),
                          operation.input_splits, operation.output_splits, 0, 1, size);
  return call();
}

}  // namespace

RingBackend::RingBackend(std::shared_ptr<Core> core, int rank, int size, c10::intrusive_ptr<Options> options,
                         UseDevice use_device, std::string cpu_device)
    : Backend(rank, size),
      core_(std::move(core)),
      options_(std::move(options)),
      use_device_(std::move(use_device)),
      cpu_device_(std::move(cpu_device)) {
  init();
  std::lock_guard<std::mutex> lock(live().mutex);
  live().backends.insert(this);
}

RingBackend::~RingBackend() {
  try {
    shutdown();
  } catch (const std::exception& error) {
    TORCH_WARN("ringcomm: closing a group failed: ", error.what());
  }
}

void RingBackend::shutdown() {
  {
    std::lock_guard<std::mutex> lock(live().mutex);
    live().backends.erase(this);
  }
  {
    const WithoutGil released;
    messages_.stop();
  }
  core_->close();
}

void RingBackend::shutdown_all() {
  for (;;) {
    std::shared_ptr<Core> core;
    {
      std::lock_guard<std::mutex> lock(live().mutex);
      if (live().backends.empty()) break;
      core = (*live().backends.begin())->core_;
      live().backends.erase(live().backends.begin());
    }
    core->close();
  }
  const WithoutGil released;
  Completer::instance().drain(kDrain);
}

void RingBackend::abort() { core_->abort("abort() was called on its process group"); }

void RingBackend::setTimeout(std::chrono::milliseconds timeout) {
  core_->set_timeout(seconds(timeout));
  options_->timeout = timeout;
}

c10d::ErrorType RingBackend::getError() {
  switch (core_->fault()) {
    case RC_OK:
      return c10d::ErrorType::SUCCESS;
    case RC_DEADLINE:
      return c10d::ErrorType::TIMEOUT;
    case RC_PEER_LOST:
      return c10d::ErrorType::REMOTE_ERROR;
    default:
      return c10d::ErrorType::COMM_ERROR;
  }
}

// ---- calls ---------------------------------------------------------------------------------------

c10::intrusive_ptr<RingWork> RingBackend::make_work(const Operation& operation, uint64_t seq, Place place) const {
  return c10::make_intrusive<RingWork>(core_, operation.type, operation.title, seq, operation.inputs, operation.outputs,
                                       std::move(place));
}

bool RingBackend::is_on_gpu(const Operation& operation) const {
  return !operation.calls.empty() && operation.has_tensors() && (!operation.device().is_cpu() || !cpu_device_.empty());
}

void RingBackend::use_gpu(c10::Device device) {
  std::lock_guard<std::mutex> lock(gpu_mutex_);
  if (!gpu_) {
    use_device_(device.is_cpu() ? cpu_device_ : device.str());
    gpu_ = device;
  }
  TORCH_CHECK(*gpu_ == device, "ringcomm: a tensor on ", device, ", but this rank of group ", pg_desc_, " is on ",
              *gpu_, ": a rank has one GPU (torch.cuda.set_device, or device_id of init_process_group)");
}

void RingBackend::finish_gpu() {
  std::optional<c10::Device> gpu;
  {
    std::lock_guard<std::mutex> lock(gpu_mutex_);
    gpu = gpu_;
  }
  if (!gpu || core_->device_mode() != RC_DEVICE_QUEUES) return;
  core_->finish_device();
  if (!gpu->is_cpu()) finish_current_stream(*gpu);
}

std::optional<c10::Stream> RingBackend::side_stream_of(c10::Device device, std::optional<c10::Stream>& kept) {
  if (device.is_cpu()) return std::nullopt;
  std::lock_guard<std::mutex> lock(gpu_mutex_);
  if (!kept) kept = side_stream(device);
  return kept;
}

RingBackend::WorkPtr RingBackend::launch(Operation operation, bool async_op, std::chrono::milliseconds timeout) {
  const uint64_t seq = ++seq_;
  for (rc_call& call : operation.calls) call.timeout_s = timeout.count() > 0 ? seconds(timeout) : 0;
  Place place;
  bool queues = false;  // run_now() does not block
  if (is_on_gpu(operation)) {
    const c10::Device device = operation.device();
    use_gpu(device);
    queues = core_->device_mode() == RC_DEVICE_QUEUES;
    if (!device.is_cpu()) place = Place(device, async_op ? side_stream_of(device, collectives_stream_) : std::nullopt);
    operation.put(place);
  }
  return recorded(operation, seq, false, pg_uid_, pg_desc_, rank_, size_, [&] {
    return async_op && !queues ? queue(std::move(operation), seq, std::move(place))
                               : run_now(operation, seq, std::move(place));
  });
}

RingBackend::WorkPtr RingBackend::run_now(Operation& operation, uint64_t seq, Place place) {
  const auto work = make_work(operation, seq, std::move(place));
  try {
    for (const rc_call& call : operation.calls) core_->run(call);
    // There are no streams of torch's on an emulated GPU.
    if (is_on_gpu(operation) && !work->place().on_gpu() && core_->device_mode() == RC_DEVICE_QUEUES)
      core_->finish_device();
    operation.finish(work->place());
  } catch (...) {
    work->complete(std::current_exception());  // ends its profile
    throw;
  }
  work->complete(nullptr);
  return remember(work);
}

RingBackend::WorkPtr RingBackend::queue(Operation operation, uint64_t seq, Place place) {
  const auto work = make_work(operation, seq, std::move(place));
  const size_t num_calls = operation.calls.size();
  if (num_calls == 0) {
    work->complete(nullptr);
    return remember(work);
  }
  auto queued = std::make_unique<Queued>(std::move(operation), work, num_calls);
  size_t submitted = 0;
  try {
    for (; submitted < num_calls; ++submitted)
      core_->submit(queued->operation.calls[submitted], Queued::on_done, queued.get());
    static_cast<void>(queued.release());  // the last callback deletes it
  } catch (...) {
    if (submitted == 0) {
      work->complete(std::current_exception());
      throw;
    }
    Queued* part = queued.release();  // the calls that were submitted still use it
    part->fail(std::current_exception());
    part->done(num_calls - submitted, -1);
  }
  return remember(work);
}

RingBackend::WorkPtr RingBackend::start_message(Operation operation, Place place, const Start& start) {
  const uint64_t seq = ++message_seq_;
  return recorded(operation, seq, true, pg_uid_, pg_desc_, rank_, size_, [&]() -> WorkPtr {
    const auto work = make_work(operation, seq, std::move(place));
    auto queued = std::make_unique<Queued>(std::move(operation), work, 1);
    try {
      start(Queued::on_done, queued.get());
    } catch (...) {
      work->complete(std::current_exception());
      throw;
    }
    static_cast<void>(queued.release());  // the callback deletes it
    return remember(work);
  });
}

RingBackend::WorkPtr RingBackend::remember(c10::intrusive_ptr<RingWork> work) {
  if (coalescing_) coalesced_.push_back(work);
  return work;
}

void RingBackend::startCoalescing() {
  TORCH_CHECK(!coalescing_, "ringcomm: coalescing has been started already");
  coalescing_ = true;
}

RingBackend::WorkPtr RingBackend::endCoalescing() {
  TORCH_CHECK(coalescing_, "ringcomm: endCoalescing without startCoalescing");
  coalescing_ = false;
  struct Together {
    std::atomic<size_t> left;
    std::mutex mutex;
    std::exception_ptr error;
  };
  const auto members = std::move(coalesced_);
  coalesced_.clear();
  const auto work = c10::make_intrusive<RingWork>(core_, c10d::OpType::COALESCED, "ringcomm:coalesced", seq_.load(),
                                                  Tensors(), Tensors());
  for (const auto& member : members) work->include(member);
  if (members.empty()) work->complete(nullptr);
  const auto together = std::make_shared<Together>();
  together->left = members.size();
  for (const auto& member : members) {
    member->on_complete([together, work](const std::exception_ptr& error) {
      if (error) {
        std::lock_guard<std::mutex> lock(together->mutex);
        if (!together->error) together->error = error;
      }
      if (together->left.fetch_sub(1, std::memory_order_acq_rel) == 1) work->complete(together->error);
    });
  }
  return work;
}

}  // namespace ringcomm::adapter
