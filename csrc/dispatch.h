// From what is known at run time to template parameters: one switch over dtypes, one over head dims.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <type_traits>

#include "dtype.h"

namespace fastlm {

template <typename T>
struct Type {
  using type = T;
};

// Returns launch(Type<T>{}) for the T of `dtype`.
template <typename Launch>
cudaError_t with_dtype(Dtype dtype, const Launch& launch) {
  switch (dtype) {
    case Dtype::kFloat32: return launch(Type<float>{});
    case Dtype::kFloat16: return launch(Type<__half>{});
    case Dtype::kBFloat16: return launch(Type<__nv_bfloat16>{});
  }
  return cudaErrorInvalidValue;
}

// Returns launch(std::integral_constant<int, D>{}) for the least D that attention is compiled for
// and that holds `headdim`.
template <typename Launch>
cudaError_t with_headdim(int headdim, const Launch& launch) {
  if (headdim <= 32) return launch(std::integral_constant<int, 32>{});
  if (headdim <= 64) return launch(std::integral_constant<int, 64>{});
  if (headdim <= 96) return launch(std::integral_constant<int, 96>{});
  if (headdim <= 128) return launch(std::integral_constant<int, 128>{});
  return launch(std::integral_constant<int, 256>{});
}

}  // namespace fastlm
