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
// The textbook formula: infinities are not recovered from NaN parts.
template <typename T>
RC_HD Complex<T> wrapping_multiply(Complex<T> a, Complex<T> b) {
  return {a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real};
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

struct Average {
  template <typename T>
  RC_HD T combine(T a, T b) {
    return wrapping_add(a, b);
  }
  // A division, not a product with 1 / n: exact where the mean is a number. Integers truncate.
  template <typename T>
  RC_HD T finish(T value, int num_inputs) {
    return static_cast<T>(value / num_inputs);
  }
};

// A NaN on either side wins: comparisons with it are false, so b's comes out by itself.
struct Minimum : Unfinished {
  template <typename T>
  RC_HD T combine(T a, T b) {
    return (a < b) | (a != a) ? a : b;
  }
};

struct Maximum : Unfinished {
  template <typename T>
  RC_HD T combine(T a, T b) {
    return (a > b) | (a != a) ? a : b;
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
