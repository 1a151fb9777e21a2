// Shuffles and barriers.
#pragma once

#include "platform.cuh"

namespace fastlm {

constexpr int kWarp = 32;

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

// The value of the lane whose number differs in the bits of `mask`. All 32 lanes take part.
__device__ __forceinline__ float shuffle_xor(float x, int mask) {
#ifdef FASTLM_SIMT
  return simt::shuffle(x, simt::lane() ^ mask);
#else
  return __shfl_xor_sync(0xffffffffu, x, mask);
#endif
}

// The value of lane `lane`. All 32 lanes take part.
__device__ __forceinline__ float shuffle(float x, int lane) {
#ifdef FASTLM_SIMT
  return simt::shuffle(x, lane);
#else
  return __shfl_sync(0xffffffffu, x, lane);
#endif
}

__device__ __forceinline__ uint32_t shuffle_xor(uint32_t x, int mask) {
#ifdef FASTLM_SIMT
  return simt::shuffle(x, simt::lane() ^ mask);
#else
  return __shfl_xor_sync(0xffffffffu, x, mask);
#endif
}

// Waits for all threads of the block, and shows each what the others wrote.
__device__ __forceinline__ void sync_block() {
#ifdef FASTLM_SIMT
  simt::sync_block();
#else
  __syncthreads();
#endif
}

// The same for `threads` of them, whole warps, which all name the same `barrier`: 1 to 15.
__device__ __forceinline__ void sync_threads(int barrier, int threads) {
#ifdef FASTLM_SIMT
  simt::sync_threads(barrier, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#endif
}

// The same for the 32 lanes of a warp.
__device__ __forceinline__ void sync_warp() {
#ifdef FASTLM_SIMT
  simt::sync_warp();
#else
  __syncwarp();
#endif
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

}  // namespace fastlm
