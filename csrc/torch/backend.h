// torch.distributed's backend "ringcomm": c10d::Backend on top of a communicator of _core.
//
// Calls that torch marks as synchronous run in the calling thread and return a completed Work; all
// others are queued, in the same order, on the core's progress thread.
//
// Calls on CUDA tensors are queued on a GPU's stream: the current one if they are synchronous, else one of this
// backend's, behind the current one. Where the core cannot queue (several processes share a GPU that runs one at a
// time), they run as on the CPU. The first one prepares the GPUs of the group and is collective, as every call.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <vector>

#include "torch/core.h"
#include "torch/in_order.h"
#include "torch/operation.h"
#include "torch/work.h"

namespace ringcomm::adapter {

class RingBackend final : public c10d::Backend {
 public:
  using Tensors = std::vector<at::Tensor>;
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;

  // use_device("cuda:0") lets the core take arrays on that device; collective; may need the GIL. device: where
  // tensors on the CPU are, for emulated GPUs; "": on the CPU.
  using UseDevice = std::function<void(const std::string& device)>;
  RingBackend(std::shared_ptr<Core> core, int rank, int size, c10::intrusive_ptr<Options> options, UseDevice use_device,
              std::string cpu_device);
  ~RingBackend() override;
  // Shuts down every backend of this process and lets callbacks finish; before the interpreter ends.
  static void shutdown_all();

  const std::string getBackendName() const override { return "ringcomm"; }
  c10::intrusive_ptr<Options> getBackendOptions() override { return options_; }
  void setTimeout(std::chrono::milliseconds timeout) override;
  // batch_isend_irecv need not collect: each operation starts at once and has its own Work.
  bool supportsCoalescing() const override { return false; }
  void startCoalescing() override;
  WorkPtr endCoalescing() override;
  void setSequenceNumberForGroup() override {}  // every rank counts from 0
  uint64_t getSequenceNumberForGroup() override { return seq_; }
  c10d::ErrorType getError() override;
  void abort() override;
  void shutdown() override;

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override;
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  WorkPtr allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override;
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override;
  WorkPtr allgather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override;
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override;
  WorkPtr allgather_coalesced(std::vector<Tensors>& outputs, Tensors& inputs,
                              const c10d::AllgatherOptions& options) override;
  WorkPtr allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::AllgatherOptions& options) override;
  WorkPtr reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                         const c10d::ReduceScatterOptions& options) override;
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) override;
  WorkPtr reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::ReduceScatterOptions& options) override;
  WorkPtr gather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& options) override;
  WorkPtr scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& options) override;
  WorkPtr alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) override;
  WorkPtr alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
                        std::vector<int64_t>& input_splits, const c10d::AllToAllOptions& options) override;
  WorkPtr barrier(const c10d::BarrierOptions& options) override;
  void monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) override;
  WorkPtr send(Tensors& tensors, int to_rank, int tag) override;
  WorkPtr recv(Tensors& tensors, int from_rank, int tag) override;
  WorkPtr recvAnysource(Tensors& tensors, int tag) override;

 private:
  // Runs or queues the calls of an operation.
  WorkPtr launch(Operation operation, bool async_op, std::chrono::milliseconds timeout);
  WorkPtr run_now(Operation& operation, uint64_t seq, Place place);
  WorkPtr queue(Operation operation, uint64_t seq, Place place);
  // Lets the core take arrays on this rank's GPU; collective the first time.
  void use_gpu(c10::Device device);
  // A stream of this backend's for what is asynchronous: collectives, or messages.
  std::optional<c10::Stream> side_stream_of(c10::Device device, std::optional<c10::Stream>& kept);
  bool is_on_gpu(const Operation& operation) const;
  // Blocks until all that this rank has queued on its GPU is done.
  void finish_gpu();
  // Starts a message; `start` hands it to the core with the callback and its context.
  using Start = std::function<void(rc_done done, void* context)>;
  WorkPtr start_message(Operation operation, Place place, const Start& start);
  WorkPtr receive(Operation operation, const Tensors& tensors, int from_rank, int tag);
  c10::intrusive_ptr<RingWork> make_work(const Operation& operation, uint64_t seq, Place place = Place()) const;
  WorkPtr remember(c10::intrusive_ptr<RingWork> work);

  // The calls of each operation on one pair of tensors.
  void add_all_gather(Operation& operation, at::ArrayRef<at::Tensor> outputs, const at::Tensor& input) const;
  void add_all_gather(Operation& operation, const at::Tensor& output, const at::Tensor& input) const;
  void add_reduce_scatter(Operation& operation, const at::Tensor& output, const at::Tensor& input,
                          const c10d::ReduceOp& reduce_op) const;
  void check_root(const Operation& operation, int64_t root) const;
  // Inputs and outputs of a sparse all_reduce; blocks.
  at::Tensor sum_of_sparse(const at::Tensor& tensor, std::chrono::milliseconds timeout);
  at::Tensor gathered(const at::Tensor& mine, std::chrono::milliseconds timeout);

  const std::shared_ptr<Core> core_;
  const c10::intrusive_ptr<Options> options_;
  const UseDevice use_device_;
  const std::string cpu_device_;
  std::mutex gpu_mutex_;  // guards what follows
  std::optional<c10::Device> gpu_;
  std::optional<c10::Stream> collectives_stream_, messages_stream_;
  InOrder messages_;                      // those that wait for a GPU before they start
  std::atomic<uint64_t> seq_{0};          // of collectives
  std::atomic<uint64_t> message_seq_{0};  // of sends and receives
  bool coalescing_ = false;
  std::vector<c10::intrusive_ptr<RingWork>> coalesced_;
};

}  // namespace ringcomm::adapter
