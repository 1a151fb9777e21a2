// Attention backward: delta, and which kernels a head dim has.
#include "attention_bwd.cuh"
#include "dispatch.h"

namespace fastlm {
namespace {

constexpr int kDeltaThreads = 256;

// delta = rowsum(do out) - dlse, and 0 where a row sees no key. `lanes` neighbouring lanes have a
// row, 8 columns each: 4, 8, 16 or 32.
//
// Traffic: do and out once, a few bytes a row beside them.
template <typename T>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_delta_kernel(const AttentionBackwardParams backward, int tiles, int lanes) {
  const AttentionParams& p = backward.forward;
  const int rows = kDeltaThreads / lanes;
  const int head = static_cast<int>(blockIdx.x) / tiles % p.nheads;
  const int batch = static_cast<int>(blockIdx.x) / tiles / p.nheads;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = int64_t{static_cast<int>(blockIdx.x) % tiles} * rows + thread / lanes;
  const int col = thread % lanes * 8;
  const bool valid = row < p.lse_stride_h;
  float sum = 0.0f;
  if (valid && col < p.headdim) {
    T x[8], y[8];
    const uint4 dout = load_16_once(row_0<T>(backward.dout, batch, row, head) + col);
    const uint4 out = load_16_once(row_0<T>(p.out, batch, row, head) + col);
    memcpy(static_cast<void*>(x), &dout, sizeof x);
    memcpy(static_cast<void*>(y), &out, sizeof y);
#pragma unroll
    for (int i = 0; i < 8; i++) sum = fmaf(to_float(x[i]), to_float(y[i]), sum);
  }
  for (int mask = lanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (!valid || col != 0) return;
  const int64_t at = (int64_t{batch} * p.nheads + head) * p.lse_stride_h + row;
  if (backward.dlse != nullptr) sum -= backward.dlse[at];
  backward.delta[at] = p.lse[at] == -INFINITY ? 0.0f : sum;
}

}  // namespace

cudaError_t attention_bwd_delta(const AttentionBackwardParams& backward, cudaStream_t stream) {
  const AttentionParams& p = backward.forward;
  int lanes = 4;
  while (lanes * 8 < p.headdim) lanes *= 2;
  // Packed tokens are rows of one sequence here.
  const int64_t heads = (p.cu_seqlens_q != nullptr ? 1 : int64_t{p.batch}) * p.nheads;
  const int64_t tiles = ceil_div<int64_t>(p.lse_stride_h, kDeltaThreads / lanes);
  if (heads * tiles == 0) return cudaSuccess;
  const auto kernel = p.bf16 ? bounded<attention_delta_kernel<__nv_bfloat16>, kDeltaThreads, 0>
                             : bounded<attention_delta_kernel<__half>, kDeltaThreads, 0>;
  return launch(kernel, dim3(static_cast<unsigned>(heads * tiles)), stream, backward,
                static_cast<int>(tiles), lanes);
}

cudaError_t attention_bwd_dq(const AttentionBackwardParams& params, cudaStream_t stream) {
  return with_headdim(params.forward.headdim, [&](auto headdim) {
    return attention_dq_of<decltype(headdim)::value>(params, stream);
  });
}

cudaError_t attention_bwd_dkv(const AttentionBackwardParams& params, cudaStream_t stream) {
  return with_headdim(params.forward.headdim, [&](auto headdim) {
    return attention_dkv_of<decltype(headdim)::value>(params, stream);
  });
}

}  // namespace fastlm
