#include "base/nvml.h"

#include <dlfcn.h>

#include <cstdio>
#include <type_traits>
#include <utility>

#include "base/error.h"

namespace ringcomm::nvml {
namespace {

constexpr const char* kLibrary = "libnvidia-ml.so.1";
// As nvml.h numbers them.
constexpr int kSuccess = 0;
constexpr int kCapabilityNvlink = 2;
constexpr int kStatusOk = 0;

using DeviceHandle = void*;

struct Library {
  int (*init)() = nullptr;
  int (*handle_by_uuid)(const char* uuid, DeviceHandle* device) = nullptr;
  int (*p2p_status)(DeviceHandle device, DeviceHandle peer, int capability, int* status) = nullptr;
  std::string problem;  // empty: it can be asked
};

const Library& library() {
  static const Library loaded = [] {
    Library found;
    void* const handle = ::dlopen(kLibrary, RTLD_LAZY | RTLD_LOCAL);
    if (handle == nullptr) {
      found.problem = ::dlerror();
      return found;
    }
    const auto find = [&](const char* symbol, auto& function) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(::dlsym(handle, symbol));
      if (function == nullptr) found.problem = concat(kLibrary, " has no ", symbol);
    };
    find("nvmlInit_v2", found.init);
    find("nvmlDeviceGetHandleByUUID", found.handle_by_uuid);
    find("nvmlDeviceGetP2PStatus", found.p2p_status);
    if (!found.problem.empty()) return found;
    const int status = found.init();
    if (status != kSuccess) found.problem = concat("nvmlInit_v2 failed with ", status);
    return found;
  }();
  return loaded;
}

// "GPU-01234567-89ab-cdef-0123-456789abcdef"
std::string text_of(const std::array<uint8_t, 16>& uuid) {
  std::string text = "GPU-";
  for (size_t i = 0; i < uuid.size(); ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    char digits[3];
    std::snprintf(digits, sizeof(digits), "%02x", uuid[i]);
    text += digits;
  }
  return text;
}

}  // namespace

std::optional<bool> linked_by_nvlink(const std::array<uint8_t, 16>& uuid, const std::array<uint8_t, 16>& peer_uuid,
                                     std::string* reason) {
  const Library& nvml = library();
  *reason = nvml.problem;
  if (!reason->empty()) return {};
  DeviceHandle device = nullptr;
  DeviceHandle peer = nullptr;
  for (const auto& [one, handle] : {std::pair{&uuid, &device}, std::pair{&peer_uuid, &peer}}) {
    const int status = nvml.handle_by_uuid(text_of(*one).c_str(), handle);
    if (status == kSuccess) continue;
    *reason = concat("nvmlDeviceGetHandleByUUID of ", text_of(*one), " failed with ", status);
    return {};
  }
  int answer = 0;
  const int status = nvml.p2p_status(device, peer, kCapabilityNvlink, &answer);
  if (status == kSuccess) return answer == kStatusOk;
  *reason = concat("nvmlDeviceGetP2PStatus failed with ", status);
  return {};
}

}  // namespace ringcomm::nvml
