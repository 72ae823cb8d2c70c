#include "transport/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <utility>

#include "base/error.h"

namespace ringcomm {

UniqueFd& UniqueFd::operator=(UniqueFd&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

UniqueFd::~UniqueFd() {
  if (fd_ >= 0) ::close(fd_);
}

int UniqueFd::release() { return std::exchange(fd_, -1); }

int create_segment(const std::string& name, int64_t num_bytes) {
  // fallocate would take what there is, and the kernel would end processes.
  const int64_t memory_bytes = static_cast<int64_t>(::sysconf(_SC_PHYS_PAGES)) * ::sysconf(_SC_PAGESIZE);
  if (num_bytes > memory_bytes) {
    RC_FAIL(system, "could not allocate ", num_bytes, " bytes of shared memory: this machine has ", memory_bytes,
            "; lower RINGCOMM_STAGING_KIB");
  }
  UniqueFd fd(::memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  RC_SYS(fd.get(), "memfd_create for a shared segment of ", num_bytes, " bytes failed");
  RC_SYS(::fchmod(fd.get(), 0600), "fchmod of a shared segment failed");
  const int code = ::posix_fallocate(fd.get(), 0, num_bytes);
  if (code != 0) {
    RC_FAIL(system, "could not allocate ", num_bytes, " bytes of shared memory (", std::strerror(code),
            "); lower RINGCOMM_STAGING_KIB or raise the memory limit of this container");
  }
  RC_SYS(::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL), "sealing a shared segment failed");
  return fd.release();
}

Mapping::Mapping(int fd, int64_t num_bytes) : num_bytes_(static_cast<size_t>(num_bytes)) {
  struct stat info;
  RC_SYS(::fstat(fd, &info), "fstat of a shared segment failed");
  if (info.st_size < num_bytes) {
    RC_FAIL(wire, "a shared segment has ", info.st_size, " bytes, expected at least ", num_bytes,
            "; do all ranks run the same ringcomm with the same RINGCOMM_STAGING_KIB?");
  }
  void* address = ::mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
  if (address == MAP_FAILED) RC_FAIL(system, "mapping ", num_bytes, " shared bytes failed: ", std::strerror(errno));
  data_ = static_cast<uint8_t*>(address);
}

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), num_bytes_(std::exchange(other.num_bytes_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(num_bytes_, other.num_bytes_);
  return *this;
}

Mapping::~Mapping() {
  if (data_ != nullptr) ::munmap(data_, num_bytes_);
}

}  // namespace ringcomm
