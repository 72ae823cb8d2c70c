// Shared memory without a name: sealed memfd segments that travel as file descriptors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace ringcomm {

// A file descriptor that closes itself.
class UniqueFd {
 public:
  explicit UniqueFd(int fd = -1) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(other.release()) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept;
  ~UniqueFd();
  int get() const { return fd_; }
  int release();

 private:
  int fd_;
};

// A new zeroed segment of num_bytes: memfd, mode 0600, every page allocated now (so that a full
// memory is this error and not a SIGBUS later), size sealed. The caller owns the descriptor.
int create_segment(const std::string& name, int64_t num_bytes);

// A shared read-write mapping of a whole segment.
class Mapping {
 public:
  Mapping() = default;
  // Checks that the segment has at least num_bytes. Does not keep fd.
  Mapping(int fd, int64_t num_bytes);
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();
  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_ = nullptr;
  size_t num_bytes_ = 0;
};

}  // namespace ringcomm
