// What the library asks of the CUDA runtime beside launches: in one place, for all kernels.
#ifndef FASTLM_SIMT
#include "arch/runtime.h"

#include <map>
#include <mutex>
#include <utility>

namespace fastlm {

cudaError_t grant_shared(const void* kernel, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> granted;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  if (error == cudaSuccess) {
    int& most = granted[{kernel, device}];
    if (bytes <= most) return cudaSuccess;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) most = bytes;
  }
  cudaGetLastError();  // or the next launch would find the error
  return error;
}

}  // namespace fastlm

// Versions of CUDA, 13000 for 13.0: of the runtime in this library, and the newest that the driver
// knows, 0 where there is no driver. For fastlm/cuda_library.py, by ctypes.
extern "C" __attribute__((visibility("default"))) void fastlm_cuda_versions(int* runtime,
                                                                            int* driver) {
  *runtime = *driver = 0;
  cudaRuntimeGetVersion(runtime);
  cudaDriverGetVersion(driver);
}
#endif
