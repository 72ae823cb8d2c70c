// two_shot: a rank owns one chunk of every segment, sums it, and hands the sum to everyone.
//
// Exact       stage: copy the chunks that others own into the own input buffer
//             reduce: sum the own chunk in rank order into the output and, where its contributions lay,
//             into the input buffers of all peers. These lines are the owner's already, which has just
//             read them, and go home with the sum.
//             collect: copy the sums of the others' chunks out of the own input buffer
// With codec  stage: encode all chunks into the own input buffer; reduce: decode and sum the own chunk in
//             rank order, encode the sum into the own result buffer; collect: decode all sums
// Steps       stage(0), announce, then for each segment s: stage(s+1), reduce(s), publish, wait for all,
//             collect(s). Ranks may drift by one segment. In a reduce the root alone gets sums and
//             collects.
// Wire bytes  2 (n-1)/n x input per rank; with a codec the encoded sizes; reduce: 1 x input, the root (n-1)/n
// Scratch     2 input buffers per rank; with a codec 2 result buffers and one float32 chunk as well
// Ordering    one release per segment, acquired by all peers: a rank that published s has reduced s and
//             staged s+1. So the wait for s lets everybody reduce s+1 and collect s, and nobody touches a
//             peer's input buffer s&1 any more: it is rewritten for s+2 after that wait. Result buffer s&1
//             is rewritten after the wait for s+1, which a peer publishes after it collected s. Input
//             buffers end unread by others.
// Best for    everything that is not small
//
// Equal bits: one owner sums each element in rank order, everyone takes the owner's bytes. With a
// codec every contribution is encoded, also the owner's own, and the owner decodes its own wire bytes:
// the result does not depend on how the array is cut into chunks and segments.
#include <array>

#include "algo/collective.h"
#include "reduce/reduce.h"

namespace ringcomm {
namespace {

// Published when a segment is reduced, and so is everything before it: the next segment is staged.
constexpr uint32_t step_of(int64_t segment) { return static_cast<uint32_t>(segment + 1); }

// Small enough for what is staged to be in cache, large enough to be worth a wait. Measured for 4 MiB and two
// ranks: 0.55 of DeepSpeed's time, with twice as much 0.60.
constexpr int64_t kExactSegmentBytes = 256 * 1024;

// Segments of an encoded array. A value never takes more than 2 bytes on the wire; 4 leaves the staged
// segment in cache.
Segmentation encoded_segmentation(int64_t num_elems, int world_size, int64_t buffer_bytes) {
  return Segmentation(num_elems, world_size, buffer_bytes / 4, kBlockElems);
}

// What both forms share.
class Shots {
 public:
  Shots(ShmGroup& group, const Collective& call, const Segmentation& segmentation)
      : group_(group),
        call_(call),
        segmentation_(segmentation),
        elem_bytes_(static_cast<int64_t>(dtype_size(call.dtype))) {}

  int64_t num_segments() const { return segmentation_.num_segments(); }
  int64_t bytes_sent() const { return bytes_sent_; }

 protected:
  // What `rank` owns of a segment, relative to the segment.
  Range chunk(int64_t segment, int rank) const { return segmentation_.chunk(segment, rank); }
  int64_t first_elem(int64_t segment, const Range& range) const { return segmentation_.begin(segment) + range.begin; }
  const uint8_t* input(int64_t elem) const { return bytes_at(call_.input, elem * elem_bytes_); }
  uint8_t* output(int64_t elem) const { return bytes_at(call_.output, elem * elem_bytes_); }

  ShmGroup& group_;
  const Collective& call_;
  const Segmentation segmentation_;
  const int64_t elem_bytes_;
  int64_t bytes_sent_ = 0;
};

class ExactShots : public Shots {
 public:
  ExactShots(ShmGroup& group, const Collective& call)
      : Shots(group, call,
              Segmentation(
                  call.count, group.world_size(),
                  std::min(group.buffer_bytes(), kExactSegmentBytes) / static_cast<int64_t>(dtype_size(call.dtype)),
                  static_cast<int64_t>(kCacheLine / dtype_size(call.dtype)))),
        collects_(call.op != OpKind::reduce || group.rank() == call.root) {}

