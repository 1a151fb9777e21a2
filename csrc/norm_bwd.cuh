// What the kernels of a norm's backward share; norm_bwd.cu has the formulas.
#pragma once

#include "arch/device.cuh"
#include "norm.cuh"

namespace fastlm {

// Elements of a vector.
inline int vector_of(const NormBackward& call) {
  return call.dy.dtype == call.z.dtype && call.z.dtype != Dtype::kFloat32 ? 8 : 4;
}

template <typename DY, typename Z, int V>
struct BackwardTypes {};

// Calls launch(BackwardTypes<DY, Z, V>, aligned) with what dtypes, pointers and strides of the call
// allow.
template <typename Launch>
cudaError_t with_backward_types(const NormBackward& call, const Launch& launch) {
  const Dtype dy = call.dy.dtype, z = call.z.dtype;
  const int v = vector_of(call);
  bool known = call.dz_in.ptr == nullptr || call.dz_in.dtype == z, aligned = true;
  for (const RowTensor& t : {call.dy, call.dz_in, call.z, call.weight, call.dz, call.dx}) {
    aligned = aligned && is_aligned(t, call.cols, v);
  }
  const Dtype half = dy == Dtype::kFloat32 ? z : dy;
  for (const RowTensor& t : {call.dz, call.dx}) {
    known = known && (t.ptr == nullptr || t.dtype == half || t.dtype == Dtype::kFloat32 ||
                      half == Dtype::kFloat32);
  }
  if (aligned && known) {
    const bool fp16 = half == Dtype::kFloat16;
    if (v == 8) {
      return fp16 ? launch(BackwardTypes<__half, __half, 8>{}, true)
                  : launch(BackwardTypes<__nv_bfloat16, __nv_bfloat16, 8>{}, true);
    }
    if (half == Dtype::kFloat32) return launch(BackwardTypes<float, float, 4>{}, true);
    if (z == Dtype::kFloat32) {
      return fp16 ? launch(BackwardTypes<__half, float, 4>{}, true)
                  : launch(BackwardTypes<__nv_bfloat16, float, 4>{}, true);
    }
    if (dy == Dtype::kFloat32) {
      return fp16 ? launch(BackwardTypes<float, __half, 4>{}, true)
                  : launch(BackwardTypes<float, __nv_bfloat16, 4>{}, true);
    }
  }
  return v == 8 ? launch(BackwardTypes<Any, Any, 8>{}, aligned)
                : launch(BackwardTypes<Any, Any, 4>{}, aligned);
}

// Rows for which a block has no room, and their groups, each of which leaves a row of sums.
int wide_partials(int64_t rows, const Device& device);
cudaError_t norm_bwd_wide(const NormBackward& call, cudaStream_t stream);

}  // namespace fastlm
