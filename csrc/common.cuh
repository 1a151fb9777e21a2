// What several kernels share: conversions and the random numbers of dropout.
#pragma once

#include "arch/copy.cuh"
#include "arch/warp.cuh"

namespace fastlm {

template <typename Int>
__host__ __device__ constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounded to nearest even.
template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// The keep mask of dropout, bit for bit that of fastlm/reference/dropout.py: four 32-bit words for
// columns 4 * group to 4 * group + 3; a word below the threshold drops its element.
// Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011 (Philox4x32-10).
__device__ inline uint4 philox(uint64_t seed, uint32_t group, uint32_t row, uint32_t head,
                               uint32_t batch) {
  uint32_t c0 = group, c1 = row, c2 = head, c3 = batch;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return uint4{c0, c1, c2, c3};
}

// Of four neighbouring elements, whose words are `words`: bit i tells whether element i is kept.
__device__ inline uint32_t keep_four(uint4 words, uint32_t threshold) {
  return (words.x >= threshold ? 1u : 0u) | (words.y >= threshold ? 2u : 0u) |
         (words.z >= threshold ? 4u : 0u) | (words.w >= threshold ? 8u : 0u);
}

}  // namespace fastlm
