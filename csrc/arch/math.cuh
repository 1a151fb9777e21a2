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

// 1 / x to 1 unit in the last place; denormal x and results are 0. 1 / 0 = inf, 1 / inf = 0.
__device__ inline float reciprocal_approx(float x) {
#ifdef FASTLM_SIMT
  const auto flush = [](float y) { return std::fpclassify(y) == FP_SUBNORMAL ? 0.0f * y : y; };
  return flush(1.0f / flush(x));
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace fastlm
