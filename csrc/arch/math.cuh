// Instructions of the special function unit.
#pragma once

#include "platform.cuh"

namespace fastlm {

// 2^x to 2 units in the last place; denormal results are 0. exp2(-inf) = 0.
__device__ inline float exp2_approx(float x) {
#ifdef FASTLM_SIMT
  return simt::exp2_approx(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace fastlm
