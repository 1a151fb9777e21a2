// Forward of LayerNorm and RMSNorm for rows that one block has not whole. A row goes to a block, tile
// by tile: statistics are merged (Chan et al.), and z waits in shared memory, where it fits, for the
// second pass, which otherwise reads and adds again. Where rows are fewer than multiprocessors, each
// segment of a row goes to a block, in two launches.
//
// Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
// Variances", 1979.
#include "arch/device.cuh"
#include "norm_fwd.cuh"

namespace fastlm {
namespace {

constexpr int kItems = 16;  // columns of a thread in a tile
constexpr int kWideBlock = 512;
constexpr int kSlots = 32;  // of row_sum: a warp each

// What is uniform over the call beside NormForward.
struct Plan {
  bool aligned;       // for Any: the others are always
  bool keeps_shared;  // z
};

template <typename X>
__device__ inline bool is_whole(const Plan& plan) {
  return !std::is_same_v<X, Any> || plan.aligned;
}

// What a thread adds up to its z of a tile, as it lies in memory; 0 past the row's end.
template <typename X, typename Z, int V>
struct Addends {
  Vector<X, V> x[kItems / V];
  Vector<Z, V> residual[kItems / V];
};

// Of Any the residual comes when it is added: as floats it would take too many registers.
template <typename Z>
constexpr bool kEarly = !std::is_same_v<Z, Any>;

template <typename X, typename Z, int V, typename Index>
__device__ inline void load_x(Addends<X, Z, V>* in, const NormForward& call, int64_t row,
                              bool valid, Columns<V> columns, Index first, bool whole) {
  const int64_t cols = valid ? call.cols : 0;
#pragma unroll
  for (int k = 0; k < kItems / V; k++) {
    in->x[k] = Vector<X, V>{};
    const auto col = columns.at(first, k);
    const int count = columns_at<V>(col, cols, whole);
    if (count > 0) in->x[k] = load_once<X, V>(call.x, row * call.x.stride + col, count, whole);
  }
}

template <typename X, typename Z, int V, typename Index>
__device__ inline void load_residual(Addends<X, Z, V>* in, const NormForward& call, int64_t row,
                                     bool valid, Columns<V> columns, Index first, bool whole) {
  const int64_t cols = valid ? call.cols : 0;
#pragma unroll
  for (int k = 0; k < kItems / V; k++) {
    in->residual[k] = Vector<Z, V>{};
    const auto col = columns.at(first, k);
    const int count = columns_at<V>(col, cols, whole);
    if (count > 0) {
      in->residual[k] =
          load_once<Z, V>(call.residual, row * call.residual.stride + col, count, whole);
    }
  }
}

template <typename X, typename Z, int V, typename Index>
__device__ inline void add_up(Vector<Z, V> (&z)[kItems / V], const Addends<X, Z, V>& in,
                              const NormForward& call, int64_t row, bool valid,
                              Columns<V> columns, Index first, bool whole) {
  const int64_t cols = valid ? call.cols : 0;
  uint32_t keep = ~0u;
  if (call.dropout.seed != nullptr) {
    const uint64_t seed = static_cast<uint64_t>(*call.dropout.seed);
    keep = keep_bits<V, kItems>(seed, call.dropout.threshold, row, columns, first);
  }
#pragma unroll
  for (int k = 0; k < kItems / V; k++) {
    float sum[V], more[V];
    unpack(sum, in.x[k]);
    if (call.dropout.seed != nullptr) {
#pragma unroll
      for (int i = 0; i < V; i++) {
        sum[i] = keep >> (V * k + i) & 1 ? sum[i] * call.dropout.scale : 0.0f;
      }
    }
    if (call.residual.ptr != nullptr) {
      if constexpr (kEarly<Z>) {
        unpack(more, in.residual[k]);
      } else {
        const auto col = columns.at(first, k);
        const int count = columns_at<V>(col, cols, whole);
        load_floats(more, call.residual, row * call.residual.stride + col, count,
                    whole && count > 0);
      }
#pragma unroll
      for (int i = 0; i < V; i++) sum[i] += more[i];
    }
    if constexpr (std::is_same_v<Z, Any>) {
#pragma unroll
      for (int i = 0; i < V; i++) sum[i] = rounded(sum[i], call.z_dtype);
    }
    pack(&z[k], sum);
  }
}

// This thread's z of a tile, of R rows from `row` on; no load waits for what another brings.
template <typename X, typename Z, int V, int R, typename Index>
__device__ inline void load_z(Vector<Z, V> (&z)[R][kItems / V], const NormForward& call,
                              int64_t row, int64_t rows, Columns<V> columns, Index first,
                              bool whole) {
  Addends<X, Z, V> in[R];
#pragma unroll
  for (int r = 0; r < R; r++) load_x(&in[r], call, row + r, row + r < rows, columns, first, whole);
  if (kEarly<Z> && call.residual.ptr != nullptr) {
#pragma unroll
    for (int r = 0; r < R; r++) {
      load_residual(&in[r], call, row + r, row + r < rows, columns, first, whole);
    }
  }
#pragma unroll
  for (int r = 0; r < R; r++) {
    add_up(z[r], in[r], call, row + r, row + r < rows, columns, first, whole);
  }
}

template <typename Z, int V, typename Index>
__device__ inline void store_z(const Vector<Z, V> (&z)[kItems / V], const NormForward& call,
                               int64_t row, int64_t cols, Columns<V> columns, Index first,
                               bool whole) {
#pragma unroll
  for (int k = 0; k < kItems / V; k++) {
    const auto col = columns.at(first, k);
    const int count = columns_at<V>(col, cols, whole);
    if (count == 0) continue;
    float values[V];
    unpack(values, z[k]);
    store_floats<std::is_same_v<Z, Any>>(call.z, row * call.cols + col, values, count, whole);
  }
}

// y of R rows from `row` on, with weight and bias loaded once.
template <typename Z, int V, int R, typename Index>
__device__ inline void store_y(const Vector<Z, V> (&z)[R][kItems / V], const float (&mean)[R],
                               const float (&rstd)[R], const NormForward& call, int64_t row,
                               Columns<V> columns, Index first, bool whole) {
#pragma unroll
  for (int k = 0; k < kItems / V; k++) {
    const auto col = columns.at(first, k);
    const int count = columns_at<V>(col, row < call.rows ? call.cols : 0, whole);
    if (count == 0) continue;
    float weight[V], bias[V];
    fill(weight, 1.0f);
    if (call.weight.ptr != nullptr) {
      load_floats(weight, call.weight, col, count, whole);
      const float one = call.kind == NormKind::kGemma ? 1.0f : 0.0f;
#pragma unroll
      for (int i = 0; i < V; i++) weight[i] += one;
    }
    fill(bias, 0.0f);
    if (call.bias.ptr != nullptr) load_floats(bias, call.bias, col, count, whole);
#pragma unroll
    for (int r = 0; r < R; r++) {
      if (r > 0 && row + r >= call.rows) break;
      float y[V];
      unpack(y, z[r][k]);
#pragma unroll
      for (int i = 0; i < V; i++) y[i] = (y[i] - mean[r]) * rstd[r];
      if (call.kind == NormKind::kLlama) {
#pragma unroll
        for (int i = 0; i < V; i++) y[i] = rounded(y[i], call.x.dtype);
      }
#pragma unroll
      for (int i = 0; i < V; i++) y[i] = fmaf(y[i], weight[i], bias[i]);
      store_floats<std::is_same_v<Z, Any>>(call.y, (row + r) * call.cols + col, y, count, whole);
    }
  }
}

// Mean and squared deviations from it of one thread's values so far.
struct Moments {
  float count = 0.0f, mean = 0.0f, squares = 0.0f;
};

// Chan et al.
__device__ inline void merge(Moments* sofar, const Moments& more) {
  if (more.count == 0.0f) return;
  const float delta = more.mean - sofar->mean;
  const float share = more.count / (sofar->count + more.count);
  sofar->squares = fmaf(delta * delta, share * sofar->count, sofar->squares + more.squares);
  sofar->mean = fmaf(delta, share, sofar->mean);
  sofar->count += more.count;
}

template <typename Z, int V, typename Index>
__device__ inline void add_tile(Moments* sofar, const Vector<Z, V> (&z)[kItems / V],
                                int64_t cols, bool has_mean, Columns<V> columns, Index first,
                                bool whole) {
  float sum = 0.0f, squares = 0.0f;
  int count = 0;
#pragma unroll
  for (int k = 0; k < kItems / V; k++) {
    count += columns_at<V>(columns.at(first, k), cols, whole);
    float values[V];
    unpack(values, z[k]);
#pragma unroll
    for (int i = 0; i < V; i++) sum += values[i];
  }
  if (count == 0) return;
  const float n = static_cast<float>(count);
  const float mean = has_mean ? sum / n : 0.0f;
#pragma unroll
  for (int k = 0; k < kItems / V; k++) {
    const int there = columns_at<V>(columns.at(first, k), cols, whole);
    float values[V];
    unpack(values, z[k]);
#pragma unroll
    for (int i = 0; i < V; i++) {
      const float deviation = i < there ? values[i] - mean : 0.0f;
      squares = fmaf(deviation, deviation, squares);
    }
  }
  merge(sofar, {n, mean, squares});
}

// The moments of a segment, from those of the block's threads; the same in all of them.
__device__ inline Moments block_moments(const Moments& mine, float count, bool has_mean,
                                        float* slots) {
  float mean[1] = {mine.count * mine.mean};
  if (has_mean) {
    row_sum(mean, kWideBlock, slots);
    mean[0] /= count;
  }
  const float delta = mine.mean - mean[0];
  float squares[1] = {fmaf(delta * delta, mine.count, mine.squares)};
  row_sum(squares, kWideBlock, slots + kSlots);
  return {count, mean[0], squares[0]};
}

// Rows of any width: a block each, or one for each segment, tile by tile.
template <typename X, typename Z, int V>
__global__ void __launch_bounds__(kWideBlock, 1)
    norm_fwd_wide_kernel(NormForward call, Plan plan, Phase phase) {
  const bool whole = is_whole<X>(plan);
  const Columns<V> columns{kWideBlock, static_cast<int>(threadIdx.x)};
  constexpr int kTile = kWideBlock * kItems;
  static_assert(kSegment % kTile == 0);
  const Segments segments(call.cols, call.splits, phase);
  const int64_t row = segments.row;
  float* slots = shared_memory<float>();
  Vector<Z, V>* kept = reinterpret_cast<Vector<Z, V>*>(slots + 2 * kSlots);
  const bool has_mean = call.kind == NormKind::kLayer;

  Vector<Z, V> rows_z[1][kItems / V];
  auto& z = rows_z[0];
  Moments moments;
#pragma unroll 1
  for (int64_t segment = segments.begin; segment < segments.end && phase != Phase::kResults;
       segment++) {
    const int64_t end = min((segment + 1) * kSegment, call.cols);
    Moments mine;
    for (int64_t first = segment * kSegment; first < end; first += kTile) {
      load_z<X>(rows_z, call, row, call.rows, columns, first, whole);
      if (call.z.ptr != nullptr) store_z(z, call, row, call.cols, columns, first, whole);
      if (plan.keeps_shared) {
#pragma unroll
        for (int k = 0; k < kItems / V; k++) {
          const auto col = columns.at(first, k);
          if (col < call.cols) kept[col / V] = z[k];
        }
      }
      add_tile(&mine, z, call.cols, has_mean, columns, first, whole);
    }
    sync_block();  // the slots are free again
    const float count = static_cast<float>(end - segment * kSegment);
    merge(&moments, block_moments(mine, count, has_mean, slots));
  }
  float* scratch = call.moments + row * call.splits * 3;
  if (phase == Phase::kSums) {
    if (threadIdx.x == 0) {
      float* to = scratch + segments.begin * 3;
      to[0] = moments.count, to[1] = moments.mean, to[2] = moments.squares;
    }
    return;
  }
  if (phase == Phase::kResults) {
#pragma unroll 1
    for (int i = 0; i < call.splits; i++) {
      const float* from = scratch + i * 3;
      merge(&moments, {from[0], from[1], from[2]});
    }
  }
  const float mean[1] = {moments.mean}, rstd[1] = {rstd_of(moments.squares, call)};
  if (threadIdx.x == 0 && segments.begin == 0) store_statistics(call, row, mean[0], rstd[0]);

  const int64_t end = min(segments.end * kSegment, call.cols);
  for (int64_t first = segments.begin * kSegment; first < end; first += kTile) {
    if (plan.keeps_shared) {  // by this very thread
#pragma unroll
      for (int k = 0; k < kItems / V; k++) {
        const auto col = columns.at(first, k);
        if (col < call.cols) z[k] = kept[col / V];
      }
    } else {
      load_z<X>(rows_z, call, row, call.rows, columns, first, whole);
    }
    store_y(rows_z, mean, rstd, call, row, columns, first, whole);
  }
}

template <typename X, typename Z, int V>
cudaError_t launch_wide(ForwardTypes<X, Z, V>, const NormForward& call, Plan plan,
                        cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  size_t shared = 2 * kSlots * sizeof(float);
  const size_t row = ceil_div<int64_t>(call.cols, V) * sizeof(Vector<Z, V>);
  plan.keeps_shared =
      call.splits == 1 && shared + row <= static_cast<size_t>(device.shared_bytes);
  if (plan.keeps_shared) shared += row;
  return launch_phases(call.rows, call.splits, [&](Phase phase, dim3 blocks) {
    return launch(norm_fwd_wide_kernel<X, Z, V>, blocks, kWideBlock, shared, stream, call, plan,
                  phase);
  });
}

}  // namespace

cudaError_t norm_splits(int64_t rows, int64_t cols, int* splits) {
  *splits = 1;
  const int64_t segments = ceil_div(cols, kSegment);
  if (segments == 1) return cudaSuccess;
  Device device;
  const cudaError_t error = current_device(&device);
  if (error == cudaSuccess && rows < device.multiprocessors) *splits = static_cast<int>(segments);
  return error;
}

cudaError_t norm_fwd_wide(const NormForward& call, cudaStream_t stream) {
  return with_forward_types(call, [&](auto types, bool aligned) {
    return launch_wide(types, call, Plan{aligned, false}, stream);
  });
}

}  // namespace fastlm
