// One call of a collective on tensors: the calls that it makes of the core, the memory that must stay
// alive meanwhile, and what is copied where when they are done.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/SmallVector.h>

#include <deque>
#include <optional>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <utility>
#include <vector>

#include "torch/core.h"
#include "torch/place.h"

namespace ringcomm::adapter {

class Operation {
 public:
  // `title` names it in profiles ("ringcomm:all_reduce"), `name` in errors and communication
  // metadata, where readers expect NCCL's spelling.
  Operation(const Core& core, c10d::OpType type, const char* title, const char* name)
      : type(type), title(title), name(name), core_(core) {}

  // Memory of a tensor as the core needs it: dense and contiguous, of all tensors on one device. If the
  // tensor's own is not, a copy stands in for it, which finish() copies back after write() and update().
  void* read(const at::Tensor& tensor);
  void* write(const at::Tensor& tensor);
  void* update(const at::Tensor& tensor);

  // The same for a message of a tensor on a GPU: page-locked memory of the host, which gets the tensor's values in the
  // order of `place`, or whose values it gets there in finish().
  const void* read_to_host(const at::Tensor& tensor, Place& place);
  void* write_from_host(const at::Tensor& tensor, const Place& place);

  // One more call; the elements of `like` give the dtype. Counts passed on are items of the tensor.
  rc_call& move(int32_t op, const at::Tensor& like, int64_t num_items, int root = -1);
  rc_call& reduce(int32_t op, const at::Tensor& like, int64_t num_items, const c10d::ReduceOp& reduce_op,
                  int root = -1);
  rc_call& synchronize(int32_t op) { return add(op, {0, 0}, 0, -1); }
  // Makes one call on a list of the calls so far, which are of one operation and operator, and without parts.
  void coalesce();
  // Parts by rank, of tensors or of pieces of one tensor.
  const rc_part* read_parts(at::ArrayRef<at::Tensor> tensors);
  const rc_part* write_parts(at::ArrayRef<at::Tensor> tensors);
  const rc_part* parts(void* base, const at::Tensor& like, at::ArrayRef<int64_t> num_items);
  // A copy of `from` to make when the calls are done.
  void copy_when_done(const at::Tensor& to, const at::Tensor& from) { copies_.emplace_back(to, from); }
  void keep(const at::Tensor& tensor) { kept_.push_back(tensor); }

  // A wrong argument. RuntimeError, as of torch's own backends.
  template <typename... Parts>
  void check(bool ok, const Parts&... parts) const {
    TORCH_CHECK(ok, "ringcomm ", name, ": ", parts...);
  }
  void check_dense(const at::Tensor& tensor);
  void check_same_type(const at::Tensor& tensor, const at::Tensor& like) const;

  // The device of all tensors so far; the CPU if there is none.
  c10::Device device() const { return device_.value_or(c10::Device(c10::kCPU)); }
  bool has_tensors() const { return device_.has_value(); }
  // Runs the calls on a GPU's stream, where the tensors are in use from now on.
  void put(const Place& place);

  // After the last call: copies results to where the caller wants them, in the order of its place.
  void finish(const Place& place) const;

  const c10d::OpType type;
  const char* const title;
  const char* const name;
  c10::SmallVector<rc_call, 1> calls;
  std::vector<at::Tensor> inputs;   // for profiles
  std::vector<at::Tensor> outputs;  // the value of the future
  std::vector<int64_t> input_splits, output_splits;

 private:
  rc_call& add(int32_t op, Elements elements, int64_t num_items, int root);
  const rc_part* own(std::vector<rc_part> parts);

  const Core& core_;
  std::optional<c10::Device> device_;
  c10::SmallVector<at::Tensor, 2> kept_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;  // to, from
  std::deque<std::vector<rc_part>> parts_;                 // a deque: addresses stay
  std::vector<rc_array> arrays_;                           // of a coalesced call
};

}  // namespace ringcomm::adapter
