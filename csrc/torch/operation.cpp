#include "torch/operation.h"

#include <ATen/MemoryOverlap.h>

#include <algorithm>

namespace ringcomm::adapter {
namespace {

// Whether the bytes at data_ptr() are the values, one after the other.
bool is_plain(const at::Tensor& tensor) { return tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg(); }

at::Tensor on_host(const at::Tensor& tensor) {
  return at::empty(tensor.sizes(), at::TensorOptions().dtype(tensor.scalar_type()).pinned_memory(true));
}

}  // namespace

void Operation::check_dense(const at::Tensor& tensor) {
  check(tensor.layout() == at::kStrided, "invalid tensor layout: ", tensor.layout(),
        "; only all_reduce takes sparse tensors");
  check(tensor.is_cpu() || tensor.is_cuda(), "invalid tensor device: ", tensor.device(),
        "; this backend moves CPU and CUDA tensors");
  if (!device_) device_ = tensor.device();
  check(*device_ == tensor.device(), "invalid tensor device: expected ", *device_, ", got ", tensor.device(),
        "; all tensors of a call must be on the same device");
}

void Operation::check_same_type(const at::Tensor& tensor, const at::Tensor& like) const {
  check(tensor.scalar_type() == like.scalar_type(), "invalid tensor type: expected ", like.scalar_type(), ", got ",
        tensor.scalar_type(), "; all tensors of a call must have the same type");
}

void* Operation::read(const at::Tensor& tensor) {
  check_dense(tensor);
  kept_.push_back(is_plain(tensor) ? tensor : tensor.contiguous().resolve_conj().resolve_neg());
  return const_cast<void*>(kept_.back().const_data_ptr());  // C callers have one part type for both directions
}

void* Operation::write(const at::Tensor& tensor) {
  check_dense(tensor);
  if (is_plain(tensor)) {
    kept_.push_back(tensor);
    return tensor.mutable_data_ptr();
  }
  at::assert_no_internal_overlap(tensor);
  const at::Tensor staged = at::empty(tensor.sizes(), tensor.options().memory_format(at::MemoryFormat::Contiguous));
  copy_when_done(tensor, staged);
  return staged.mutable_data_ptr();
}

void* Operation::update(const at::Tensor& tensor) {
  check_dense(tensor);
  if (is_plain(tensor)) return write(tensor);
  at::assert_no_internal_overlap(tensor);
  const at::Tensor staged = tensor.clone(at::MemoryFormat::Contiguous).resolve_conj().resolve_neg();
  copy_when_done(tensor, staged);
  return staged.mutable_data_ptr();
}

const void* Operation::read_to_host(const at::Tensor& tensor, Place& place) {
  check_dense(tensor);
  const at::NoGradGuard no_grad;
  const at::Tensor copy = on_host(tensor);
  {
    c10::OptionalStreamGuard guard;
    place.enter(guard);
    copy.copy_(tensor, /*non_blocking=*/true);
  }
  place.use(tensor);
  place.end();
  kept_.push_back(copy);
  return copy.const_data_ptr();
}

void* Operation::write_from_host(const at::Tensor& tensor, const Place& place) {
  check_dense(tensor);
  at::assert_no_internal_overlap(tensor);
  const at::Tensor copy = on_host(tensor);
  copy_when_done(tensor, copy);
  place.use(tensor);
  return copy.mutable_data_ptr();
}

rc_call& Operation::add(int32_t op, Elements elements, int64_t num_items, int root) {
  rc_call call{};
  call.op = op;
  call.dtype = elements.dtype;
  call.algo = -1;
  call.root = root;
  call.count = num_items * elements.per_item;
  call.factor = 1;
  calls.push_back(call);
  return calls.back();
}

rc_call& Operation::move(int32_t op, const at::Tensor& like, int64_t num_items, int root) {
  return add(op, core_.moved(like.scalar_type()), num_items, root);
}

rc_call& Operation::reduce(int32_t op, const at::Tensor& like, int64_t num_items, const c10d::ReduceOp& reduce_op,
                           int root) {
  const int32_t reduce_op_id = core_.reduce_op(reduce_op);
  double factor = 1;
  if (reduce_op.op_ == c10d::ReduceOp::PREMUL_SUM) {
    const auto* supplement = dynamic_cast<const c10d::PreMulSumSupplement*>(reduce_op.supplement_.get());
    check(supplement != nullptr, "invalid reduce operation: PREMUL_SUM without its factor");
    factor = supplement->tensor_factor.defined() ? supplement->tensor_factor.item<double>() : supplement->double_factor;
  }
  rc_call& call = add(op, core_.reduced(like.scalar_type()), num_items, root);
  call.reduce_op = reduce_op_id;
  call.factor = factor;
  return call;
}

void Operation::coalesce() {
  if (calls.empty()) return;
  for (const rc_call& call : calls) arrays_.push_back({call.input, call.output, call.count, call.dtype, 0});
  calls.resize(1);
  calls[0].is_list = 1;
  calls[0].arrays = arrays_.data();
  calls[0].num_arrays = static_cast<int64_t>(arrays_.size());
}

const rc_part* Operation::own(std::vector<rc_part> parts) {
  parts_.push_back(std::move(parts));
  return parts_.back().data();
}

const rc_part* Operation::read_parts(at::ArrayRef<at::Tensor> tensors) {
  std::vector<rc_part> parts;
  for (const at::Tensor& tensor : tensors)
    parts.push_back({read(tensor), tensor.numel() * core_.moved(tensor.scalar_type()).per_item});
  return own(std::move(parts));
}

const rc_part* Operation::write_parts(at::ArrayRef<at::Tensor> tensors) {
  std::vector<rc_part> parts;
  for (const at::Tensor& tensor : tensors)
    parts.push_back({write(tensor), tensor.numel() * core_.moved(tensor.scalar_type()).per_item});
  return own(std::move(parts));
}

const rc_part* Operation::parts(void* base, const at::Tensor& like, at::ArrayRef<int64_t> num_items) {
  const Elements elements = core_.moved(like.scalar_type());
  std::vector<rc_part> parts;
  int64_t begin = 0;
  for (const int64_t items : num_items) {
    parts.push_back({static_cast<char*>(base) + begin * like.element_size(), items * elements.per_item});
    begin += items;
  }
  return own(std::move(parts));
}

void Operation::put(const Place& place) {
  for (rc_call& call : calls) {
    call.on_device = 1;
    call.stream = place.handle();
  }
  for (const at::Tensor& tensor : kept_) place.use(tensor);
  for (const auto& [to, from] : copies_) {
    place.use(to);
    place.use(from);
  }
}

void Operation::finish(const Place& place) const {
  if (copies_.empty()) return;
  const at::NoGradGuard no_grad;
  c10::OptionalStreamGuard guard;
  place.enter(guard);
  for (const auto& [to, from] : copies_) to.copy_(from, /*non_blocking=*/true);
}

}  // namespace ringcomm::adapter
