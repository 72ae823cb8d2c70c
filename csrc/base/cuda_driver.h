// What ringcomm needs of the CUDA driver that the runtime does not have. libcuda is not linked, because there is none
// on a machine without a GPU: the functions are looked up when they are first asked for.
#pragma once

#include <cuda.h>

#include "base/cuda_check.h"

namespace ringcomm {

struct CudaDriver {
  decltype(&::cuDeviceGetAttribute) device_get_attribute = nullptr;
  decltype(&::cuDeviceGetUuid) device_get_uuid = nullptr;
  decltype(&::cuDevicePrimaryCtxGetState) primary_context_state = nullptr;
  decltype(&::cuDevicePrimaryCtxRetain) retain_primary_context = nullptr;
  decltype(&::cuCtxGetCurrent) current_context = nullptr;
  decltype(&::cuCtxPushCurrent) push_context = nullptr;
  decltype(&::cuCtxPopCurrent) pop_context = nullptr;
  decltype(&::cuPointerGetAttributes) pointer_attributes = nullptr;
  decltype(&::cuMemGetAllocationGranularity) allocation_granularity = nullptr;
  decltype(&::cuMemCreate) create = nullptr;
  decltype(&::cuMemRelease) release = nullptr;
  decltype(&::cuMemAddressReserve) address_reserve = nullptr;
  decltype(&::cuMemAddressFree) address_free = nullptr;
  decltype(&::cuMemMap) map = nullptr;
  decltype(&::cuMemUnmap) unmap = nullptr;
  decltype(&::cuMemSetAccess) set_access = nullptr;
  decltype(&::cuMemExportToShareableHandle) export_handle = nullptr;
  decltype(&::cuMemImportFromShareableHandle) import_handle = nullptr;
};

// Throws DeviceError without a driver, or where it is older than CUDA 11.4 (12.4 needs a newer one).
inline const CudaDriver& cuda_driver() {
  static const CudaDriver driver = [] {
    const auto find = [](const char* symbol, auto& function) {
      void* address = nullptr;
      cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
      // Of this version, whatever the toolkit's: what decltype says above has been the same since.
      constexpr unsigned kVersion = 11040;
      RC_CUDA(cudaGetDriverEntryPointByVersion(symbol, &address, kVersion, cudaEnableDefault, &result), "looking for ",
              symbol, " in the CUDA driver");
#else
      RC_CUDA(cudaGetDriverEntryPoint(symbol, &address, cudaEnableDefault, &result), "looking for ", symbol,
              " in the CUDA driver");
#endif
      if (result != cudaDriverEntryPointSuccess || address == nullptr) {
        RC_FAIL(device, "the CUDA driver has no ", symbol, ": install a newer one");
      }
      function = reinterpret_cast<std::decay_t<decltype(function)>>(address);
    };
    CudaDriver found;
    find("cuDeviceGetAttribute", found.device_get_attribute);
    find("cuDeviceGetUuid", found.device_get_uuid);
    find("cuDevicePrimaryCtxGetState", found.primary_context_state);
    find("cuDevicePrimaryCtxRetain", found.retain_primary_context);
    find("cuCtxGetCurrent", found.current_context);
    find("cuCtxPushCurrent", found.push_context);
    find("cuCtxPopCurrent", found.pop_context);
    find("cuPointerGetAttributes", found.pointer_attributes);
    find("cuMemGetAllocationGranularity", found.allocation_granularity);
    find("cuMemCreate", found.create);
    find("cuMemRelease", found.release);
    find("cuMemAddressReserve", found.address_reserve);
    find("cuMemAddressFree", found.address_free);
    find("cuMemMap", found.map);
    find("cuMemUnmap", found.unmap);
    find("cuMemSetAccess", found.set_access);
    find("cuMemExportToShareableHandle", found.export_handle);
    find("cuMemImportFromShareableHandle", found.import_handle);
    return found;
  }();
  return driver;
}

}  // namespace ringcomm
