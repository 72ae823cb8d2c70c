// Errors that reach the user. A message says what was expected, what was found, on which rank and
// in which operation, and what to do. Never exit(), never assert() on user input.
#pragma once

#include <cerrno>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>

namespace ringcomm {

// One Python exception class per kind (ringcomm/errors.py); bind/errors.cpp translates.
enum class ErrorKind : int {
  usage = 1,      // a bad argument; the communicator is untouched
  mismatch = 2,   // ranks called different operations; the communicator is lost
  peer_lost = 3,  // a peer process ended or closed; the communicator is lost
  deadline = 4,   // a live peer did not arrive in time; the communicator is lost
  aborted = 5,    // somebody called abort(), or the communicator was used after close()
  device = 6,     // a CUDA call failed
  wire = 7,       // bytes that do not parse
  system = 8,     // the operating system refused (memory, descriptors, ...)
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message, int culprit_rank = -1)
      : std::runtime_error(message), kind_(kind), culprit_rank_(culprit_rank) {}
  ErrorKind kind() const { return kind_; }
  // The rank that caused it, or -1.
  int culprit_rank() const { return culprit_rank_; }

 private:
  ErrorKind kind_;
  int culprit_rank_;
};

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace ringcomm

#define RC_FAIL(kind, ...) throw ::ringcomm::Error(::ringcomm::ErrorKind::kind, ::ringcomm::concat(__VA_ARGS__))

// A condition on the caller's arguments.
#define RC_CHECK(cond, ...)        \
  do {                             \
    if (!(cond)) {                 \
      RC_FAIL(usage, __VA_ARGS__); \
    }                              \
  } while (0)

// A system call that returns -1 on failure; the message gets errno's text.
#define RC_SYS(call, ...)                                                                 \
  do {                                                                                    \
    if ((call) == -1) {                                                                   \
      const int saved_errno = errno;                                                      \
      RC_FAIL(system, ::ringcomm::concat(__VA_ARGS__), ": ", std::strerror(saved_errno)); \
    }                                                                                     \
  } while (0)
