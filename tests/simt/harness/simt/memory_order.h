// What the functions of csrc/base/ptx.h are here.
#pragma once

#include <cstdint>

namespace simt {

enum class Order { relaxed, acquire, release };

// A load may be one of a loop that waits, so another thread may run before it.
uint32_t load(const uint32_t* word, Order order);
uint64_t load(const uint64_t* word, Order order);
void store(uint32_t* word, uint32_t value, Order order);
void store(uint64_t* word, uint64_t value, Order order);

// The device's clock.
uint64_t nanoseconds();

}  // namespace simt
