// Sums of the columns of a matrix of partial sums: the second stage of every parameter's gradient.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace fastlm {

// out[col] = the sum of partials[:, col], of which there may be none; partials (rows, cols) is
// contiguous. The order of the sums depends on the shape alone.
cudaError_t column_sum(const float* partials, int64_t rows, int64_t cols, void* out, Dtype dtype,
                       cudaStream_t stream);

}  // namespace fastlm