  void stage(int64_t segment) {
    for (int owner = 0; owner < group_.world_size(); ++owner) {
      if (owner == group_.rank()) continue;
      const Range range = chunk(segment, owner);
      copy_bytes(staged(group_.rank(), segment, range), input(first_elem(segment, range)), range.count() * elem_bytes_);
      bytes_sent_ += range.count() * elem_bytes_;
    }
  }

  void reduce(int64_t segment) {
    const Range range = chunk(segment, group_.rank());
    const int64_t first = first_elem(segment, range);
    std::array<const void*, kMaxRanks> inputs;
    std::array<void*, kMaxRanks> copies;
    ReduceArgs args{inputs.data(), group_.world_size(), range.count(), collects_ ? output(first) : nullptr};
    args.copies = copies.data();
    for (int peer = 0; peer < group_.world_size(); ++peer) {
      const bool is_own = peer == group_.rank();
      inputs[static_cast<size_t>(peer)] = is_own ? input(first) : staged(peer, segment, range);
      if (is_own || (call_.op == OpKind::reduce && peer != call_.root)) continue;
      if (args.output == nullptr) {
        args.output = staged(peer, segment, range);
      } else {
        copies[static_cast<size_t>(args.num_copies++)] = staged(peer, segment, range);
      }
      bytes_sent_ += range.count() * elem_bytes_;
    }
    cpu::reduce(call_.dtype, call_.reduce_op, args);
  }

  void collect(int64_t segment) {
    for (int owner = 0; owner < group_.world_size() && collects_; ++owner) {
      if (owner == group_.rank()) continue;
      const Range range = chunk(segment, owner);
      copy_bytes(output(first_elem(segment, range)), staged(group_.rank(), segment, range),
                 range.count() * elem_bytes_);
    }
  }

 private:
  uint8_t* staged(int rank, int64_t segment, const Range& range) const {
    return group_.input_buffer(rank, segment) + range.begin * elem_bytes_;
  }

  const bool collects_;  // this rank gets the result
};

class EncodedShots : public Shots {
 public:
  EncodedShots(ShmGroup& group, const Collective& call, Scratch& scratch)
      : Shots(group, call, encoded_segmentation(call.count, group.world_size(), group.buffer_bytes())),
        staging_(group, call.op, true, call.num_bytes(), segmentation_.num_segments()),
        codec_(call.codec),
        chunk_wire_bytes_(static_cast<int64_t>(wire_bytes(codec_.up, segmentation_.max_chunk_elems()))),
        accumulator_(scratch.floats(segmentation_.max_chunk_elems())),
        encoded_(scratch.bytes(std::max(
            chunk_wire_bytes_, static_cast<int64_t>(wire_bytes(codec_.down, segmentation_.max_chunk_elems()))))) {}

  void stage(int64_t segment) {
    timed(segment, [&] { encode_contribution(segment); });
  }
  void reduce(int64_t segment) {
    timed(segment, [&] { encode_sum(segment); });
  }
  void collect(int64_t segment) {
    timed(segment, [&] { decode_sums(segment); });
  }

 private:
  template <typename Work>
  void timed(int64_t segment, const Work& work) {
    staging_.timed(segment, segmentation_.count(segment) * elem_bytes_, work);
  }

  void encode_contribution(int64_t segment) {
    for (int owner = 0; owner < group_.world_size(); ++owner) {
      const Range range = chunk(segment, owner);
      if (range.count() == 0) continue;
      const int64_t first = first_elem(segment, range);
      encode(segment, codec_.up, wire(group_.rank(), segment, owner),
             encode_args(input(first), call_.dtype, range.count(), at(codec_.residual, first),
                         static_cast<uint32_t>(group_.rank()), first));
      if (owner != group_.rank()) bytes_sent_ += bytes_of(codec_.up, range);
    }
  }

