#include "bind/bind.h"

namespace ringcomm::bind {

void bind_comm(pybind11::module_&) {}

}  // namespace ringcomm::bind
