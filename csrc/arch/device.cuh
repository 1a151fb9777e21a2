// What a launcher asks the current device.
#pragma once

#include "platform.cuh"

namespace fastlm {

struct Device {
  int multiprocessors;
  int shared_bytes;  // a block may have, where its launch asks for it
};

inline cudaError_t current_device(Device* device) {
#ifdef FASTLM_SIMT
  // Few, so that loops over a grid's stride turn in tests too.
  *device = {3, simt::device_shared_bytes()};
  return cudaSuccess;
#else
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                index);
#endif
}

}  // namespace fastlm
