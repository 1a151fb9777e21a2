// What the kernels of a norm's backward share; norm_bwd.cu has the formulas.
#pragma once

#include "norm.cuh"

namespace fastlm {

// What is uniform over the call beside NormBackward.
struct NormBackwardPlan {
  int lanes;
  bool aligned;       // for Any: the others are always
  bool keeps_shared;  // a wide row's dy and z
  int scratch;        // floats of store_partial
  int places;         // of a row in shared memory, 2 to the power of something if not 0
};

template <typename Z>
__device__ inline bool is_whole(const NormBackwardPlan& plan) {
  return !std::is_same_v<Z, Any> || plan.aligned;
}

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

template <int V, int Items, typename Index>
__device__ inline uint32_t keep_bits_of(const NormBackward& call, int64_t row, Columns<V> columns,
                                        Index first) {
  if (call.dropout.seed == nullptr || call.dx.ptr == nullptr) return ~0u;
  return keep_bits<V, Items>(static_cast<uint64_t>(*call.dropout.seed), call.dropout.threshold, row,
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

// Calls launch(Dtypes<DY, Z, V>, plan) with what dtypes, pointers and strides of the call allow.
template <typename DY, typename Z, int V>
struct Dtypes {};

template <typename Launch>
cudaError_t with_dtypes(const NormBackward& call, const Launch& launch) {
  const Dtype dy = call.dy.dtype, z = call.z.dtype;
  const int v = dy == z && z != Dtype::kFloat32 ? 8 : 4;
  NormBackwardPlan plan{0, true, false, 0, 0};
  for (const RowTensor& t : {call.dy, call.dz_in, call.z, call.weight, call.dz, call.dx}) {
    plan.aligned = plan.aligned && is_aligned(t, call.cols, v);
  }
  if (plan.aligned && v == 8) {
    return z == Dtype::kFloat16 ? launch(Dtypes<__half, __half, 8>{}, plan)
                                : launch(Dtypes<__nv_bfloat16, __nv_bfloat16, 8>{}, plan);
  }
  if (plan.aligned && z == Dtype::kFloat32) {
    if (dy == Dtype::kFloat16) return launch(Dtypes<__half, float, 4>{}, plan);
    if (dy == Dtype::kBFloat16) return launch(Dtypes<__nv_bfloat16, float, 4>{}, plan);
    return launch(Dtypes<float, float, 4>{}, plan);
  }
  return v == 8 ? launch(Dtypes<Any, Any, 8>{}, plan) : launch(Dtypes<Any, Any, 4>{}, plan);
}

// Rows too wide for the registers of a block; norm_bwd_wide.cu.
constexpr int64_t kColumnsRows = 64;  // of a group of rows at least, so that partials stay few
cudaError_t norm_bwd_wide(const NormBackward& call, cudaStream_t stream);

}  // namespace fastlm
