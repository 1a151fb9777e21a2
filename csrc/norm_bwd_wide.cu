// Backward of LayerNorm and RMSNorm for rows too wide for the registers of a block, in two kernels.
// A row goes to a block, tile by tile, dy and z waiting in shared memory, where they fit, for the
// row's two sums; the place of a tile that is done is where the next row's begins to arrive. (Where
// rows are fewer than multiprocessors, a segment of a row goes to a block, in two launches.) That is
// 6 bytes an element of 2-byte elements, 8 with dz_in. dweight and dbias go by
// columns, and read dy and z once more, 4 bytes; a group of rows leaves one fp32 row of sums.
#include "norm_bwd.cuh"
#include "norm_wide.cuh"

namespace fastlm {
namespace {

constexpr int kWideItems = 8;     // columns of a thread in a tile
constexpr int kColumnsWarps = 8;  // of a block of norm_bwd_columns_kernel, each with its rows
constexpr int kSlots = 2 * kWideBlock / kWarp;  // of block_sum
constexpr int64_t kColumnsRows = 64;  // of a group of rows at least, so that partials stay few

// Vectors of a row in shared memory: an even number, since those of z come behind those of dy, which
// may have half their size and alignment.
template <int V>
__host__ __device__ inline int64_t kept_vectors(int64_t cols) {
  return ceil_div<int64_t>(cols, 2 * V) * 2;
}

// What is uniform over the call beside NormBackward.
struct Plan {
  bool aligned;       // for Any: the others are always
  bool keeps_shared;  // dy and z
  bool streams;       // they arrive there by themselves
};

template <typename Z>
__device__ inline bool is_whole(const Plan& plan) {
  return !std::is_same_v<Z, Any> || plan.aligned;
}

// One thread's columns of a row in a tile, as they arrive.
template <typename DY, typename Z, int V, int Items>
struct Incoming {
  Vector<DY, V> dy[Items / V];
  Vector<Z, V> z[Items / V];
  float mean, rstd;
};

// dy and z of a row in shared memory, where each thread has what it will itself read again.
template <typename DY, typename Z, int V>
struct KeptRow {
  static constexpr int kTile = kWideBlock * kWideItems;
  static constexpr int kVectors = kWideItems / V;
  Vector<DY, V>* dy;
  Vector<Z, V>* z;
  Columns<V> columns;
  int64_t cols;

  __device__ KeptRow(void* shared, Columns<V> columns, int64_t cols)
      : dy(static_cast<Vector<DY, V>*>(shared)),
        z(reinterpret_cast<Vector<Z, V>*>(dy + kept_vectors<V>(cols))),
        columns(columns),
        cols(cols) {}

  __device__ void put(const Incoming<DY, Z, V, kWideItems>& in, int64_t first) const {
#pragma unroll
    for (int k = 0; k < kVectors; k++) {
      const auto col = columns.at(first, k);
      if (col >= cols) continue;
      dy[col / V] = in.dy[k];
      z[col / V] = in.z[k];
    }
  }

  __device__ void get(Incoming<DY, Z, V, kWideItems>* in, int64_t first) const {
#pragma unroll
    for (int k = 0; k < kVectors; k++) {
      const auto col = columns.at(first, k);
      in->dy[k] = col < cols ? dy[col / V] : Vector<DY, V>{};
      in->z[k] = col < cols ? z[col / V] : Vector<Z, V>{};
    }
  }

