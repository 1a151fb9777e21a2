// Attention forward and backward for fp16 and bf16: what a call is, and one launcher a pass.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dropout.h"

namespace fastlm {

// (batch, seqlen, nheads, headdim) with last stride 1, or packed (tokens, nheads, headdim), for
// which stride_b is 0. In elements; multiples of 8, and the pointer is aligned to 16 bytes.
struct AttentionTensor {
  void* ptr;
  int64_t stride_b, stride_m, stride_h;
};

struct AttentionParams {
  AttentionTensor q, k, v, out;
  float* lse;  // (batch, nheads, seqlen_q), packed (nheads, tokens_q): natural logarithm
  bool bf16;   // else fp16
  int batch, nheads, nheads_k, headdim;
  int seqlen_q, seqlen_k;  // of packed sequences the maxima
  int64_t lse_stride_h;    // seqlen_q, packed tokens_q; a batch is nheads heads on, packed none
  const int* seqlens_k;    // (batch,) or nullptr
  const int* cu_seqlens_q;  // (batch + 1,) or nullptr: not packed
  const int* cu_seqlens_k;
  // Key `row + diagonal + right` is the last one that a row sees, `row + diagonal - left` the
  // first. Unlimited sides hold seqlen_q + seqlen_k.
  int left, right;
  bool bottom_right;  // diagonal = n_k - n_q, else 0
  float scale;        // of q k; any sign
  Dropout dropout;
};

struct AttentionBackwardParams {
  AttentionParams forward;
  AttentionTensor dout, dq, dk, dv;
  const float* dlse;  // as lse, or nullptr
  float* delta;       // scratch, as lse: rowsum(dout * out) - dlse
};

cudaError_t attention_fwd(const AttentionParams& params, cudaStream_t stream);
// delta, which the two others read.
cudaError_t attention_bwd_delta(const AttentionBackwardParams& params, cudaStream_t stream);
cudaError_t attention_bwd_dq(const AttentionBackwardParams& params, cudaStream_t stream);
// dk and dv; heads of one key head are summed in order.
cudaError_t attention_bwd_dkv(const AttentionBackwardParams& params, cudaStream_t stream);

// The forward of one of the head dims that kernels are built for, at least params.headdim: 32, 64,
// 96, 128 or 256. Each is compiled in a file of its own.
template <int D>
cudaError_t attention_fwd_of(const AttentionParams& params, cudaStream_t stream);

// The same for dq, and for dk and dv.
template <int D>
cudaError_t attention_dq_of(const AttentionBackwardParams& params, cudaStream_t stream);
template <int D>
cudaError_t attention_dkv_of(const AttentionBackwardParams& params, cudaStream_t stream);

}  // namespace fastlm
