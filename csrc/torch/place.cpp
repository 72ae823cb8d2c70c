#include "torch/place.h"

#include <pybind11/pybind11.h>

namespace ringcomm::adapter {
namespace {

using Streams = c10::impl::VirtualGuardImpl;

// The newest versions of torch tell; the older ones do so in Python only, of the current stream.
template <typename Impl>
auto native_handle(const Impl& impl, c10::Stream stream, int) -> decltype(impl.getStreamNativeHandle(stream)) {
  return impl.getStreamNativeHandle(stream);
}
template <typename Impl>
void* native_handle(const Impl&, c10::Stream stream, long) {
  const c10::StreamGuard current(stream);
  const pybind11::gil_scoped_acquire acquire;
  const auto ask = pybind11::module_::import("torch._C").attr("_cuda_getCurrentRawStream");
  return reinterpret_cast<void*>(ask(static_cast<int>(stream.device_index())).template cast<uintptr_t>());
}

}  // namespace

c10::Stream side_stream(c10::Device gpu) {
  // Of high priority: peers wait for what runs there.
  return Streams(gpu.type()).getStreamFromGlobalPool(gpu, true);
}

void finish_current_stream(c10::Device gpu) {
  const Streams streams(gpu.type());
  streams.synchronizeStream(streams.getStream(gpu));
}

Place::Place(c10::Device gpu, std::optional<c10::Stream> side) {
  const c10::Stream current = Streams(gpu.type()).getStream(gpu);
  stream_ = side.value_or(current);
  aside_ = *stream_ != current;
  if (!aside_) return;
  c10::Event here(gpu.type());
  here.record(current);
  here.block(*stream_);
}

void* Place::handle() const {
  return stream_ ? native_handle(*c10::impl::getDeviceGuardImpl(stream_->device_type()), *stream_, 0) : nullptr;
}

std::vector<c10::Device> Place::devices() const {
  return stream_ ? std::vector<c10::Device>{stream_->device()} : std::vector<c10::Device>{};
}

void Place::use(const at::Tensor& tensor) const {
  if (!aside_ || tensor.is_cpu()) return;
  Streams(stream_->device_type()).recordDataPtrOnStream(tensor.storage().data_ptr(), *stream_);
}

void Place::end() {
  if (!stream_) return;
  ended_.emplace(stream_->device_type());
  ended_->record(*stream_);
}

void Place::join() const {
  if (!ended_) return;
  const c10::Stream current = Streams(stream_->device_type()).getStream(stream_->device());
  if (current != *stream_) ended_->block(current);
}

}  // namespace ringcomm::adapter
