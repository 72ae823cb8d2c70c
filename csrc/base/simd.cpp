#include "base/simd.h"

#include <atomic>

#include "base/error.h"

namespace ringcomm {
namespace {

std::atomic<int> level_in_use{-1};

bool runs_here(SimdLevel level) {
#if defined(RC_HAVE_X86_LEVELS)
  switch (level) {
    case SimdLevel::baseline:
      return true;
    case SimdLevel::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
             __builtin_cpu_supports("bmi2");
    case SimdLevel::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512cd") && runs_here(SimdLevel::avx2);
  }
  return false;
#else
  return level == SimdLevel::baseline;
#endif
}

}  // namespace

SimdLevel best_simd_level() {
  if (runs_here(SimdLevel::avx512)) return SimdLevel::avx512;
  return runs_here(SimdLevel::avx2) ? SimdLevel::avx2 : SimdLevel::baseline;
}

SimdLevel simd_level() {
  int level = level_in_use.load(std::memory_order_relaxed);
  if (level < 0) {
    level = static_cast<int>(best_simd_level());
    level_in_use.store(level, std::memory_order_relaxed);
  }
  return static_cast<SimdLevel>(level);
}

void set_simd_level(const std::string& name) {
  for (SimdLevel level : {SimdLevel::baseline, SimdLevel::avx2, SimdLevel::avx512}) {
    if (name != simd_level_name(level)) continue;
    RC_CHECK(runs_here(level), "SIMD level '", name, "' does not run on this processor; the best one here is '",
             simd_level_name(best_simd_level()), "'");
    level_in_use.store(static_cast<int>(level), std::memory_order_relaxed);
    return;
  }
  RC_FAIL(usage, "SIMD level must be 'baseline', 'avx2' or 'avx512', not '", name, "'");
}

const char* simd_level_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::baseline:
      return "baseline";
    case SimdLevel::avx2:
      return "avx2";
    case SimdLevel::avx512:
      return "avx512";
  }
  return "?";
}

}  // namespace ringcomm
