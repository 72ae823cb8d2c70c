// The operations of RingBackend: what each checks and which calls of the core it makes.
#include <algorithm>

#include "torch/backend.h"

namespace ringcomm::adapter {
namespace {

using c10d::OpType;
using Tensors = RingBackend::Tensors;

const at::Tensor& only(const Operation& operation, const Tensors& tensors, const char* what) {
  operation.check(tensors.size() == 1, "requires a single-element ", what, "tensor list, got ", tensors.size());
  return tensors[0];
}

const Tensors& only(const Operation& operation, const std::vector<Tensors>& lists, const char* what, int size) {
  operation.check(lists.size() == 1, "requires a single-element ", what, " list containing a list with ", size,
                  " tensors, got ", lists.size(), " lists");
  operation.check(lists[0].size() == static_cast<size_t>(size), "Incorrect ", what, " list size ", lists[0].size(),
                  ". ", what, " list size should be ", size, ", same as size of the process group.");
  return lists[0];
}

void append(Tensors& all, at::ArrayRef<at::Tensor> more) { all.insert(all.end(), more.begin(), more.end()); }

bool all_have(at::ArrayRef<at::Tensor> tensors, int64_t numel) {
  return std::all_of(tensors.begin(), tensors.end(), [&](const at::Tensor& t) { return t.numel() == numel; });
}

}  // namespace

void RingBackend::check_root(const Operation& operation, int64_t root) const {
  operation.check(root >= 0 && root < size_, "invalid root rank: ", root, "; the group has ranks 0 to ", size_ - 1);
}

// ---- one tensor ----------------------------------------------------------------------------------

RingBackend::WorkPtr RingBackend::broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) {
  Operation operation(*core_, OpType::BROADCAST, "ringcomm:broadcast", "broadcast");
  const at::Tensor& tensor = only(operation, tensors, "");
  check_root(operation, options.rootRank);
  const bool is_root = options.rootRank == rank_;
  void* data = is_root ? operation.read(tensor) : operation.write(tensor);
  rc_call& call = operation.move(core_->ops().broadcast, tensor, tensor.numel(), static_cast<int>(options.rootRank));
  call.input = call.output = data;
  operation.inputs = operation.outputs = {tensor};
  return launch(std::move(operation), options.asyncOp, options.timeout);
}

RingBackend::WorkPtr RingBackend::allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) {
  Operation operation(*core_, OpType::ALLREDUCE, "ringcomm:all_reduce", "allreduce");
  const at::Tensor& tensor = only(operation, tensors, "");
  if (tensor.layout() == at::kSparse) return allreduce_sparse(tensors, options);
  void* data = operation.update(tensor);
  rc_call& call = operation.reduce(core_->ops().all_reduce, tensor, tensor.numel(), options.reduceOp);
  call.input = call.output = data;
  operation.inputs = operation.outputs = {tensor};
  return launch(std::move(operation), options.asyncOp, options.timeout);
}

RingBackend::WorkPtr RingBackend::allreduce_coalesced(Tensors& tensors,
                                                      const c10d::AllreduceCoalescedOptions& options) {
  Operation operation(*core_, OpType::ALLREDUCE_COALESCED, "ringcomm:all_reduce", "allreduce_coalesced");
  operation.check(!tensors.empty(), "requires non-empty tensor list");
  for (const at::Tensor& tensor : tensors) {
    operation.check_same_type(tensor, tensors[0]);
    void* data = operation.update(tensor);
    rc_call& call = operation.reduce(core_->ops().all_reduce, tensor, tensor.numel(), options.reduceOp);
    call.input = call.output = data;
  }
  operation.coalesce();
  operation.inputs = operation.outputs = tensors;
  return launch(std::move(operation), options.asyncOp, options.timeout);
}

RingBackend::WorkPtr RingBackend::reduce(Tensors& tensors, const c10d::ReduceOptions& options) {
  Operation operation(*core_, OpType::REDUCE, "ringcomm:reduce", "reduce");
  const at::Tensor& tensor = only(operation, tensors, "");
  check_root(operation, options.rootRank);
  const bool is_root = options.rootRank == rank_;
  void* data = is_root ? operation.update(tensor) : operation.read(tensor);
  rc_call& call = operation.reduce(core_->ops().reduce, tensor, tensor.numel(), options.reduceOp,
                                   static_cast<int>(options.rootRank));
  call.input = data;
  call.output = is_root ? data : nullptr;
  operation.inputs = operation.outputs = {tensor};
  return launch(std::move(operation), options.asyncOp, options.timeout);
}

