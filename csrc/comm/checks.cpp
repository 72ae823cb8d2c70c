#include "comm/checks.h"

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "reduce/reduce.h"

namespace ringcomm {
namespace {

// Memory that a call reads or writes, and the rank whose part it is.
struct Span {
  const uint8_t* begin;
  int64_t num_bytes;
  int rank;

  const uint8_t* end() const { return begin + num_bytes; }
};

bool overlap(const Span& a, const Span& b) {
  return a.num_bytes > 0 && b.num_bytes > 0 && a.begin < b.end() && b.begin < a.end();
}

Span span_of(const void* data, int64_t num_bytes, int rank) {
  return {static_cast<const uint8_t*>(data), num_bytes, rank};
}

template <typename Part>
std::vector<Span> spans_of(const std::vector<Part>& parts, const Collective& call) {
  std::vector<Span> spans;
  spans.reserve(parts.size());
  for (const Part& part : parts) {
    spans.push_back(
        span_of(part.data, part.count * static_cast<int64_t>(dtype_size(call.dtype)), static_cast<int>(spans.size())));
  }
  return spans;
}

void check_codec(const Collective& call) {
  const bool has_codec = call.codec.up != CodecId::none;
  RC_CHECK(!has_codec || call.op == OpKind::all_reduce, op_name(call.op), " takes no codec");
  RC_CHECK(!has_codec || codec_takes(call.dtype), "codec ", codec_name(call.codec.up),
           " takes float32, bfloat16 and float16, not ", dtype_name(call.dtype),
           "; use codec=None for an exact result");
  RC_CHECK(!has_codec || call.reduce_op == ReduceOp::sum || call.reduce_op == ReduceOp::avg,
           "a codec works with op='sum' and 'avg', not '", reduce_op_name(call.reduce_op), "'",
           call.reduce_op == ReduceOp::premul_sum ? "; multiply x by the factor first" : "");
  RC_CHECK(has_codec || (call.codec.residual == nullptr && call.codec.owner_residual == nullptr),
           "a residual needs a codec: nothing is lost in an exact all_reduce");
}

template <typename Part>
void check_parts(const std::vector<Part>& parts, const Collective& call, int world_size, const char* array) {
  RC_CHECK(parts.size() == static_cast<size_t>(world_size), array, ": ", parts.size(), " parts, expected ", world_size,
           ", one per rank");
  for (size_t rank = 0; rank < parts.size(); ++rank) {
    const int64_t count = parts[rank].count;
    RC_CHECK(count >= 0, array, ": the part of rank ", rank, " has a negative count, ", count);
    RC_CHECK(is_exchange(call.op) || count == call.count, array, ": the part of rank ", rank, " has ", count,
             " elements, expected ", call.count, "; all parts of ", op_name(call.op), " are equally long");
  }
}

// All is read while all is written. Only what a rank keeps for itself may be where it comes from; unless
// it is reduced, it is then not written at all.
void check_overlaps(std::vector<Span> reads, std::vector<Span> writes, int rank, bool is_reduced) {
  const auto of_rank = [rank](const Span& span) { return span.rank == rank; };
  const uint8_t* own = std::find_if(reads.begin(), reads.end(), of_rank)->begin;
  const auto by_address = [](const Span& a, const Span& b) { return a.begin < b.begin; };
  std::sort(reads.begin(), reads.end(), by_address);
  std::sort(writes.begin(), writes.end(), by_address);
  const Span* last = nullptr;  // that is not empty
  for (const Span& write : writes) {
    if (write.num_bytes == 0) continue;
    RC_CHECK(last == nullptr || !overlap(*last, write), "out: what comes from rank ", last->rank, " and from rank ",
             write.rank, " would share memory; pass arrays that do not overlap");
    last = &write;
    if (write.rank == rank && write.begin == own && !is_reduced) continue;
    for (const Span& read : reads) {
      if (read.begin >= write.end()) break;
      const bool in_place = read.rank == rank && write.rank == rank && read.begin == write.begin;
      RC_CHECK(in_place || !overlap(read, write), "out would overwrite what goes to rank ", read.rank,
               "; pass an array that does not overlap x");
    }
  }
}

// Parts that stand in a list on one side at least.
void check_lists(const Collective& call, bool has_sends, bool has_receives, int rank, int world_size) {
  if (has_sends) check_parts(call.sends, call, world_size, "x");
  if (has_receives) check_parts(call.receives, call, world_size, "out");
  const size_t self = static_cast<size_t>(rank);
  const int64_t sent = has_sends ? call.sends[self].count : call.count;
  const int64_t received = has_receives ? call.receives[self].count : call.count;
  RC_CHECK(sent == received, "rank ", rank, " keeps ", sent, " elements of x for itself, and out has room for ",
           received);
  check_overlaps(
      has_sends ? spans_of(call.sends, call) : std::vector<Span>{span_of(call.input, call.num_bytes(), rank)},
      has_receives ? spans_of(call.receives, call) : std::vector<Span>{span_of(call.output, call.num_bytes(), rank)},
      rank, reduces(call.op));
}

// One array on each side; `in_place` is where both may begin, if they may.
void check_arrays(const Collective& call, int64_t input_bytes, int64_t output_bytes, const void* in_place) {
  const bool is_in_place = (input_bytes < output_bytes ? call.input : call.output) == in_place;
  RC_CHECK(is_in_place || !overlap(span_of(call.input, input_bytes, 0), span_of(call.output, output_bytes, 0)),
           "out overlaps x", in_place == nullptr ? "" : ", and not as this rank's own part of it",
           "; pass an array that does not overlap", in_place == nullptr ? "" : ", or exactly that part");
}

void check_memory(const Collective& call, int rank, int world_size) {
  const bool is_root = rank == call.root;
  const int64_t num_bytes = call.num_bytes();
  switch (call.op) {
    case OpKind::barrier:
    case OpKind::monitored_barrier:
      return;
    case OpKind::all_reduce:
    case OpKind::broadcast:
      return check_arrays(call, num_bytes, num_bytes, call.input);
    case OpKind::reduce:
      if (is_root) check_arrays(call, num_bytes, num_bytes, call.input);
      return;
    case OpKind::all_gather:
      if (!call.receives.empty()) return check_lists(call, false, true, rank, world_size);
      return check_arrays(call, num_bytes, num_bytes * world_size, call.part_from(rank));
    case OpKind::reduce_scatter:
      if (!call.sends.empty()) return check_lists(call, true, false, rank, world_size);
      return check_arrays(call, num_bytes * world_size, num_bytes, call.part_for(rank));
    case OpKind::gather:
      if (is_root) check_lists(call, false, true, rank, world_size);
      return;
    case OpKind::scatter:
      if (is_root) check_lists(call, true, false, rank, world_size);
      return;
    case OpKind::all_to_all:
      if (call.sends.empty() && call.receives.empty()) {
        RC_CHECK(call.count % world_size == 0, "x: ", call.count, " elements, which is no multiple of the world size ",
                 world_size);
        return check_arrays(call, num_bytes, num_bytes, nullptr);
      }
      return check_lists(call, true, true, rank, world_size);
  }
}

}  // namespace

void check_call(const Collective& call, int rank, int world_size) {
  RC_CHECK(call.count >= 0, "count must not be negative, got ", call.count);
  RC_CHECK(!has_root(call.op) || (call.root >= 0 && call.root < world_size), "root must be 0 to ", world_size - 1,
           ", not ", call.root);
  RC_CHECK(call.timeout_s >= 0, "timeout must be positive, not ", call.timeout_s, " s");
  if (reduces(call.op)) check_reduction(call.dtype, call.reduce_op);
  check_codec(call);
  if (!is_packed(call)) check_memory(call, rank, world_size);  // calls_of_list() has checked the arrays of that one
}

}  // namespace ringcomm
