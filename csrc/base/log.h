// Messages for people, on their way to Python's `ringcomm` logger (ringcomm/env.py decides what is
// shown). Without a sink, and below the level that somebody reads, a message costs one load.
#pragma once

#include <string>

#include "base/error.h"

namespace ringcomm {

// Python's numbers; trace is ringcomm.env.TRACE.
enum class LogLevel : int { trace = 5, info = 20, warning = 30, off = 100 };

// May be called by any thread that holds no lock which a caller of ringcomm may want. Never throws.
using LogSink = void (*)(LogLevel level, const char* subsystem, const std::string& message);
void set_log_sink(LogSink sink, LogLevel least);

bool logs(LogLevel level);
void write_log(LogLevel level, const char* subsystem, const std::string& message);

// subsystem: what RINGCOMM_DEBUG_SUBSYS selects: INIT, COLL or FAULT.
template <typename... Parts>
void log(LogLevel level, const char* subsystem, const Parts&... parts) {
  if (logs(level)) write_log(level, subsystem, concat(parts...));
}

}  // namespace ringcomm
