// Where an operation runs: on the CPU, or on a stream of a GPU, and then in which order with what else is queued
// there. No CUDA headers: torch's own, which are the same for every kind of device, so one source serves all builds of
// torch.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>

#include <optional>
#include <vector>

namespace ringcomm::adapter {

// A stream of torch's pool, for work beside the current one.
c10::Stream side_stream(c10::Device gpu);
// Blocks until all that is queued on the current stream is done.
void finish_current_stream(c10::Device gpu);

// Not thread-safe.
class Place {
 public:
  Place() = default;  // the CPU
  // On the current stream of a GPU; or on `side`, behind all that is queued on the current one by now.
  explicit Place(c10::Device gpu, std::optional<c10::Stream> side = std::nullopt);

  bool on_gpu() const { return stream_.has_value(); }
  // The stream as the CUDA runtime knows it; null on the CPU.
  void* handle() const;
  // Of the values of a future.
  std::vector<c10::Device> devices() const;
  // Keeps the memory of a tensor of the GPU from being used anew before the operation is done, if it goes beside its
  // own stream.
  void use(const at::Tensor& tensor) const;
  // Makes the stream the current one for a scope.
  void enter(c10::OptionalStreamGuard& guard) const {
    if (stream_) guard.reset_stream(*stream_);
  }

  // All of the operation is queued.
  void end();
  // Whether it is done; before end(): never. Always on the CPU.
  bool passed() const { return !on_gpu() || (ended_ && ended_->query()); }
  // Blocks until it is done; after end().
  void wait() const {
    if (ended_) ended_->synchronize();
  }
  // What is queued on the current stream from now on comes after it.
  void join() const;

 private:
  std::optional<c10::Stream> stream_;
  bool aside_ = false;
  std::optional<c10::Event> ended_;
};

}  // namespace ringcomm::adapter
