// One spelling for arithmetic that is compiled for the host (once per SIMD level) and for CUDA.
//
// RC_HD functions never leave their translation unit: the host form is always inlined, so a copy
// compiled for AVX-512 cannot be picked by the linker for a machine without it.
//
// RC_HD_METHOD is the same for member functions that have an object.
//
// RC_IS_CONSTANT(x) is true where the host compiler knows x after inlining: for a choice between two
// forms of the same result.
#pragma once

#if defined(__CUDACC__)
#define RC_HD __host__ __device__ __forceinline__
#define RC_HD_METHOD RC_HD
#define RC_IS_CONSTANT(value) false
#else
#define RC_HD static inline __attribute__((always_inline))
#define RC_HD_METHOD inline __attribute__((always_inline))
#define RC_IS_CONSTANT(value) __builtin_constant_p(value)
#endif
