// What a launcher asks the current device.
#pragma once

#include "platform.cuh"

namespace fastlm {

// The host build's device is small, so that loops over a grid's stride turn in tests too.
struct Device {
  int multiprocessors = 3;
  int shared_bytes = 64 * 1024;  // a block may have, where its launch asks for it
  int multiprocessor_bytes = 144 * 1024;  // of shared memory, 1 KiB of each block reserved
};

inline cudaError_t current_device(Device* device) {
#ifdef FASTLM_SIMT
  *device = Device{};
  return cudaSuccess;
#else
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                 index);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(&device->multiprocessor_bytes,
                                cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
#endif
}

}  // namespace fastlm
