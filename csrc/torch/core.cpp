#include "torch/core.h"

#include <pybind11/pybind11.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cstring>

namespace ringcomm::adapter {
namespace {

// torch's types by the names of base/dtype.h.
const char* core_name(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    case at::kChar:
      return "int8";
    case at::kShort:
      return "int16";
    case at::kInt:
      return "int32";
    case at::kLong:
      return "int64";
    case at::kByte:
      return "uint8";
    case at::kUInt16:
      return "uint16";
    case at::kUInt32:
      return "uint32";
    case at::kUInt64:
      return "uint64";
    case at::kBool:
      return "bool";
    case at::kComplexFloat:
      return "complex64";
    case at::kComplexDouble:
      return "complex128";
    case at::kFloat8_e4m3fn:
      return "float8_e4m3fn";
    case at::kFloat8_e5m2:
      return "float8_e5m2";
    case at::kFloat8_e4m3fnuz:
      return "float8_e4m3fnuz";
    case at::kFloat8_e5m2fnuz:
      return "float8_e5m2fnuz";
    case at::kFloat8_e8m0fnu:
      return "float8_e8m0fnu";
    default:  // torch has more types than travel as themselves
      return nullptr;
  }
}

const char* core_name(c10d::ReduceOp::RedOpType op) {
  switch (op) {
    case c10d::ReduceOp::SUM:
      return "sum";
    case c10d::ReduceOp::AVG:
      return "avg";
    case c10d::ReduceOp::PRODUCT:
      return "product";
    case c10d::ReduceOp::MIN:
      return "min";
    case c10d::ReduceOp::MAX:
      return "max";
    case c10d::ReduceOp::BAND:
      return "band";
    case c10d::ReduceOp::BOR:
      return "bor";
    case c10d::ReduceOp::BXOR:
      return "bxor";
    case c10d::ReduceOp::PREMUL_SUM:
      return "premul_sum";
    case c10d::ReduceOp::UNUSED:
      break;
  }
  return "unused";
}

// Ids by torch's enum value, looked up once.
template <typename Enum, size_t kCount, typename Lookup>
const std::array<int32_t, kCount>& ids(Lookup lookup) {
  static const std::array<int32_t, kCount> table = [&] {
    std::array<int32_t, kCount> found{};
    for (size_t value = 0; value < kCount; ++value) {
      const char* name = core_name(static_cast<Enum>(value));
      found[value] = name == nullptr ? -1 : lookup(name);
    }
    return found;
  }();
  return table;
}
constexpr size_t kNumScalarTypes = static_cast<size_t>(at::ScalarType::NumOptions);
constexpr size_t kNumReduceOps = static_cast<size_t>(c10d::ReduceOp::UNUSED) + 1;

}  // namespace

Core::Core(const rc_table* table, rc_comm* comm) : table_(table), comm_(nullptr) {
  TORCH_CHECK(table->version == RC_TABLE_VERSION && table->size >= sizeof(rc_table),
              "ringcomm._core and ringcomm._c10d do not fit together (interface ", table->version, " and ",
              RC_TABLE_VERSION, "): reinstall ringcomm");
  comm_ = table->retain(comm);
  ops_ = {table->op_id("barrier"),    table->op_id("monitored_barrier"),
          table->op_id("all_reduce"), table->op_id("broadcast"),
          table->op_id("all_gather"), table->op_id("reduce_scatter"),
          table->op_id("reduce"),     table->op_id("gather"),
          table->op_id("scatter"),    table->op_id("all_to_all")};
  bytes_ = table->dtype_id("uint8");
}

Core::~Core() { table_->release(comm_); }

Elements Core::moved(at::ScalarType type) const {
  const int32_t dtype = ids<at::ScalarType, kNumScalarTypes>(table_->dtype_id)[static_cast<size_t>(type)];
  if (dtype >= 0) return {dtype, 1};
  return {bytes_, static_cast<int64_t>(c10::elementSize(type))};
}

Elements Core::reduced(at::ScalarType type) const {
  const int32_t dtype = ids<at::ScalarType, kNumScalarTypes>(table_->dtype_id)[static_cast<size_t>(type)];
  TORCH_CHECK_VALUE(dtype >= 0, "Invalid scalar type: ringcomm cannot reduce ", type);
  return {dtype, 1};
}

