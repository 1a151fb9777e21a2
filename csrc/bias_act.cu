// Bias, activation and dropout in one pass, forward and backward.
//
// Bytes an element, of 2-byte dtypes: the forward moves 4 (x, y), the backward 6 (dy, x, dx), and 2
// more where the caller wants y again. bias and the rows of partial sums are read once for many
// rows. A thread keeps its columns, and so their bias and their sums, for all the rows that it
// goes through.
#include <algorithm>
#include <initializer_list>

#include "activation.cuh"
#include "arch/device.cuh"
#include "chunk.cuh"
#include "column_sum.h"
#include "dispatch.h"
#include "ffn.h"

namespace fastlm {
namespace {

// Chunks of a thread that are on their way at once, of each tensor.
constexpr int kForwardRows = 4;
constexpr int kBackwardRows = 2;
// Blocks of a kernel on a multiprocessor at once; the ragged kernels need more registers.
constexpr int kForwardBlocks = 4;
constexpr int kBackwardBlocks = 3;

__device__ inline uint64_t seed_of(const BiasAct& call) {
  return call.dropout.seed == nullptr ? 0 : static_cast<uint64_t>(*call.dropout.seed);
}

// Bit V * r + i: whether dropout keeps column col + i of row `first + r * step`.
template <int V, int Rows>
__device__ inline uint32_t keep_bits(uint64_t seed, uint32_t threshold, int64_t first, int step,
                                     int64_t col) {
  static_assert(V * Rows <= 32 && V % 4 == 0);
  uint32_t bits = 0;
#pragma unroll 1
  for (int i = 0; i < V * Rows; i += 4) {
    const int64_t row = first + static_cast<int64_t>(i / V) * step;
    const uint4 words = philox(seed, static_cast<uint32_t>((col + i % V) / 4),
                               static_cast<uint32_t>(row), 0, 0);
    bits |= keep_four(words, threshold) << i;
  }
  return bits;
}

template <int V>
__device__ inline void drop(float (&x)[V], uint32_t bits, float scale) {
#pragma unroll
  for (int i = 0; i < V; i++) x[i] = (bits >> i & 1u) != 0 ? x[i] * scale : 0.0f;
}

template <bool kWhole, int V>
__device__ inline void load_bias(float (&bias)[V], const BiasAct& call, const Place& place) {
#pragma unroll
  for (int i = 0; i < V; i++) bias[i] = 0.0f;
  if (call.bias != nullptr && place.count > 0) {
    load_floats<kWhole>(bias, call.bias, call.bias_dtype, place.col, place.count);
  }
}

// One tile of y.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(kTileThreads, kWhole ? kForwardBlocks : 3)
    bias_act_fwd_kernel(BiasActForward forward, Tiling tiling) {
  constexpr int V = Chunk<T>::kSize;
  const BiasAct& call = forward.call;
  const Place place = place_of<T>(tiling, call.cols);
  if (place.count == 0) return;
  const int step = tiling.row_lanes();
  const int64_t tile = blockIdx.x / tiling.col_tiles;
  const int64_t first = tile * kForwardRows * step + place.row_lane;
  const uint64_t seed = seed_of(call);

  Chunk<T> x[kForwardRows];
#pragma unroll
  for (int r = 0; r < kForwardRows; r++) {
    const int64_t row = first + r * step;
    if (row < call.rows) {
      load_chunk<kWhole>(&x[r], call.x, row * call.x.stride + place.col, place.count);
    }
  }
  float bias[V];
  load_bias<kWhole>(bias, call, place);
  uint32_t bits = 0;
  if (call.dropout.seed != nullptr) {
    bits = keep_bits<V, kForwardRows>(seed, call.dropout.threshold, first, step, place.col);
  }

  with_activation(call.activation, [&](auto activate) {
#pragma unroll
    for (int r = 0; r < kForwardRows; r++) {
      const int64_t row = first + r * step;
      if (row >= call.rows) break;
      float y[V], slope;
      unpack(y, x[r]);
#pragma unroll
      for (int i = 0; i < V; i++) y[i] = activate(y[i] + bias[i], &slope);
      if (call.dropout.seed != nullptr) drop(y, bits >> (V * r), call.dropout.scale);
      const int64_t at = row * forward.y.stride + place.col;
      store_chunk<kWhole, T>(forward.y, at, y, place.count);
    }
  });
}

// A column tile of every groups-th tile of rows: dx, y and this group's row of partial sums.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(kTileThreads, kWhole ? kBackwardBlocks : 2)
    bias_act_bwd_kernel(BiasActBackward backward, Tiling tiling) {
  constexpr int V = Chunk<T>::kSize;
  const BiasAct& call = backward.call;
  const Place place = place_of<T>(tiling, call.cols);
  const int step = tiling.row_lanes();
  const int64_t group = blockIdx.x / tiling.col_tiles;
  const uint64_t seed = seed_of(call);
  float bias[V], sums[V];
  load_bias<kWhole>(bias, call, place);
#pragma unroll
  for (int i = 0; i < V; i++) sums[i] = 0.0f;

  const int64_t rows = place.count == 0 ? 0 : call.rows;
  const int64_t height = static_cast<int64_t>(kBackwardRows) * step;
  for (int64_t top = group * height; top < rows; top += backward.groups * height) {
    const int64_t first = top + place.row_lane;
    Chunk<T> x[kBackwardRows], dy[kBackwardRows];
#pragma unroll
    for (int r = 0; r < kBackwardRows; r++) {
      const int64_t row = first + r * step;
      if (row < rows) {
        load_chunk<kWhole>(&x[r], call.x, row * call.x.stride + place.col, place.count);
        load_chunk<kWhole>(&dy[r], backward.dy, row * backward.dy.stride + place.col, place.count);
      }
    }
    uint32_t bits = 0;
    if (call.dropout.seed != nullptr) {
      bits = keep_bits<V, kBackwardRows>(seed, call.dropout.threshold, first, step, place.col);
    }

    with_activation(call.activation, [&](auto activate) {
#pragma unroll
      for (int r = 0; r < kBackwardRows; r++) {
        const int64_t row = first + r * step;
        if (row >= rows) break;
        float y[V], dx[V];
        unpack(y, x[r]);
        unpack(dx, dy[r]);
#pragma unroll
        for (int i = 0; i < V; i++) {
          float slope;
          y[i] = activate(y[i] + bias[i], &slope);
          dx[i] *= slope;
        }
        if (call.dropout.seed != nullptr) {
          drop(y, bits >> (V * r), call.dropout.scale);
          drop(dx, bits >> (V * r), call.dropout.scale);
        }
        if (backward.dx.ptr != nullptr) {
          const int64_t at = row * backward.dx.stride + place.col;
          store_chunk<kWhole, T>(backward.dx, at, dx, place.count);
        }
        if (backward.y.ptr != nullptr) {
          const int64_t at = row * backward.y.stride + place.col;
          store_chunk<kWhole, T>(backward.y, at, y, place.count);
        }
#pragma unroll
        for (int i = 0; i < V; i++) sums[i] += dx[i];
      }
    });
  }
  if (backward.partials == nullptr) return;

  float* slots = shared_memory<float>();  // [V][kTileThreads]
#pragma unroll
  for (int i = 0; i < V; i++) slots[i * kTileThreads + threadIdx.x] = sums[i];
  sync_block();
  // Thread (i, lane) adds up element i of the chunks of `lane`: place.col is theirs.
  const int i = place.row_lane;
  if (i >= V || place.col + i >= call.cols) return;
  const float* slot = slots + i * kTileThreads + (threadIdx.x & ((1u << tiling.lane_bits) - 1));
  float sum = 0.0f;
#pragma unroll 4
  for (int lane = 0; lane < step; lane++) sum += slot[lane << tiling.lane_bits];
  backward.partials[group * call.cols + place.col + i] = sum;
}

// Whether all that a call reads and writes consists of aligned chunks.
template <typename T>
bool is_whole_call(const BiasAct& call, std::initializer_list<RowTensor> tensors) {
  const RowTensor bias{const_cast<void*>(call.bias), call.bias_dtype, 0};
  bool whole = is_whole<T>(call.x, call.rows, call.cols) && is_whole<T>(bias, 1, call.cols);
  for (const RowTensor& each : tensors) whole = whole && is_whole<T>(each, call.rows, call.cols);
  return whole;
}

template <typename T>
cudaError_t launch_fwd(const BiasActForward& forward, cudaStream_t stream) {
  const BiasAct& call = forward.call;
  const Tiling tiling = tiling_of<T>(call.cols);
  const int64_t row_tiles = ceil_div<int64_t>(call.rows, kForwardRows * tiling.row_lanes());
  const dim3 grid(static_cast<unsigned>(row_tiles * tiling.col_tiles));
  const auto kernel = is_whole_call<T>(call, {forward.y})
                          ? bounded<bias_act_fwd_kernel<T, true>, kTileThreads, 0>
                          : bounded<bias_act_fwd_kernel<T, false>, kTileThreads, 0>;
  return launch(kernel, grid, stream, forward, tiling);
}

template <typename T>
int64_t backward_tiles(const BiasAct& call) {
  return ceil_div<int64_t>(call.rows, kBackwardRows * tiling_of<T>(call.cols).row_lanes());
}

template <typename T>
cudaError_t launch_bwd(BiasActBackward backward, cudaStream_t stream) {
  const BiasAct& call = backward.call;
  const Tiling tiling = tiling_of<T>(call.cols);
  constexpr size_t kShared = kTileThreads * Chunk<T>::kSize * sizeof(float);
  const bool sums = backward.partials != nullptr;
  if (!sums) backward.groups = backward_tiles<T>(call);
  const dim3 grid(static_cast<unsigned>(backward.groups * tiling.col_tiles));
  const bool whole = is_whole_call<T>(call, {backward.dy, backward.dx, backward.y});
  const auto most = whole ? bounded<bias_act_bwd_kernel<T, true>, kTileThreads, kShared>
                          : bounded<bias_act_bwd_kernel<T, false>, kTileThreads, kShared>;
  return launch(most.kernel, grid, kTileThreads, sums ? kShared : 0, stream, backward, tiling);
}

// As many as fill the device once: the fewer, the fewer rows of sums to add up.
template <typename T>
cudaError_t groups_of(const BiasAct& call, int64_t* groups) {
  Device device;
  if (cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  const int64_t col_tiles = tiling_of<T>(call.cols).col_tiles;
  const int64_t fill = kBackwardBlocks * device.multiprocessors / col_tiles;
  *groups = std::min(backward_tiles<T>(call), std::max<int64_t>(fill, 1));
  return cudaSuccess;
}

}  // namespace

cudaError_t bias_act_fwd(const BiasActForward& forward, cudaStream_t stream) {
  if (forward.call.rows == 0 || forward.call.cols == 0) return cudaSuccess;
  return with_dtype(forward.call.x.dtype, [&](auto type) {
    return launch_fwd<typename decltype(type)::type>(forward, stream);
  });
}

cudaError_t bias_act_bwd_groups(const BiasAct& call, int64_t* groups) {
  *groups = 0;
  if (call.rows == 0 || call.cols == 0) return cudaSuccess;
  return with_dtype(call.x.dtype, [&](auto type) {
    return groups_of<typename decltype(type)::type>(call, groups);
  });
}

cudaError_t bias_act_bwd(const BiasActBackward& backward, cudaStream_t stream) {
  const BiasAct& call = backward.call;
  cudaError_t error = cudaSuccess;
  if (call.rows > 0 && call.cols > 0) {
    error = with_dtype(call.x.dtype, [&](auto type) {
      return launch_bwd<typename decltype(type)::type>(backward, stream);
    });
  }
  if (error != cudaSuccess || backward.dbias == nullptr) return error;
  const ColumnSum sums[] = {{backward.partials, backward.dbias, call.bias_dtype}, {}};
  return column_sums(sums, backward.groups, call.cols, stream);
}

}  // namespace fastlm
