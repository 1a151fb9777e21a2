// LayerNorm and RMSNorm with dropout and residual add before them: what a call is, and one launcher
// a pass. fastlm/reference/norm.py is the specification.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dropout.h"
#include "dtype.h"

namespace fastlm {

// kLlama rounds xhat to x's dtype before the product with weight, kGemma adds 1 to weight.
enum class NormKind { kLayer, kRms, kLlama, kGemma };

struct NormForward {
  RowTensor x, residual, weight, bias;
  RowTensor y, z;
  float* mean;  // (rows,); layer norm alone
  float* rstd;  // (rows,)
  int64_t rows;
  int64_t cols;  // at least 1
  NormKind kind;
  Dtype z_dtype;  // of residual + dropout(x), also where z is not wanted
  float eps;
  Dropout dropout;
  int splits;      // from norm_splits
  float* moments;  // scratch: three floats for each split of a row
};

struct NormBackward {
  RowTensor dy, dz_in, z, weight;
  RowTensor dz, dx, dweight, dbias;
  const float* mean;
  const float* rstd;
  // Scratch: a row of `cols` sums for each of norm_bwd_partials' groups of rows, of dweight and of
  // dbias; nullptr where the gradient is not wanted.
  float* dweight_partials;
  float* dbias_partials;
  int partials;
  int64_t rows;
  int64_t cols;
  NormKind kind;
  Dropout dropout;
  int splits;   // from norm_splits
  float* sums;  // scratch: two floats for each split of a row
};

// In how many blocks to work on a row: more than 1 where rows are wide and too few for the current
// device. Their scratch is then wanted, else nullptr.
cudaError_t norm_splits(int64_t rows, int64_t cols, int* splits);

cudaError_t norm_fwd(const NormForward& call, cudaStream_t stream);

// How many groups of rows the current device's backward adds up by itself, in a call that has its
// tensors, rows and cols.
cudaError_t norm_bwd_partials(const NormBackward& call, int* partials);
cudaError_t norm_bwd(const NormBackward& call, cudaStream_t stream);

}  // namespace fastlm
