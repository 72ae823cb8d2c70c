// Point-to-point messages of a communicator.
#include <chrono>
#include <utility>

#include "comm/communicator.h"

namespace ringcomm {

std::shared_ptr<Work> Communicator::send(const void* data, int64_t num_bytes, int dst, int tag, bool background) {
  RC_CHECK(dst >= 0 && dst < world_size_, "dst must be 0 to ", world_size_ - 1, ", not ", dst);
  P2pOp op;
  op.is_send = true;
  op.peer = dst;
  op.tag = tag;
  op.data = static_cast<uint8_t*>(const_cast<void*>(data));
  op.num_bytes = num_bytes;
  return post_message(std::move(op), background);
}

std::shared_ptr<Work> Communicator::recv(void* data, int64_t num_bytes, int src, int tag, bool background) {
  RC_CHECK(src == kAnySource || (src >= 0 && src < world_size_), "src must be 0 to ", world_size_ - 1,
           ", or -1 for any rank, not ", src);
  P2pOp op;
  op.peer = src;
  op.tag = tag;
  op.data = static_cast<uint8_t*>(data);
  op.num_bytes = num_bytes;
  return post_message(std::move(op), background);
}

std::shared_ptr<Work> Communicator::post_message(P2pOp op, bool background) {
  check_usable();
  RC_CHECK(op.num_bytes >= 0, "num_bytes must not be negative, got ", op.num_bytes);
  RC_CHECK(op.tag >= 0, "the tag of a message must not be negative, got ", op.tag);
  auto work = std::make_shared<Work>();
  work->messages_ = messages_;
  const auto start = std::chrono::steady_clock::now();
  op.on_finish = [this, work, start, is_send = op.is_send, num_bytes = op.num_bytes, peer = op.peer](
                     std::exception_ptr error, int source) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      OpStats& total = is_send ? message_stats_.send : message_stats_.recv;
      if (!error) {
        ++total.calls;
        total.bytes += static_cast<uint64_t>(num_bytes);
        if (is_send && peer != rank_) total.bytes_sent += static_cast<uint64_t>(num_bytes);
        total.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      }
    }
    work->finish(std::move(error), is_send ? -1 : source);
  };
  messages_->post(std::move(op), background);
  return work;
}

void Communicator::copy_across(int device, void* to, const void* from, int64_t num_bytes, Stream stream) const {
  check_usable();
  if (num_bytes == 0) return;
  const runtime::DeviceGuard guard(device);
  RC_CHECK(!runtime::is_capturing(stream),
           "a message from or to an array on a GPU cannot be captured into a CUDA graph: the host carries it; send and "
           "receive outside of the capture");
  runtime::Event event(device);
  // Before the copy, too: one of pageable memory holds this thread up without an end until the stream has come to it.
  for (const bool copies : {true, false}) {
    event.record(stream);
    wait_for_event(event);
    if (copies) runtime::copy_async(to, from, num_bytes, stream);
  }
}

void Communicator::wait_for_event(const runtime::Event& event) const {
  constexpr std::chrono::microseconds kNap{50};
  const Clock::time_point start = Clock::now();
  while (!event.passed()) {
    if (check_interrupt_) check_interrupt_();
    if (const std::optional<Error> lost = fault()) throw *lost;
    const std::chrono::nanoseconds limit = timeout();
    if (Clock::now() - start > limit) {
      RC_FAIL(deadline, "a message of rank ", rank_, " waited ", static_cast<double>(limit.count()) / 1e9,
              " s for its stream; look for other work that keeps the GPU busy, or raise timeout=. The communicator "
              "is as it was.");
    }
    std::this_thread::sleep_for(kNap);
  }
}

Communicator::MessageStats Communicator::message_stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return message_stats_;
}

}  // namespace ringcomm
