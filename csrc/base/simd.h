// Run-time choice among copies of one kernel source that were compiled for different instruction
// sets. Every level gives the same bytes: kernels use no fast-math and no contraction that rounds
// differently.
//
// A kernel file x_cpu.cpp is compiled once per level with RC_SIMD_LEVEL set to baseline, avx2 or
// avx512; it puts everything in namespace RC_SIMD_LEVEL and exports one table of function
// pointers. Such files include only C headers and RC_HD headers: an inline function from the
// standard library would be compiled with the higher instruction set and could be linked in for all.
#pragma once

#include <string>

namespace ringcomm {

enum class SimdLevel : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The best level that this build has and this processor runs.
SimdLevel best_simd_level();
// The level in use: the best one, unless forced.
SimdLevel simd_level();
// Forces a level for the whole process (tests, bug hunts). Throws UsageError if it cannot run here.
void set_simd_level(const std::string& name);
const char* simd_level_name(SimdLevel level);

}  // namespace ringcomm

#if defined(__x86_64__) && !defined(RC_BASELINE_ONLY)
#define RC_HAVE_X86_LEVELS 1
// Picks `table` from the namespace of the level in use.
#define RC_SIMD_DISPATCH(table)                                                \
  (::ringcomm::simd_level() == ::ringcomm::SimdLevel::avx512 ? avx512::table() \
   : ::ringcomm::simd_level() == ::ringcomm::SimdLevel::avx2 ? avx2::table()   \
                                                             : baseline::table())
#else
#define RC_SIMD_DISPATCH(table) (baseline::table())
#endif
