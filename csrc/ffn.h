// Bias, activation and dropout in one pass, and gated activations: what a call is, and one launcher
// a pass. fastlm/reference/ffn.py is the specification.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dropout.h"
#include "dtype.h"

namespace fastlm {

enum class Activation : int32_t { kGelu, kGeluTanh, kRelu, kRelu2, kSilu, kQuickGelu };

// y = dropout(activation(x + bias)). y, dy and dx have x's dtype.
struct BiasAct {
  RowTensor x;
  const void* bias;  // (cols,) or nullptr
  Dtype bias_dtype;
  int64_t rows, cols;
  Activation activation;
  Dropout dropout;
};

struct BiasActForward {
  BiasAct call;
  RowTensor y;
};

struct BiasActBackward {
  BiasAct call;
  RowTensor dy;
  RowTensor dx, y;
  void* dbias;      // (cols,) in bias_dtype, or nullptr
  float* partials;  // scratch for dbias: (groups, cols); nullptr without rows
  int64_t groups;   // of bias_act_bwd_groups; 0 without rows
};

// y = activation(gate) * up; y and dy have the wider dtype of the two.
struct GluForward {
  RowTensor gate, up, y;
  int64_t rows, cols;
  Activation activation;
};

struct GluBackward {
  RowTensor dy, gate, up;
  RowTensor dgate, dup, y;
  int64_t rows, cols;
  Activation activation;
};

cudaError_t bias_act_fwd(const BiasActForward& forward, cudaStream_t stream);

// Into how many rows of `partials` the current device adds up those of dx. Of `call` it reads sizes
// and x's dtype.
cudaError_t bias_act_bwd_groups(const BiasAct& call, int64_t* groups);
cudaError_t bias_act_bwd(const BiasActBackward& backward, cudaStream_t stream);

cudaError_t glu_fwd(const GluForward& forward, cudaStream_t stream);
cudaError_t glu_bwd(const GluBackward& backward, cudaStream_t stream);

}  // namespace fastlm
