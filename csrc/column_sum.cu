// Sums of columns in a fixed order. A warp reads 128 bytes of a row; the warps of a block take the
// rows in turn, eight loads of a thread on their way at once, and then add up what each has.
#include "column_sum.h"

#include "common.cuh"
#include "dispatch.h"

namespace fastlm {
namespace {

constexpr int kWarps = 16;
constexpr int kUnroll = 8;

template <typename T>
__global__ void __launch_bounds__(kWarps* kWarp)
    column_sum_kernel(const float* partials, int64_t rows, int64_t cols, T* out) {
  float* sums = shared_memory<float>();  // [kWarps][kWarp]
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kWarp + lane_id();
  float sum = 0.0f;
  if (col < cols) {
    for (int64_t first = warp_id(); first < rows; first += kUnroll * kWarps) {
      float part[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; i++) {
        const int64_t row = first + i * kWarps;
        part[i] = row < rows ? partials[row * cols + col] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kUnroll; i++) sum += part[i];
    }
  }
  sums[threadIdx.x] = sum;
  sync_block();
  if (warp_id() == 0 && col < cols) {
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; warp++) total += sums[warp * kWarp + lane_id()];
    out[col] = from_float<T>(total);
  }
}

template <typename T>
cudaError_t launch_column_sum(const float* partials, int64_t rows, int64_t cols, void* out,
                              cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(cols, kWarp)));
  return launch(column_sum_kernel<T>, grid, kWarps * kWarp, kWarps * kWarp * sizeof(float), stream,
                partials, rows, cols, static_cast<T*>(out));
}

}  // namespace

cudaError_t column_sum(const float* partials, int64_t rows, int64_t cols, void* out, Dtype dtype,
                       cudaStream_t stream) {
  if (cols == 0) return cudaSuccess;
  return with_dtype(dtype, [&](auto type) {
    return launch_column_sum<typename decltype(type)::type>(partials, rows, cols, out, stream);
  });
}

}  // namespace fastlm
