#include "base/simd.h"

#include "bind/bind.h"

namespace ringcomm::bind {

void bind_simd(pybind11::module_& module) {
  module.def("simd_level", [] { return simd_level_name(simd_level()); });
  module.def("best_simd_level", [] { return simd_level_name(best_simd_level()); });
  module.def("set_simd_level", &set_simd_level, pybind11::arg("name"));
}

}  // namespace ringcomm::bind
