// Instructions of the special function unit.
#pragma once

#include <cmath>

#include "platform.cuh"

namespace fastlm {

// 2^x to 2 units in the last place; denormal results are 0. exp2(-inf) = 0.
__device__ inline float exp2_approx(float x) {
#ifdef FASTLM_SIMT
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / x with a relative error below 2^-23; denormal numbers are 0, given or resulting. 1 / 0 = inf.
__device__ inline float reciprocal_approx(float x) {
#ifdef FASTLM_SIMT
  constexpr float kTiny = 1.17549435e-38f;
  const float y = fabsf(x) < kTiny ? copysignf(HUGE_VALF, x) : 1.0f / x;
  return fabsf(y) < kTiny ? copysignf(0.0f, x) : y;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace fastlm
