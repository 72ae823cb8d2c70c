// exchange: gather, scatter and all_to_all, with a count of its own for every pair of ranks.
//
// Steps       stage: put a piece for every destination into the own slab
//             read: copy what lies there for this rank out of the peers' slabs
//             stage(0), announce, check all counts, then for each segment s: read(s), stage(s+1), publish.
//             The own part is copied directly.
// Wire bytes  what a rank sends to others, once
// Scratch     the inline payload if everything that a rank sends fits there: one flag hop, one segment.
//             Else input buffer 0 for segment 0 and the two result buffers in turn for the others, so
//             nothing waits for a hop before segment 0 or after the last one. A rank decides for
//             itself; its readers see it from its counts (wire/exchange_layout.h).
// Ordering    announce releases the counts and segment 0. One release per further segment: a rank that
//             published s has staged s and read everything of s-1. It waits for the peers that it reads
//             from, before it reads s, and for those that read from it, before it stages s+1 into the
//             buffer of s-1. Segment 0 has been read when its readers published 1, for which its
//             writer, having at least two segments, waits: the input buffer ends unread.
//             Ranks that have nothing to do with each other do not wait for each other.
// Best for    all sizes
#include <optional>
#include <vector>

#include "algo/collective.h"
#include "transport/fault.h"
#include "wire/exchange_layout.h"

namespace ringcomm {
namespace {

// Segment 0 comes with the announcement.
constexpr uint32_t step_of(int64_t segment) { return static_cast<uint32_t>(segment); }

ExchangeCounts counts_of(ShmGroup& group, int rank) {
  return ExchangeCounts::at(group.inline_payload(rank), group.world_size());
}

class Exchange {
 public:
  Exchange(ShmGroup& group, const Collective& call, int64_t inline_limit)
      : group_(group),
        op_(call.op),
        rank_(group.rank()),
        world_size_(group.world_size()),
        inline_bytes_(std::min(group.inline_bytes() - ExchangeCounts::bytes(world_size_), inline_limit) +
                      ExchangeCounts::bytes(world_size_)),
        elem_bytes_(static_cast<int64_t>(dtype_size(call.dtype))),
        parts_(ExchangeParts::of(call, world_size_)),
        outgoing_(static_cast<size_t>(world_size_)),
        incoming_(static_cast<size_t>(world_size_)) {}

  // Returns the bytes that this rank sent.
  int64_t run() {
    announce();
    group_.wait_all_announced();
    check_counts(group_);
    find_incoming();
    if (max_segments_ > 1) {
      staging_.emplace(group_, op_, false, max_segments_ * group_.buffer_bytes(), max_segments_ - 1);
    }
    const size_t self = static_cast<size_t>(rank_);
    for (const ReceivePart& part : parts_.receives) output_bytes_ += part.count * elem_bytes_;
    const SendPart& own = parts_.sends[self];
    copy_to_output(parts_.receives[self].data, own.data, own.count * elem_bytes_, output_bytes_);

    for (int64_t segment = 0; segment < own_segments_; ++segment) {
      for (int hop = 1; hop < world_size_; ++hop) read((rank_ + hop) % world_size_, segment);
      if (segment + 1 < num_segments_) stage(segment + 1);
      if (segment + 1 < own_segments_) group_.publish_step(step_of(segment + 1));
    }
    group_.end(step_of(max_segments_ - 1));
    return bytes_sent_;
  }

 private:
  struct Incoming {
    ExchangeLayout::Lane lane;
    bool is_inline = true;
    int64_t num_segments = 1;
  };

  ExchangeLayout layout_of(int rank) {
    return ExchangeLayout(counts_of(group_, rank).sends, elem_bytes_, rank, world_size_, inline_bytes_,
                          group_.buffer_bytes());
  }
  // Where `rank` puts a segment of what it sends.
  uint8_t* place(int rank, bool is_inline, int64_t segment) {
    if (is_inline) return group_.inline_payload(rank);
    return segment == 0 ? group_.input_buffer(rank, 0) : group_.result_buffer(rank, segment);
  }

  void announce() {
    write_counts(group_, parts_);
    const ExchangeLayout layout = layout_of(rank_);
    for (int dest = 0; dest < world_size_; ++dest) outgoing_[static_cast<size_t>(dest)] = layout.lane(dest);
    is_inline_ = layout.is_inline();
    num_segments_ = layout.num_segments();
    bytes_sent_ = layout.total();
    stage(0);
    group_.announce();
  }

