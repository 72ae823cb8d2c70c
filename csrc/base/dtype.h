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
  int8 = 7,
  int16 = 8,
  uint16 = 9,
  uint32 = 10,
  uint64 = 11,
  boolean = 12,
  complex64 = 13,   // two float32: real, imaginary
  complex128 = 14,  // two float64
  // float8 is moved, never computed with.
  float8_e4m3fn = 15,
  float8_e5m2 = 16,
  float8_e4m3fnuz = 17,
  float8_e5m2fnuz = 18,
  float8_e8m0fnu = 19,
};
constexpr int kNumDTypes = 20;

// sum and product wrap around in integers; avg is the sum divided by the world size (integers
// truncate towards zero); min and max return NaN if any input is NaN. float16 and bfloat16 are
// reduced in float32 and rounded once at the end. bool: sum, max and bor are `or`; product, min and
// band are `and`; the result is 0 or 1. complex avg divides the parts. premul_sum is the sum of the
// inputs after each rank scaled its own with cpu::scale().
enum class ReduceOp : uint8_t {
  sum = 0,
  avg = 1,
  min = 2,
  max = 3,
  product = 4,
  band = 5,
  bor = 6,
  bxor = 7,
  premul_sum = 8,
};
constexpr int kNumReduceOps = 9;

// What arithmetic a dtype has.
enum class DTypeKind { floating, integer, boolean, complex, opaque };

constexpr DTypeKind dtype_kind(DType dtype) {
  switch (dtype) {
    case DType::float32:
    case DType::float64:
    case DType::float16:
    case DType::bfloat16:
      return DTypeKind::floating;
    case DType::int32:
    case DType::int64:
    case DType::uint8:
    case DType::int8:
    case DType::int16:
    case DType::uint16:
    case DType::uint32:
    case DType::uint64:
      return DTypeKind::integer;
    case DType::boolean:
      return DTypeKind::boolean;
    case DType::complex64:
    case DType::complex128:
      return DTypeKind::complex;
    case DType::float8_e4m3fn:
    case DType::float8_e5m2:
    case DType::float8_e4m3fnuz:
    case DType::float8_e5m2fnuz:
    case DType::float8_e8m0fnu:
      return DTypeKind::opaque;
  }
  return DTypeKind::opaque;
}

constexpr size_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::complex128:
      return 16;
    case DType::float64:
    case DType::int64:
    case DType::uint64:
    case DType::complex64:
      return 8;
    case DType::float32:
    case DType::int32:
    case DType::uint32:
      return 4;
    case DType::float16:
    case DType::bfloat16:
    case DType::int16:
    case DType::uint16:
      return 2;
    case DType::uint8:
    case DType::int8:
    case DType::boolean:
    case DType::float8_e4m3fn:
    case DType::float8_e5m2:
    case DType::float8_e4m3fnuz:
    case DType::float8_e5m2fnuz:
    case DType::float8_e8m0fnu:
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
    case DType::int8:
      return "int8";
    case DType::int16:
      return "int16";
    case DType::uint16:
      return "uint16";
    case DType::uint32:
      return "uint32";
    case DType::uint64:
      return "uint64";
    case DType::boolean:
      return "bool";
    case DType::complex64:
      return "complex64";
    case DType::complex128:
      return "complex128";
    case DType::float8_e4m3fn:
      return "float8_e4m3fn";
    case DType::float8_e5m2:
      return "float8_e5m2";
    case DType::float8_e4m3fnuz:
      return "float8_e4m3fnuz";
    case DType::float8_e5m2fnuz:
      return "float8_e5m2fnuz";
    case DType::float8_e8m0fnu:
      return "float8_e8m0fnu";
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
    case ReduceOp::band:
      return "band";
    case ReduceOp::bor:
      return "bor";
    case ReduceOp::bxor:
      return "bxor";
    case ReduceOp::premul_sum:
      return "premul_sum";
  }
  return "?";
}

// The one rule which dtypes an operator reduces: null if it does, otherwise why not and what to do.
constexpr const char* reduction_refusal(DType dtype, ReduceOp op) {
  const DTypeKind kind = dtype_kind(dtype);
  if (kind == DTypeKind::opaque) return "float8 is only moved; convert to float16 or bfloat16 to reduce";
  switch (op) {
    case ReduceOp::sum:
    case ReduceOp::product:
      return nullptr;
    case ReduceOp::avg:
      return kind == DTypeKind::boolean ? "a mean of bools is no bool; convert to float32" : nullptr;
    case ReduceOp::min:
    case ReduceOp::max:
      return kind == DTypeKind::complex ? "complex numbers have no order; reduce their real view or their abs()"
                                        : nullptr;
    case ReduceOp::band:
    case ReduceOp::bor:
    case ReduceOp::bxor:
      return kind == DTypeKind::integer || kind == DTypeKind::boolean
                 ? nullptr
                 : "bitwise operators take integers and bool; pass an integer view";
    case ReduceOp::premul_sum:
      return kind == DTypeKind::floating || kind == DTypeKind::complex
                 ? nullptr
                 : "it takes floating-point and complex arrays; convert, or scale and use op='sum'";
  }
  return "unknown operator";
}

}  // namespace ringcomm
