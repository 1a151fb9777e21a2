// Backward of LayerNorm and RMSNorm; wdy = dy * weight, xhat = (z - mean) * rstd:
//
//   dz = rstd * (wdy - mean(wdy) - xhat * mean(wdy * xhat)) + dz_in;   dx = dropout(dz)
//   dweight = sum_rows(dy * xhat);   dbias = sum_rows(dy)
//
// RMSNorm drops the mean(wdy) term. As many blocks as the device holds go over the rows. A thread
// keeps its columns: their sums of dweight and dbias stay in registers, their weight in shared memory
// as fp32, and the next row is on its way there while this one is worked on. dy and z are read once, dz
// and dx written once: of 2-byte elements 6 bytes an element, 8 with dz_in, and 2 more where dx is
// not dz. Each block leaves one fp32 row of sums, which
// column_sum adds up in order.
//
// Rows wider than kWidest go to a block each, tile by tile, dy and z waiting in shared memory, where
// they fit, for the row's two sums; dweight and dbias read dy and z once more, by columns.
#include "column_sum.h"
#include "norm.cuh"

namespace fastlm {
namespace {

constexpr int kItems = 8;          // columns of a thread
constexpr int kNarrowBlock = 256;  // threads where a row has fewer
constexpr int kWidest = kItems * 1024;
constexpr int kThreadsResident = 1024;  // of a multiprocessor, by their registers
constexpr int kWideBlock = 512;
constexpr int kWideItems = 8;  // in a tile
constexpr int kColumnsWarps = 8;  // of a block of norm_bwd_columns_kernel, each with its rows
constexpr int kColumnsRows = 64;  // of a group at least, so that partials stay few
constexpr int kSlots = 2 * 32;  // of row_sum: two floats a warp

// What is uniform over the call beside NormBackward.
struct Plan {
  int lanes;
  bool aligned;  // for Any: the others are always
  bool keeps_shared;  // a wide row's dy and z
  int scratch;  // floats of store_partial
};

template <typename Z>
__device__ inline bool is_whole(const Plan& plan) {
  return !std::is_same_v<Z, Any> || plan.aligned;
}

// How many rows norm_bwd_kernel has in shared memory, the next one arriving while it works on this
// one: none where vectors have fewer than 16 bytes. With a single place the next row arrives after
// the sums of this one, vector by vector as that makes room.
template <typename DY, typename Z>
constexpr int kPlaces = !std::is_same_v<DY, Z> || std::is_same_v<Z, Any> ? 0
                        : sizeof(Z) == 2                                 ? 2
                                                                         : 1;

// Whether it holds the row in registers while the row's sums are made; else it reads it again.
template <typename DY, typename Z>
constexpr bool kHoldsRow = kPlaces<DY, Z> == 0 && !std::is_same_v<Z, Any>;

// One thread's columns of a row in a tile, as they arrive.
template <typename DY, typename Z, int V, int Items>
struct Incoming {
  Vector<DY, V> dy[Items / V];
  Vector<Z, V> z[Items / V];
  float mean, rstd;
};

template <typename DY, typename Z, int V, int Items>
__device__ inline void load_statistics(Incoming<DY, Z, V, Items>* in, const NormBackward& call,
                                       int64_t row) {
  const bool valid = row < call.rows;
  in->mean = valid && call.kind == NormKind::kLayer ? call.mean[row] : 0.0f;
  in->rstd = valid ? call.rstd[row] : 0.0f;
}

template <typename DY, typename Z, int V, int Items, typename Index>
__device__ inline void load_vector(Incoming<DY, Z, V, Items>* in, int k, const NormBackward& call,
                                   int64_t row, Index col, bool whole) {
  const int count = row < call.rows ? columns_at<V>(col, call.cols, whole) : 0;
  in->dy[k] = Vector<DY, V>{};
  in->z[k] = Vector<Z, V>{};
  if (count == 0) return;
  in->dy[k] = load_once<DY, V>(call.dy, row * call.dy.stride + col, count, whole);
  in->z[k] = load_once<Z, V>(call.z, row * call.z.stride + col, count, whole);
}

template <typename DY, typename Z, int V, int Items, typename Index>
__device__ inline void load_incoming(Incoming<DY, Z, V, Items>* in, const NormBackward& call,
                                     int64_t row, Columns<V> columns, Index first, bool whole) {
#pragma unroll
  for (int k = 0; k < Items / V; k++) {
    load_vector(in, k, call, row, columns.at(first, k), whole);
  }
  load_statistics(in, call, row);
}

// weight as fp32 factors of dy: 1 where there is none.
template <int V, typename Index>
__device__ inline void load_weight(float (&to)[V], const NormBackward& call, Index col,
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

// Vector k of the columns among fp32 copies in shared memory: four columns of all lanes, then the
// next four, so that lanes next to each other are at addresses next to each other.
template <int V>
__device__ inline void remember(Vector<float, 4>* copies, const float (&x)[V], Columns<V> columns,
                                int k) {
#pragma unroll
  for (int i = 0; i < V; i += 4) {
    const float four[4] = {x[i], x[i + 1], x[i + 2], x[i + 3]};
    pack(&copies[(k * V + i) / 4 * columns.lanes + columns.lane], four);
  }
}

template <int V>
__device__ inline void recall(float (&x)[V], const Vector<float, 4>* copies, Columns<V> columns,
                              int k) {
#pragma unroll
  for (int i = 0; i < V; i += 4) {
    float four[4];
    unpack(four, copies[(k * V + i) / 4 * columns.lanes + columns.lane]);
#pragma unroll
    for (int j = 0; j < 4; j++) x[i + j] = four[j];
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
template <typename DY, typename Z, int V, int Items, typename Index>
__device__ inline void store_vector(const Incoming<DY, Z, V, Items>& in, int k,
                                    const float (&means)[2], const float (&weight)[V],
                                    const NormBackward& call, int64_t row, Index col,
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
  if (call.dz.ptr != nullptr) store_floats(call.dz, at, dz, count, whole);
  if (call.dx.ptr == nullptr) return;
  if (call.seed != nullptr) {
#pragma unroll
    for (int i = 0; i < V; i++) {
      dz[i] = keep >> (V * k + i) & 1 ? dz[i] * call.dropout_scale : 0.0f;
    }
  }
  store_floats(call.dx, at, dz, count, whole);
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

template <int V, int Items, typename Index>
__device__ inline uint32_t keep_bits_of(const NormBackward& call, int64_t row, Columns<V> columns,
                                        Index first) {
  if (call.seed == nullptr || call.dx.ptr == nullptr) return ~0u;
  return keep_bits<V, Items>(static_cast<uint64_t>(*call.seed), call.dropout_threshold, row,
                             columns, first);
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

// Rows that fit into registers: `lanes` threads each, as many rows at once as the block has room
// for, and on to the next ones a grid further.
template <typename DY, typename Z, int V>
__global__ void __launch_bounds__(1024) norm_bwd_kernel(NormBackward call, Plan plan) {
  const bool whole = is_whole<Z>(plan);
  const int groups = static_cast<int>(blockDim.x) / plan.lanes;
  const int group = static_cast<int>(threadIdx.x) / plan.lanes;
  const Columns<V> columns{plan.lanes, static_cast<int>(threadIdx.x) % plan.lanes};
  float* slots = shared_memory<float>();
  const int64_t step = static_cast<int64_t>(gridDim.x) * groups;
  const bool has_mean = call.kind == NormKind::kLayer;
  constexpr int kVectors = kItems / V;
  constexpr int kRowPlaces = kPlaces<DY, Z>;
  constexpr bool kHolds = kHoldsRow<DY, Z>;

  // A copy for the threads of all rows, of whole vectors.
  Vector<float, 4>* weights = reinterpret_cast<Vector<float, 4>*>(slots + 2 * kSlots);
  float* scratch = slots + 2 * kSlots + plan.lanes * kItems;
  if (group == 0) {
#pragma unroll
    for (int k = 0; k < kVectors; k++) {
      float weight[V];
      load_weight(weight, call, columns.at(0, k), whole);
      remember(weights, weight, columns, k);
    }
  }
  sync_block();
  float dweight[kVectors][V] = {}, dbias[kVectors][V] = {};

  // Of Any the sums are in places of their own too, since registers do not do.
  constexpr bool kSumsShared = std::is_same_v<Z, Any>;
  const Columns<V> own{static_cast<int>(blockDim.x), static_cast<int>(threadIdx.x)};
  Vector<float, 4>* shared_dweight = reinterpret_cast<Vector<float, 4>*>(scratch + plan.scratch);
  Vector<float, 4>* shared_dbias = shared_dweight + kItems / 4 * own.lanes;
  if constexpr (kSumsShared) {
#pragma unroll
    for (int k = 0; k < kVectors; k++) {
      remember(shared_dweight, dweight[k], own, k);
      remember(shared_dbias, dbias[k], own, k);
    }
  }

  // Where rows arrive: vectors of dy, then of z, each read by the thread that copies it.
  Vector<Z, V>* places = reinterpret_cast<Vector<Z, V>*>(scratch + plan.scratch) + own.lane;
  Incoming<DY, Z, V, kItems> in, next;
  const auto begin_copy = [&](int64_t row, int k, int place) {
    const int col = columns.at(0, k);
    const bool valid = row < call.rows && col < call.cols;
    const int64_t dy_at = valid ? row * call.dy.stride + col : 0;
    const int64_t z_at = valid ? row * call.z.stride + col : 0;
    Vector<Z, V>* to = places + (place * 2 * kVectors + k) * own.lanes;
    copy_async_16(to, static_cast<const DY*>(call.dy.ptr) + dy_at, valid);
    copy_async_16(to + kVectors * own.lanes, static_cast<const Z*>(call.z.ptr) + z_at, valid);
  };
  const auto fetch = [&](int64_t row, int k, int place) {
    if constexpr (kRowPlaces > 0) {
      const Vector<Z, V>* from = places + (place * 2 * kVectors + k) * own.lanes;
      in.dy[k] = from[0];
      in.z[k] = from[kVectors * own.lanes];
    } else {
      load_vector(&in, k, call, row, columns.at(0, k), whole);
    }
  };

  const int64_t first = static_cast<int64_t>(blockIdx.x) * groups;
  int64_t row = first + group;
  // As many turns for all of the block, which meets in the sum.
  int left = static_cast<int>(ceil_div(call.rows - first, step));
  if constexpr (kRowPlaces > 0) {
    load_statistics(&next, call, row);
#pragma unroll
    for (int k = 0; k < kVectors; k++) begin_copy(row, k, kRowPlaces == 2 ? left % 2 : 0);
    copy_async_commit();
  }
  for (; left > 0; left--) {
    const int place = kRowPlaces == 2 ? left % 2 : 0;
    if constexpr (kRowPlaces > 0) {
      in.mean = next.mean;
      in.rstd = next.rstd;
      load_statistics(&next, call, row + step);
      copy_async_wait<0>();
    } else {
      load_statistics(&in, call, row);
    }
    if constexpr (kRowPlaces == 2) {
      if (left > 1) {
#pragma unroll
        for (int k = 0; k < kVectors; k++) begin_copy(row + step, k, 1 - place);
        copy_async_commit();
      }
    }
    if constexpr (kHolds) {
#pragma unroll
      for (int k = 0; k < kVectors; k++) fetch(row, k, place);
    }
    float sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < kVectors; k++) {
      if constexpr (!kHolds) fetch(row, k, place);
      float weight[V];
      recall(weight, weights, columns, k);
      add_sums(sums, in, k, weight);
    }
    // Slots in turn: the barrier of the sum between frees these ones.
    row_sum(sums, plan.lanes, slots + left % 2 * kSlots);
    const float n = static_cast<float>(call.cols);
    const float means[2] = {has_mean ? sums[0] / n : 0.0f, sums[1] / n};
    const uint32_t keep = keep_bits_of<V, kItems>(call, row, columns, 0);
#pragma unroll
    for (int k = 0; k < kVectors; k++) {
      if constexpr (!kHolds) fetch(row, k, place);
      if constexpr (kRowPlaces == 1) {
        if (left > 1) begin_copy(row + step, k, place);
      }
      if constexpr (kSumsShared) {
        recall(dweight[k], shared_dweight, own, k);
        recall(dbias[k], shared_dbias, own, k);
        add_columns(dweight[k], dbias[k], in, k, call);
        remember(shared_dweight, dweight[k], own, k);
        remember(shared_dbias, dbias[k], own, k);
      } else {
        add_columns(dweight[k], dbias[k], in, k, call);
      }
      float weight[V];
      recall(weight, weights, columns, k);
      store_vector(in, k, means, weight, call, row, columns.at(0, k), keep, whole);
    }
    if constexpr (kRowPlaces == 1) copy_async_commit();
    row += step;
  }
  if constexpr (kSumsShared) {
#pragma unroll
    for (int k = 0; k < kVectors; k++) {
      recall(dweight[k], shared_dweight, own, k);
      recall(dbias[k], shared_dbias, own, k);
    }
  }

  const int64_t partial = blockIdx.x * call.cols;
  if (call.dweight_partials != nullptr) {
    store_partial<V, kItems>(call.dweight_partials + partial, dweight, groups, group, columns,
                             call.cols, scratch);
  }
  if (call.dbias_partials != nullptr) {
    store_partial<V, kItems>(call.dbias_partials + partial, dbias, groups, group, columns,
                             call.cols, scratch);
  }
}

// dz and dx of rows of any width: a block each, tile by tile.
template <typename DY, typename Z, int V>
__global__ void __launch_bounds__(kWideBlock, 1) norm_bwd_wide_kernel(NormBackward call, Plan plan) {
  constexpr int kTile = kWideBlock * kWideItems;
  constexpr int kVectors = kWideItems / V;
  const bool whole = is_whole<Z>(plan);
  const Columns<V> columns{kWideBlock, static_cast<int>(threadIdx.x)};
  const int64_t row = blockIdx.x;
  float* slots = shared_memory<float>();
  const int64_t row_vectors = ceil_div<int64_t>(call.cols, V);
  Vector<DY, V>* kept_dy = reinterpret_cast<Vector<DY, V>*>(slots + kSlots);
  Vector<Z, V>* kept_z = reinterpret_cast<Vector<Z, V>*>(kept_dy + row_vectors);

  Incoming<DY, Z, V, kWideItems> in;
  float sums[2] = {0.0f, 0.0f};
  for (int64_t first = 0; first < call.cols; first += kTile) {
    load_incoming(&in, call, row, columns, first, whole);
#pragma unroll
    for (int k = 0; k < kVectors; k++) {
      const auto col = columns.at(first, k);
      float weight[V];
      load_weight(weight, call, col, whole);
      add_sums(sums, in, k, weight);
      if (plan.keeps_shared && col < call.cols) {
        kept_dy[col / V] = in.dy[k];
        kept_z[col / V] = in.z[k];
      }
    }
  }
  row_sum(sums, kWideBlock, slots);
  const float n = static_cast<float>(call.cols);
  const float means[2] = {call.kind == NormKind::kLayer ? sums[0] / n : 0.0f, sums[1] / n};

  for (int64_t first = 0; first < call.cols; first += kTile) {
    if (!plan.keeps_shared) load_incoming(&in, call, row, columns, first, whole);
    const uint32_t keep = keep_bits_of<V, kWideItems>(call, row, columns, first);
#pragma unroll
    for (int k = 0; k < kVectors; k++) {
      const auto col = columns.at(first, k);
      if (plan.keeps_shared && col < call.cols) {  // by this very thread
        in.dy[k] = kept_dy[col / V];
        in.z[k] = kept_z[col / V];
      }
      float weight[V];
      load_weight(weight, call, col, whole);
      store_vector(in, k, means, weight, call, row, col, keep, whole);
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
    load_incoming(&in, call, row, columns, first, whole);
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

// The threads of a block of norm_bwd_kernel, for rows of `lanes` threads.
int block_threads(int lanes) {
  return lanes >= kNarrowBlock ? lanes : kNarrowBlock / lanes * lanes;
}

template <typename DY, typename Z, int V>
cudaError_t launch_narrow(const NormBackward& call, Plan plan, cudaStream_t stream) {
  plan.lanes = lanes_of_row(call.cols, kItems);
  const int threads = block_threads(plan.lanes);
  plan.scratch = threads > plan.lanes ? plan.lanes * kItems : 0;
  size_t shared = (2 * kSlots + plan.lanes * kItems + plan.scratch) * sizeof(float);
  if (std::is_same_v<Z, Any>) shared += 2 * threads * kItems * sizeof(float);
  shared += kPlaces<DY, Z> * threads * kItems * 2 * sizeof(Z);
  return launch(norm_bwd_kernel<DY, Z, V>, dim3(call.partials), threads, shared, stream, call,
                plan);
}

template <typename DY, typename Z, int V>
cudaError_t launch_wide(const NormBackward& call, Plan plan, cudaStream_t stream) {
  if (call.dz.ptr != nullptr || call.dx.ptr != nullptr) {
    Device device;
    cudaError_t error = current_device(&device);
    if (error != cudaSuccess) return error;
    size_t shared = kSlots * sizeof(float);
    const size_t row =
        ceil_div<int64_t>(call.cols, V) * (sizeof(Vector<DY, V>) + sizeof(Vector<Z, V>));
    plan.keeps_shared = shared + row <= static_cast<size_t>(device.shared_bytes);
    if (plan.keeps_shared) shared += row;
    error = launch(norm_bwd_wide_kernel<DY, Z, V>, dim3(static_cast<unsigned>(call.rows)),
                   kWideBlock, shared, stream, call, plan);
    if (error != cudaSuccess) return error;
  }
  if (call.dweight_partials == nullptr && call.dbias_partials == nullptr) return cudaSuccess;
  const int64_t blocks = ceil_div<int64_t>(call.cols, kWarp * V) * call.partials;
  return launch(norm_bwd_columns_kernel<DY, Z, V>, dim3(static_cast<unsigned>(blocks)),
                kColumnsWarps * kWarp, kWarp * V * sizeof(float), stream, call, plan);
}

template <typename DY, typename Z, int V>
cudaError_t launch_rows(const NormBackward& call, const Plan& plan, cudaStream_t stream) {
  return call.cols <= kWidest ? launch_narrow<DY, Z, V>(call, plan, stream)
                              : launch_wide<DY, Z, V>(call, plan, stream);
}

cudaError_t launch_dtypes(const NormBackward& call, cudaStream_t stream) {
  const Dtype dy = call.dy.dtype, z = call.z.dtype;
  const int v = dy == z && z != Dtype::kFloat32 ? 8 : 4;
  Plan plan{0, true, false, 0};
  for (const NormTensor& t : {call.dy, call.dz_in, call.z, call.weight, call.dz, call.dx}) {
    plan.aligned = plan.aligned && is_aligned(t, call.cols, v);
  }
  if (plan.aligned && v == 8) {
    return z == Dtype::kFloat16
               ? launch_rows<__half, __half, 8>(call, plan, stream)
               : launch_rows<__nv_bfloat16, __nv_bfloat16, 8>(call, plan, stream);
  }
  if (plan.aligned && z == Dtype::kFloat32) {
    if (dy == Dtype::kFloat16) return launch_rows<__half, float, 4>(call, plan, stream);
    if (dy == Dtype::kBFloat16) return launch_rows<__nv_bfloat16, float, 4>(call, plan, stream);
    return launch_rows<float, float, 4>(call, plan, stream);
  }
  if (v == 8) return launch_rows<Any, Any, 8>(call, plan, stream);
  return launch_rows<Any, Any, 4>(call, plan, stream);
}

}  // namespace

cudaError_t norm_bwd_partials(int64_t rows, int64_t cols, int* partials) {
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  int64_t most = 0, groups = 0;
  if (cols <= kWidest) {
    const int lanes = lanes_of_row(cols, kItems);
    const int threads = block_threads(lanes);
    most = int64_t{device.multiprocessors} * (kThreadsResident / threads);
    groups = ceil_div<int64_t>(rows, threads / lanes);
  } else {
    most = device.multiprocessors;
    groups = ceil_div<int64_t>(rows, kColumnsRows);
  }
  *partials = static_cast<int>(groups < most ? groups : most);
  return cudaSuccess;
}

cudaError_t norm_bwd(const NormBackward& call, cudaStream_t stream) {
  if (call.rows > 0) {
    const cudaError_t error = launch_dtypes(call, stream);
    if (error != cudaSuccess) return error;
  }
  const struct {
    const NormTensor& sum;
    const float* partials;
  } vectors[] = {{call.dweight, call.dweight_partials}, {call.dbias, call.dbias_partials}};
  for (const auto& [sum, partials] : vectors) {
    if (sum.ptr == nullptr) continue;
    const cudaError_t error =
        column_sum(partials, call.partials, call.cols, sum.ptr, sum.dtype, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fastlm
