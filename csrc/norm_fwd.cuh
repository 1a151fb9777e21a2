// What the kernels of a norm's forward share; norm_fwd.cu has the formulas.
#pragma once

#include "norm.cuh"

namespace fastlm {

// Elements of a vector.
inline int vector_of(const NormForward& call) {
  const Dtype x = call.x.dtype;
  return x == call.z_dtype && x != Dtype::kFloat32 ? 8 : 4;
}

template <typename X, typename Z, int V>
struct ForwardTypes {};

// Calls launch(ForwardTypes<X, Z, V>, aligned) with what dtypes, pointers and strides of the call
// allow.
template <typename Launch>
cudaError_t with_forward_types(const NormForward& call, const Launch& launch) {
  const Dtype x = call.x.dtype, z = call.z_dtype;
  const int v = vector_of(call);
  bool aligned = true;
  for (const RowTensor& t : {call.x, call.residual, call.weight, call.bias, call.y, call.z}) {
    aligned = aligned && is_aligned(t, call.cols, v);
  }
  const bool known_y = call.y.dtype == x || call.y.dtype == Dtype::kFloat32;
  const bool known_residual = call.residual.ptr == nullptr || call.residual.dtype == z;
  if (aligned && known_y && known_residual) {
    if (v == 8) {
      return x == Dtype::kFloat16 ? launch(ForwardTypes<__half, __half, 8>{}, true)
                                  : launch(ForwardTypes<__nv_bfloat16, __nv_bfloat16, 8>{}, true);
    }
    if (x == Dtype::kFloat32) return launch(ForwardTypes<float, float, 4>{}, true);
    if (z == Dtype::kFloat32) {
      return x == Dtype::kFloat16 ? launch(ForwardTypes<__half, float, 4>{}, true)
                                  : launch(ForwardTypes<__nv_bfloat16, float, 4>{}, true);
    }
  }
  return v == 8 ? launch(ForwardTypes<Any, Any, 8>{}, aligned)
                : launch(ForwardTypes<Any, Any, 4>{}, aligned);
}

__device__ inline float rstd_of(float squares, const NormForward& call) {
  return rsqrtf(squares / static_cast<float>(call.cols) + call.eps);
}

__device__ inline void store_statistics(const NormForward& call, int64_t row, float mean,
                                        float rstd) {
  if (call.kind == NormKind::kLayer) call.mean[row] = mean;
  call.rstd[row] = rstd;
}

// Rows that one block has not whole.
cudaError_t norm_fwd_wide(const NormForward& call, cudaStream_t stream);

}  // namespace fastlm
