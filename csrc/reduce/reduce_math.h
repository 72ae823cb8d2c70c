// Arithmetic of the reductions, host and device, once. Each operator combines two accumulators and
// finishes the last one; T is the accumulator's type (float for float16 and bfloat16).
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace ringcomm {

template <typename T>
struct Complex {
  T real;
  T imag;
};

// Integers wrap around, which only unsigned types may, and only from 32 bits on: narrower ones are promoted to int.
template <typename T>
RC_HD T wrapping_add(T a, T b) {
  return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
}
RC_HD float wrapping_add(float a, float b) { return a + b; }
RC_HD double wrapping_add(double a, double b) { return a + b; }

template <typename T>
RC_HD T wrapping_multiply(T a, T b) {
  return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}
RC_HD float wrapping_multiply(float a, float b) { return a * b; }
RC_HD double wrapping_multiply(double a, double b) { return a * b; }
// The textbook formula: infinities are not recovered from NaN parts. The difference is written as a sum,
// which is the same number: GCC 12 makes fmaddsub of neighbouring differences and sums of products, against
// -ffp-contract=off.
template <typename T>
RC_HD Complex<T> wrapping_multiply(Complex<T> a, Complex<T> b) {
  const T minus_imag = -a.imag;
  return {a.real * b.real + minus_imag * b.imag, a.real * b.imag + a.imag * b.real};
}

struct Unfinished {
  template <typename T>
  RC_HD T finish(T value, int) {
    return value;
  }
};

struct Sum : Unfinished {
  template <typename T>
  RC_HD T combine(T a, T b) {
    return wrapping_add(a, b);
  }
};

// What an average is divided in: integers up to 32 bits in a floating type that holds them all, because
// there are vector divisions of those only. Truncated it is the integer quotient: a quotient a / b that is no
// whole number is 1 / b or more away from the next one, which the rounding does not reach.
template <typename T>
struct Quotient {
  using Type = T;
};
template <>
struct Quotient<uint8_t> {
  using Type = float;
};
template <>
struct Quotient<int8_t> {
  using Type = float;
};
template <>
struct Quotient<uint16_t> {
  using Type = float;
};
template <>
struct Quotient<int16_t> {
  using Type = float;
};
template <>
struct Quotient<uint32_t> {
  using Type = double;
};
template <>
struct Quotient<int32_t> {
  using Type = double;
};

struct Average {
  template <typename T>
  RC_HD T combine(T a, T b) {
    return wrapping_add(a, b);
  }
  // A division, not a product with 1 / n: exact where the mean is a number.
  template <typename T>
  RC_HD T finish(T value, int num_inputs) {
    // By a known number the compiler divides with a multiplication.
    if (RC_IS_CONSTANT(num_inputs)) return static_cast<T>(value / num_inputs);
    using Wide = typename Quotient<T>::Type;
    return static_cast<T>(static_cast<Wide>(value) / static_cast<Wide>(num_inputs));
  }
};

// A NaN on either side wins: comparisons with it are false, so b's comes out by itself. Two selects, because
// GCC turns a chain of `a < b or a is NaN` into jumps (measured with four inputs: 5 to 30 times the time).
struct Minimum : Unfinished {
  template <typename T>
  RC_HD T combine(T a, T b) {
    const T nan_or_b = a != a ? a : b;
    return a < b ? a : nan_or_b;
  }
};

struct Maximum : Unfinished {
  template <typename T>
  RC_HD T combine(T a, T b) {
    const T nan_or_b = a != a ? a : b;
    return a > b ? a : nan_or_b;
  }
};

struct Product : Unfinished {
  template <typename T>
  RC_HD T combine(T a, T b) {
    return wrapping_multiply(a, b);
  }
};

struct BitAnd : Unfinished {
  template <typename T>
  RC_HD T combine(T a, T b) {
    return static_cast<T>(a & b);
  }
};

struct BitOr : Unfinished {
  template <typename T>
  RC_HD T combine(T a, T b) {
    return static_cast<T>(a | b);
  }
};

struct BitXor : Unfinished {
  template <typename T>
  RC_HD T combine(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};

// What premul_sum adds up, before it is rounded to the dtype.
template <typename T>
RC_HD T scaled(T value, double factor) {
  return value * static_cast<T>(factor);
}

}  // namespace ringcomm
