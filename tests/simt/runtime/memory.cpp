// The twin of harness/detector.cpp that watches nothing: words are memory that other processes may change.
#include <time.h>

#include "machine.h"
#include "simt/memory_order.h"

namespace simt {
namespace {

template <typename T>
T load_word(const T* word, Order order) {
  let_others_run(word, sizeof(T));
  return order == Order::acquire ? __atomic_load_n(word, __ATOMIC_ACQUIRE) : __atomic_load_n(word, __ATOMIC_RELAXED);
}

template <typename T>
void store_word(T* word, T value, Order order) {
  maybe_switch();
  if (order == Order::release) {
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
  } else {
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
  }
}

}  // namespace

void watch(Block&) {}
void watch_end(Block&) {}
void watch_end(const Launch&) {}
void barrier_orders(Block&) {}
void warp_orders(Block&, uint32_t, unsigned) {}

uint32_t load(const uint32_t* word, Order order) { return load_word(word, order); }
uint64_t load(const uint64_t* word, Order order) { return load_word(word, order); }
void store(uint32_t* word, uint32_t value, Order order) { store_word(word, value, order); }
void store(uint64_t* word, uint64_t value, Order order) { store_word(word, value, order); }
void fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void atomic_access(const volatile void*, unsigned) { maybe_switch(); }

uint64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(now.tv_nsec);
}

std::string describe_address(uintptr_t address) { return "the word at " + std::to_string(address); }

}  // namespace simt
