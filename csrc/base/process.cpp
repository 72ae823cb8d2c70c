#include "base/process.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/random.h>
#include <unistd.h>

#include <atomic>

#include "base/error.h"

namespace ringcomm {
namespace {

std::atomic<uint64_t> count{0};

ProcessToken random_token() {
  ProcessToken token;
  if (::getrandom(token.data(), token.size(), 0) == static_cast<ssize_t>(token.size())) return token;
  // Sandboxes forbid system calls that they do not know.
  const int fd = ::open("/dev/urandom", O_RDONLY | O_CLOEXEC);
  RC_SYS(fd, "opening /dev/urandom failed");
  const ssize_t num_read = ::read(fd, token.data(), token.size());
  ::close(fd);
  if (num_read != static_cast<ssize_t>(token.size())) RC_FAIL(system, "/dev/urandom gave no random bytes");
  return token;
}

struct Own {
  ProcessToken token;
  uint64_t generation;  // the fork_count() it is of
};

}  // namespace

uint64_t fork_count() {
  static const int registered = ::pthread_atfork(nullptr, nullptr, [] { ++count; });
  static_cast<void>(registered);
  return count.load(std::memory_order_relaxed);
}

ProcessToken process_token() {
  // No mutex: one that another thread held during a fork would stay locked in the child.
  static std::atomic<const Own*> own{nullptr};  // never freed: somebody may be reading it
  const uint64_t generation = fork_count();
  const Own* found = own.load(std::memory_order_acquire);
  while (found == nullptr || found->generation != generation) {
    const Own* const made = new Own{random_token(), generation};
    if (own.compare_exchange_strong(found, made, std::memory_order_acq_rel)) return made->token;
    delete made;
  }
  return found->token;
}

}  // namespace ringcomm