// ---- all_gather ----------------------------------------------------------------------------------

void RingBackend::add_all_gather(Operation& operation, at::ArrayRef<at::Tensor> outputs,
                                 const at::Tensor& input) const {
  for (const at::Tensor& output : outputs) operation.check_same_type(output, input);
  const int64_t numel = input.numel();
  const at::Tensor& own = outputs[static_cast<size_t>(rank_)];
  operation.check(own.numel() == numel, "invalid tensor size: output ", rank_, " has ", own.numel(),
                  " elements, expected ", numel, " like the input");
  operation.keep(input);
  if (all_have(outputs, numel)) {
    rc_call& call = operation.move(core_->ops().all_gather, input, numel);
    call.input = operation.read(input);
    call.receives = operation.write_parts(outputs);
    return;
  }
  // Every rank brings as much as the others have room for: an exchange in which it sends the same to all.
  rc_call& call = operation.move(core_->ops().all_to_all, input, 0);
  call.sends = operation.read_parts(Tensors(static_cast<size_t>(size_), input));
  call.receives = operation.write_parts(outputs);
}

void RingBackend::add_all_gather(Operation& operation, const at::Tensor& output, const at::Tensor& input) const {
  operation.check_same_type(output, input);
  operation.check(output.numel() == input.numel() * size_,
                  "invalid tensor size: output tensor size must be equal to "
                  "world_size times input tensor size, got ",
                  output.numel(), " and ", input.numel(), " for ", size_, " ranks");
  const void* from = operation.read(input);
  void* to = operation.write(output);
  rc_call& call = operation.move(core_->ops().all_gather, input, input.numel());
  call.input = from;
  call.output = to;
}

RingBackend::WorkPtr RingBackend::allgather(std::vector<Tensors>& outputs, Tensors& inputs,
                                            const c10d::AllgatherOptions& options) {
  Operation operation(*core_, OpType::ALLGATHER, "ringcomm:all_gather", "all_gather");
  const at::Tensor& input = only(operation, inputs, "input ");
  add_all_gather(operation, only(operation, outputs, "output", size_), input);
  operation.inputs = inputs;
  operation.outputs = outputs[0];
  return launch(std::move(operation), options.asyncOp, options.timeout);
}

RingBackend::WorkPtr RingBackend::_allgather_base(at::Tensor& output, at::Tensor& input,
                                                  const c10d::AllgatherOptions& options) {
  Operation operation(*core_, OpType::_ALLGATHER_BASE, "ringcomm:_all_gather_base", "_allgather_base");
  add_all_gather(operation, output, input);
  operation.inputs = {input};
  operation.outputs = {output};
  return launch(std::move(operation), options.asyncOp, options.timeout);
}

RingBackend::WorkPtr RingBackend::allgather_coalesced(std::vector<Tensors>& outputs, Tensors& inputs,
                                                      const c10d::AllgatherOptions& options) {
  Operation operation(*core_, OpType::ALLGATHER_COALESCED, "ringcomm:all_gather", "all_gather");
  operation.check(!inputs.empty(), "requires non-empty input tensor list");
  operation.check(outputs.size() == static_cast<size_t>(size_), "output lists should be equal to world size");
  for (size_t i = 0; i < inputs.size(); ++i) {
    Tensors of_ranks;
    for (const Tensors& list : outputs) {
      operation.check(list.size() == inputs.size(), "invalid output size: (expected length ", inputs.size(), ", got ",
                      list.size(), ")");
      of_ranks.push_back(list[i]);
    }
    add_all_gather(operation, of_ranks, inputs[i]);
    append(operation.outputs, of_ranks);
  }
  operation.inputs = inputs;
  return launch(std::move(operation), options.asyncOp, options.timeout);
}

RingBackend::WorkPtr RingBackend::allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                                  const c10d::AllgatherOptions& options) {
  Operation operation(*core_, OpType::COALESCED, "ringcomm:all_gather_into_tensor", "allgather_into_tensor_coalesced");
  operation.check(outputs.size() == inputs.size(), "requires input/output tensor lists to have the same length");
  for (size_t i = 0; i < inputs.size(); ++i) add_all_gather(operation, outputs[i], inputs[i]);
  operation.coalesce();
  operation.inputs = inputs;
  operation.outputs = outputs;
  return launch(std::move(operation), options.asyncOp, options.timeout);
}

