// fastlm_cuda::norm_fwd and norm_bwd; fastlm/ops/norm.py has the contracts.
#include "../norm.h"

#include <tuple>

#include "check.h"

namespace fastlm {
namespace {

using MaybeType = std::optional<ScalarType>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

NormTensor norm_tensor(const Tensor& x) {
  const int64_t stride = x.dim() == 2 ? x.stride(0) : 0;
  return {data_or_null(x), dtype_of(x.scalar_type()), stride};
}

NormTensor norm_tensor(const MaybeTensor& x) {
  return x.has_value() ? norm_tensor(*x) : NormTensor{nullptr, Dtype::kFloat32, 0};
}

NormKind kind_of(const std::string& name) {
  if (name == "layer") return NormKind::kLayer;
  if (name == "rms_llama") return NormKind::kLlama;
  return name == "rms_gemma" ? NormKind::kGemma : NormKind::kRms;
}

// torch.promote_types of float32, float16 and bfloat16.
ScalarType promoted(ScalarType a, ScalarType b) { return a == b ? a : ScalarType::Float; }

// `floats` for each split of each row, where rows are split.
Tensor split_scratch(const Tensor& like, int64_t rows, int splits, int64_t floats) {
  const MaybeType dtype = splits > 1 ? MaybeType(ScalarType::Float) : std::nullopt;
  return new_empty(like, {rows, splits, floats}, dtype);
}

FourTensors norm_fwd_op(Tensor x, MaybeTensor residual, MaybeTensor weight, MaybeTensor bias,
                        MaybeTensor seed, double eps, double dropout_p, std::string kind,
                        ScalarType out_dtype, bool keep_z) {
  const LaunchScope scope(x);
  const int64_t rows = x.size(0), cols = x.size(1);
  const ScalarType z_dtype =
      residual.has_value() ? promoted(x.scalar_type(), residual->scalar_type()) : x.scalar_type();
  const bool has_mean = kind == "layer";
  Tensor y = new_empty(x, {rows, cols}, out_dtype);
  Tensor z = new_empty(x, {rows, cols}, keep_z ? MaybeType(z_dtype) : std::nullopt);
  Tensor mean = new_empty(x, {rows}, has_mean ? MaybeType(ScalarType::Float) : std::nullopt);
  Tensor rstd = new_empty(x, {rows}, ScalarType::Float);

  const DropoutArguments dropout(seed, dropout_p);
  NormForward call{};
  call.x = norm_tensor(x);
  call.residual = norm_tensor(residual);
  call.weight = norm_tensor(weight);
  call.bias = norm_tensor(bias);
  call.y = norm_tensor(y);
  call.z = norm_tensor(z);
  call.mean = static_cast<float*>(data_or_null(mean));
  call.rstd = static_cast<float*>(data_or_null(rstd));
  call.rows = rows;
  call.cols = cols;
  call.kind = kind_of(kind);
  call.z_dtype = dtype_of(z_dtype);
  call.eps = static_cast<float>(eps);
  call.seed = dropout.seed;
  call.dropout_threshold = dropout.threshold;
  call.dropout_scale = dropout.scale;
  check(norm_splits(rows, cols, &call.splits), "norm_fwd");
  const Tensor moments = split_scratch(x, rows, call.splits, 3);
  call.moments = static_cast<float*>(data_or_null(moments));
  check(norm_fwd(call, scope.stream()), "norm_fwd");
  return {y, z, mean, rstd};
}

FourTensors norm_bwd_op(Tensor dy, MaybeTensor dz_in, Tensor z, MaybeTensor weight, Tensor mean,
                        Tensor rstd, MaybeTensor seed, double dropout_p, std::string kind,
                        MaybeType dz_dtype, MaybeType dx_dtype, MaybeType dweight_dtype,
                        MaybeType dbias_dtype) {
  const LaunchScope scope(dy);
  const int64_t rows = z.size(0), cols = z.size(1);
  Tensor dz = new_empty(z, {rows, cols}, dz_dtype);
  Tensor dx = new_empty(z, {rows, cols}, dx_dtype);
  Tensor dweight = new_empty(z, {cols}, dweight_dtype);
  Tensor dbias = new_empty(z, {cols}, dbias_dtype);

  NormBackward call{};
  check(norm_bwd_partials(rows, cols, &call.partials), "norm_bwd");
  const auto partials_of = [&](const MaybeType& dtype) {
    return new_empty(z, {call.partials, cols},
                     dtype.has_value() ? MaybeType(ScalarType::Float) : std::nullopt);
  };
  const Tensor dweight_partials = partials_of(dweight_dtype);
  const Tensor dbias_partials = partials_of(dbias_dtype);
  const DropoutArguments dropout(seed, dropout_p);
  call.dy = norm_tensor(dy);
  call.dz_in = norm_tensor(dz_in);
  call.z = norm_tensor(z);
  call.weight = norm_tensor(weight);
  call.dz = norm_tensor(dz);
  call.dx = norm_tensor(dx);
  call.dweight = norm_tensor(dweight);
  call.dbias = norm_tensor(dbias);
  call.mean = static_cast<const float*>(data_or_null(mean));
  call.rstd = static_cast<const float*>(data_or_null(rstd));
  call.dweight_partials = static_cast<float*>(data_or_null(dweight_partials));
  call.dbias_partials = static_cast<float*>(data_or_null(dbias_partials));
  call.rows = rows;
  call.cols = cols;
  call.kind = kind_of(kind);
  call.seed = dropout.seed;
  call.dropout_threshold = dropout.threshold;
  call.dropout_scale = dropout.scale;
  check(norm_splits(rows, cols, &call.splits), "norm_bwd");
  const Tensor sums = split_scratch(z, rows, call.splits, 2);
  call.sums = static_cast<float*>(data_or_null(sums));
  check(norm_bwd(call, scope.stream()), "norm_bwd");
  return {dz, dx, dweight, dbias};
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_IMPL(fastlm_cuda, FASTLM_DISPATCH_KEY, m) {
  m.impl("norm_fwd", fastlm::boxed<fastlm::norm_fwd_op>);
  m.impl("norm_bwd", fastlm::boxed<fastlm::norm_bwd_op>);
}
