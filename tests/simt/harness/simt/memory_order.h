// What the functions of csrc/base/ptx.h are here.
#pragma once

#include <cstdint>

namespace simt {

enum class Order { relaxed, acquire, release };

// A load may be one of a loop that waits, so another thread may run before it.
uint32_t load(const uint32_t* word, Order order);
uint64_t load(const uint64_t* word, Order order);
void store(uint32_t* word, uint32_t value, Order order);
uint64_t load(const uint64_t* word, Order order);
void store(uint64_t* word, uint64_t value, Order order);

// A clock that stands still while any thread can do something that another could wait for, and goes a second forward
// when none can: who waits with a deadline of less comes in time as long as anybody can, under every schedule.
uint64_t nanoseconds();

}  // namespace simt