// ---- reduce_scatter ------------------------------------------------------------------------------

void RingBackend::add_reduce_scatter(Operation& operation, const at::Tensor& output, const at::Tensor& input,
                                     const c10d::ReduceOp& reduce_op) const {
  operation.check_same_type(output, input);
  operation.check(input.numel() == output.numel() * size_,
                  "invalid tensor size: input tensor must be the same size as "
                  "output size times world size, got ",
                  input.numel(), " and ", output.numel(), " for ", size_, " ranks");
  const void* from = operation.read(input);
  void* to = operation.write(output);
  rc_call& call = operation.reduce(core_->ops().reduce_scatter, input, output.numel(), reduce_op);
  call.input = from;
  call.output = to;
}

RingBackend::WorkPtr RingBackend::reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                                                 const c10d::ReduceScatterOptions& options) {
  Operation operation(*core_, OpType::REDUCE_SCATTER, "ringcomm:reduce_scatter", "reduce_scatter");
  const at::Tensor& output = only(operation, outputs, "output ");
  const Tensors& parts = only(operation, inputs, "input", size_);
  for (const at::Tensor& part : parts) operation.check_same_type(part, output);
  const at::Tensor& own = parts[static_cast<size_t>(rank_)];
  operation.check(own.numel() == output.numel(), "invalid tensor size: input ", rank_, " has ", own.numel(),
                  " elements, expected ", output.numel(), " like the output");
  if (all_have(parts, output.numel())) {
    void* to = operation.write(output);
    rc_call& call = operation.reduce(core_->ops().reduce_scatter, output, output.numel(), options.reduceOp);
    call.sends = operation.read_parts(parts);
    call.output = to;
  } else {  // every rank gets a part of another size
    void* to = operation.write(output);
    for (int rank = 0; rank < size_; ++rank) {
      const at::Tensor& part = parts[static_cast<size_t>(rank)];
      const void* from = operation.read(part);
      rc_call& call = operation.reduce(core_->ops().reduce, part, part.numel(), options.reduceOp, rank);
      call.input = from;
      call.output = rank == rank_ ? to : nullptr;
    }
  }
  operation.inputs = parts;
  operation.outputs = outputs;
  return launch(std::move(operation), options.asyncOp, options.timeout);
}

RingBackend::WorkPtr RingBackend::_reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                                       const c10d::ReduceScatterOptions& options) {
  Operation operation(*core_, OpType::_REDUCE_SCATTER_BASE, "ringcomm:_reduce_scatter_base", "_reduce_scatter_base");
  add_reduce_scatter(operation, output, input, options.reduceOp);
  operation.inputs = {input};
  operation.outputs = {output};
  return launch(std::move(operation), options.asyncOp, options.timeout);
}

RingBackend::WorkPtr RingBackend::reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                                  const c10d::ReduceScatterOptions& options) {
  Operation operation(*core_, OpType::COALESCED, "ringcomm:reduce_scatter_tensor", "reduce_scatter_tensor_coalesced");
  operation.check(outputs.size() == inputs.size(), "requires input/output tensor lists to have the same length");
  for (size_t i = 0; i < inputs.size(); ++i) add_reduce_scatter(operation, outputs[i], inputs[i], options.reduceOp);
  operation.coalesce();
  operation.inputs = inputs;
  operation.outputs = outputs;
  return launch(std::move(operation), options.asyncOp, options.timeout);
}

// ---- gather, scatter, all_to_all -----------------------------------------------------------------

RingBackend::WorkPtr RingBackend::gather(std::vector<Tensors>& outputs, Tensors& inputs,
                                         const c10d::GatherOptions& options) {
  Operation operation(*core_, OpType::GATHER, "ringcomm:gather", "gather");
  check_root(operation, options.rootRank);
  const at::Tensor& input = only(operation, inputs, "input ");
  const void* from = operation.read(input);
  rc_call& call = operation.move(core_->ops().gather, input, input.numel(), static_cast<int>(options.rootRank));
  call.input = from;
  if (options.rootRank == rank_) {
    const Tensors& parts = only(operation, outputs, "output", size_);
    for (const at::Tensor& part : parts) operation.check_same_type(part, input);
    call.receives = operation.write_parts(parts);
    operation.outputs = parts;
  } else {
    operation.check(outputs.empty(), "requires empty output on non-root");
  }
  operation.inputs = inputs;
  return launch(std::move(operation), options.asyncOp, options.timeout);
}

