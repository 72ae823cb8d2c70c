#include "devices.h"

#include <cstdlib>
#include <map>
#include <mutex>
#include <sstream>
#include <string>

#include "base/error.h"

namespace simt {
namespace {

int number_in(const char* name, int otherwise, int most) {
  const char* const text = getenv(name);
  if (text == nullptr || *text == '\0') return otherwise;
  char* end = nullptr;
  const long value = strtol(text, &end, 10);
  RC_CHECK(*end == '\0' && value >= 0 && value <= most, name, " must be a number from 0 to ", most, ", not '", text,
           "'");
  return static_cast<int>(value);
}

struct Range {
  int64_t num_bytes;
  int device;
  uint64_t id;
  std::string path;
};

struct Places {
  std::mutex mutex;
  std::map<uintptr_t, Range> ranges;  // by their address; disjoint
  uint64_t last_id = 0;

  // Null: the address is in none.
  const std::pair<const uintptr_t, Range>* find(const void* address) const {
    const uintptr_t number = reinterpret_cast<uintptr_t>(address);
    auto after = ranges.upper_bound(number);
    if (after == ranges.begin()) return nullptr;
    --after;
    return number - after->first < static_cast<uintptr_t>(after->second.num_bytes) ? &*after : nullptr;
  }
};

Places& places() {
  static Places* const all = new Places;  // outlives every static object that frees memory
  return *all;
}

}  // namespace

const std::vector<int>& visible_devices() {
  static const std::vector<int> visible = [] {
    const int count = number_in("RINGCOMM_SIMT_DEVICES", 1, 64);
    std::vector<int> devices;
    const char* const named = getenv("RINGCOMM_SIMT_VISIBLE");
    if (named == nullptr) {
      for (int i = 0; i < count; ++i) devices.push_back(i);
      return devices;
    }
    std::istringstream text(named);
    for (std::string part; std::getline(text, part, ',');) {
      const int device = part.empty() ? -1 : atoi(part.c_str());
      if (device < 0 || device >= count) break;  // as CUDA does: what follows is not seen
      devices.push_back(device);
    }
    return devices;
  }();
  return visible;
}

bool peers_reach_each_other() { return number_in("RINGCOMM_SIMT_PEERS", 1, 1) != 0; }
bool is_shared_concurrently() { return number_in("RINGCOMM_SIMT_CONCURRENT", 0, 1) != 0; }

bool exports_descriptors() {
  const char* const text = getenv("RINGCOMM_SIMT_EXPORT");
  const std::string kind = text == nullptr ? "descriptor" : text;
  RC_CHECK(kind == "descriptor" || kind == "legacy", "RINGCOMM_SIMT_EXPORT must be descriptor or legacy, not '", kind,
           "'");
  return kind == "descriptor";
}

void place(const void* address, int64_t num_bytes, int device, const std::string& path) {
  const std::lock_guard<std::mutex> lock(places().mutex);
  places().ranges[reinterpret_cast<uintptr_t>(address)] = Range{num_bytes, device, ++places().last_id, path};
}

void forget_place(const void* address) {
  const std::lock_guard<std::mutex> lock(places().mutex);
  places().ranges.erase(reinterpret_cast<uintptr_t>(address));
}

int device_of(const void* address, int otherwise) {
  const std::lock_guard<std::mutex> lock(places().mutex);
  const auto* found = places().find(address);
  return found == nullptr ? otherwise : found->second.device;
}

Placed placed_at(const void* address) {
  const std::lock_guard<std::mutex> lock(places().mutex);
  const auto* found = places().find(address);
  if (found == nullptr) return {};
  const auto& [begin, range] = *found;
  return {begin, range.num_bytes, range.id, range.path};
}

}  // namespace simt
