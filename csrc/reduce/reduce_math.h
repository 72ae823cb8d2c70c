// Arithmetic of the reductions, host and device, once. Each operator combines two accumulators and
// finishes the last one; T is the accumulator's type (float for float16 and bfloat16).
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace ringcomm {

// Integers wrap around, which only unsigned types may.
RC_HD float wrapping_add(float a, float b) { return a + b; }
RC_HD double wrapping_add(double a, double b) { return a + b; }
RC_HD uint8_t wrapping_add(uint8_t a, uint8_t b) { return static_cast<uint8_t>(a + b); }
RC_HD int32_t wrapping_add(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}
RC_HD int64_t wrapping_add(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
}

RC_HD float wrapping_multiply(float a, float b) { return a * b; }
RC_HD double wrapping_multiply(double a, double b) { return a * b; }
RC_HD uint8_t wrapping_multiply(uint8_t a, uint8_t b) { return static_cast<uint8_t>(a * b); }
RC_HD int32_t wrapping_multiply(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b));
}
RC_HD int64_t wrapping_multiply(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
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
    return static_cast<T>(value / static_cast<T>(num_inputs));
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

}  // namespace ringcomm
