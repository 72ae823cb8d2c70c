// NVIDIA's management library, which comes with the driver and, unlike CUDA, names links. Not linked: loaded when it is
// first asked, and missing in many containers.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>

namespace ringcomm::nvml {

// Whether two GPUs reach each other's memory over NVLink; nothing, and the reason, where the library cannot say.
std::optional<bool> linked_by_nvlink(const std::array<uint8_t, 16>& uuid, const std::array<uint8_t, 16>& peer_uuid,
                                     std::string* reason);

}  // namespace ringcomm::nvml
