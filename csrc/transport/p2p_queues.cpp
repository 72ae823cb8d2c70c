#include "transport/p2p_queues.h"

#include <algorithm>
#include <utility>

#include "transport/fault.h"

namespace ringcomm {

P2pQueues::P2pQueues(ShmGroup& group)
    : group_(group), layout_(group.p2p_layout()), rank_(group.rank()), next_id_(group.first_seq()) {
  peers_.reserve(static_cast<size_t>(group.world_size()));
  for (int peer = 0; peer < group.world_size(); ++peer) {
    peers_.push_back(Peer{
        P2pChannel(layout_, group.slab(rank_), group.slab(peer), rank_, peer, group.first_seq()), 0, {}, {}, {}, {}});
  }
}

// ---- matching ------------------------------------------------------------------------------------

void P2pQueues::post(P2pOps one) {
  const P2pOps::iterator op = one.begin();
  op->deadline = std::chrono::steady_clock::now() + group_.timeout();
  if (!op->is_send) {
    ++(op->peer == kAnySource ? expected_from_any_ : peer_of(*op).expected);
    posted_.splice(posted_.end(), one);
    for (auto arrival = arrived_.begin(); arrival != arrived_.end(); ++arrival) {
      if ((op->peer != kAnySource && op->peer != arrival->source) || op->tag != arrival->header.tag) continue;
      match(op, *arrival);
      arrived_.erase(arrival);
      return;
    }
  } else if (op->peer != rank_) {
    Peer& peer = peer_of(*op);
    peer.outbox.splice(peer.outbox.end(), one);
  } else {
    arrived_.push_back(Arrival{rank_, {op->num_bytes, op->tag, 0}, true, op->data, {}, std::move(one)});
    const P2pOps::iterator receive = find_receive(rank_, op->tag);
    if (receive == posted_.end()) return;
    match(receive, arrived_.back());
    arrived_.pop_back();
  }
}

P2pOps::iterator P2pQueues::find_receive(int source, int tag) {
  return std::find_if(posted_.begin(), posted_.end(),
                      [&](const P2pOp& op) { return op.tag == tag && (op.peer == source || op.peer == kAnySource); });
}

bool P2pQueues::awaits_own(int tag) { return find_receive(rank_, tag) != posted_.end(); }

void P2pQueues::match(P2pOps::iterator receive, Arrival& arrival) {
  if (receive->num_bytes != arrival.header.num_bytes) fail_mismatch(*receive, arrival);
  if (receive->peer == kAnySource) {
    --expected_from_any_;
    receive->peer = arrival.source;
    first_to_serve_ = arrival.source + 1;
  } else {
    --peer_of(*receive).expected;
  }
  if (!arrival.is_here) {
    Peer& peer = peer_of(*receive);
    receive->id = arrival.header.id;
    peer.wanted.splice(peer.wanted.end(), posted_, receive);
    grant(peer);
    return;
  }
  if (receive->num_bytes > 0) std::memmove(receive->data, arrival.payload, static_cast<size_t>(receive->num_bytes));
  finish(posted_, receive);
  if (!arrival.own.empty()) finish(arrival.own, arrival.own.begin());
}

void P2pQueues::finish(P2pOps& from, P2pOps::iterator op) { finished_.splice(finished_.end(), from, op); }

// ---- moving --------------------------------------------------------------------------------------

bool P2pQueues::progress() {
  group_.throw_if_failed();
  bool moved = false;
  const int world_size = group_.world_size();
  const int first = first_to_serve_;
  for (int i = 0; i < world_size; ++i) {
    const int rank = (first + i) % world_size;
    if (rank == rank_) continue;
    Peer& peer = peers_[static_cast<size_t>(rank)];
    if (!peer.outbox.empty()) moved |= flush(peer);
    if (expected_from_any_ > 0 || peer.expected > 0) moved |= take(rank);
    if (!peer.incoming.empty()) moved |= drain(peer);
  }
  return stream() || moved;
}

// Puts headers, and with them short messages, into free slots.
bool P2pQueues::flush(Peer& peer) {
  bool moved = false;
  while (!peer.outbox.empty() && peer.channel.can_post()) {
    const P2pOps::iterator op = peer.outbox.begin();
    op->id = next_id_++;
    peer.channel.post({op->num_bytes, op->tag, op->id}, op->data);
    if (op->num_bytes <= layout_.eager_bytes) {
      finish(peer.outbox, op);
    } else {
      peer.offered.splice(peer.offered.end(), peer.outbox, op);
    }
    moved = true;
  }
  return moved;
}

// Takes one message off its slot; one, so that receives from anyone serve the peers in turn.
bool P2pQueues::take(int source) {
  P2pChannel& channel = peers_[static_cast<size_t>(source)].channel;
  const MessageHeader* header = channel.front();
  if (header == nullptr) return false;
  const bool is_short = header->num_bytes <= layout_.eager_bytes;
  const auto* payload = reinterpret_cast<const uint8_t*>(header + 1);
  Arrival arrival{source, *header, is_short, payload, {}, {}};
  const P2pOps::iterator receive = find_receive(source, header->tag);
  if (receive != posted_.end()) {
    match(receive, arrival);
  } else {
    if (is_short) {
      arrival.kept.assign(payload, payload + header->num_bytes);
      arrival.payload = arrival.kept.data();
    }
    arrived_.push_back(std::move(arrival));
  }
  channel.pop();
  return true;
}

void P2pQueues::grant(Peer& peer) {
  while (!peer.wanted.empty() && peer.incoming.size() < kGrants) {
    peer.channel.grant(peer.wanted.front().id);
    peer.incoming.splice(peer.incoming.end(), peer.wanted, peer.wanted.begin());
  }
}

// Copies one piece out of the peer's stream.
bool P2pQueues::drain(Peer& peer) {
  const uint8_t* piece = peer.channel.next_piece();
  if (piece == nullptr) return false;
  const P2pOps::iterator op = peer.incoming.begin();
  const int64_t num_bytes = std::min(layout_.chunk_bytes, op->num_bytes - op->moved_bytes);
  std::memcpy(op->data + op->moved_bytes, piece, static_cast<size_t>(num_bytes));
  op->moved_bytes += num_bytes;
  if (op->moved_bytes == op->num_bytes) {
    finish(peer.incoming, op);
    grant(peer);
  }
  peer.channel.release_piece();  // after the grant: see waits_for
  return true;
}

// Puts one piece of the message whose turn it is into a free stream buffer.
bool P2pQueues::stream() {
  if (streaming_.empty() && !start_stream()) return false;
  Piece& piece = pieces_[next_buffer_ % kStreamBuffers];
  if (piece.channel != nullptr && !piece.channel->has_drained(piece.number)) return false;
  const uint32_t buffer = next_buffer_++ % kStreamBuffers;
  const P2pOps::iterator op = streaming_.begin();
  P2pChannel& channel = peer_of(*op).channel;
  const int64_t num_bytes = std::min(layout_.chunk_bytes, op->num_bytes - op->moved_bytes);
  std::memcpy(group_.slab(rank_) + layout_.stream_offset(buffer), op->data + op->moved_bytes,
              static_cast<size_t>(num_bytes));
  piece = {&channel, channel.stream(buffer)};
  op->moved_bytes += num_bytes;
  if (op->moved_bytes == op->num_bytes) finish(streaming_, op);
  return true;
}

bool P2pQueues::start_stream() {
  const int world_size = group_.world_size();
  for (int i = 0; i < world_size; ++i) {
    const int rank = (first_to_stream_ + i) % world_size;
    Peer& peer = peers_[static_cast<size_t>(rank)];
    if (peer.offered.empty() || !peer.channel.has_grant()) continue;
    const uint32_t id = peer.channel.take_grant();
    const auto op = std::find_if(peer.offered.begin(), peer.offered.end(), [&](const P2pOp& o) { return o.id == id; });
    if (op == peer.offered.end()) {
      group_.fail(Error(ErrorKind::wire, concat("rank ", rank, " of group '", group_.name(), "' asks rank ", rank_,
                                                " for message ", id, ", which it does not have. ", kCommunicatorLost)));
    }
    streaming_.splice(streaming_.end(), peer.offered, op);
    first_to_stream_ = rank + 1;
    return true;
  }
  return false;
}

// ---- failing -------------------------------------------------------------------------------------

std::vector<P2pOps*> P2pQueues::all_lists() {
  std::vector<P2pOps*> lists{&posted_, &streaming_};
  for (Peer& peer : peers_) {
    for (P2pOps* list : {&peer.outbox, &peer.offered, &peer.wanted, &peer.incoming}) lists.push_back(list);
  }
  for (Arrival& arrival : arrived_) lists.push_back(&arrival.own);
  return lists;
}

void P2pQueues::fail_all(std::exception_ptr error) {
  for (P2pOps* list : all_lists()) {
    for (P2pOp& op : *list) op.error = error;
    finished_.splice(finished_.end(), *list);
  }
  arrived_.clear();
  for (Peer& peer : peers_) peer.expected = 0;
  expected_from_any_ = 0;
}

void P2pQueues::fail_unmatched(std::exception_ptr error) {
  const auto fail = [&](P2pOps& list) {
    for (P2pOp& op : list) op.error = error;
    finished_.splice(finished_.end(), list);
  };
  fail(posted_);
  for (Arrival& arrival : arrived_) fail(arrival.own);
  arrived_.clear();
  for (Peer& peer : peers_) peer.expected = 0;
  expected_from_any_ = 0;
}

void P2pQueues::check(std::chrono::steady_clock::time_point now) {
  for (const P2pOps* list : all_lists()) {
    for (const P2pOp& op : *list) {
      if (now >= op.deadline) fail_deadline(op);
    }
  }
  bool someone_lives = group_.world_size() == 1;
  for (int rank = 0; rank < group_.world_size(); ++rank) {
    if (rank == rank_) continue;
    check_left(rank);
    someone_lives = someone_lives || group_.lifecycle(rank) != Lifecycle::closed;
  }
  if (someone_lives || expected_from_any_ == 0 || progress()) return;
  fail_left(*std::find_if(posted_.begin(), posted_.end(), [](const P2pOp& op) { return op.peer == kAnySource; }),
            kAnySource);
}

void P2pQueues::check_left(int rank) {
  const Lifecycle state = group_.lifecycle(rank);
  if (state != Lifecycle::closed && state != Lifecycle::closing) return;
  // It may have done its part before it left. While anything moves, this is asked again later.
  if (waits_for(rank, state) == nullptr || progress()) return;
  if (const P2pOp* op = waits_for(rank, state)) fail_left(*op, rank);
}

// An operation that cannot finish without more from a rank that is in this state.
const P2pOp* P2pQueues::waits_for(int rank, Lifecycle state) {
  Peer& peer = peers_[static_cast<size_t>(rank)];
  if (!peer.outbox.empty()) return &peer.outbox.front();
  // A rank that is closing grants what it had matched, the next one before it is done with the last.
  const bool streams = !streaming_.empty() && streaming_.front().peer == rank;
  const bool idle = !streams && peer.channel.all_drained();
  if (!peer.offered.empty() && idle && !peer.channel.has_grant()) return &peer.offered.front();
  if (state == Lifecycle::closing) return nullptr;  // it still finishes what it has begun to send or to receive
  for (const P2pOps* list : {&peer.wanted, &peer.incoming}) {
    if (!list->empty()) return &list->front();
  }
  if (streams) return &streaming_.front();
  const auto receive = std::find_if(posted_.begin(), posted_.end(), [&](const P2pOp& op) { return op.peer == rank; });
  return receive == posted_.end() ? nullptr : &*receive;
}

// "recv of 400 bytes with tag 7 from rank 1"
std::string P2pQueues::describe(const P2pOp& op) const {
  return concat(op.is_send ? "send of " : "recv of ", op.num_bytes, " bytes with tag ", op.tag,
                op.is_send ? " to " : " from ", op.peer == kAnySource ? "any rank" : concat("rank ", op.peer));
}

void P2pQueues::fail_mismatch(const P2pOp& receive, const Arrival& arrival) {
  group_.fail(Error(
      ErrorKind::mismatch,
      concat("ranks of group '", group_.name(), "' disagree about a message: rank ", arrival.source, " called send of ",
             arrival.header.num_bytes, " bytes with tag ", arrival.header.tag, " to rank ", rank_, ", rank ", rank_,
             " called ", describe(receive), ". Nothing was received. ", kCommunicatorLost)));
}

void P2pQueues::fail_deadline(const P2pOp& op) {
  const bool any = op.peer == kAnySource;
  const std::string who =
      any ? std::string("no rank sent it")
          : concat(group_.name_with_pid(op.peer), " did not ", op.is_send ? "receive it" : "send it");
  const std::string where = any || op.peer == rank_ ? std::string() : concat("; ", group_.where_is(op.peer));
  group_.fail(
      Error(ErrorKind::deadline,
            concat(who, " within ", static_cast<double>(group_.timeout().count()) / 1e9, " s: rank ", rank_,
                   " waits in ", describe(op), " of group '", group_.name(), "'", where,
                   ". Look for a call with another tag or rank, one that is missing or slow, or raise timeout=. ",
                   kCommunicatorLost),
            op.peer));
}

void P2pQueues::fail_left(const P2pOp& op, int rank) {
  group_.fail(Error(ErrorKind::peer_lost,
                    concat(rank == kAnySource ? std::string("every other rank") : group_.name_with_pid(rank),
                           " closed group '", group_.name(), "'; rank ", rank_, " still waits in ", describe(op),
                           ". Every message must be sent and received before a rank closes. ", kCommunicatorLost),
                    rank));
}

}  // namespace ringcomm