  // Begins to copy a tile of a row, or of none.
  __device__ void begin(const NormBackward& call, int64_t row, int64_t first) const {
    if constexpr (!std::is_same_v<Z, Any>) {
#pragma unroll
      for (int k = 0; k < kVectors; k++) {
        const auto col = columns.at(first, k);
        if (col >= cols || row >= call.rows) continue;
        copy_async<sizeof(Vector<DY, V>)>(
            &dy[col / V], static_cast<const DY*>(call.dy.ptr) + row * call.dy.stride + col);
        copy_async<sizeof(Vector<Z, V>)>(
            &z[col / V], static_cast<const Z*>(call.z.ptr) + row * call.z.stride + col);
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

template <typename DY, typename Z, int V, int Items>
__device__ inline void load_statistics(Incoming<DY, Z, V, Items>* in, const NormBackward& call,
                                       int64_t row) {
  const bool valid = row < call.rows;
  in->mean = valid && call.kind == NormKind::kLayer ? call.mean[row] : 0.0f;
  in->rstd = valid ? call.rstd[row] : 0.0f;
}

template <typename DY, typename Z, int V, int Items>
__device__ inline void load_vector(Incoming<DY, Z, V, Items>* in, int k, const NormBackward& call,
                                   int64_t row, int64_t col, bool whole) {
  const int count = row < call.rows ? columns_at<V>(col, call.cols, whole) : 0;
  in->dy[k] = Vector<DY, V>{};
  in->z[k] = Vector<Z, V>{};
  if (count == 0) return;
  in->dy[k] = load_once<DY, V>(call.dy, row * call.dy.stride + col, count, whole);
  in->z[k] = load_once<Z, V>(call.z, row * call.z.stride + col, count, whole);
}

template <typename DY, typename Z, int V, int Items>
__device__ inline void load_tile(Incoming<DY, Z, V, Items>* in, const NormBackward& call,
                                 int64_t row, Columns<V> columns, int64_t first, bool whole) {
#pragma unroll
  for (int k = 0; k < Items / V; k++) {
    load_vector(in, k, call, row, columns.at(first, k), whole);
  }
}

// weight as fp32 factors of dy: 1 where there is none.
template <int V>
__device__ inline void load_weight(float (&to)[V], const NormBackward& call, int64_t col,
                                   bool whole) {
  const int count = columns_at<V>(col, call.cols, whole);
  fill(to, 1.0f);
  if (call.weight.ptr == nullptr || count == 0) return;
  load_floats(to, call.weight, col, count, whole);
  if (call.kind == NormKind::kGemma) {
#pragma unroll
    for (int i = 0; i < V; i++) to[i] += 1.0f;
  }
}

// Columns past the row's end have dy = 0 and z = 0, and so add nothing.
template <typename DY, typename Z, int V, int Items>
__device__ inline void add_sums(float (&sums)[2], const Incoming<DY, Z, V, Items>& in, int k,
                                const float (&weight)[V]) {
  float dy[V], z[V];
  unpack(dy, in.dy[k]);
  unpack(z, in.z[k]);
#pragma unroll
  for (int i = 0; i < V; i++) {
    sums[0] = fmaf(dy[i], weight[i], sums[0]);
    sums[1] = fmaf(dy[i] * weight[i], (z[i] - in.mean) * in.rstd, sums[1]);
  }
}

// dz and dx of vector k, from the row's mean(wdy) and mean(wdy * xhat).
template <typename DY, typename Z, int V, int Items>
__device__ inline void store_vector(const Incoming<DY, Z, V, Items>& in, int k,
                                    const float (&means)[2], const float (&weight)[V],
                                    const NormBackward& call, int64_t row, int64_t col,
                                    uint32_t keep, bool whole) {
  const int count = columns_at<V>(col, call.cols, whole);
  if (row >= call.rows || count == 0) return;
  float dz[V], other[V];
  unpack(dz, in.dy[k]);
  unpack(other, in.z[k]);
#pragma unroll
  for (int i = 0; i < V; i++) {
    const float xhat = (other[i] - in.mean) * in.rstd;
    dz[i] = fmaf(-xhat, means[1], dz[i] * weight[i]) - means[0];
  }
  if (call.dz_in.ptr != nullptr) {
    load_floats(other, call.dz_in, row * call.dz_in.stride + col, count, whole);
#pragma unroll
    for (int i = 0; i < V; i++) dz[i] = fmaf(dz[i], in.rstd, other[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) dz[i] *= in.rstd;
  }
  const int64_t at = row * call.cols + col;
  if (call.dz.ptr != nullptr) store_floats<std::is_same_v<Z, Any>>(call.dz, at, dz, count, whole);
  if (call.dx.ptr == nullptr) return;
  if (call.dropout.seed != nullptr) {
#pragma unroll
    for (int i = 0; i < V; i++) {
      dz[i] = keep >> (V * k + i) & 1 ? dz[i] * call.dropout.scale : 0.0f;
    }
  }
  store_floats<std::is_same_v<Z, Any>>(call.dx, at, dz, count, whole);
}

template <typename DY, typename Z, int V, int Items>
__device__ inline void add_columns(float (&dweight)[V], float (&dbias)[V],
                                   const Incoming<DY, Z, V, Items>& in, int k,
                                   const NormBackward& call) {
  float dy[V], z[V];
  unpack(dy, in.dy[k]);
  unpack(z, in.z[k]);
  if (call.dweight_partials != nullptr) {
#pragma unroll
    for (int i = 0; i < V; i++) {
      dweight[i] = fmaf(dy[i], (z[i] - in.mean) * in.rstd, dweight[i]);
    }
  }
  if (call.dbias_partials != nullptr) {
#pragma unroll
    for (int i = 0; i < V; i++) dbias[i] += dy[i];
  }
}

template <int Items, int V>
__device__ inline uint32_t keep_bits_of(const NormBackward& call, int64_t row, Columns<V> columns,
                                        int64_t first) {
  if (call.dropout.seed == nullptr || call.dx.ptr == nullptr) return ~0u;
  return keep_bits<Items>(call.dropout, row, columns, first);
}

// A block's row of sums of the columns: its `groups` of threads, each with sums of its own in
// `mine`, take turns. `scratch` is shared memory for a float of each column, and free.
template <int V, int Items>
__device__ inline void store_partial(float* partial, const float (&mine)[Items / V][V], int groups,
                                     int group, Columns<V> columns, int64_t cols, float* scratch) {
  for (int turn = 0; turn < groups; turn++) {
#pragma unroll
    for (int k = 0; k < Items / V; k++) {
      const auto col = columns.at(0, k);
      if (group != turn) continue;
#pragma unroll
      for (int i = 0; i < V; i++) {
        if (col + i >= cols) continue;
        const float sofar = turn == 0 ? 0.0f : scratch[col + i];
        if (turn + 1 == groups) {
          partial[col + i] = sofar + mine[k][i];
        } else {
          scratch[col + i] = sofar + mine[k][i];
        }
      }
    }
    if (groups > 1) sync_block();
  }
}

// The block's segments' part of sum(wdy) and sum(wdy * xhat) of a row, whose dy and z it leaves in
// `kept`, where that has room.
template <typename DY, typename Z, int V>
__device__ inline void row_sums(float (&sums)[2], Incoming<DY, Z, V, kWideItems>* in,
                                const NormBackward& call, const Plan& plan,
                                const KeptRow<DY, Z, V>& kept, const Segments& segments,
                                int64_t row, float* slots) {
  const bool whole = is_whole<Z>(plan);
#pragma unroll 1
  for (int64_t segment = segments.begin; segment < segments.end; segment++) {
    float mine[2] = {0.0f, 0.0f};
    const int64_t end = min((segment + 1) * kSegment, call.cols);
#pragma unroll 1
    for (int64_t first = segment * kSegment; first < end; first += kept.kTile) {
      if (plan.streams) {
        kept.wait(first);
        kept.get(in, first);
      } else {
        load_tile(in, call, row, kept.columns, first, whole);
        if (plan.keeps_shared) kept.put(*in, first);
      }
#pragma unroll
      for (int k = 0; k < kept.kVectors; k++) {
        float weight[V];
        load_weight(weight, call, kept.columns.at(first, k), whole);
        add_sums(mine, *in, k, weight);
      }
    }
    sync_block();  // the slots are free again
    block_sum(mine, slots);
    sums[0] += mine[0];
    sums[1] += mine[1];
  }
}

// dz and dx of rows of any width, tile by tile: a block each and on to the next ones a grid further,
// or a block for each segment.
template <typename DY, typename Z, int V>
__global__ void __launch_bounds__(kWideBlock, 1)
    norm_bwd_wide_kernel(NormBackward call, Plan plan, Phase phase) {
  const bool whole = is_whole<Z>(plan);
  const Columns<V> columns{kWideBlock, static_cast<int>(threadIdx.x)};
  const Segments segments(call.cols, call.splits, phase);
  float* slots = shared_memory<float>();
  const KeptRow<DY, Z, V> kept(slots + kSlots, columns, call.cols);
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
    Incoming<DY, Z, V, kWideItems> in{};
    load_statistics(&in, call, row);
    float sums[2] = {0.0f, 0.0f};
    if (phase != Phase::kResults) row_sums(sums, &in, call, plan, kept, segments, row, slots);
    float* scratch = call.sums + row * call.splits * 2;
    if (phase == Phase::kSums) {
      if (threadIdx.x == 0) {
        scratch[segments.begin * 2] = sums[0];
        scratch[segments.begin * 2 + 1] = sums[1];
      }
      continue;
    }
    if (phase == Phase::kResults) {
#pragma unroll 1
      for (int i = 0; i < call.splits; i++) {
        sums[0] += scratch[i * 2];
        sums[1] += scratch[i * 2 + 1];
      }
    }
    const float n = static_cast<float>(call.cols);
    const float means[2] = {call.kind == NormKind::kLayer ? sums[0] / n : 0.0f, sums[1] / n};

#pragma unroll 1
    for (int64_t first = begin; first < end; first += kept.kTile) {
      if (plan.keeps_shared) {
        kept.get(&in, first);
      } else {
        load_tile(&in, call, row, columns, first, whole);
      }
      if (plan.streams) kept.begin(call, row + step, first);
      const uint32_t keep = keep_bits_of<kWideItems>(call, row, columns, first);
#pragma unroll
      for (int k = 0; k < kept.kVectors; k++) {
        const auto col = columns.at(first, k);
        float weight[V];
        load_weight(weight, call, col, whole);
        store_vector(in, k, means, weight, call, row, col, keep, whole);
      }
    }
  }
}

// dweight and dbias of wide rows: a warp has V columns a lane, and every kColumnsWarps-th row of
// the block's group of rows.
template <typename DY, typename Z, int V>
__global__ void __launch_bounds__(kColumnsWarps* kWarp, 1)
    norm_bwd_columns_kernel(NormBackward call, Plan plan) {
  const bool whole = is_whole<Z>(plan);
  const int64_t group = blockIdx.x % call.partials;
  const int64_t first = blockIdx.x / call.partials * (kWarp * V);
  const Columns<V> columns{kWarp, lane_id()};
  const int64_t step = static_cast<int64_t>(call.partials) * kColumnsWarps;
  float dweight[1][V] = {}, dbias[1][V] = {};
#pragma unroll 4
  for (int64_t row = group * kColumnsWarps + warp_id(); row < call.rows; row += step) {
    Incoming<DY, Z, V, V> in;
    load_tile(&in, call, row, columns, first, whole);
    load_statistics(&in, call, row);
    add_columns(dweight[0], dbias[0], in, 0, call);
  }
  float* scratch = shared_memory<float>();
  const int64_t partial = group * call.cols + first;
  if (call.dweight_partials != nullptr) {
    store_partial<V, V>(call.dweight_partials + partial, dweight, kColumnsWarps, warp_id(),
                        columns, call.cols - first, scratch);
  }
  if (call.dbias_partials != nullptr) {
    store_partial<V, V>(call.dbias_partials + partial, dbias, kColumnsWarps, warp_id(), columns,
                        call.cols - first, scratch);
  }
}

template <typename DY, typename Z, int V>
cudaError_t launch_wide(BackwardTypes<DY, Z, V>, const NormBackward& call, Plan plan,
                        cudaStream_t stream) {
  if (call.dz.ptr != nullptr || call.dx.ptr != nullptr) {
    Device device;
    cudaError_t error = current_device(&device);
    if (error != cudaSuccess) return error;
    size_t shared = kSlots * sizeof(float);
    const size_t row =
        kept_vectors<V>(call.cols) * (sizeof(Vector<DY, V>) + sizeof(Vector<Z, V>));
    plan.keeps_shared =
        call.splits == 1 && shared + row <= static_cast<size_t>(device.shared_bytes);
    if (plan.keeps_shared) shared += row;
    plan.streams = plan.keeps_shared && !std::is_same_v<Z, Any>;
    // Rows in shared memory leave room for one block, which prepares for its next row.
    const int64_t most = plan.streams ? int64_t{device.multiprocessors} : call.rows;
    error = launch_phases(call.rows, call.splits, most, [&](Phase phase, dim3 blocks) {
      const auto most = bounded<norm_bwd_wide_kernel<DY, Z, V>, kWideBlock, kAllShared>;
      return launch(most.kernel, blocks, kWideBlock, shared, stream, call, plan, phase);
    });
    if (error != cudaSuccess) return error;
  }
  if (call.dweight_partials == nullptr && call.dbias_partials == nullptr) return cudaSuccess;
  const int64_t blocks = ceil_div<int64_t>(call.cols, kWarp * V) * call.partials;
  const auto kernel = bounded<norm_bwd_columns_kernel<DY, Z, V>, kColumnsWarps * kWarp,
                              kWarp * V * sizeof(float)>;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), stream, call, plan);
}

}  // namespace

int wide_partials(int64_t rows, const Device& device) {
  const int64_t groups = ceil_div<int64_t>(rows, kColumnsRows);
  return static_cast<int>(min(groups, int64_t{device.multiprocessors}));
}

cudaError_t norm_bwd_wide(const NormBackward& call, cudaStream_t stream) {
  return with_backward_types(call, [&](auto types, bool aligned) {
    return launch_wide(types, call, Plan{aligned, false, false}, stream);
  });
}

}  // namespace fastlm
