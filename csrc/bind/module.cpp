#include "bind/bind.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "ringcomm's core: transports, algorithms and codecs. Pointers, counts and enums only; no torch.";
  ringcomm::bind::bind_errors(module);
  ringcomm::bind::bind_log(module);
  ringcomm::bind::bind_simd(module);
  ringcomm::bind::bind_device(module);
  ringcomm::bind::bind_codec(module);
  ringcomm::bind::bind_dlpack(module);
  ringcomm::bind::bind_device_group(module);
  ringcomm::bind::bind_comm(module);
  ringcomm::bind::bind_c_table(module);
#if defined(RC_SIMT)
  ringcomm::bind::bind_simt(module);
#endif
}
