// Element types and reduction operators that cross the wire. The values are part of the wire
// format: append, never renumber.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ringcomm {

enum class DType : uint8_t {
  float32 = 0,
  float64 = 1,
  float16 = 2,
  bfloat16 = 3,
  int32 = 4,
  int64 = 5,
  uint8 = 6,
};
constexpr int kNumDTypes = 7;

// sum and product wrap around in integers; avg is the sum divided by the world size (integers
// truncate towards zero); min and max return NaN if any input is NaN. float16 and bfloat16 are
// reduced in float32 and rounded once at the end.
enum class ReduceOp : uint8_t { sum = 0, avg = 1, min = 2, max = 3, product = 4 };
constexpr int kNumReduceOps = 5;

constexpr size_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::float64:
    case DType::int64:
      return 8;
    case DType::float32:
    case DType::int32:
      return 4;
    case DType::float16:
    case DType::bfloat16:
      return 2;
    case DType::uint8:
      return 1;
  }
  return 0;
}

constexpr const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "float32";
    case DType::float64:
      return "float64";
    case DType::float16:
      return "float16";
    case DType::bfloat16:
      return "bfloat16";
    case DType::int32:
      return "int32";
    case DType::int64:
      return "int64";
    case DType::uint8:
      return "uint8";
  }
  return "?";
}

constexpr const char* reduce_op_name(ReduceOp op) {
  switch (op) {
    case ReduceOp::sum:
      return "sum";
    case ReduceOp::avg:
      return "avg";
    case ReduceOp::min:
      return "min";
    case ReduceOp::max:
      return "max";
    case ReduceOp::product:
      return "product";
  }
  return "?";
}

}  // namespace ringcomm
