// pack and unpack on CUDA: the buffer is cut into units of 16 bytes and tiles of units, tiles go round over blocks, and
// a thread finds the piece of its unit by bisection. So a block's work does not depend on where pieces begin.
//
// A piece's last unit is cut short. Units of pieces that lie at multiples of 16 bytes are loaded, several per thread,
// before the first is stored; all others go one by one, in accesses as wide as the piece's address allows, whose lines
// the neighbours' accesses find in the cache.
#include <cstring>

#include "algo/pack.h"
#include "base/error.h"
#include "base/launch.h"
#include "base/vector_access.h"

namespace ringcomm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // units of a thread in a tile
constexpr int kTileUnits = kThreads * kInFlight;
constexpr int kMostPieces = 240;
static_assert(kPackedGranule == kVectorBytes, "a unit is one access");

using Vector = VectorWord<kVectorBytes>::Type;

// What one launch copies. Indexed where it lies, in constant memory: a copy would need a stack.
struct PackArgs {
  uint8_t* pieces[kMostPieces];  // none is empty
  int64_t ends[kMostPieces];     // where they end in the buffer
  uint8_t* buffer;
  int num_pieces;

  __device__ __forceinline__ int64_t begin(int piece) const { return piece == 0 ? 0 : packed_bytes(ends[piece - 1]); }
  __device__ __forceinline__ int64_t num_units() const { return packed_bytes(ends[num_pieces - 1]) / kVectorBytes; }
};
static_assert(sizeof(PackArgs) <= 4096, "kernel arguments, before CUDA 12.1 or sm_70");

// The piece, one of [low, high], in which the unit is.
__device__ __forceinline__ int piece_of(const PackArgs& args, int low, int high, int64_t unit) {
  while (low < high) {
    const int middle = (low + high) / 2;
    if (unit * kVectorBytes < args.ends[middle]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// kVectorBytes between an aligned vector and an address that is a multiple of kWidth.
template <int kWidth>
__device__ __forceinline__ Vector gather(const uint8_t* from) {
  using Word = typename VectorWord<kWidth>::Type;
  Word words[kVectorBytes / kWidth];
#pragma unroll
  for (int i = 0; i < kVectorBytes / kWidth; ++i) words[i] = reinterpret_cast<const Word*>(from)[i];
  Vector vector;
  memcpy(&vector, words, sizeof(vector));
  return vector;
}

template <int kWidth>
__device__ __forceinline__ void scatter(uint8_t* to, Vector vector) {
  using Word = typename VectorWord<kWidth>::Type;
  Word words[kVectorBytes / kWidth];
  memcpy(words, &vector, sizeof(vector));
#pragma unroll
  for (int i = 0; i < kVectorBytes / kWidth; ++i) reinterpret_cast<Word*>(to)[i] = words[i];
}

// A whole unit of a piece at any address.
template <bool kPacks, int kWidth>
__device__ __forceinline__ void copy_whole(uint8_t* piece, Vector* unit) {
  if (kPacks) {
    *unit = gather<kWidth>(piece);
  } else {
    scatter<kWidth>(piece, *unit);
  }
}

// One unit that is cut short, or of a piece that is not aligned.
template <bool kPacks>
__device__ __forceinline__ void copy_unit(uint8_t* piece, int64_t num_bytes, Vector* unit) {
  if (num_bytes >= kVectorBytes) {
    if (is_aligned(piece, 8)) return copy_whole<kPacks, 8>(piece, unit);
    if (is_aligned(piece, 4)) return copy_whole<kPacks, 4>(piece, unit);
    if (is_aligned(piece, 2)) return copy_whole<kPacks, 2>(piece, unit);
    return copy_whole<kPacks, 1>(piece, unit);
  }
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(unit);
#pragma unroll 1
  for (int i = 0; i < kVectorBytes; ++i) {
    if (kPacks) {
      bytes[i] = i < num_bytes ? piece[i] : 0;
    } else if (i < num_bytes) {
      piece[i] = bytes[i];
    }
  }
}

template <bool kPacks>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackArgs args) {
  const int64_t num_units = args.num_units();
  Vector* const units = reinterpret_cast<Vector*>(args.buffer);
#pragma unroll 1
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kTileUnits; first < num_units;
       first += static_cast<int64_t>(gridDim.x) * kTileUnits) {
    const int low = piece_of(args, 0, args.num_pieces - 1, first);
    const int high = piece_of(args, low, args.num_pieces - 1, at_most(first + kTileUnits, num_units) - 1);
    const int64_t mine = first + threadIdx.x;
    uint8_t* pieces[kInFlight];  // the thread's places in them; null: nothing is left to copy
    int64_t left[kInFlight];     // bytes from there to the piece's end
    Vector vectors[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t unit = mine + k * kThreads;
      const int piece = piece_of(args, low, high, unit);
      pieces[k] = unit < num_units ? args.pieces[piece] + (unit * kVectorBytes - args.begin(piece)) : nullptr;
      left[k] = args.ends[piece] - unit * kVectorBytes;
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (pieces[k] == nullptr || left[k] < kVectorBytes || !is_aligned(pieces[k], kVectorBytes)) continue;
      vectors[k] = kPacks ? *reinterpret_cast<const Vector*>(pieces[k]) : units[mine + k * kThreads];
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (pieces[k] == nullptr || left[k] < kVectorBytes || !is_aligned(pieces[k], kVectorBytes)) continue;
      (kPacks ? units[mine + k * kThreads] : *reinterpret_cast<Vector*>(pieces[k])) = vectors[k];
      pieces[k] = nullptr;
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (pieces[k] != nullptr) copy_unit<kPacks>(pieces[k], left[k], units + mine + k * kThreads);
    }
  }
}

template <bool kPacks>
void launch_pack(const char* name, const std::vector<Piece>& pieces, uint8_t* buffer, Stream stream) {
  RC_CHECK(is_aligned(buffer, kVectorBytes), name, ": the buffer must lie at a multiple of ", kVectorBytes, " bytes");
  PackArgs args;
  args.buffer = buffer;
  args.num_pieces = 0;
  int64_t end = 0;  // of the pieces so far in args.buffer
  const auto flush = [&] {
    if (args.num_pieces == 0) return;
    launch(name, spread(ceil_div(packed_bytes(end) / kVectorBytes, kInFlight), kThreads), stream, pack_kernel<kPacks>,
           args);
    args.buffer += packed_bytes(end);
    args.num_pieces = 0;
    end = 0;
  };
  for (const Piece& piece : pieces) {
    RC_CHECK(piece.num_bytes >= 0, name, ": a piece has ", piece.num_bytes, " bytes");
    if (piece.num_bytes == 0) continue;
    end = packed_bytes(end) + piece.num_bytes;
    args.pieces[args.num_pieces] = static_cast<uint8_t*>(piece.data);
    args.ends[args.num_pieces] = end;
    if (++args.num_pieces == kMostPieces) flush();
  }
  flush();
}

}  // namespace

void pack(const std::vector<Piece>& pieces, void* buffer, Stream stream) {
  launch_pack<true>("pack", pieces, static_cast<uint8_t*>(buffer), stream);
}

void unpack(const std::vector<Piece>& pieces, const void* buffer, Stream stream) {
  launch_pack<false>("unpack", pieces, const_cast<uint8_t*>(static_cast<const uint8_t*>(buffer)), stream);
}

void load_pack_kernels() {
  load_kernel("pack", pack_kernel<true>);
  load_kernel("unpack", pack_kernel<false>);
}

}  // namespace ringcomm::cuda
