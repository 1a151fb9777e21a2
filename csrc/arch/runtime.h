// What kernels' launches ask of the CUDA runtime; bindings/runtime.cpp.
#pragma once

#include <cuda_runtime_api.h>

namespace fastlm {

// Lets blocks of a kernel have so many bytes of shared memory on the current device. What they may
// have never becomes less: another thread may be about to launch it with more.
cudaError_t grant_shared(const void* kernel, int bytes);

}  // namespace fastlm
