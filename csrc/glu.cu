// activation(gate) * up in one pass, forward and backward.
//
// Bytes an element, of 2-byte dtypes: the forward moves 6 (gate, up, y), the backward 10 (dy, gate,
// up, dgate, dup), and 2 more where the caller wants y again.
#include <initializer_list>

#include "activation.cuh"
#include "chunk.cuh"
#include "dispatch.h"
#include "ffn.h"

namespace fastlm {
namespace {

// Chunks of a thread that are on their way at once, of each tensor.
constexpr int kRows = 2;

// One tile of y.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(kTileThreads) glu_fwd_kernel(GluForward call, Tiling tiling) {
  constexpr int V = Chunk<T>::kSize;
  const Place place = place_of<T>(tiling, call.cols);
  if (place.count == 0) return;
  const int step = tiling.row_lanes();
  const int64_t tile = blockIdx.x / tiling.col_tiles;
  const int64_t first = tile * kRows * step + place.row_lane;

  Chunk<T> gate[kRows], up[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const int64_t row = first + r * step;
    if (row < call.rows) {
      load_chunk<kWhole>(&gate[r], call.gate, row * call.gate.stride + place.col, place.count);
      load_chunk<kWhole>(&up[r], call.up, row * call.up.stride + place.col, place.count);
    }
  }
  with_activation(call.activation, [&](auto activate) {
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const int64_t row = first + r * step;
      if (row >= call.rows) break;
      float y[V], u[V], slope;
      unpack(y, gate[r]);
      unpack(u, up[r]);
#pragma unroll
      for (int i = 0; i < V; i++) y[i] = activate(y[i], &slope) * u[i];
      store_chunk<kWhole, T>(call.y, row * call.y.stride + place.col, y, place.count);
    }
  });
}

// One tile of dgate = dy * up * activation'(gate), of dup = dy * activation(gate), and of y.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(kTileThreads) glu_bwd_kernel(GluBackward call, Tiling tiling) {
  constexpr int V = Chunk<T>::kSize;
  const Place place = place_of<T>(tiling, call.cols);
  if (place.count == 0) return;
  const int step = tiling.row_lanes();
  const int64_t tile = blockIdx.x / tiling.col_tiles;
  const int64_t first = tile * kRows * step + place.row_lane;

  Chunk<T> dy[kRows], gate[kRows], up[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const int64_t row = first + r * step;
    if (row < call.rows) {
      load_chunk<kWhole>(&dy[r], call.dy, row * call.dy.stride + place.col, place.count);
      load_chunk<kWhole>(&gate[r], call.gate, row * call.gate.stride + place.col, place.count);
      load_chunk<kWhole>(&up[r], call.up, row * call.up.stride + place.col, place.count);
    }
  }
  with_activation(call.activation, [&](auto activate) {
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const int64_t row = first + r * step;
      if (row >= call.rows) break;
      float d[V], g[V], u[V];
      unpack(d, dy[r]);
      unpack(g, gate[r]);
      unpack(u, up[r]);
      float dgate[V], dup[V], y[V];
#pragma unroll
      for (int i = 0; i < V; i++) {
        float slope;
        const float a = activate(g[i], &slope);
        dgate[i] = d[i] * u[i] * slope;
        dup[i] = d[i] * a;
        y[i] = a * u[i];
      }
      const auto store = [&](const RowTensor& to, const float(&from)[V]) {
        if (to.ptr == nullptr) return;
        store_chunk<kWhole, T>(to, row * to.stride + place.col, from, place.count);
      };
      store(call.dgate, dgate);
      store(call.dup, dup);
      store(call.y, y);
    }
  });
}

template <typename T, auto kWholeKernel, auto kRaggedKernel, typename Call>
cudaError_t launch_tiles(const Call& call, std::initializer_list<RowTensor> tensors,
                         cudaStream_t stream) {
  bool whole = true;
  for (const RowTensor& each : tensors) whole = whole && is_whole<T>(each, call.rows, call.cols);
  const Tiling tiling = tiling_of<T>(call.cols);
  const int64_t row_tiles = ceil_div<int64_t>(call.rows, kRows * tiling.row_lanes());
  const dim3 grid(static_cast<unsigned>(row_tiles * tiling.col_tiles));
  const auto kernel = whole ? bounded<kWholeKernel, kTileThreads, 0>
                            : bounded<kRaggedKernel, kTileThreads, 0>;
  return launch(kernel, grid, stream, call, tiling);
}

template <typename T>
cudaError_t launch_fwd(const GluForward& call, cudaStream_t stream) {
  return launch_tiles<T, glu_fwd_kernel<T, true>, glu_fwd_kernel<T, false>>(
      call, {call.gate, call.up, call.y}, stream);
}

template <typename T>
cudaError_t launch_bwd(const GluBackward& call, cudaStream_t stream) {
  return launch_tiles<T, glu_bwd_kernel<T, true>, glu_bwd_kernel<T, false>>(
      call, {call.dy, call.gate, call.up, call.dgate, call.dup, call.y}, stream);
}

}  // namespace

cudaError_t glu_fwd(const GluForward& call, cudaStream_t stream) {
  if (call.rows == 0 || call.cols == 0) return cudaSuccess;
  if (call.gate.dtype != call.up.dtype) return launch_fwd<Mixed>(call, stream);
  return with_dtype(call.gate.dtype, [&](auto type) {
    return launch_fwd<typename decltype(type)::type>(call, stream);
  });
}

cudaError_t glu_bwd(const GluBackward& call, cudaStream_t stream) {
  if (call.rows == 0 || call.cols == 0) return cudaSuccess;
  if (call.gate.dtype != call.up.dtype) return launch_bwd<Mixed>(call, stream);
  return with_dtype(call.gate.dtype, [&](auto type) {
    return launch_bwd<typename decltype(type)::type>(call, stream);
  });
}

}  // namespace fastlm
