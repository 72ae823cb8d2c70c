// Arithmetic of the cast codecs bf16 and fp16, host and device, once: the conversions are those of
// base/half.h, this adds the residual rule.
#pragma once

#include <cstdint>

#include "base/half.h"
#include "base/host_device.h"

namespace ringcomm {

// What the cast lost of `value`; an element that decodes to NaN or infinity keeps its old residual.
RC_HD float cast_residual(float value, float decoded, float old_residual) {
  return (float_bits(decoded) & 0x7F800000u) == 0x7F800000u ? old_residual : value - decoded;
}

}  // namespace ringcomm
