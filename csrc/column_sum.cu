// Sums of columns in a fixed order. A warp reads 128 bytes of a row; the warps of a block take the
// rows in turn, kUnroll loads of a thread on their way at once, and then add up what each has.
#include "column_sum.h"

#include "common.cuh"

namespace fastlm {
namespace {

constexpr int kWarps = 16;
constexpr int kUnroll = 9;  // a load each for as many rows as an H100 has multiprocessors

__device__ inline void store(const ColumnSum& of, int64_t col, float sum) {
  switch (of.dtype) {
    case Dtype::kFloat32: static_cast<float*>(of.out)[col] = sum; break;
    case Dtype::kFloat16: static_cast<__half*>(of.out)[col] = from_float<__half>(sum); break;
    case Dtype::kBFloat16:
      static_cast<__nv_bfloat16*>(of.out)[col] = from_float<__nv_bfloat16>(sum);
      break;
  }
}

__global__ void __launch_bounds__(kWarps* kWarp)
    column_sums_kernel(ColumnSum first, ColumnSum second, int64_t rows, int64_t cols) {
  float* sums = shared_memory<float>();  // [kWarps][kWarp]
  const int64_t blocks = ceil_div<int64_t>(cols, kWarp);
  const ColumnSum of = blockIdx.x < blocks ? first : second;
  const int64_t col = blockIdx.x % blocks * kWarp + lane_id();
  float sum = 0.0f;
  if (col < cols) {
    for (int64_t begin = warp_id(); begin < rows; begin += kUnroll * kWarps) {
      float part[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; i++) {
        const int64_t row = begin + i * kWarps;
        part[i] = row < rows ? of.partials[row * cols + col] : 0.0f;
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
    store(of, col, total);
  }
}

}  // namespace

cudaError_t column_sums(const ColumnSum (&sums)[2], int64_t rows, int64_t cols,
                        cudaStream_t stream) {
  const int wanted = (sums[0].out != nullptr) + (sums[1].out != nullptr);
  if (cols == 0 || wanted == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(cols, kWarp) * wanted));
  constexpr int kThreads = kWarps * kWarp;
  return launch(bounded<column_sums_kernel, kThreads, kThreads * sizeof(float)>, grid, stream,
                sums[0].out != nullptr ? sums[0] : sums[1], sums[1], rows, cols);
}

}  // namespace fastlm
