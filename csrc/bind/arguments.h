// What Python passes - addresses and enum values as integers - in C++ types.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "base/error.h"

namespace ringcomm::bind {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// So that nothing behind the bindings sees a value out of range.
template <typename Enum>
Enum checked(int64_t value, int limit, const char* what) {
  RC_CHECK(value >= 0 && value < limit, what, " must be in 0..", limit - 1, ", not ", value);
  return static_cast<Enum>(value);
}

// {name: value} of an enum.
template <typename Enum, typename Name>
pybind11::dict ids_by_name(int count, Name name) {
  pybind11::dict result;
  for (int id = 0; id < count; ++id) result[name(static_cast<Enum>(id))] = id;
  return result;
}

}  // namespace ringcomm::bind
