// What -fsanitize=thread and -fsanitize=alignment,bounds,shift call at every access of a .cu file. The sanitizers' own
// libraries are not linked.
#include <cstring>

#include "machine.h"

namespace simt {
namespace {

void accessed(const void* address, unsigned bytes, bool write, bool needs_alignment, const void* code) {
  if (machine().inside) return;
  Inside inside;
  check_access(reinterpret_cast<uintptr_t>(address), bytes, write, false, needs_alignment, code);
  maybe_switch();
}

// Of GCC's undefined-behaviour sanitizer (libsanitizer/ubsan).
struct SourceLocation {
  const char* file;
  uint32_t line;
  uint32_t column;
};

std::string at(const SourceLocation& location) {
  const char* const slash = strrchr(location.file, '/');
  return std::string(slash == nullptr ? location.file : slash + 1) + ":" + std::to_string(location.line);
}

void undefined(const char* kind, const SourceLocation& location, const std::string& what) {
  if (machine().inside) return;
  Inside inside;
  report(std::string(kind) + ": " + where(*machine().current) + " (" + at(location) + ") " + what, kind + at(location));
}

}  // namespace
}  // namespace simt

extern "C" {

#define SIMT_HOOK(name, bytes, write, aligned) \
  void name(void* address) { simt::accessed(address, bytes, write, aligned, __builtin_return_address(0)); }
#define SIMT_HOOKS(bytes)                                      \
  SIMT_HOOK(__tsan_read##bytes, bytes, false, true)            \
  SIMT_HOOK(__tsan_write##bytes, bytes, true, true)            \
  SIMT_HOOK(__tsan_unaligned_read##bytes, bytes, false, false) \
  SIMT_HOOK(__tsan_unaligned_write##bytes, bytes, true, false)
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)

void __tsan_read_range(void* address, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    simt::accessed(static_cast<char*>(address) + i, 1, false, false, __builtin_return_address(0));
  }
}
void __tsan_write_range(void* address, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    simt::accessed(static_cast<char*>(address) + i, 1, true, false, __builtin_return_address(0));
  }
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}

// A wide vector is split into its parts before the hooks above see it; this one sees the whole.
void __ubsan_handle_type_mismatch_v1(void* data, uintptr_t address) {
  struct Data {
    simt::SourceLocation location;
    const void* type;
    uint8_t log_alignment;
    uint8_t check;
  };
  const Data& mismatch = *static_cast<Data*>(data);
  if (simt::machine().inside) return;
  simt::undefined("misaligned", mismatch.location,
                  "accesses " + simt::describe_address(address) + ", which is not a multiple of " +
                      std::to_string(1u << mismatch.log_alignment) + ": take the element-wise path for such arrays");
  simt::abandon();  // the processor may fault on it, too
}
void __ubsan_handle_out_of_bounds(void* data, uintptr_t index) {
  simt::undefined("out of bounds", *static_cast<simt::SourceLocation*>(data),
                  "takes element " + std::to_string(static_cast<intptr_t>(index)) + " of a shorter array");
}
void __ubsan_handle_shift_out_of_bounds(void* data, uintptr_t, uintptr_t by) {
  simt::undefined(
      "shift", *static_cast<simt::SourceLocation*>(data),
      "shifts by " + std::to_string(static_cast<intptr_t>(by)) + ", which its type has not as many bits for");
}

}  // extern "C"
