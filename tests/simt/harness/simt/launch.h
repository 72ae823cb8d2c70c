// What csrc/base/launch.h calls here: the launch is queued, and simt::run() executes everything that is queued.
#pragma once

#include <functional>
#include <tuple>
#include <utility>

#include "dialect.h"

// One queue of one rank: a rank is a GPU of its own, whose memory the others reach. Null is stream 0 of rank 0.
struct CUstream_st {
  int rank = 0;
  int id = 0;
};

namespace simt {

// A kernel with its arguments. The detector knows where they lie: threads read them without a race.
struct Closure {
  virtual ~Closure() = default;
  virtual void call() const = 0;
  virtual size_t bytes() const = 0;
  virtual const void* code() const = 0;
};

template <typename... Params>
struct KernelClosure final : Closure {
  KernelClosure(void (*kernel_)(Params...), Params... args) : kernel(kernel_), arguments(args...) {}
  void call() const override { std::apply(kernel, arguments); }
  size_t bytes() const override { return sizeof(*this); }
  const void* code() const override { return reinterpret_cast<const void*>(kernel); }
  void (*kernel)(Params...);
  std::tuple<Params...> arguments;
};

void enqueue(const char* name, dim3 grid, dim3 block, size_t shared_bytes, CUstream_st* stream, const Closure* owned);

template <typename... Params>
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, CUstream_st* stream,
            void (*kernel)(Params...), Params... args) {
  enqueue(name, grid, block, shared_bytes, stream, new KernelClosure<Params...>(kernel, args...));
}

}  // namespace simt