  void encode_sum(int64_t segment) {
    const Range range = chunk(segment, group_.rank());
    if (range.count() == 0) return;
    const int64_t first = first_elem(segment, range);
    for (int peer = 0; peer < group_.world_size(); ++peer) {
      uint8_t* const contribution = wire(peer, segment, group_.rank());
      cpu::decode_add(codec_.up, contribution, range.count(), accumulator_, peer == 0);
      if (peer != group_.rank()) staging_.has_read(segment, contribution, bytes_of(codec_.up, range));
    }
    if (call_.reduce_op == ReduceOp::avg) {
      cpu::divide(accumulator_, range.count(), static_cast<float>(group_.world_size()));
    }
    encode(segment, codec_.down, group_.result_buffer(group_.rank(), segment),
           encode_args(accumulator_, DType::float32, range.count(), at(codec_.owner_residual, first),
                       owner_random_stream(), first));
    bytes_sent_ += bytes_of(codec_.down, range) * (group_.world_size() - 1);
  }

  void decode_sums(int64_t segment) {
    for (int step = 0; step < group_.world_size(); ++step) {
      const int owner = (group_.rank() + step) % group_.world_size();
      const Range range = chunk(segment, owner);
      uint8_t* const result = group_.result_buffer(owner, segment);
      cpu::decode(codec_.down, result, range.count(), output(first_elem(segment, range)), call_.dtype);
      if (owner != group_.rank()) staging_.has_read(segment, result, bytes_of(codec_.down, range));
    }
  }

  uint8_t* wire(int rank, int64_t segment, int owner) const {
    return group_.input_buffer(rank, segment) + owner * chunk_wire_bytes_;
  }
  // `rank` of the random numbers that round sums: no rank's own, and the same whoever owns the chunk.
  uint32_t owner_random_stream() const { return static_cast<uint32_t>(group_.world_size()); }
  static float* at(float* values, int64_t elem) { return values == nullptr ? nullptr : values + elem; }
  static int64_t bytes_of(CodecId codec, const Range& range) {
    return static_cast<int64_t>(wire_bytes(codec, range.count()));
  }
  void encode(int64_t segment, CodecId codec, uint8_t* wire, EncodeArgs args) const {
    const bool streams = staging_.streams(segment);
    args.wire = streams ? encoded_ : wire;
    cpu::encode(codec, args);
    if (streams) stream_copy(wire, encoded_, wire_bytes(codec, args.num_elems));
  }
  EncodeArgs encode_args(const void* input, DType dtype, int64_t num_elems, float* residual, uint32_t random_stream,
                         int64_t first) const {
    EncodeArgs args;
    args.input = input;
    args.input_dtype = dtype;
    args.num_elems = num_elems;
    args.residual = residual;
    args.rounding = codec_.rounding;
    args.seed = codec_.seed;
    args.step = codec_.step;
    args.rank = random_stream;
    args.first_elem = first;
    return args;
  }

  StagingAccess staging_;
  const CodecOptions& codec_;
  const int64_t chunk_wire_bytes_;
  float* const accumulator_;
  uint8_t* const encoded_;
};

template <typename Form>
int64_t run(ShmGroup& group, Form shots) {
  const int64_t num_segments = shots.num_segments();
  shots.stage(0);
  group.announce();  // segment 0 is staged
  for (int64_t segment = 0; segment < num_segments; ++segment) {
    if (segment + 1 < num_segments) shots.stage(segment + 1);
    if (segment == 0) group.wait_all_announced();
    shots.reduce(segment);
    group.publish_step(step_of(segment));
    group.wait_all_steps(step_of(segment));
    shots.collect(segment);
  }
  group.end(step_of(num_segments - 1));
  return shots.bytes_sent();
}

}  // namespace

int64_t two_shot(ShmGroup& group, const Collective& call, Scratch& scratch) {
  return call.codec.up == CodecId::none ? run(group, ExactShots(group, call))
                                        : run(group, EncodedShots(group, call, scratch));
}

std::vector<Range> encoded_sums_of(int rank, int64_t num_elems, int world_size, int64_t buffer_bytes) {
  const Segmentation segmentation = encoded_segmentation(num_elems, world_size, buffer_bytes);
  std::vector<Range> ranges;
  for (int64_t segment = 0; segment < segmentation.num_segments(); ++segment) {
    const Range range = segmentation.chunk(segment, rank);
    const int64_t first = segmentation.begin(segment);
    if (range.count() > 0) ranges.push_back({first + range.begin, first + range.end});
  }
  return ranges;
}

}  // namespace ringcomm
