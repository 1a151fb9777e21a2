// Activations and their derivatives in fp32, without a branch between elements.
//
// A device that streams 2-byte numbers has few instructions for each: an A100 (1.9 TB/s, 108 SMs of
// 64 fp32 lanes at 1.4 GHz) about 20 on its fp32 lanes for the 4 bytes of a forward pass, an H100
// (3 TB/s, 132 SMs of 128 lanes at 1.7 GHz) about 38 in all. erff alone takes 20 to 25, and a
// branch; expf and a division of IEEE accuracy add to that. So everything here is made of 2^x and
// 1/x of the special function unit, two an element where it has time for five. A whole forward of
// GELU comes to 23 instructions an element in the SASS, 16 of them on fp32 lanes: by that count
// memory is the limit, and an H200 reached 79 % (forward) and 84 % (backward) of a copy's speed.
#pragma once

#include "arch/math.cuh"
#include "ffn.h"

namespace fastlm {

constexpr float kLog2E = 1.4426950408889634f;

// e = exp(-|z|) gives sigmoid(z) and 1 - sigmoid(z) without cancellation or overflow.
__device__ inline float sigmoid(float z, float* rest) {
  const float e = exp2_approx(-kLog2E * fabsf(z));
  const float near = reciprocal_approx(1.0f + e);
  const float far = e * near;
  *rest = z < 0.0f ? near : far;
  return z < 0.0f ? far : near;
}

// Phi(z), the normal distribution function, and *pdf = Phi'(z).
//
// Phi(-|z|) = exp(-z^2 / 2) t Q(t) with t = 1 / (1 + 0.3 |z|) and a polynomial Q of degree 7,
// fitted for |z| <= 13.3, where exp(-z^2 / 2) is no denormal yet: its relative error is below
// 3.2e-8 (1 + z^2 / 4), less than what rounding the exponent does. The form is that of Hastings'
// approximations of erf (Abramowitz and Stegun, 7.1.26).
__device__ inline float normal_cdf(float z, float* pdf) {
  const float e = exp2_approx((-0.5f * kLog2E * z) * z);
  const float t = reciprocal_approx(1.0f + 0.3f * fabsf(z));
  float q = 3.6421318185e-2f;
  q = q * t - 1.5996142653e-1f;
  q = q * t + 2.1040005470e-1f;
  q = q * t - 5.6647661288e-2f;
  q = q * t + 1.2965830982e-1f;
  q = q * t + 9.9747831712e-2f;
  q = q * t + 1.2074977983e-1f;
  q = q * t + 1.1963180922e-1f;
  q = q * t * e;
  *pdf = 0.3989422804014327f * e;
  return z < 0.0f ? q : 1.0f - q;
}

// activation(z), and its derivative, which costs nothing where it is not used.
template <Activation A>
__device__ inline float activate(float z, float* slope) {
  if constexpr (A == Activation::kGelu) {
    float pdf;
    const float cdf = normal_cdf(z, &pdf);
    *slope = cdf + z * pdf;
    return z * cdf;
  } else if constexpr (A == Activation::kGeluTanh) {
    // 0.5 (1 + tanh(u)) = sigmoid(2 u).
    const float z2 = z * z;
    float t;
    const float s = sigmoid(z * (1.5957691216057308f + 0.07135481627260025f * z2), &t);
    const float st = s * t;
    const float more = z * st * (1.5957691216057308f + 0.21406444881780076f * z2);
    // st is 0 long before z2 overflows, but 0 * inf is NaN.
    *slope = s + (st == 0.0f ? 0.0f : more);
    return z * s;
  } else if constexpr (A == Activation::kRelu) {
    *slope = z <= 0.0f ? 0.0f : 1.0f;
    return z <= 0.0f ? 0.0f : z;  // keeps NaN, as torch does
  } else if constexpr (A == Activation::kRelu2) {
    const float r = z <= 0.0f ? 0.0f : z;
    *slope = 2.0f * r;
    return r * r;
  } else if constexpr (A == Activation::kSilu) {
    float t;
    const float s = sigmoid(z, &t);
    *slope = s + s * (z * t);
    return z * s;
  } else {
    static_assert(A == Activation::kQuickGelu);
    float t;
    const float s = sigmoid(1.702f * z, &t);
    *slope = s + 1.702f * (s * (z * t));
    return z * s;
  }
}

template <Activation A>
struct ActivationOf {
  __device__ float operator()(float z, float* slope) const { return activate<A>(z, slope); }
};

// Calls fn with the activation as a function object: a branch of the whole grid, not of an element.
template <typename Fn>
__device__ inline void with_activation(Activation activation, Fn&& fn) {
  switch (activation) {
    case Activation::kGelu:
      return fn(ActivationOf<Activation::kGelu>{});
    case Activation::kGeluTanh:
      return fn(ActivationOf<Activation::kGeluTanh>{});
    case Activation::kRelu:
      return fn(ActivationOf<Activation::kRelu>{});
    case Activation::kRelu2:
      return fn(ActivationOf<Activation::kRelu2>{});
    case Activation::kSilu:
      return fn(ActivationOf<Activation::kSilu>{});
    case Activation::kQuickGelu:
      return fn(ActivationOf<Activation::kQuickGelu>{});
  }
}

}  // namespace fastlm
