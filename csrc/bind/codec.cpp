#include "bind/bind.h"

namespace ringcomm::bind {

void bind_codec(pybind11::module_&) {}

}  // namespace ringcomm::bind
