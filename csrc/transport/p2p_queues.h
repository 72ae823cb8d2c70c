// The messages of one rank that are not finished, and how they move.
//
// A message of at most eager_bytes travels in a slot beside its header: the sender is done once it has
// written it. A longer one puts its header into a slot; the receiver grants it once a receive matches,
// and the sender streams it through its stream buffers, one message at a time. Whoever granted is
// draining, so the stream never waits for a receive that nobody posted.
//
// A header is taken off its slot only while some receive could match it: what nobody asks for stays in
// the sender's eight slots and holds up the sender, and what arrives before its turn (another tag) is
// kept here. Messages of one sender match in the order in which they were sent, receives in the order
// in which they were posted.
//
// Nothing here blocks or locks. P2pEngine decides which thread runs it.
#pragma once

#include <chrono>
#include <exception>
#include <functional>
#include <list>
#include <vector>

#include "transport/p2p_channel.h"
#include "transport/shm_group.h"

namespace ringcomm {

constexpr int kAnySource = -1;

// One message to send or to receive.
struct P2pOp {
  bool is_send = false;
  int peer = kAnySource;  // a receive from anyone: whose message it got
  int tag = 0;
  uint8_t* data = nullptr;  // only read if is_send
  int64_t num_bytes = 0;
  // Called once it is finished, without locks held, on whichever thread finished it; error is null if
  // it went well.
  std::function<void(std::exception_ptr error, int source)> on_finish;

  std::chrono::steady_clock::time_point deadline;
  uint32_t id = 0;          // of a long message
  int64_t moved_bytes = 0;  // of a long message
  std::exception_ptr error;
};
using P2pOps = std::list<P2pOp>;  // operations move from list to list and never in memory

class P2pQueues {
 public:
  explicit P2pQueues(ShmGroup& group);

  // Takes the one element of `one`. Throws like progress().
  void post(P2pOps one);
  // Moves what can be moved now; whether anything did. Throws the group's fault, or makes one.
  bool progress();
  // Makes a fault if an operation is past its deadline, or waits for a peer that has left.
  void check(std::chrono::steady_clock::time_point now);
  // Ends everything with `error`.
  void fail_all(std::exception_ptr error);
  // Ends, with `error`, the receives for which no message has come and the messages to this rank itself.
  void fail_unmatched(std::exception_ptr error);
  // The operations that have finished since the last call.
  P2pOps take_finished() { return std::move(finished_); }
  // Whether a receive is posted that a message from this rank to itself would match now.
  bool awaits_own(int tag);

 private:
  struct Peer {
    P2pChannel channel;
    int expected = 0;  // receives in posted_ from this peer
    P2pOps outbox;     // sends that wait for a slot
    P2pOps offered;    // long sends whose header is out
    P2pOps wanted;     // long receives, matched, not granted yet
    P2pOps incoming;   // granted, in the order of the grants
  };
  // A message for this rank, in its slot or kept.
  struct Arrival {
    int source;
    MessageHeader header;
    bool is_here;               // else it is a long one that has to be granted
    const uint8_t* payload;     // if it is here
    std::vector<uint8_t> kept;  // what payload points to once it is off its slot
    P2pOps own;                 // the send, if this rank sent it to itself
  };

  Peer& peer_of(const P2pOp& op) { return peers_[static_cast<size_t>(op.peer)]; }
  P2pOps::iterator find_receive(int source, int tag);
  void match(P2pOps::iterator receive, Arrival& arrival);
  void finish(P2pOps& from, P2pOps::iterator op);
  bool flush(Peer& peer);
  bool take(int source);
  void grant(Peer& peer);
  bool drain(Peer& peer);
  bool stream();
  bool start_stream();
  void check_left(int rank);
  const P2pOp* waits_for(int rank, Lifecycle state);
  std::vector<P2pOps*> all_lists();
  std::string describe(const P2pOp& op) const;
  [[noreturn]] void fail_mismatch(const P2pOp& receive, const Arrival& arrival);
  [[noreturn]] void fail_deadline(const P2pOp& op);
  [[noreturn]] void fail_left(const P2pOp& op, int rank);

  ShmGroup& group_;
  const P2pLayout layout_;
  const int rank_;
  std::vector<Peer> peers_;  // by rank; the own one is not used
  int expected_from_any_ = 0;
  P2pOps posted_;               // receives that nothing has matched yet
  std::list<Arrival> arrived_;  // messages that no receive has matched yet
  P2pOps streaming_;            // the send that uses the stream buffers, if any
  P2pOps finished_;
  // The piece that lies in a stream buffer: of the peer, by its number.
  struct Piece {
    const P2pChannel* channel = nullptr;
    uint32_t number = 0;
  };
  Piece pieces_[kStreamBuffers];
  uint32_t next_buffer_ = 0;
  uint32_t next_id_;
  int first_to_serve_ = 0;  // the rank after the one that a receive from anyone took a message of
  int first_to_stream_ = 0;
};

}  // namespace ringcomm
