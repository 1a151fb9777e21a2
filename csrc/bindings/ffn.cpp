// fastlm_cuda::bias_act_fwd, bias_act_bwd, glu_fwd and glu_bwd; fastlm/ops/_ffn_functions.py has
// the contracts.
#include "../ffn.h"

#include <map>
#include <tuple>

#include "check.h"

namespace fastlm {
namespace {

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

Activation activation_of(const std::string& name) {
  static const std::map<std::string, Activation> kNames = {
      {"gelu", Activation::kGelu},   {"gelu_tanh", Activation::kGeluTanh},
      {"relu", Activation::kRelu},   {"relu2", Activation::kRelu2},
      {"silu", Activation::kSilu},   {"quick_gelu", Activation::kQuickGelu},
  };
  return kNames.at(name);
}

// Of x's shape, or what stands for a result that is not wanted.
Tensor new_rows(const Tensor& x, bool wanted, ScalarType dtype) {
  return new_empty(x, {x.size(0), x.size(1)},
                   wanted ? std::optional<ScalarType>(dtype) : std::nullopt);
}

// Kernels are chosen by the dtype of a result that is not wanted too.
RowTensor outgoing(const Tensor& result, ScalarType dtype) {
  RowTensor rows = row_tensor(result);
  rows.dtype = dtype_of(dtype);
  return rows;
}

// Kernels read dy as what y was, and autograd gives it so.
RowTensor incoming(const Tensor& dy, ScalarType dtype) {
  if (dy.scalar_type() != dtype) throw std::runtime_error("fastlm_cuda: dy must have y's dtype");
  return row_tensor(dy);
}

BiasAct bias_act_of(const Tensor& x, const MaybeTensor& bias, const MaybeTensor& seed,
                    const std::string& activation, double dropout_p) {
  BiasAct call{};
  call.x = row_tensor(x);
  call.bias = data_of(bias);
  call.bias_dtype = bias.has_value() ? dtype_of(bias->scalar_type()) : Dtype::kFloat32;
  call.rows = x.size(0);
  call.cols = x.size(1);
  call.activation = activation_of(activation);
  call.dropout = dropout_of(seed, dropout_p);
  return call;
}

Tensor bias_act_fwd_op(Tensor x, MaybeTensor bias, MaybeTensor seed, std::string activation,
                       double dropout_p) {
  const LaunchScope scope(x);
  Tensor y = new_rows(x, true, x.scalar_type());
  const BiasActForward forward{bias_act_of(x, bias, seed, activation, dropout_p), row_tensor(y)};
  check(bias_act_fwd(forward, scope.stream()), "bias_act_fwd");
  return y;
}

ThreeTensors bias_act_bwd_op(Tensor dy, Tensor x, MaybeTensor bias, MaybeTensor seed,
                             std::string activation, double dropout_p, bool need_dx,
                             bool need_dbias, bool need_y) {
  const LaunchScope scope(x);
  const ScalarType dtype = x.scalar_type();
  const int64_t cols = x.size(1);
  Tensor dx = new_rows(x, need_dx, dtype), y = new_rows(x, need_y, dtype);
  Tensor dbias = new_empty(
      x, {cols}, need_dbias ? std::optional<ScalarType>(bias->scalar_type()) : std::nullopt);

  BiasActBackward backward{};
  backward.call = bias_act_of(x, bias, seed, activation, dropout_p);
  if (need_dbias) check(bias_act_bwd_groups(backward.call, &backward.groups), "bias_act_bwd");
  Tensor partials = new_empty(x, {backward.groups, cols}, ScalarType::Float);
  backward.dy = incoming(dy, dtype);
  backward.dx = outgoing(dx, dtype);
  backward.y = outgoing(y, dtype);
  backward.dbias = data_or_null(dbias);
  backward.partials = static_cast<float*>(data_or_null(partials));
  check(bias_act_bwd(backward, scope.stream()), "bias_act_bwd");
  return {dx, dbias, y};
}

Tensor glu_fwd_op(Tensor gate, Tensor up, std::string activation) {
  const LaunchScope scope(gate);
  Tensor y = new_rows(gate, true, promoted(gate.scalar_type(), up.scalar_type()));
  GluForward call{};
  call.gate = row_tensor(gate);
  call.up = row_tensor(up);
  call.y = row_tensor(y);
  call.rows = gate.size(0);
  call.cols = gate.size(1);
  call.activation = activation_of(activation);
  check(glu_fwd(call, scope.stream()), "glu_fwd");
  return y;
}

ThreeTensors glu_bwd_op(Tensor dy, Tensor gate, Tensor up, std::string activation, bool need_dgate,
                        bool need_dup, bool need_y) {
  const LaunchScope scope(gate);
  const ScalarType dtype = promoted(gate.scalar_type(), up.scalar_type());
  Tensor dgate = new_rows(gate, need_dgate, gate.scalar_type());
  Tensor dup = new_rows(gate, need_dup, up.scalar_type());
  Tensor y = new_rows(gate, need_y, dtype);
  GluBackward call{};
  call.dy = incoming(dy, dtype);
  call.gate = row_tensor(gate);
  call.up = row_tensor(up);
  call.dgate = outgoing(dgate, gate.scalar_type());
  call.dup = outgoing(dup, up.scalar_type());
  call.y = outgoing(y, dtype);
  call.rows = gate.size(0);
  call.cols = gate.size(1);
  call.activation = activation_of(activation);
  check(glu_bwd(call, scope.stream()), "glu_bwd");
  return {dgate, dup, y};
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_IMPL(fastlm_cuda, FASTLM_DISPATCH_KEY, m) {
  m.impl("bias_act_fwd", fastlm::boxed<fastlm::bias_act_fwd_op>);
  m.impl("bias_act_bwd", fastlm::boxed<fastlm::bias_act_bwd_op>);
  m.impl("glu_fwd", fastlm::boxed<fastlm::glu_fwd_op>);
  m.impl("glu_bwd", fastlm::boxed<fastlm::glu_bwd_op>);
}
