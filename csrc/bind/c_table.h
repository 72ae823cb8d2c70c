// The core for extension modules that cannot share its C++ types: a table of C functions and an
// opaque communicator, both handed over in a PyCapsule. One build of _core serves adapters built
// against any torch and any pybind11.
//
// Ids of operations, dtypes, ... are looked up by name once, so an adapter needs no other header.
// All functions may be called from any thread, with or without the GIL; those that block should be
// called without it. None throws. Functions with an `error` fill it unless they return RC_OK.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// A table of version N has the functions of N at their places; a newer core may append more.
#define RC_TABLE_VERSION 3
#define RC_TABLE_CAPSULE "ringcomm._core.c_table"
#define RC_COMM_CAPSULE "ringcomm._core.Communicator"

typedef struct rc_comm rc_comm;

// 0, or an ErrorKind of base/error.h, or RC_INTERRUPTED.
typedef int32_t rc_status;
enum {
  RC_OK = 0,
  RC_USAGE = 1,
  RC_MISMATCH = 2,
  RC_PEER_LOST = 3,
  RC_DEADLINE = 4,
  RC_ABORTED = 5,
  RC_DEVICE = 6,
  RC_WIRE = 7,
  RC_SYSTEM = 8,
  RC_INTERRUPTED = 100,  // a signal handler raised: the Python error of this thread is set
};

typedef int32_t rc_device_mode;
enum {
  RC_DEVICE_NONE = -1,
  RC_DEVICE_BLOCKS = 0,  // run() returns when they are done
  RC_DEVICE_QUEUES = 1,  // run() returns when they are queued on the stream
};

typedef struct rc_error {
  rc_status kind;
  int32_t culprit_rank;  // -1: no single rank
  char text[2040];       // UTF-8, zero terminated
} rc_error;

// One rank's part; `data` of a part that is sent is not written.
typedef struct rc_part {
  void* data;
  int64_t count;
} rc_part;

// One array of a list; fields as in rc_call.
typedef struct rc_array {
  const void* input;
  void* output;
  int64_t count;
  int32_t dtype;
  uint32_t reserved;
} rc_array;

// One call of one collective; fields as in Collective (algo/collective.h).
typedef struct rc_call {
  int32_t op;
  int32_t dtype;
  int32_t reduce_op;
  int32_t algo;             // -1: the table chooses
  int32_t root;             // -1 where there is none
  uint32_t wait_all_ranks;  // monitored_barrier: an error says of every late rank where it is
  int64_t count;
  const void* input;
  void* output;
  const rc_part* sends;     // world_size parts or null; an all_to_all without any cuts input and output evenly
  const rc_part* receives;  // world_size parts or null
  double factor;            // of premul_sum
  double timeout_s;         // 0: the communicator's
  const char* tag;          // null: none
  void* stream;             // cudaStream_t; with on_device
  uint32_t on_device;       // memory is that of this rank's GPU
  uint32_t is_list;         // all_reduce, all_gather, reduce_scatter: arrays instead of input, output, count and dtype
  const rc_array* arrays;
  int64_t num_arrays;
} rc_call;

// Called once when a call has ended: `error` is null on success and valid only during the callback;
// `source` is the sender of a received message, -1 in any other case. Runs in a thread of the core,
// without the GIL, or inside submit(). Must neither block nor throw.
typedef void (*rc_done)(void* context, const rc_error* error, int32_t source);

typedef struct rc_table {
  uint32_t version;  // RC_TABLE_VERSION of the core
  uint32_t size;     // sizeof(rc_table) of the core

  // The id of a name such as "all_reduce", "float32", "sum", "ring"; -1: this core has none.
  int32_t (*op_id)(const char* name);
  int32_t (*dtype_id)(const char* name);
  int32_t (*reduce_op_id)(const char* name);
  int32_t (*algo_id)(const char* name);

  // One more reference to the communicator. Every one is given back with release(); the last one
  // closes the communicator, waiting for pending calls.
  rc_comm* (*retain)(rc_comm* comm);
  void (*release)(rc_comm* comm);

  // Runs one collective in this thread and returns when it has ended.
  rc_status (*run)(rc_comm* comm, const rc_call* call, rc_error* error);
  // Queues one collective; memory must stay valid until `done` is called, the rc_call and its part
  // arrays only until submit() returns. `done` is called if and only if RC_OK is returned.
  rc_status (*submit)(rc_comm* comm, const rc_call* call, rc_done done, void* context, rc_error* error);

  // Starts a message of num_bytes bytes to or from a rank (-1: from any), which goes on by itself.
  // Otherwise as submit(). Messages are no part of the order of collectives.
  rc_status (*send)(rc_comm* comm, const void* data, int64_t num_bytes, int32_t to_rank, int32_t tag, rc_done done,
                    void* context, rc_error* error);
  rc_status (*receive)(rc_comm* comm, void* data, int64_t num_bytes, int32_t from_rank, int32_t tag, rc_done done,
                       void* context, rc_error* error);

  // Finishes pending calls, bounded by the deadline, and leaves the group. Idempotent, not collective.
  rc_status (*close)(rc_comm* comm, rc_error* error);
  // Makes every rank's current and later calls fail with RC_ABORTED. Never waits.
  rc_status (*abort)(rc_comm* comm, const char* reason, rc_error* error);
  rc_status (*set_timeout)(rc_comm* comm, double timeout_s, rc_error* error);
  // What every later call would fail with; RC_OK: nothing.
  rc_status (*fault)(rc_comm* comm, rc_error* error);

  // How calls on GPUs end: RC_DEVICE_NONE, before this communicator has any; else as the group agreed.
  rc_device_mode (*device_mode)(rc_comm* comm);
  // Returns when all calls on GPUs that run() has queued are done.
  rc_status (*finish_device)(rc_comm* comm, rc_error* error);
} rc_table;

#ifdef __cplusplus
}
#endif