RingBackend::WorkPtr RingBackend::scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                                          const c10d::ScatterOptions& options) {
  Operation operation(*core_, OpType::SCATTER, "ringcomm:scatter", "scatter");
  check_root(operation, options.rootRank);
  const at::Tensor& output = only(operation, outputs, "output ");
  void* to = operation.write(output);
  rc_call& call = operation.move(core_->ops().scatter, output, output.numel(), static_cast<int>(options.rootRank));
  call.output = to;
  if (options.rootRank == rank_) {
    const Tensors& parts = only(operation, inputs, "input", size_);
    for (const at::Tensor& part : parts) operation.check_same_type(part, output);
    call.sends = operation.read_parts(parts);
    operation.inputs = parts;
  } else {
    operation.check(inputs.empty(), "requires empty input on non-root");
  }
  operation.outputs = outputs;
  return launch(std::move(operation), options.asyncOp, options.timeout);
}

RingBackend::WorkPtr RingBackend::alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) {
  Operation operation(*core_, OpType::ALLTOALL, "ringcomm:all_to_all", "all_to_all");
  operation.check(inputs.size() == static_cast<size_t>(size_) && outputs.size() == inputs.size(),
                  "invalid tensor list size: input and output need ", size_, " tensors, one per rank, got ",
                  inputs.size(), " and ", outputs.size());
  for (const at::Tensor& tensor : inputs) operation.check_same_type(tensor, inputs[0]);
  for (const at::Tensor& tensor : outputs) operation.check_same_type(tensor, inputs[0]);
  rc_call& call = operation.move(core_->ops().all_to_all, inputs[0], 0);
  call.sends = operation.read_parts(inputs);
  call.receives = operation.write_parts(outputs);
  operation.inputs = inputs;
  operation.outputs = outputs;
  return launch(std::move(operation), options.asyncOp, options.timeout);
}

RingBackend::WorkPtr RingBackend::alltoall_base(at::Tensor& output, at::Tensor& input,
                                                std::vector<int64_t>& output_splits, std::vector<int64_t>& input_splits,
                                                const c10d::AllToAllOptions& options) {
  Operation operation(*core_, OpType::ALLTOALL_BASE, "ringcomm:all_to_all", "all_to_allv");
  operation.check_same_type(output, input);
  // Items that each rank sends or gets: rows of the first dimension, split as told or evenly.
  const auto items_by_rank = [&](const at::Tensor& tensor, const std::vector<int64_t>& splits, const char* what) {
    const int64_t rows = tensor.dim() == 0 ? 1 : tensor.size(0);
    const int64_t per_row = rows == 0 ? 0 : tensor.numel() / rows;
    if (splits.empty()) {
      operation.check(rows % size_ == 0, "invalid ", what, " size: the first dimension, ", rows,
                      ", does not divide equally across ", size_,
                      " ranks (Tensor's dim 0 does not divide equally "
                      "across group size)");
      return std::vector<int64_t>(static_cast<size_t>(size_), tensor.numel() / size_);
    }
    int64_t total = 0;
    std::vector<int64_t> items;
    for (const int64_t split : splits) {
      operation.check(split >= 0, "invalid ", what, " split size: ", split);
      total += split;
      items.push_back(split * per_row);
    }
    operation.check(splits.size() == static_cast<size_t>(size_), "invalid number of ", what, " splits: ", splits.size(),
                    " (Number of tensor splits not equal to group size ", size_, ")");
    operation.check(total == rows, "invalid ", what, " splits: they add up to ", total, ", the first dimension is ",
                    rows, " (Split sizes doesn't match total dim 0 size)");
    return items;
  };
  const std::vector<int64_t> sent = items_by_rank(input, input_splits, "input");
  const std::vector<int64_t> received = items_by_rank(output, output_splits, "output");
  void* from = operation.read(input);
  void* to = operation.write(output);
  const bool is_even = input_splits.empty() && output_splits.empty() && input.numel() == output.numel();
  rc_call& call = operation.move(core_->ops().all_to_all, input, is_even ? input.numel() : 0);
  call.input = from;
  call.output = to;
  if (!is_even) {
    call.sends = operation.parts(from, input, sent);
    call.receives = operation.parts(to, output, received);
  }
  operation.inputs = {input};
  operation.outputs = {output};
  operation.input_splits = input_splits;
  operation.output_splits = output_splits;
  return launch(std::move(operation), options.asyncOp, options.timeout);
}

