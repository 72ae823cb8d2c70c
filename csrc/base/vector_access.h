// Memory accesses of kernels: 16 bytes at a time where the address allows it. For .cu files.
#pragma once

#include <cstdint>
#include <cstring>

#include "base/host_device.h"
#include "base/ptx.h"

namespace ringcomm {

constexpr int kVectorBytes = 16;

RC_HD bool is_aligned(const void* address, size_t num_bytes) {
  return reinterpret_cast<uintptr_t>(address) % num_bytes == 0;
}

template <int kBytes>
struct VectorWord;
template <>
struct VectorWord<1> {
  using Type = uint8_t;
};
template <>
struct VectorWord<2> {
  using Type = uint16_t;
};
template <>
struct VectorWord<4> {
  using Type = uint32_t;
};
template <>
struct VectorWord<8> {
  using Type = uint2;
};
template <>
struct VectorWord<16> {
  using Type = uint4;
};

// kCount elements in one access of 1, 2, 4, 8 or 16 bytes, or in several of 16. The address is a multiple of the
// access. Loops are unrolled: the elements stay in registers.
template <typename T, int kCount>
__device__ __forceinline__ void load_vector(const void* from, T (&elements)[kCount]) {
  constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  constexpr int kAccess = kBytes < kVectorBytes ? kBytes : kVectorBytes;
  using Word = typename VectorWord<kAccess>::Type;
  Word words[kBytes / kAccess];
#pragma unroll
  for (int i = 0; i < kBytes / kAccess; ++i) words[i] = static_cast<const Word*>(from)[i];
  memcpy(elements, words, kBytes);
}

// kWhole: words of 16 bytes are stored as such even if the compiler would cut them: see store_run.
template <bool kWhole = false, typename T, int kCount>
__device__ __forceinline__ void store_vector(void* to, const T (&elements)[kCount]) {
  constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  constexpr int kAccess = kBytes < kVectorBytes ? kBytes : kVectorBytes;
  using Word = typename VectorWord<kAccess>::Type;
  Word words[kBytes / kAccess];
  memcpy(words, elements, kBytes);
#pragma unroll
  for (int i = 0; i < kBytes / kAccess; ++i) {
    if constexpr (kWhole && kAccess == kVectorBytes) {
      store_whole(static_cast<Word*>(to) + i, words[i]);
    } else {
      static_cast<Word*>(to)[i] = words[i];
    }
  }
}

// Elements [begin, begin + kCount) of an array of num_elems, in one piece if `vector` says that none are missing and
// the address allows it. A load puts zeros for those past the end, a store leaves them out. The compiler would begin
// both ways of storing with one store, of the first elements only.
template <typename T, int kCount>
__device__ __forceinline__ void load_run(const T* array, int64_t begin, int64_t num_elems, bool vector,
                                         T (&run)[kCount]) {
  if (vector) return load_vector(array + begin, run);
#pragma unroll
  for (int i = 0; i < kCount; ++i) run[i] = begin + i < num_elems ? array[begin + i] : T{};
}

template <typename T, int kCount>
__device__ __forceinline__ void store_run(T* array, int64_t begin, int64_t num_elems, bool vector,
                                          const T (&run)[kCount]) {
  if (vector) return store_vector<true>(array + begin, run);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (begin + i < num_elems) array[begin + i] = run[i];
  }
}

// load(i, item) and use(i, item) for all i of [0, count), in order. As many items as kInFlight are loaded before the
// first of them is used, so that their way from memory is paid for once.
template <typename Item, int kInFlight = 4, typename Load, typename Use>
__device__ __forceinline__ void load_ahead(int count, Load load, Use use) {
#pragma unroll 1
  for (int first = 0; first < count; first += kInFlight) {
    Item items[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (first + k < count) load(first + k, items[k]);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (first + k < count) use(first + k, items[k]);
    }
  }
}

// 16 bits at any address, little endian.
__device__ __forceinline__ uint16_t load_two_bytes(const uint8_t* from) {
  return static_cast<uint16_t>(from[0] | from[1] << 8);
}
__device__ __forceinline__ void store_two_bytes(uint8_t* to, uint16_t value) {
  to[0] = static_cast<uint8_t>(value);
  to[1] = static_cast<uint8_t>(value >> 8);
}

}  // namespace ringcomm
