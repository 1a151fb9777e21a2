// Sums of the columns of a matrix of partial sums: the second stage of every parameter's gradient.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace fastlm {

// out[col] = the sum of partials[:, col], a contiguous (rows, cols) of which there may be no rows.
// Without `out` nothing is wanted.
struct ColumnSum {
  const float* partials;
  void* out;
  Dtype dtype;
};

// Both in one launch. The order of the sums depends on the shape alone.
cudaError_t column_sums(const ColumnSum (&sums)[2], int64_t rows, int64_t cols,
                        cudaStream_t stream);

}  // namespace fastlm