// ---- barrier -------------------------------------------------------------------------------------

RingBackend::WorkPtr RingBackend::barrier(const c10d::BarrierOptions& options) {
  Operation operation(*core_, OpType::BARRIER, "ringcomm:barrier", "barrier");
  // As with NCCL, all that this rank has queued on its GPU is done before it says that it is there.
  finish_gpu();
  operation.synchronize(core_->ops().barrier);
  return launch(std::move(operation), options.asyncOp, options.timeout);
}

void RingBackend::monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) {
  Operation operation(*core_, OpType::BARRIER, "ringcomm:monitored_barrier", "monitored_barrier");
  const auto timeout = options.timeout == c10d::kUnsetTimeout ? options_->timeout : options.timeout;
  if (timeout.count() <= 0)
    C10_THROW_ERROR(DistBackendError, c10::str("Rank ", rank_, " timed out in monitoredBarrier after 0 ms."));
  rc_call& call = operation.synchronize(core_->ops().monitored_barrier);
  call.wait_all_ranks = wait_all_ranks ? 1 : 0;
  call.timeout_s = static_cast<double>(timeout.count()) / 1e3;
  ++seq_;
  rc_error error;
  const rc_status status = core_->try_run(call, &error);
  if (status == RC_DEADLINE && error.culprit_rank >= 0) {
    C10_THROW_ERROR(DistBackendError, c10::str("Rank ", error.culprit_rank, " failed to pass monitoredBarrier in ",
                                               timeout.count(), " ms. ", error.text));
  }
  if (status != RC_OK) std::rethrow_exception(to_exception(error));
}

// ---- messages ------------------------------------------------------------------------------------

RingBackend::WorkPtr RingBackend::send(Tensors& tensors, int to_rank, int tag) {
  Operation operation(*core_, OpType::SEND, "ringcomm:send", "send");
  const at::Tensor& tensor = only(operation, tensors, "");
  operation.check(tag >= 0, "Tag must be nonnegative, got ", tag);
  operation.check(to_rank >= 0 && to_rank < size_, "invalid destination rank: ", to_rank);
  // Messages travel through the host: that of a GPU starts as soon as the copy there is made.
  std::shared_ptr<Place> copied;
  if (tensor.is_cuda()) {
    copied = std::make_shared<Place>(tensor.device(), side_stream_of(tensor.device(), messages_stream_));
  }
  const void* data = copied ? operation.read_to_host(tensor, *copied) : operation.read(tensor);
  const int64_t num_bytes = static_cast<int64_t>(tensor.nbytes());
  operation.inputs = operation.outputs = tensors;
  return start_message(std::move(operation), Place(), [=](rc_done done, void* context) {
    if (!copied) return core_->send(data, num_bytes, to_rank, tag, done, context);
    const bool posted = messages_.post([=, core = core_] {
      rc_error error;
      try {
        copied->wait();
        if (core->try_send(data, num_bytes, to_rank, tag, done, context, &error) == RC_OK) return;
      } catch (const std::exception& failure) {
        error = make_error(RC_DEVICE, failure.what());
      }
      done(context, &error, -1);
    });
    TORCH_CHECK(posted, "ringcomm send: this group is closed");
  });
}

RingBackend::WorkPtr RingBackend::recv(Tensors& tensors, int from_rank, int tag) {
  Operation operation(*core_, OpType::RECV, "ringcomm:recv", "recv");
  operation.check(from_rank >= 0 && from_rank < size_, "invalid source rank: ", from_rank);
  return receive(std::move(operation), tensors, from_rank, tag);
}

RingBackend::WorkPtr RingBackend::recvAnysource(Tensors& tensors, int tag) {
  return receive(Operation(*core_, OpType::RECVANYSOURCE, "ringcomm:recvAnySource", "recvAnysource"), tensors, -1, tag);
}

