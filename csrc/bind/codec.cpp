// Codecs, reductions and packing on pointers. Arguments are integers; the GIL is released around long work. `stream`
// says where: None is the CPU, on the calling thread; a CUDA stream means memory of a GPU, and the call returns when
// the work is queued.
#include "codec/codec.h"

#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "algo/pack.h"
#include "base/error.h"
#include "base/runtime.h"
#include "bind/arguments.h"
#include "bind/bind.h"
#include "reduce/reduce.h"

namespace ringcomm::bind {
namespace py = pybind11;
namespace {

CodecId codec_of(int64_t id) { return checked<CodecId>(id, kNumCodecs, "codec id"); }
DType dtype_of(int64_t id) { return checked<DType>(id, kNumDTypes, "dtype id"); }
ReduceOp op_of(int64_t id) { return checked<ReduceOp>(id, kNumReduceOps, "reduce op id"); }

using OptionalStream = std::optional<uintptr_t>;

// Below this, handing the GIL over costs more than the work.
constexpr int64_t kReleaseElems = 4096;

template <typename Work>
void run(int64_t num_elems, Work work) {
  std::optional<py::gil_scoped_release> release;
  if (num_elems > kReleaseElems) release.emplace();
  work();
}

// on_gpu(stream) has the GPU current that `array`, one of the arguments, is on.
template <typename OnCpu, typename OnGpu>
void run(int64_t num_elems, const OptionalStream& stream, uintptr_t array, OnCpu on_cpu, OnGpu on_gpu) {
  if (!stream) return run(num_elems, on_cpu);
  py::gil_scoped_release release;
  std::string reason;
  if (!runtime::available(&reason)) RC_FAIL(device, "a kernel cannot run on a GPU: ", reason);
  const Stream queue = pointer<CUstream_st>(*stream);
  if (num_elems <= 0) return on_gpu(queue);  // nothing but the checks
  const int device = runtime::device_of(pointer<const void>(array));
  RC_CHECK(device >= 0, "address ", pointer<const void>(array),
           " is not in a GPU's memory: leave `stream` out for arrays of the CPU");
  const runtime::DeviceGuard guard(device);
  on_gpu(queue);
}

void encode(int64_t codec, uintptr_t input, int64_t input_dtype, int64_t num_elems, uintptr_t wire, uintptr_t residual,
            bool stochastic, uint64_t seed, uint64_t step, uint32_t rank, int64_t first_elem, OptionalStream stream) {
  EncodeArgs args;
  args.input = pointer<const void>(input);
  args.input_dtype = dtype_of(input_dtype);
  args.num_elems = num_elems;
  args.wire = pointer<uint8_t>(wire);
  args.residual = pointer<float>(residual);
  args.rounding = stochastic ? Rounding::stochastic : Rounding::nearest_even;
  args.seed = seed;
  args.step = step;
  args.rank = rank;
  args.first_elem = first_elem;
  const CodecId id = codec_of(codec);
  run(num_elems, stream, input, [&] { cpu::encode(id, args); }, [&](Stream queue) { cuda::encode(id, args, queue); });
}

void decode(int64_t codec, uintptr_t wire, int64_t num_elems, uintptr_t output, int64_t output_dtype,
            OptionalStream stream) {
  const CodecId id = codec_of(codec);
  const DType dtype = dtype_of(output_dtype);
  const auto* const bytes = pointer<const uint8_t>(wire);
  run(
      num_elems, stream, output, [&] { cpu::decode(id, bytes, num_elems, pointer<void>(output), dtype); },
      [&](Stream queue) { cuda::decode(id, bytes, num_elems, pointer<void>(output), dtype, queue); });
}

void decode_add(int64_t codec, uintptr_t wire, int64_t num_elems, uintptr_t accumulator, bool first,
                OptionalStream stream) {
  const CodecId id = codec_of(codec);
  const auto* const bytes = pointer<const uint8_t>(wire);
  auto* const sums = pointer<float>(accumulator);
  run(
      num_elems, stream, accumulator, [&] { cpu::decode_add(id, bytes, num_elems, sums, first); },
      [&](Stream queue) { cuda::decode_add(id, bytes, num_elems, sums, first, queue); });
}

void divide(uintptr_t values, int64_t num_elems, float divisor, OptionalStream stream) {
  auto* const array = pointer<float>(values);
  run(
      num_elems, stream, values, [&] { cpu::divide(array, num_elems, divisor); },
      [&](Stream queue) { cuda::divide(array, num_elems, divisor, queue); });
}

void reduce(int64_t dtype, int64_t op, const std::vector<uintptr_t>& inputs, int64_t num_elems, uintptr_t output,
            const std::vector<uintptr_t>& copies, OptionalStream stream) {
  std::vector<const void*> pointers;
  for (uintptr_t input : inputs) pointers.push_back(pointer<const void>(input));
  std::vector<void*> places;
  for (uintptr_t copy : copies) places.push_back(pointer<void>(copy));
  ReduceArgs args;
  args.inputs = pointers.data();
  args.num_inputs = static_cast<int>(pointers.size());
  args.num_elems = num_elems;
  args.output = pointer<void>(output);
  args.copies = places.data();
  args.num_copies = static_cast<int>(places.size());
  const DType dtype_id = dtype_of(dtype);
  const ReduceOp op_id = op_of(op);
  run(
      num_elems, stream, output, [&] { cpu::reduce(dtype_id, op_id, args); },
      [&](Stream queue) { cuda::reduce(dtype_id, op_id, args, queue); });
}

void reduce_hop(int64_t dtype, int64_t op, uintptr_t accumulator_in, uintptr_t input, uintptr_t accumulator,
                int64_t num_elems, OptionalStream stream) {
  const DType dtype_id = dtype_of(dtype);
  const ReduceOp op_id = op_of(op);
  const auto* const before = pointer<const void>(accumulator_in);
  const auto* const values = pointer<const void>(input);
  auto* const after = pointer<void>(accumulator);
  run(
      num_elems, stream, accumulator, [&] { cpu::reduce_hop(dtype_id, op_id, before, values, after, num_elems); },
      [&](Stream queue) { cuda::reduce_hop(dtype_id, op_id, before, values, after, num_elems, queue); });
}

void finish_hops(int64_t dtype, int64_t op, uintptr_t accumulator, int num_inputs, uintptr_t output, int64_t num_elems,
                 OptionalStream stream) {
  const DType dtype_id = dtype_of(dtype);
  const ReduceOp op_id = op_of(op);
  const auto* const sums = pointer<const void>(accumulator);
  auto* const result = pointer<void>(output);
  run(
      num_elems, stream, output, [&] { cpu::finish_hops(dtype_id, op_id, sums, num_inputs, result, num_elems); },
      [&](Stream queue) { cuda::finish_hops(dtype_id, op_id, sums, num_inputs, result, num_elems, queue); });
}

void scale(int64_t dtype, uintptr_t input, double factor, uintptr_t output, int64_t num_elems, OptionalStream stream) {
  const DType dtype_id = dtype_of(dtype);
  const auto* const values = pointer<const void>(input);
  auto* const result = pointer<void>(output);
  run(
      num_elems, stream, output, [&] { cpu::scale(dtype_id, values, factor, result, num_elems); },
      [&](Stream queue) { cuda::scale(dtype_id, values, factor, result, num_elems, queue); });
}

// Addresses and bytes.
std::vector<Piece> pieces_of(const std::vector<std::pair<uintptr_t, int64_t>>& given) {
  std::vector<Piece> pieces;
  for (const auto& [address, num_bytes] : given) {
    RC_CHECK(num_bytes >= 0, "num_bytes of a piece must not be negative, got ", num_bytes);
    pieces.push_back({pointer<void>(address), num_bytes});
  }
  return pieces;
}

void pack(const std::vector<std::pair<uintptr_t, int64_t>>& given, uintptr_t buffer, OptionalStream stream) {
  const std::vector<Piece> pieces = pieces_of(given);
  auto* const to = pointer<void>(buffer);
  run(
      packed_bytes(pieces), stream, buffer, [&] { cpu::pack(pieces, to); },
      [&](Stream queue) { cuda::pack(pieces, to, queue); });
}

void unpack(const std::vector<std::pair<uintptr_t, int64_t>>& given, uintptr_t buffer, OptionalStream stream) {
  const std::vector<Piece> pieces = pieces_of(given);
  const auto* const from = pointer<const void>(buffer);
  run(
      packed_bytes(pieces), stream, buffer, [&] { cpu::unpack(pieces, from); },
      [&](Stream queue) { cuda::unpack(pieces, from, queue); });
}

// On the CPU. True if every byte is zero; stops at the first piece that is not.
bool is_zero(uintptr_t address, int64_t num_bytes) {
  RC_CHECK(num_bytes >= 0, "num_bytes must not be negative, got ", num_bytes);
  constexpr int64_t kPieceBytes = 4096;
  static constexpr uint8_t kZeros[kPieceBytes] = {};
  bool zero = true;
  run(num_bytes, [&] {
    for (int64_t begin = 0; begin < num_bytes && zero; begin += kPieceBytes) {
      const int64_t count = num_bytes - begin < kPieceBytes ? num_bytes - begin : kPieceBytes;
      zero = std::memcmp(pointer<const uint8_t>(address) + begin, kZeros, static_cast<size_t>(count)) == 0;
    }
  });
  return zero;
}

}  // namespace

void bind_codec(py::module_& module) {
  module.attr("CODEC_FORMAT_VERSION") = kCodecFormatVersion;
  module.attr("CODECS") = ids_by_name<CodecId>(kNumCodecs, codec_name);
  module.attr("DTYPES") = ids_by_name<DType>(kNumDTypes, dtype_name);
  module.attr("DTYPE_BYTES") = [] {
    py::dict bytes;
    for (int id = 0; id < kNumDTypes; ++id) {
      bytes[dtype_name(static_cast<DType>(id))] = dtype_size(static_cast<DType>(id));
    }
    return bytes;
  }();
  module.attr("REDUCE_OPS") = ids_by_name<ReduceOp>(kNumReduceOps, reduce_op_name);

  module.def("codec_name", [](int64_t codec) { return codec_name(codec_of(codec)); }, py::arg("codec"));
  module.def("bits_per_value", [](int64_t codec) { return bits_per_value(codec_of(codec)); }, py::arg("codec"));
  module.def(
      "wire_bytes", [](int64_t codec, int64_t num_elems) { return wire_bytes(codec_of(codec), num_elems); },
      py::arg("codec"), py::arg("num_elems"));
  module.def("encode", &encode, py::arg("codec"), py::arg("input_ptr"), py::arg("input_dtype"), py::arg("num_elems"),
             py::arg("wire_ptr"), py::arg("residual_ptr") = 0, py::arg("stochastic") = false, py::arg("seed") = 0,
             py::arg("step") = 0, py::arg("rank") = 0, py::arg("first_elem") = 0, py::arg("stream") = py::none());
  module.def("decode", &decode, py::arg("codec"), py::arg("wire_ptr"), py::arg("num_elems"), py::arg("output_ptr"),
             py::arg("output_dtype"), py::arg("stream") = py::none());
  module.def("decode_add", &decode_add, py::arg("codec"), py::arg("wire_ptr"), py::arg("num_elems"),
             py::arg("accumulator_ptr"), py::arg("first") = false, py::arg("stream") = py::none());
  module.def("divide", &divide, py::arg("values_ptr"), py::arg("num_elems"), py::arg("divisor"),
             py::arg("stream") = py::none());
  module.def("reduce", &reduce, py::arg("dtype"), py::arg("op"), py::arg("input_ptrs"), py::arg("num_elems"),
             py::arg("output_ptr"), py::arg("copy_ptrs") = std::vector<uintptr_t>(), py::arg("stream") = py::none());
  module.def("reduce_hop", &reduce_hop, py::arg("dtype"), py::arg("op"), py::arg("accumulator_in_ptr"),
             py::arg("input_ptr"), py::arg("accumulator_ptr"), py::arg("num_elems"), py::arg("stream") = py::none());
  module.def("finish_hops", &finish_hops, py::arg("dtype"), py::arg("op"), py::arg("accumulator_ptr"),
             py::arg("num_inputs"), py::arg("output_ptr"), py::arg("num_elems"), py::arg("stream") = py::none());
  module.def("scale", &scale, py::arg("dtype"), py::arg("input_ptr"), py::arg("factor"), py::arg("output_ptr"),
             py::arg("num_elems"), py::arg("stream") = py::none());
  module.def("pack", &pack, py::arg("pieces"), py::arg("buffer_ptr"), py::arg("stream") = py::none());
  module.def("unpack", &unpack, py::arg("pieces"), py::arg("buffer_ptr"), py::arg("stream") = py::none());
  module.def("is_zero", &is_zero, py::arg("ptr"), py::arg("num_bytes"));
}

}  // namespace ringcomm::bind
