// Reductions on CUDA; the arithmetic is that of reduce_math.h. A thread takes 16 bytes of every array, reads each input
// once and writes each output once; what is left over, and all of arrays that are not aligned, goes
// element by element.
#include <type_traits>

#include "base/error.h"
#include "base/launch.h"
#include "base/vector_access.h"
#include "reduce/reduce.h"
#include "reduce/reduce_device.h"

namespace ringcomm::cuda {
namespace {

// Two blocks of them on a multiprocessor at least: left alone, ptxas spills bytes of minima on sm_100 and sm_120.
constexpr int kThreads = 256;

// Pointers as kernel arguments. Indexed where they lie, in constant memory: a copy would need a stack.
struct Arrays {
  const void* inputs[kMostReduceArrays];
  void* outputs[kMostReduceArrays];
  int num_inputs;
  int num_outputs;
};

// All inputs are read before the first output is written, which may be one of them.
template <typename T, typename Op, int kCount>
__device__ __forceinline__ void reduce_run(const Arrays& arrays, int64_t begin) {
  Accumulator<T> totals[kCount];
  using Elements = T[kCount];
  const auto load = [&](int rank, Elements& elements) {
    load_vector(static_cast<const T*>(arrays.inputs[rank]) + begin, elements);
  };
  load_ahead<Elements>(arrays.num_inputs, load,
                       [&](int rank, const Elements& elements) { combine_rank<Op>(rank, elements, totals); });
#pragma unroll
  for (int i = 0; i < kCount; ++i) totals[i] = Op().finish(totals[i], arrays.num_inputs);
  T elements[kCount];
  to_elements<T>(totals, elements);
  for (int k = 0; k < arrays.num_outputs; ++k) store_vector(static_cast<T*>(arrays.outputs[k]) + begin, elements);
}

template <typename T, typename Op>
__global__ void __launch_bounds__(kThreads, 2)
    reduce_kernel(const __grid_constant__ Arrays arrays, int64_t num_elems, int64_t num_runs) {
#pragma unroll 1
  for (int64_t run = first_item(); run < num_runs; run += item_step()) {
    reduce_run<T, Op, kRun<T>>(arrays, run * kRun<T>);
  }
#pragma unroll 1
  for (int64_t i = num_runs * kRun<T> + first_item(); i < num_elems; i += item_step()) {
    reduce_run<T, Op, 1>(arrays, i);
  }
}

struct Hop {
  const void* accumulator_in;  // null: the first hop
  const void* input;
  void* accumulator;
};

template <typename T, typename Op, int kCount>
__device__ __forceinline__ void hop_run(const Hop& hop, int64_t begin) {
  using Acc = Accumulator<T>;
  Acc values[kCount];
  load_run<T>(hop.input, begin, values);
  Acc* const accumulator = static_cast<Acc*>(hop.accumulator) + begin;
  if (hop.accumulator_in == nullptr) return store_vector(accumulator, values);
  Acc totals[kCount];
  load_vector(static_cast<const Acc*>(hop.accumulator_in) + begin, totals);
  combine_runs<Op>(totals, values);
  store_vector(accumulator, totals);
}

template <typename T, typename Op>
__global__ void __launch_bounds__(kThreads, 2) hop_kernel(const Hop hop, int64_t num_elems, int64_t num_runs) {
#pragma unroll 1
  for (int64_t run = first_item(); run < num_runs; run += item_step()) hop_run<T, Op, kRun<T>>(hop, run * kRun<T>);
#pragma unroll 1
  for (int64_t i = num_runs * kRun<T> + first_item(); i < num_elems; i += item_step()) hop_run<T, Op, 1>(hop, i);
}

// The two functions of one value that end with rounding to T.
template <typename T, typename Op>
struct Finish {
  using Input = Accumulator<T>;
  int num_inputs;
  __device__ __forceinline__ Accumulator<T> operator()(Input total) const { return Op().finish(total, num_inputs); }
  __device__ __forceinline__ static Accumulator<T> load(Input element) { return element; }
};
template <typename T>
struct Scale {
  using Input = T;
  double factor;
  __device__ __forceinline__ Accumulator<T> operator()(Accumulator<T> value) const { return scaled(value, factor); }
  __device__ __forceinline__ static Accumulator<T> load(Input element) { return InKernels<T>::load(element); }
};

template <typename T, int kCount, typename Function>
__device__ __forceinline__ void map_run(const void* input, void* output, int64_t begin, Function function) {
  using Input = typename Function::Input;
  Input inputs[kCount];
  Accumulator<T> values[kCount];
  T elements[kCount];
  load_vector(static_cast<const Input*>(input) + begin, inputs);
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = function(Function::load(inputs[i]));
  to_elements<T>(values, elements);
  store_vector(static_cast<T*>(output) + begin, elements);
}

template <typename T, typename Function>
__global__ void __launch_bounds__(kThreads, 2)
    map_kernel(const void* input, void* output, int64_t num_elems, int64_t num_runs, Function function) {
#pragma unroll 1
  for (int64_t run = first_item(); run < num_runs; run += item_step()) {
    map_run<T, kRun<T>>(input, output, run * kRun<T>, function);
  }
#pragma unroll 1
  for (int64_t i = num_runs * kRun<T> + first_item(); i < num_elems; i += item_step()) {
    map_run<T, 1>(input, output, i, function);
  }
}

// ---- Launches. num_elems counts the kernel's elements, see reduce/kernels.h. -------------------------

// The few elements after the runs make no difference.
LaunchShape shape_of(int64_t num_elems, int64_t num_runs) {
  return spread(num_runs > 0 ? num_runs : num_elems, kThreads);
}

template <typename T, typename Op>
void launch_reduce(const Arrays& arrays, bool vectors, int64_t num_elems, Stream stream) {
  const int64_t num_runs = vectors ? num_elems / kRun<T> : 0;
  launch("reduce", shape_of(num_elems, num_runs), stream, reduce_kernel<T, Op>, arrays, num_elems, num_runs);
}

template <typename T, typename Op>
void launch_hop(const Hop& hop, bool vectors, int64_t num_elems, Stream stream) {
  const int64_t num_runs = vectors ? num_elems / kRun<T> : 0;
  launch("reduce_hop", shape_of(num_elems, num_runs), stream, hop_kernel<T, Op>, hop, num_elems, num_runs);
}

template <typename T, typename Op>
void launch_finish(const void* accumulator, int num_inputs, void* output, bool vectors, int64_t num_elems,
                   Stream stream) {
  // Only a mean has something left to do but the rounding.
  using Function = Finish<T, std::conditional_t<std::is_same_v<Op, Average>, Average, Sum>>;
  const int64_t num_runs = vectors ? num_elems / kRun<T> : 0;
  launch("finish_hops", shape_of(num_elems, num_runs), stream, map_kernel<T, Function>, accumulator, output, num_elems,
         num_runs, Function{num_inputs});
}

template <typename T>
void launch_scale(const void* input, double factor, void* output, bool vectors, int64_t num_elems, Stream stream) {
  const int64_t num_runs = vectors ? num_elems / kRun<T> : 0;
  launch("scale", shape_of(num_elems, num_runs), stream, map_kernel<T, Scale<T>>, input, output, num_elems, num_runs,
         Scale<T>{factor});
}

struct ReduceLaunchers {
  void (*reduce)(const Arrays& arrays, bool vectors, int64_t num_elems, Stream stream);
  void (*reduce_hop)(const Hop& hop, bool vectors, int64_t num_elems, Stream stream);
  void (*finish_hops)(const void* accumulator, int num_inputs, void* output, bool vectors, int64_t num_elems,
                      Stream stream);
  int parts;  // kernel elements per array element
};
struct ScaleLauncher {
  void (*scale)(const void* input, double factor, void* output, bool vectors, int64_t num_elems, Stream stream);
  int parts;
};
struct DTypeLaunchers {
  ReduceLaunchers ops[kNumReduceOps];
  ScaleLauncher scale;
};

struct Cuda : DeviceElements {
  using Kernels = ReduceLaunchers;
  using Row = DTypeLaunchers;
  template <typename T, typename Op, int kParts>
  static constexpr ReduceLaunchers kKernels{launch_reduce<T, Op>, launch_hop<T, Op>, launch_finish<T, Op>, kParts};
  template <typename T, int kParts>
  static constexpr ScaleLauncher kScale{launch_scale<T>, kParts};
};
static_assert(ReduceRows<Cuda>::follows_the_rule());

const ReduceLaunchers& launchers(DType dtype, ReduceOp op, int64_t num_elems) {
  check_reduction(dtype, op);
  RC_CHECK(num_elems >= 0, "num_elems must not be negative, got ", num_elems);
  return ReduceRows<Cuda>::kTable[static_cast<int>(dtype)].ops[static_cast<int>(op)];
}

// Checks that an array of the dtype lies where GPUs can read its elements; true if it can be read by vectors.
bool takes_vectors(const void* array, DType dtype) {
  RC_CHECK(is_aligned(array, dtype_size(dtype)), "an array of ", dtype_name(dtype), " must lie at a multiple of ",
           dtype_size(dtype), " bytes on a GPU, got address ", array, ": copy it to an array of its own");
  return is_aligned(array, kVectorBytes);
}

}  // namespace

void reduce(DType dtype, ReduceOp op, const ReduceArgs& args, Stream stream) {
  const ReduceLaunchers& chosen = launchers(dtype, op, args.num_elems);
  RC_CHECK(args.num_inputs >= 1, "a reduction needs at least one input, got ", args.num_inputs);
  RC_CHECK(args.num_inputs <= kMostReduceArrays, "at most ", kMostReduceArrays,
           " arrays are reduced at once on a GPU, got ", args.num_inputs, ": reduce groups of them with reduce_hop");
  RC_CHECK(args.num_copies >= 0 && args.num_copies < kMostReduceArrays, "the result has 0 to ", kMostReduceArrays - 1,
           " copies on a GPU, got ", args.num_copies);
  Arrays arrays{};
  bool vectors = true;
  arrays.num_inputs = args.num_inputs;
  arrays.num_outputs = args.num_copies + 1;
  for (int k = 0; k < arrays.num_inputs; ++k) {
    arrays.inputs[k] = args.inputs[k];
    vectors = takes_vectors(arrays.inputs[k], dtype) && vectors;
  }
  for (int k = 0; k < arrays.num_outputs; ++k) {
    arrays.outputs[k] = k == 0 ? args.output : args.copies[k - 1];
    vectors = takes_vectors(arrays.outputs[k], dtype) && vectors;
  }
  if (args.num_elems > 0) chosen.reduce(arrays, vectors, args.num_elems * chosen.parts, stream);
}

void reduce_hop(DType dtype, ReduceOp op, const void* accumulator_in, const void* input, void* accumulator,
                int64_t num_elems, Stream stream) {
  const ReduceLaunchers& chosen = launchers(dtype, op, num_elems);
  const DType wide = cpu::accumulator_dtype(dtype);
  bool vectors = takes_vectors(input, dtype);
  vectors = takes_vectors(accumulator_in, wide) && vectors;
  vectors = takes_vectors(accumulator, wide) && vectors;
  if (num_elems == 0) return;
  chosen.reduce_hop(Hop{accumulator_in, input, accumulator}, vectors, num_elems * chosen.parts, stream);
}

void finish_hops(DType dtype, ReduceOp op, const void* accumulator, int num_inputs, void* output, int64_t num_elems,
                 Stream stream) {
  const ReduceLaunchers& chosen = launchers(dtype, op, num_elems);
  RC_CHECK(num_inputs >= 1, "a reduction needs at least one input, got ", num_inputs);
  bool vectors = takes_vectors(accumulator, cpu::accumulator_dtype(dtype));
  vectors = takes_vectors(output, dtype) && vectors;
  if (num_elems == 0) return;
  chosen.finish_hops(accumulator, num_inputs, output, vectors, num_elems * chosen.parts, stream);
}

void scale(DType dtype, const void* input, double factor, void* output, int64_t num_elems, Stream stream) {
  launchers(dtype, ReduceOp::premul_sum, num_elems);
  bool vectors = takes_vectors(input, dtype);
  vectors = takes_vectors(output, dtype) && vectors;
  const ScaleLauncher& chosen = ReduceRows<Cuda>::kTable[static_cast<int>(dtype)].scale;
  if (num_elems > 0) chosen.scale(input, factor, output, vectors, num_elems * chosen.parts, stream);
}

}  // namespace ringcomm::cuda