RingBackend::WorkPtr RingBackend::receive(Operation operation, const Tensors& tensors, int from_rank, int tag) {
  const at::Tensor& tensor = only(operation, tensors, "");
  operation.check(tag >= 0, "Tag must be nonnegative, got ", tag);
  Place place;
  if (tensor.is_cuda()) place = Place(tensor.device(), side_stream_of(tensor.device(), messages_stream_));
  void* data = place.on_gpu() ? operation.write_from_host(tensor, place) : operation.write(tensor);
  const int64_t num_bytes = static_cast<int64_t>(tensor.nbytes());
  operation.inputs = operation.outputs = tensors;
  return start_message(std::move(operation), std::move(place), [=](rc_done done, void* context) {
    core_->receive(data, num_bytes, from_rank, tag, done, context);
  });
}

// ---- sparse all_reduce ---------------------------------------------------------------------------

at::Tensor RingBackend::gathered(const at::Tensor& mine, std::chrono::milliseconds timeout) {
  at::Tensor input = mine.contiguous();
  std::vector<int64_t> sizes = input.sizes().vec();
  sizes.insert(sizes.begin(), size_);
  at::Tensor all = at::empty(sizes, input.options());
  c10d::AllgatherOptions options;
  options.timeout = timeout;
  options.asyncOp = false;
  _allgather_base(all, input, options);
  return all;
}

at::Tensor RingBackend::sum_of_sparse(const at::Tensor& tensor, std::chrono::milliseconds timeout) {
  const at::Tensor mine = tensor.coalesce();
  const at::Tensor indices = mine.indices(), values = mine.values();
  std::vector<int64_t> facts = {indices.size(1), mine.sparse_dim(), mine.dense_dim()};
  for (const int64_t size : mine.sizes()) facts.push_back(size);
  const at::Tensor all_facts = gathered(at::tensor(facts, at::kLong), timeout);
  const int64_t* by_rank = all_facts.const_data_ptr<int64_t>();
  const size_t num_facts = facts.size();
  int64_t most = 0;
  for (int rank = 0; rank < size_; ++rank) {
    const int64_t* theirs = by_rank + static_cast<size_t>(rank) * num_facts;
    TORCH_CHECK(std::equal(facts.begin() + 1, facts.end(), theirs + 1),
                "ringcomm allreduce: invalid sparse tensor size: ranks ", rank_, " and ", rank,
                " have different shapes or numbers of sparse dimensions");
    most = std::max(most, theirs[0]);
  }
  // Padded to the longest, because then every rank can hand out its part in one all_gather.
  const auto padded = [&](const at::Tensor& rows) {
    std::vector<int64_t> sizes = rows.sizes().vec();
    sizes[0] = most;
    const at::Tensor full = at::zeros(sizes, rows.options());
    full.narrow(0, 0, rows.size(0)).copy_(rows);
    return full;
  };
  const at::Tensor all_indices = gathered(padded(indices.t()), timeout);
  const at::Tensor all_values = gathered(padded(values), timeout);
  at::Tensor sum = at::zeros_like(mine);
  for (int rank = 0; rank < size_; ++rank) {
    const int64_t count = by_rank[static_cast<size_t>(rank) * num_facts];
    sum = sum + at::sparse_coo_tensor(all_indices[rank].narrow(0, 0, count).t(), all_values[rank].narrow(0, 0, count),
                                      mine.sizes(), mine.options());
  }
  return sum.coalesce();
}

RingBackend::WorkPtr RingBackend::allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) {
  Operation operation(*core_, OpType::_ALLREDUCE_SPARSE, "ringcomm:sparse_all_reduce", "allreduce_sparse");
  const at::Tensor& tensor = only(operation, tensors, "");
  operation.check(tensor.layout() == at::kSparse, "invalid tensor layout: ", tensor.layout());
  operation.check(tensor.is_cpu() || tensor.is_cuda(), "invalid tensor device: ", tensor.device());
  operation.check(options.reduceOp.op_ == c10d::ReduceOp::SUM,
                  "unsupported reduction operation (allreduce of sparse tensors only works with ReduceOp.SUM)");
  const at::NoGradGuard no_grad;
  // In the calling thread whatever is asked: what it gathers second depends on what it gathered
  // first, and no other call may come in between.
  const at::Tensor sum = sum_of_sparse(tensor, options.timeout);
  tensor.copy_(sum);
  operation.inputs = operation.outputs = {tensor};
  const auto work = make_work(operation, seq_, tensor.is_cuda() ? Place(tensor.device()) : Place());
  work->complete(nullptr);
  return remember(work);
}

}  // namespace ringcomm::adapter
