// Functions that the Python tests call.
#pragma once

#include <exception>
#include <string>

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

namespace simt {

// Of the last call that failed.
std::string& last_error();

// 0, or -1 with the exception's text in last_error().
template <typename Work>
int guarded(Work work) {
  try {
    work();
    return 0;
  } catch (const std::exception& error) {
    last_error() = error.what();
    return -1;
  }
}

}  // namespace simt
