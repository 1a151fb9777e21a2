// The compiler of the day: nvcc for a GPU, or g++ for the host build of tests/simt, which runs the
// same kernels with one fiber for each CUDA thread. Nothing outside of arch/ asks which one it is.
//
// What the lanes of a warp do together is forced inline: the host build tells by the place of a call
// whether lanes are at the same one.
#pragma once

#ifdef FASTLM_SIMT
#include "simt.h"
#else
#include <cuda_runtime.h>

#include "runtime.h"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

namespace fastlm {

// Shared memory of a block, as much as its launch asked for. Kernels declare no other: the host
// build fills this one with NaN before each block.
template <typename T>
__device__ inline T* shared_memory() {
#ifdef FASTLM_SIMT
  return static_cast<T*>(simt::shared_memory());
#else
  extern __shared__ __align__(128) unsigned char fastlm_shared[];
  return reinterpret_cast<T*>(fastlm_shared);
#endif
}

// Hides from the compiler what it knows of x: what follows from x is then computed where it is used,
// and not before a loop, to wait in registers.
__device__ inline void forget(int& x) {
#ifdef FASTLM_SIMT
  (void)x;
#else
  asm volatile("" : "+r"(x));
#endif
}
__device__ inline void forget(int64_t& x) {
#ifdef FASTLM_SIMT
  (void)x;
#else
  asm volatile("" : "+l"(x));
#endif
}

// A kernel, and the most threads of a block and bytes of shared memory that its launches ask for;
// kAllShared: as many as the device has for a block. csrc/build.py reads them in the object files,
// where `used` keeps the names of all `bounded`, and fastlm._C has them.
constexpr int kAllShared = -1;

template <typename... Params>
struct Bounded {
  void (*kernel)(Params...);
  int threads, shared_bytes;
};
template <typename... Params>
Bounded(void (*)(Params...), int, int) -> Bounded<Params...>;

template <auto kKernel, int kThreads, int kSharedBytes>
__attribute__((used)) constexpr Bounded bounded{kKernel, kThreads, kSharedBytes};

// Launches kernel(args...) and returns what the launch itself says; faults inside come later.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
                   cudaStream_t stream, const Args&... args) {
#ifdef FASTLM_SIMT
  (void)stream;
  return simt::launch(kernel, grid, dim3(static_cast<unsigned>(threads)),
                      shared_bytes, args...);
#else
  // More than 48 KiB is granted only to kernels that ask for it.
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        grant_shared(reinterpret_cast<const void*>(kernel), static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(args...);
  return cudaGetLastError();
#endif
}

// The same with all threads and bytes that `most` has.
template <typename... Params, typename... Args>
cudaError_t launch(const Bounded<Params...>& most, dim3 grid, cudaStream_t stream,
                   const Args&... args) {
  return launch(most.kernel, grid, most.threads, static_cast<size_t>(most.shared_bytes), stream,
                args...);
}

}  // namespace fastlm
