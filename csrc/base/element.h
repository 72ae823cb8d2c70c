// 16-bit floats as kernels hold them: in registers, at addresses of their own alignment. Host loops, which take
// any address, have base/convert.h. For .cu files.
#pragma once

#include <cstdint>
#include <type_traits>

#include "base/half.h"

namespace ringcomm {

struct Bfloat16Element {
  uint16_t bits;
};
struct Float16Element {
  uint16_t bits;
};

RC_HD float to_float(float value) { return value; }
RC_HD float to_float(Bfloat16Element value) { return bfloat16_to_float(value.bits); }
RC_HD float to_float(Float16Element value) { return float16_to_float(value.bits); }

// Rounded to nearest even.
template <typename T>
RC_HD T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, Bfloat16Element>) {
    return {float_to_bfloat16(value)};
  } else {
    static_assert(std::is_same_v<T, Float16Element>);
    return {float_to_float16(value)};
  }
}

}  // namespace ringcomm
