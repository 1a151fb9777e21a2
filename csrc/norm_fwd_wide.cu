// Forward of LayerNorm and RMSNorm for rows that no block has in registers. A row goes to a block,
// tile by tile: statistics are merged (Chan et al.), and z waits in shared memory, where it fits,
// for the second pass, which otherwise reads and adds again. Where z is x, each tile's place takes
// the next row's as soon as its y is made: 4 bytes an element of 2 bytes. Where rows are fewer than
// multiprocessors, each segment of a row goes to a block, in two launches.
//
// Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
// Variances", 1979.
#include "arch/device.cuh"
#include "norm_fwd.cuh"
#include "norm_wide.cuh"

namespace fastlm {
namespace {

constexpr int kItems = 16;  // columns of a thread in a tile
constexpr int kSlots = kWideBlock / kWarp;  // of block_sum

// What is uniform over the call beside NormForward.
struct Plan {
  bool aligned;       // for Any: the others are always
  bool keeps_shared;  // z
  bool streams;       // x is z, and goes there by itself, a row ahead
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

template <typename T, int V>
__device__ inline void load_tile(Vector<T, V> (&to)[kItems / V], const RowTensor& x, int64_t row,
                                 int64_t cols, Columns<V> columns, int64_t first, bool whole) {
#pragma unroll
  for (int k = 0; k < kItems / V; k++) {
    to[k] = Vector<T, V>{};
    const auto col = columns.at(first, k);
    const int count = columns_at<V>(col, cols, whole);
    if (count > 0) to[k] = load_once<T, V>(x, row * x.stride + col, count, whole);
  }
}

template <typename X, typename Z, int V>
__device__ inline void add_up(Vector<Z, V> (&z)[kItems / V], const Addends<X, Z, V>& in,
                              const NormForward& call, int64_t row, Columns<V> columns,
                              int64_t first, bool whole) {
  uint32_t keep = ~0u;
  if (call.dropout.seed != nullptr) {
    keep = keep_bits<kItems>(call.dropout, row, columns, first);
  }
#pragma unroll
  for (int k = 0; k < kItems / V; k++) {
    float sum[V], more[V];
    unpack(sum, in.x[k]);
    drop(sum, keep >> V * k, call.dropout);
    if (call.residual.ptr != nullptr) {
      if constexpr (kEarly<Z>) {
        unpack(more, in.residual[k]);
      } else {
        const auto col = columns.at(first, k);
        const int count = columns_at<V>(col, call.cols, whole);
        load_floats(more, call.residual, row * call.residual.stride + col, count,
                    whole && count > 0);
      }
#pragma unroll
      for (int i = 0; i < V; i++) sum[i] += more[i];
    }
    if constexpr (std::is_same_v<Z, Any>) round_as<Any>(sum, call.z_dtype);
    pack(&z[k], sum);
  }
}

// This thread's z of a tile.
template <typename X, typename Z, int V>
__device__ inline void load_z(Vector<Z, V> (&z)[kItems / V], const NormForward& call, int64_t row,
                              Columns<V> columns, int64_t first, bool whole) {
  Addends<X, Z, V> in;
  load_tile(in.x, call.x, row, call.cols, columns, first, whole);
  if (kEarly<Z> && call.residual.ptr != nullptr) {
    load_tile(in.residual, call.residual, row, call.cols, columns, first, whole);
  }
  add_up(z, in, call, row, columns, first, whole);
}

template <typename Z, int V>
__device__ inline void store_z(const Vector<Z, V> (&z)[kItems / V], const NormForward& call,
                               int64_t row, int64_t cols, Columns<V> columns, int64_t first,
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

template <typename Z, int V>
__device__ inline void store_y(const Vector<Z, V> (&z)[kItems / V], float mean, float rstd,
                               const NormForward& call, int64_t row, Columns<V> columns,
                               int64_t first, bool whole) {
#pragma unroll
  for (int k = 0; k < kItems / V; k++) {
    const auto col = columns.at(first, k);
    const int count = columns_at<V>(col, call.cols, whole);
    if (count == 0) continue;
    float weight[V], bias[V], y[V];
    fill(weight, 1.0f);
    if (call.weight.ptr != nullptr) {
      load_floats(weight, call.weight, col, count, whole);
      const float one = call.kind == NormKind::kGemma ? 1.0f : 0.0f;
#pragma unroll
      for (int i = 0; i < V; i++) weight[i] += one;
    }
    fill(bias, 0.0f);
    if (call.bias.ptr != nullptr) load_floats(bias, call.bias, col, count, whole);
    unpack(y, z[k]);
#pragma unroll
    for (int i = 0; i < V; i++) y[i] = (y[i] - mean) * rstd;
    if (call.kind == NormKind::kLlama) round_as<Any>(y, call.x.dtype);
#pragma unroll
    for (int i = 0; i < V; i++) y[i] = fmaf(y[i], weight[i], bias[i]);
    store_floats<std::is_same_v<Z, Any>>(call.y, row * call.cols + col, y, count, whole);
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

template <typename Z, int V>
__device__ inline void add_tile(Moments* sofar, const Vector<Z, V> (&z)[kItems / V],
                                int64_t cols, bool has_mean, Columns<V> columns, int64_t first,
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
    block_sum(mean, slots);
    mean[0] /= count;
  }
  const float delta = mine.mean - mean[0];
  float squares[1] = {fmaf(delta * delta, mine.count, mine.squares)};
  block_sum(squares, slots + kSlots);
  return {count, mean[0], squares[0]};
}

// A row's z in shared memory, where each thread has what it will itself read again.
template <typename X, typename Z, int V>
struct KeptRow {
  static constexpr int kTile = kWideBlock * kItems;
  static constexpr bool kStreams = std::is_same_v<X, Z> && !std::is_same_v<Z, Any>;
  Vector<Z, V>* vectors;
  Columns<V> columns;
  int64_t cols;

  __device__ void put(const Vector<Z, V> (&z)[kItems / V], int64_t first) const {
#pragma unroll
    for (int k = 0; k < kItems / V; k++) {
      const auto col = columns.at(first, k);
      if (col < cols) vectors[col / V] = z[k];
    }
  }

  __device__ void get(Vector<Z, V> (&z)[kItems / V], int64_t first) const {
#pragma unroll
    for (int k = 0; k < kItems / V; k++) {
      const auto col = columns.at(first, k);
      z[k] = col < cols ? vectors[col / V] : Vector<Z, V>{};
    }
  }

  // Begins to copy a tile of x, where x is z, or of no row.
  __device__ void begin(const NormForward& call, int64_t row, int64_t first) const {
    if constexpr (kStreams) {
#pragma unroll
      for (int k = 0; k < kItems / V; k++) {
        const auto col = columns.at(first, k);
        if (col >= cols || row >= call.rows) continue;
        const X* from = static_cast<const X*>(call.x.ptr) + row * call.x.stride + col;
        copy_async<sizeof(Vector<Z, V>)>(&vectors[col / V], from);
      }
      copy_async_commit();
    }
  }

  // Waits for a tile of a row of which the later ones may still be on their way.
  __device__ void wait(int64_t first) const {
    if (first + 4 * kTile < cols) return copy_async_wait<4>();
    if (first + kTile < cols) return copy_async_wait<1>();
    copy_async_wait<0>();
  }
};

// The moments of the block's segments of a row, whose z it leaves in `kept`, where that has room.
template <typename X, typename Z, int V>
__device__ inline Moments row_moments(const NormForward& call, const Plan& plan,
                                      const KeptRow<X, Z, V>& kept, const Segments& segments,
                                      int64_t row, float* slots) {
  const bool whole = is_whole<X>(plan), has_mean = call.kind == NormKind::kLayer;
  Vector<Z, V> z[kItems / V];
  Moments moments;
#pragma unroll 1
  for (int64_t segment = segments.begin; segment < segments.end; segment++) {
    const int64_t end = min((segment + 1) * kSegment, call.cols);
    Moments mine;
#pragma unroll 1
    for (int64_t first = segment * kSegment; first < end; first += kept.kTile) {
      if (plan.streams) {
        kept.wait(first);
        kept.get(z, first);
      } else {
        load_z<X>(z, call, row, kept.columns, first, whole);
        if (plan.keeps_shared) kept.put(z, first);
      }
      if (call.z.ptr != nullptr) store_z(z, call, row, call.cols, kept.columns, first, whole);
      add_tile(&mine, z, call.cols, has_mean, kept.columns, first, whole);
    }
    sync_block();  // the slots are free again
    const float count = static_cast<float>(end - segment * kSegment);
    merge(&moments, block_moments(mine, count, has_mean, slots));
  }
  return moments;
}

// Rows of any width, tile by tile: a block each and on to the next ones a grid further, or a block
// for each segment.
template <typename X, typename Z, int V>
__global__ void __launch_bounds__(kWideBlock, 1)
    norm_fwd_wide_kernel(NormForward call, Plan plan, Phase phase) {
  const bool whole = is_whole<X>(plan);
  const Columns<V> columns{kWideBlock, static_cast<int>(threadIdx.x)};
  const Segments segments(call.cols, call.splits, phase);
  float* slots = shared_memory<float>();
  const KeptRow<X, Z, V> kept{reinterpret_cast<Vector<Z, V>*>(slots + 2 * kSlots), columns,
                              call.cols};
  static_assert(kSegment % kept.kTile == 0);
  const int64_t begin = segments.begin * kSegment, end = min(segments.end * kSegment, call.cols);
  const int64_t step = phase == Phase::kAll ? int64_t{gridDim.x} : call.rows;
  if (plan.streams) {
    for (int64_t first = begin; first < end; first += kept.kTile) {
      kept.begin(call, segments.row, first);
    }
  }
#pragma unroll 1
  for (int64_t row = segments.row; row < call.rows; row += step) {
    Moments moments;
    if (phase != Phase::kResults) moments = row_moments(call, plan, kept, segments, row, slots);
    float* scratch = call.moments + row * call.splits * 3;
    if (phase == Phase::kSums) {
      if (threadIdx.x == 0) {
        float* to = scratch + segments.begin * 3;
        to[0] = moments.count, to[1] = moments.mean, to[2] = moments.squares;
      }
      continue;
    }
    if (phase == Phase::kResults) {
#pragma unroll 1
      for (int i = 0; i < call.splits; i++) {
        const float* from = scratch + i * 3;
        merge(&moments, {from[0], from[1], from[2]});
      }
    }
    const float rstd = rstd_of(moments.squares, call);
    if (threadIdx.x == 0 && segments.begin == 0) store_statistics(call, row, moments.mean, rstd);

#pragma unroll 1
    for (int64_t first = begin; first < end; first += kept.kTile) {
      Vector<Z, V> z[kItems / V];
      if (plan.keeps_shared) {
        kept.get(z, first);
      } else {
        load_z<X>(z, call, row, columns, first, whole);
      }
      if (plan.streams) kept.begin(call, row + step, first);
      store_y(z, moments.mean, rstd, call, row, columns, first, whole);
    }
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
  plan.streams = plan.keeps_shared && KeptRow<X, Z, V>::kStreams && call.residual.ptr == nullptr &&
                 call.dropout.seed == nullptr;
  const auto launch_phase = [&](Phase phase, dim3 blocks) {
    const auto most = bounded<norm_fwd_wide_kernel<X, Z, V>, kWideBlock, kAllShared>;
    return launch(most.kernel, blocks, kWideBlock, shared, stream, call, plan, phase);
  };
  return launch_phases(call.rows, call.splits, device.multiprocessors, launch_phase);
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
    return launch_wide(types, call, Plan{aligned, false, false}, stream);
  });
}

}  // namespace fastlm
