#include "base/log.h"

#include <atomic>

namespace ringcomm {
namespace {

std::atomic<LogSink> current_sink{nullptr};
std::atomic<LogLevel> least_level{LogLevel::off};

}  // namespace

void set_log_sink(LogSink sink, LogLevel least) {
  current_sink.store(sink);
  least_level.store(sink == nullptr ? LogLevel::off : least);
}

bool logs(LogLevel level) { return level >= least_level.load(std::memory_order_relaxed); }

void write_log(LogLevel level, const char* subsystem, const std::string& message) {
  if (const LogSink sink = current_sink.load()) sink(level, subsystem, message);
}

}  // namespace ringcomm
