// fastlm_cuda::norm_fwd and norm_bwd; fastlm/ops/norm.py has the contracts.
#include "../norm.h"

#include <tuple>

#include "check.h"

namespace fastlm {
namespace {

using MaybeType = std::optional<ScalarType>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

NormKind kind_of(const std::string& name) {
  if (name == "layer") return NormKind::kLayer;
  if (name == "rms_llama") return NormKind::kLlama;
  return name == "rms_gemma" ? NormKind::kGemma : NormKind::kRms;
}

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

  NormForward call{};
  call.x = row_tensor(x);
  call.residual = row_tensor(residual);
  call.weight = row_tensor(weight);
  call.bias = row_tensor(bias);
  call.y = row_tensor(y);
  call.z = row_tensor(z);
  call.mean = static_cast<float*>(data_or_null(mean));
  call.rstd = static_cast<float*>(data_or_null(rstd));
  call.rows = rows;
  call.cols = cols;
  call.kind = kind_of(kind);
  call.z_dtype = dtype_of(z_dtype);
  call.eps = static_cast<float>(eps);
  call.dropout = dropout_of(seed, dropout_p);
  check(norm_splits(rows, cols, &call.splits), "norm_fwd");
  const Tensor moments = split_scratch(x, rows, call.splits, 3);
  call.moments = static_cast<float*>(data_or_null(moments));
  check(norm_fwd(call, scope.stream()), "norm_fwd");
  return {y, z, mean, rstd};
}

FourTensors norm_bwd_op(Tensor dy, MaybeTensor dz_in, Tensor z, MaybeTensor weight,
                        MaybeTensor mean, Tensor rstd, MaybeTensor seed, double dropout_p,
                        std::string kind, MaybeType dz_dtype, MaybeType dx_dtype,
                        MaybeType dweight_dtype, MaybeType dbias_dtype) {
  const LaunchScope scope(dy);
  const int64_t rows = z.size(0), cols = z.size(1);
  Tensor dz = new_empty(z, {rows, cols}, dz_dtype);
  Tensor dx = new_empty(z, {rows, cols}, dx_dtype);
  Tensor dweight = new_empty(z, {cols}, dweight_dtype);
  Tensor dbias = new_empty(z, {cols}, dbias_dtype);

  NormBackward call{};
  call.dy = row_tensor(dy);
  call.dz_in = row_tensor(dz_in);
  call.z = row_tensor(z);
  call.weight = row_tensor(weight);
  call.dz = row_tensor(dz);
  call.dx = row_tensor(dx);
  call.dweight = row_tensor(dweight);
  call.dbias = row_tensor(dbias);
  call.mean = static_cast<const float*>(data_of(mean));
  call.rstd = static_cast<const float*>(data_or_null(rstd));
  call.rows = rows;
  call.cols = cols;
  call.kind = kind_of(kind);
  call.dropout = dropout_of(seed, dropout_p);
  check(norm_bwd_partials(call, &call.partials), "norm_bwd");
  const auto partials_of = [&](const MaybeType& dtype) {
    return new_empty(z, {call.partials, cols},
                     dtype.has_value() ? MaybeType(ScalarType::Float) : std::nullopt);
  };
  const Tensor dweight_partials = partials_of(dweight_dtype);
  const Tensor dbias_partials = partials_of(dbias_dtype);
  call.dweight_partials = static_cast<float*>(data_or_null(dweight_partials));
  call.dbias_partials = static_cast<float*>(data_or_null(dbias_partials));
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
