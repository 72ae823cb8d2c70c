// The emulator, and csrc's functions for CUDA, as C functions for ctypes.
#include "algo/pack.h"
#include "codec/codec.h"
#include "control.h"
#include "reduce/reduce.h"
#include "simt/export.h"

namespace simt {

std::string& last_error() {
  static std::string text;
  return text;
}

}  // namespace simt

using namespace ringcomm;

SIMT_EXPORT const char* simt_last_error() { return simt::last_error().c_str(); }

SIMT_EXPORT void* simt_allocate(size_t bytes, const char* name) {
  void* memory = nullptr;
  simt::guarded([&] { memory = simt::allocate(bytes, name); });
  return memory;
}

SIMT_EXPORT void simt_release_all() { simt::release_all(); }

// Streams live as long as the process.
SIMT_EXPORT CUstream_st* simt_stream(int rank, int id) { return new CUstream_st{rank, id}; }

// The reports, a line each; empty: nothing was wrong. Null: simt_last_error().
SIMT_EXPORT const char* simt_run(int schedule, uint64_t seed, double switch_probability, int max_resident_blocks) {
  static std::string text;
  simt::Config config;
  config.schedule = static_cast<simt::Schedule>(schedule);
  config.seed = seed;
  config.switch_probability = switch_probability;
  config.max_resident_blocks = max_resident_blocks;
  const int status = simt::guarded([&] {
    text.clear();
    for (const std::string& report : simt::run(config)) text += report + "\n";
  });
  return status == 0 ? text.c_str() : nullptr;
}

SIMT_EXPORT void simt_counts(uint64_t* switches, uint64_t* accesses, uint64_t* threads) {
  const simt::Counts counts = simt::counts();
  *switches = counts.switches;
  *accesses = counts.accesses;
  *threads = counts.threads;
}

// As many as fit; returns how many there are.
SIMT_EXPORT int64_t simt_kernels_ended(uint32_t* offsets, int64_t capacity) {
  const std::set<uint32_t> kernels = simt::kernels_ended();
  int64_t count = 0;
  for (const uint32_t offset : kernels) {
    if (count < capacity) offsets[count] = offset;
    ++count;
  }
  return count;
}

SIMT_EXPORT int simt_pack(int packs, uint8_t* const* data, const int64_t* num_bytes, int num_pieces, void* buffer,
                          CUstream_st* stream) {
  std::vector<Piece> pieces;
  for (int i = 0; i < num_pieces; ++i) pieces.push_back({data[i], num_bytes[i]});
  return simt::guarded([&] { packs != 0 ? cuda::pack(pieces, buffer, stream) : cuda::unpack(pieces, buffer, stream); });
}

SIMT_EXPORT int simt_encode(int codec, const void* input, int input_dtype, int64_t num_elems, uint8_t* wire,
                            float* residual, int stochastic, uint64_t seed, uint64_t step, uint32_t rank,
                            int64_t first_elem, CUstream_st* stream) {
  EncodeArgs args;
  args.input = input;
  args.input_dtype = static_cast<DType>(input_dtype);
  args.num_elems = num_elems;
  args.wire = wire;
  args.residual = residual;
  args.rounding = stochastic != 0 ? Rounding::stochastic : Rounding::nearest_even;
  args.seed = seed;
  args.step = step;
  args.rank = rank;
  args.first_elem = first_elem;
  return simt::guarded([&] { cuda::encode(static_cast<CodecId>(codec), args, stream); });
}

SIMT_EXPORT int simt_decode(int codec, const uint8_t* wire, int64_t num_elems, void* output, int output_dtype,
                            CUstream_st* stream) {
  return simt::guarded([&] {
    cuda::decode(static_cast<CodecId>(codec), wire, num_elems, output, static_cast<DType>(output_dtype), stream);
  });
}

SIMT_EXPORT int simt_decode_add(int codec, const uint8_t* wire, int64_t num_elems, float* accumulator, int first,
                                CUstream_st* stream) {
  return simt::guarded(
      [&] { cuda::decode_add(static_cast<CodecId>(codec), wire, num_elems, accumulator, first != 0, stream); });
}

SIMT_EXPORT int simt_divide(float* values, int64_t num_elems, float divisor, CUstream_st* stream) {
  return simt::guarded([&] { cuda::divide(values, num_elems, divisor, stream); });
}

SIMT_EXPORT int simt_reduce(int dtype, int op, const void* const* inputs, int num_inputs, int64_t num_elems,
                            void* output, void* const* copies, int num_copies, CUstream_st* stream) {
  ReduceArgs args;
  args.inputs = inputs;
  args.num_inputs = num_inputs;
  args.num_elems = num_elems;
  args.output = output;
  args.copies = copies;
  args.num_copies = num_copies;
  return simt::guarded([&] { cuda::reduce(static_cast<DType>(dtype), static_cast<ReduceOp>(op), args, stream); });
}

SIMT_EXPORT int simt_reduce_hop(int dtype, int op, const void* accumulator_in, const void* input, void* accumulator,
                                int64_t num_elems, CUstream_st* stream) {
  return simt::guarded([&] {
    cuda::reduce_hop(static_cast<DType>(dtype), static_cast<ReduceOp>(op), accumulator_in, input, accumulator,
                     num_elems, stream);
  });
}

SIMT_EXPORT int simt_finish_hops(int dtype, int op, const void* accumulator, int num_inputs, void* output,
                                 int64_t num_elems, CUstream_st* stream) {
  return simt::guarded([&] {
    cuda::finish_hops(static_cast<DType>(dtype), static_cast<ReduceOp>(op), accumulator, num_inputs, output, num_elems,
                      stream);
  });
}

SIMT_EXPORT int simt_scale(int dtype, const void* input, double factor, void* output, int64_t num_elems,
                           CUstream_st* stream) {
  return simt::guarded([&] { cuda::scale(static_cast<DType>(dtype), input, factor, output, num_elems, stream); });
}