int32_t Core::reduce_op(const c10d::ReduceOp& op) const {
  const int32_t id = ids<c10d::ReduceOp::RedOpType, kNumReduceOps>(table_->reduce_op_id)[static_cast<size_t>(op.op_)];
  TORCH_CHECK_VALUE(id >= 0, "invalid reduce operation: ringcomm has no ", core_name(op.op_));
  return id;
}

void Core::run(const rc_call& call) const {
  rc_error error;
  if (try_run(call, &error) != RC_OK) std::rethrow_exception(to_exception(error));
}

rc_status Core::try_run(const rc_call& call, rc_error* error) const {
  const WithoutGil released;
  return table_->run(comm_, &call, error);
}

void Core::submit(const rc_call& call, rc_done done, void* context) const {
  rc_error error;
  if (table_->submit(comm_, &call, done, context, &error) != RC_OK) std::rethrow_exception(to_exception(error));
}

void Core::send(const void* data, int64_t num_bytes, int to_rank, int tag, rc_done done, void* context) const {
  rc_error error;
  if (try_send(data, num_bytes, to_rank, tag, done, context, &error) != RC_OK)
    std::rethrow_exception(to_exception(error));
}

rc_status Core::try_send(const void* data, int64_t num_bytes, int to_rank, int tag, rc_done done, void* context,
                         rc_error* error) const {
  return table_->send(comm_, data, num_bytes, to_rank, tag, done, context, error);
}

void Core::receive(void* data, int64_t num_bytes, int from_rank, int tag, rc_done done, void* context) const {
  rc_error error;
  if (table_->receive(comm_, data, num_bytes, from_rank, tag, done, context, &error) != RC_OK)
    std::rethrow_exception(to_exception(error));
}

void Core::close() const {
  rc_error error;
  rc_status status;
  {
    WithoutGil released;
    status = table_->close(comm_, &error);
  }
  if (status != RC_OK) std::rethrow_exception(to_exception(error));
}

void Core::abort(const std::string& reason) const {
  rc_error error;
  // A communicator that is closed already has nothing left to abort.
  if (table_->abort(comm_, reason.c_str(), &error) != RC_OK && error.kind != RC_ABORTED)
    std::rethrow_exception(to_exception(error));
}

void Core::set_timeout(double timeout_s) const {
  rc_error error;
  if (table_->set_timeout(comm_, timeout_s, &error) != RC_OK) std::rethrow_exception(to_exception(error));
}

rc_status Core::fault() const {
  rc_error error;
  return table_->fault(comm_, &error);
}

void Core::throw_fault() const {
  rc_error error;
  if (table_->fault(comm_, &error) != RC_OK) std::rethrow_exception(to_exception(error));
}

void Core::finish_device() const {
  rc_error error;
  rc_status status;
  {
    const WithoutGil released;
    status = table_->finish_device(comm_, &error);
  }
  if (status != RC_OK) std::rethrow_exception(to_exception(error));
}

std::exception_ptr to_exception(const rc_error& error) {
  try {
    switch (error.kind) {
      case RC_USAGE:
        C10_THROW_ERROR(ValueError, error.text);
      case RC_INTERRUPTED: {
        pybind11::gil_scoped_acquire acquire;
        throw pybind11::error_already_set();
      }
      case RC_DEADLINE:  // torch's tools look for these words
        C10_THROW_ERROR(DistBackendError, c10::str("ringcomm: Timed out waiting: ", error.text));
      default:
        C10_THROW_ERROR(DistBackendError, c10::str("ringcomm: ", error.text));
    }
  } catch (...) {
    return std::current_exception();
  }
}

rc_error make_error(rc_status kind, const char* text) {
  rc_error error{kind, -1, {}};
  std::strncpy(error.text, text, sizeof(error.text) - 1);
  return error;
}

WithoutGil::WithoutGil() {
  if (Py_IsInitialized() != 0 && PyGILState_Check() != 0) state_ = PyEval_SaveThread();
}

WithoutGil::~WithoutGil() {
  if (state_ != nullptr) PyEval_RestoreThread(static_cast<PyThreadState*>(state_));
}

void check_python_signals() {
  if (::syscall(SYS_gettid) != ::getpid() || Py_IsInitialized() == 0) return;
  pybind11::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

}  // namespace ringcomm::adapter
