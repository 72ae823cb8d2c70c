// Which kernel reduces which dtype with which operator: one table for every device. Includes only C headers and
// RC_HD headers, see base/simd.h.
//
// A device describes itself by a class in its own unnamed namespace:
//
//   Float16, Bfloat16, Bool             elements of arrays that C++ has no type for
//   Kernels, Row                        what a pair of dtype and operator has, as in reduce/kernels.h
//   kKernels<T, Op, kParts>             the Kernels of elements T; kParts of them are one element of the array
//   kScale<T, kParts>                   the last member of Row, for premul_sum
#pragma once

#include "base/dtype.h"
#include "reduce/reduce_math.h"

namespace ringcomm {

// In the order of ReduceOp: sum, avg, min, max, product, band, bor, bxor, premul_sum; then the scaling.
template <typename Device>
struct ReduceRows {
  using Row = typename Device::Row;
  template <typename T, typename Op, int kParts = 1>
  static constexpr typename Device::Kernels kKernels = Device::template kKernels<T, Op, kParts>;
  static constexpr typename Device::Kernels kNone{};

  template <typename T>
  static constexpr Row kFloating{{kKernels<T, Sum>, kKernels<T, Average>, kKernels<T, Minimum>, kKernels<T, Maximum>,
                                  kKernels<T, Product>, kNone, kNone, kNone, kKernels<T, Sum>},
                                 Device::template kScale<T, 1>};
  // Unsigned is T without its sign: sums and products modulo 2^n are the same bits.
  template <typename T, typename Unsigned>
  static constexpr Row kInteger{
      {kKernels<Unsigned, Sum>, kKernels<T, Average>, kKernels<T, Minimum>, kKernels<T, Maximum>,
       kKernels<Unsigned, Product>, kKernels<uint8_t, BitAnd, sizeof(T)>, kKernels<uint8_t, BitOr, sizeof(T)>,
       kKernels<uint8_t, BitXor, sizeof(T)>, kNone},
      {}};
  template <typename T>
  static constexpr Row kBoolean{
      {kKernels<T, BitOr>, kNone, kKernels<T, BitAnd>, kKernels<T, BitOr>, kKernels<T, BitAnd>, kKernels<T, BitAnd>,
       kKernels<T, BitOr>, kKernels<T, BitXor>, kNone},
      {}};
  template <typename T>
  static constexpr Row kComplex{{kKernels<T, Sum, 2>, kKernels<T, Average, 2>, kNone, kNone,
                                 kKernels<Complex<T>, Product>, kNone, kNone, kNone, kKernels<T, Sum, 2>},
                                Device::template kScale<T, 2>};

  // In the order of DType; float8, the last, has none.
  static constexpr Row kTable[kNumDTypes] = {kFloating<float>,
                                             kFloating<double>,
                                             kFloating<typename Device::Float16>,
                                             kFloating<typename Device::Bfloat16>,
                                             kInteger<int32_t, uint32_t>,
                                             kInteger<int64_t, uint64_t>,
                                             kInteger<uint8_t, uint8_t>,
                                             kInteger<int8_t, uint8_t>,
                                             kInteger<int16_t, uint16_t>,
                                             kInteger<uint16_t, uint16_t>,
                                             kInteger<uint32_t, uint32_t>,
                                             kInteger<uint64_t, uint64_t>,
                                             kBoolean<typename Device::Bool>,
                                             kComplex<float>,
                                             kComplex<double>};

  // A kernel for every pair that reduction_refusal() lets through.
  static constexpr bool follows_the_rule() {
    for (int dtype = 0; dtype < kNumDTypes; ++dtype) {
      for (int op = 0; op < kNumReduceOps; ++op) {
        const bool legal = reduction_refusal(static_cast<DType>(dtype), static_cast<ReduceOp>(op)) == nullptr;
        if (legal != (kTable[dtype].ops[op].parts != 0)) return false;
      }
    }
    return true;
  }
};

}  // namespace ringcomm
