// fastlm_cuda::attention_fwd and attention_bwd; the contracts: fastlm/ops/_attention_contract.py.
// Masks, biases, slopes, sinks and softcap are refused in Python.
#include "../attention.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "check.h"

namespace fastlm {
namespace {

// What both passes take after their tensors.
struct Options {
  const MaybeTensor &seqlens_k, &cu_seqlens_q, &cu_seqlens_k, &seed;
  const std::string& causal;
  double softmax_scale;
  int64_t window_left, window_right;
  double dropout_p;
  int64_t max_seqlen_q, max_seqlen_k;
};

// Strides of dimensions of size 1 mean nothing, and rows past the end are not read, but their
// addresses must be aligned: `aligned` sees to the first, Python has refused other strides.
AttentionTensor attention_tensor(const Tensor& x) {
  const auto stride = [&](int64_t dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); };
  const bool packed = x.dim() == 3;
  const AttentionTensor t{data_of(x), packed ? 0 : stride(0), stride(packed ? 0 : 1),
                          stride(packed ? 1 : 2)};
  if (reinterpret_cast<uintptr_t>(t.ptr) % 16 != 0 || t.stride_b % 8 != 0 ||
      t.stride_m % 8 != 0 || t.stride_h % 8 != 0) {
    throw std::runtime_error("fastlm_cuda: attention takes tensors aligned to 16 bytes");
  }
  return t;
}

// x where 16-byte pieces of it can be copied, else a copy. Python sees to strides; compiled code has
// no address to look at, so that this is where a slice from an odd place shows.
Tensor aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 ? x : torch::stable::clone(x);
}

const int* int_data(const MaybeTensor& x) { return static_cast<const int*>(data_of(x)); }

AttentionParams attention_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& out, const Tensor& lse, const Options& options) {
  const bool packed = options.cu_seqlens_q.has_value();
  const int64_t farthest = std::min<int64_t>(options.max_seqlen_q + options.max_seqlen_k,
                                             std::numeric_limits<int>::max() / 4);
  const auto side = [&](int64_t window) {
    return static_cast<int>(window < 0 ? farthest : std::min(window, farthest));
  };
  AttentionParams p{};
  p.q = attention_tensor(q);
  p.k = attention_tensor(k);
  p.v = attention_tensor(v);
  p.out = attention_tensor(out);
  p.lse = static_cast<float*>(data_of(lse));
  p.bf16 = q.scalar_type() == ScalarType::BFloat16;
  p.batch = static_cast<int>(packed ? options.cu_seqlens_q->size(0) - 1 : q.size(0));
  p.nheads = static_cast<int>(q.size(q.dim() - 2));
  p.nheads_k = static_cast<int>(k.size(k.dim() - 2));
  p.headdim = static_cast<int>(q.size(q.dim() - 1));
  p.seqlen_q = static_cast<int>(options.max_seqlen_q);
  p.seqlen_k = static_cast<int>(options.max_seqlen_k);
  p.lse_stride_h = packed ? q.size(0) : q.size(1);
  p.seqlens_k = int_data(options.seqlens_k);
  p.cu_seqlens_q = int_data(options.cu_seqlens_q);
  p.cu_seqlens_k = int_data(options.cu_seqlens_k);
  p.left = side(options.window_left);
  p.right = options.causal == "none" ? side(options.window_right)
                                     : std::min(side(options.window_right), 0);
  p.bottom_right = options.causal != "top_left";
  p.scale = static_cast<float>(options.softmax_scale);
  p.dropout = dropout_of(options.seed, options.dropout_p);
  return p;
}

// As `like`, contiguous. Tokens that belong to no packed sequence are written by no kernel.
Tensor new_like(const Tensor& like, bool packed) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < like.dim(); i++) shape.push_back(like.size(i));
  return packed ? torch::stable::new_zeros(like, shape) : torch::stable::new_empty(like, shape);
}

std::tuple<Tensor, Tensor, Tensor> attention_fwd_op(
    Tensor q, Tensor k, Tensor v, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor seqlens_k,
    MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, MaybeTensor, MaybeTensor, MaybeTensor seed,
    std::string causal, double softmax_scale, int64_t window_left, int64_t window_right, double,
    double dropout_p, bool, int64_t, int64_t max_seqlen_q, int64_t max_seqlen_k, bool) {
  const LaunchScope scope(q);
  q = aligned(q), k = aligned(k), v = aligned(v);
  const bool packed = cu_seqlens_q.has_value();
  const Tensor out = new_like(q, packed);
  const Tensor lse =
      packed ? new_empty(q, {q.size(1), q.size(0)}, ScalarType::Float)
             : new_empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  if (packed) torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  const AttentionParams params = attention_params(
      q, k, v, out, lse,
      {seqlens_k, cu_seqlens_q, cu_seqlens_k, seed, causal, softmax_scale, window_left,
       window_right, dropout_p, max_seqlen_q, max_seqlen_k});
  check(attention_fwd(params, scope.stream()), "attention_fwd");
  return {out, lse, new_empty(q, {0}, std::nullopt)};
}

using SevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SevenTensors attention_bwd_op(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, MaybeTensor,
    MaybeTensor dlse, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor seqlens_k,
    MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, MaybeTensor, MaybeTensor, MaybeTensor seed,
    std::string causal, double softmax_scale, int64_t window_left, int64_t window_right, double,
    double dropout_p, bool, int64_t, int64_t max_seqlen_q, int64_t max_seqlen_k, bool need_dq,
    bool need_dkv, bool, bool, bool, bool) {
  const LaunchScope scope(q);
  dout = aligned(dout), q = aligned(q), k = aligned(k), v = aligned(v);
  const bool packed = cu_seqlens_q.has_value();
  const auto nothing = [&] { return new_empty(q, {0}, std::nullopt); };
  const auto gradient = [&](const Tensor& x, bool needed) {
    return needed ? new_like(x, packed) : nothing();
  };
  const Tensor dq = gradient(q, need_dq), dk = gradient(k, need_dkv), dv = gradient(v, need_dkv);
  const Tensor delta = new_like(lse, false);
  AttentionBackwardParams call{};
  call.forward = attention_params(
      q, k, v, out, lse,
      {seqlens_k, cu_seqlens_q, cu_seqlens_k, seed, causal, softmax_scale, window_left,
       window_right, dropout_p, max_seqlen_q, max_seqlen_k});
  call.dout = attention_tensor(dout);
  call.dlse = static_cast<const float*>(data_of(dlse));
  call.delta = static_cast<float*>(data_of(delta));
  check(attention_bwd_delta(call, scope.stream()), "attention_bwd");
  if (need_dq) {
    call.dq = attention_tensor(dq);
    check(attention_bwd_dq(call, scope.stream()), "attention_bwd");
  }
  if (need_dkv) {
    call.dk = attention_tensor(dk);
    call.dv = attention_tensor(dv);
    check(attention_bwd_dkv(call, scope.stream()), "attention_bwd");
  }
  return {dq, dk, dv, nothing(), nothing(), nothing(), nothing()};
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_IMPL(fastlm_cuda, FASTLM_DISPATCH_KEY, m) {
  m.impl("attention_fwd", fastlm::boxed<fastlm::attention_fwd_op>);
  m.impl("attention_bwd", fastlm::boxed<fastlm::attention_bwd_op>);
}