  void find_incoming() {
    own_segments_ = max_segments_ = num_segments_;
    for (int peer = 0; peer < world_size_; ++peer) {
      if (peer == rank_) continue;
      const ExchangeLayout layout = layout_of(peer);
      const Incoming incoming{layout.lane(rank_), layout.is_inline(), layout.num_segments()};
      max_segments_ = std::max(max_segments_, incoming.num_segments);
      if (incoming.lane.total > 0) own_segments_ = std::max(own_segments_, incoming.num_segments);
      incoming_[static_cast<size_t>(peer)] = incoming;
    }
  }

  void stage(int64_t segment) {
    for (int hop = 1; hop < world_size_; ++hop) {
      const size_t dest = static_cast<size_t>((rank_ + hop) % world_size_);
      const Range range = outgoing_[dest].range(segment);
      uint8_t* const to = place(rank_, is_inline_, segment) + outgoing_[dest].offset;
      const uint8_t* const from = bytes_at(parts_.sends[dest].data, range.begin);
      if (segment == 0) {
        copy_bytes(to, from, range.count());
      } else {
        staging_->timed(segment - 1, range.count(), [&] { staging_->write(segment - 1, to, from, range.count()); });
      }
    }
  }

  void read(int peer, int64_t segment) {
    const Incoming& incoming = incoming_[static_cast<size_t>(peer)];
    const bool reads = incoming.lane.total > 0 && segment < incoming.num_segments;
    const bool is_read = outgoing_[static_cast<size_t>(peer)].total > 0 && segment < num_segments_;
    if (segment > 0 && (reads || is_read)) group_.wait_step(peer, step_of(segment));
    if (!reads) return;
    const Range range = incoming.lane.range(segment);
    uint8_t* const to = bytes_at(parts_.receives[static_cast<size_t>(peer)].data, range.begin);
    uint8_t* const from = place(peer, incoming.is_inline, segment) + incoming.lane.offset;
    if (segment == 0) return copy_to_output(to, from, range.count(), output_bytes_);
    staging_->timed(segment - 1, range.count(), [&] {
      copy_to_output(to, from, range.count(), output_bytes_);
      staging_->has_read(segment - 1, from, range.count());
    });
  }

  ShmGroup& group_;
  const OpKind op_;
  const int rank_;
  const int world_size_;
  const int64_t inline_bytes_;  // counts included
  const int64_t elem_bytes_;
  const ExchangeParts parts_;
  std::vector<ExchangeLayout::Lane> outgoing_;
  std::vector<Incoming> incoming_;
  std::optional<StagingAccess> staging_;  // of the segments after 0, once their number is known
  bool is_inline_ = true;                 // what this rank sends
  int64_t num_segments_ = 1;              // of what this rank sends
  int64_t own_segments_ = 1;              // ... and of what it reads
  int64_t max_segments_ = 1;              // of any rank
  int64_t bytes_sent_ = 0;
  int64_t output_bytes_ = 0;
};

}  // namespace

ExchangeParts ExchangeParts::of(const Collective& call, int world_size) {
  ExchangeParts parts{call.sends, call.receives};
  parts.sends.resize(static_cast<size_t>(world_size));
  parts.receives.resize(static_cast<size_t>(world_size));
  if (call.op == OpKind::gather) parts.sends[static_cast<size_t>(call.root)] = {call.input, call.count};
  if (call.op == OpKind::scatter) parts.receives[static_cast<size_t>(call.root)] = {call.output, call.count};
  return parts;
}

void write_counts(ShmGroup& group, const ExchangeParts& parts) {
  const ExchangeCounts counts = counts_of(group, group.rank());
  for (int peer = 0; peer < group.world_size(); ++peer) {
    counts.sends[peer] = parts.sends[static_cast<size_t>(peer)].count;
    counts.receives[peer] = parts.receives[static_cast<size_t>(peer)].count;
  }
}

// Every rank compares every pair, so all raise the same sentence, in this call.
int64_t check_counts(ShmGroup& group) {
  int64_t largest = 0;
  for (int from = 0; from < group.world_size(); ++from) {
    const int64_t* sends = counts_of(group, from).sends;
    for (int to = 0; to < group.world_size(); ++to) {
      const int64_t expected = counts_of(group, to).receives[from];
      largest = std::max(largest, expected);
      if (sends[to] == expected) continue;
      group.fail(Error(ErrorKind::mismatch,
                       concat("ranks of group '", group.name(), "' disagree in ", group.describe_current(), ": rank ",
                              from, " sends ", sends[to], " elements to rank ", to, ", which expects ", expected,
                              ". Nothing was received. ", kCommunicatorLost)));
    }
  }
  return largest;
}

int64_t exchange(ShmGroup& group, const Collective& call, int64_t inline_limit) {
  return Exchange(group, call, inline_limit).run();
}

}  // namespace ringcomm
