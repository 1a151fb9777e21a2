// Backward of LayerNorm and RMSNorm; wdy = dy * weight, xhat = (z - mean) * rstd:
//
//   dz = rstd * (wdy - mean(wdy) - xhat * mean(wdy * xhat)) + dz_in;   dx = dropout(dz)
//   dweight = sum_rows(dy * xhat);   dbias = sum_rows(dy)
//
// RMSNorm drops the mean(wdy) term. A thread keeps the sums of its columns of dweight and dbias in
// registers; dy, z and dz_in wait in shared memory from their copy to the end of the row, so each
// tensor is read or written once: of 2-byte elements 6 bytes an element, 8 with dz_in, and 2 more
// where dx is not dz. weight lies in shared memory as fp32. A block leaves one fp32 row of sums,
// which column_sums adds up in order. Rows for which a block has no room are norm_bwd_wide.cu's.
#include "column_sum.h"
#include "norm_bwd.cuh"
#include "norm_rows.cuh"

namespace fastlm {
namespace {

template <typename DY, typename Z, int V, bool kWarps>
struct Source {
  Ring<DY, V, kWarps> dy;
  Ring<Z, V, kWarps> z, dz_in;
  int place = 0;

  __device__ Source(const NormBackward& call, const RowThread<V, kWarps>& me, char* shared)
      : dy(shared, me),
        z(shared + dy.bytes(me.plan), me),
        dz_in(shared + dy.bytes(me.plan) + z.bytes(me.plan), me) {
    for (int64_t i = 0; i < me.plan.places; i++) begin(call, me, me.row + i * me.plan.step, i);
    dy.clear(me);
    z.clear(me);
    if (call.dz_in.ptr != nullptr) dz_in.clear(me);
  }

  __device__ void begin(const NormBackward& call, const RowThread<V, kWarps>& me, int64_t row,
                        int into) const {
    dy.begin(into, call.dy, row, call.rows, me);
    z.begin(into, call.z, row, call.rows, me);
    if (call.dz_in.ptr != nullptr) dz_in.begin(into, call.dz_in, row, call.rows, me);
    copy_async_commit();
  }

  __device__ void wait(const NormBackward&, const RowThread<V, kWarps>& me, int64_t) const {
    wait_for_row(me.plan.places);
  }

  // Nobody needs `row` there any more.
  __device__ void free(const NormBackward& call, const RowThread<V, kWarps>& me, int64_t row) {
    begin(call, me, row + int64_t{me.plan.places} * me.plan.step, place);
    place = place + 1 == me.plan.places ? 0 : place + 1;
  }

  __device__ void get(float (&to_dy)[V], float (&to_z)[V], int k) const {
    unpack(to_dy, *dy.at(place, k));
    unpack(to_z, *z.at(place, k));
  }
};

// Of Any the row comes when its turn is there, as floats.
template <int V, bool kWarps>
struct Source<Any, Any, V, kWarps> {
  Vector<Any, V>*dy, *z;

  __device__ Source(const NormBackward&, const RowThread<V, kWarps>& me, char* shared)
      : dy(own_vectors<Vector<Any, V>>(shared, static_cast<int>(threadIdx.x), kRowItems / V)),
        z(dy + me.plan.threads * (kRowItems / V)) {}

  __device__ void wait(const NormBackward& call, const RowThread<V, kWarps>& me,
                       int64_t row) const {
    const bool whole = me.plan.aligned;
#pragma unroll 1
    for (int k = 0; k < kRowItems / V; k++) {
      float x[V], y[V];
      fill(x, 0.0f);
      fill(y, 0.0f);
      const int count = row < call.rows ? me.count(k, call.cols, whole) : 0;
      if (count > 0) {
        load_floats(x, call.dy, row * call.dy.stride + me.at(k), count, whole);
        load_floats(y, call.z, row * call.z.stride + me.at(k), count, whole);
      }
      pack(&dy[k * kWarp], x);
      pack(&z[k * kWarp], y);
    }
  }

  __device__ void free(const NormBackward&, const RowThread<V, kWarps>&, int64_t) const {}

  __device__ void get(float (&to_dy)[V], float (&to_z)[V], int k) const {
    unpack(to_dy, dy[k * kWarp]);
    unpack(to_z, z[k * kWarp]);
  }
};

struct Statistics {
  float mean, rstd;

  __device__ Statistics(const NormBackward& call, int64_t row) {
    const bool valid = row < call.rows;
    mean = valid && call.kind == NormKind::kLayer ? call.mean[row] : 0.0f;
    rstd = valid ? call.rstd[row] : 0.0f;
  }
};

// This thread's part of sum(wdy) and sum(wdy * (z - mean)); two sums each, which do not wait for
// each other. Columns that the row has not are zeros.
template <typename DY, typename Z, int V, bool kWarps>
__device__ inline void add_sums(float (&sums)[2], const Source<DY, Z, V, kWarps>& source,
                                const ColumnCopies& weights, const Statistics& of,
                                const RowThread<V, kWarps>& me) {
  float parts[2][2] = {};
#pragma unroll
  for (int k = 0; k < kRowItems / V; k++) {
    if (me.ends_at(k)) break;
    float dy[V], z[V], weight[V];
    source.get(dy, z, k);
    weights.get(weight, k);
#pragma unroll
    for (int i = 0; i < V; i++) {
      parts[0][i % 2] = fmaf(dy[i], weight[i], parts[0][i % 2]);
      parts[1][i % 2] = fmaf(dy[i] * weight[i], z[i] - of.mean, parts[1][i % 2]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++) sums[i] = parts[i][0] + parts[i][1];
}

// Sums of a thread's columns.
template <int V>
struct ColumnSums {
  float dweight[kRowItems / V][V] = {}, dbias[kRowItems / V][V] = {};
};

template <int V>
__device__ inline void add_columns(float (&dweight)[V], float (&dbias)[V], const float (&dy)[V],
                                   const float (&z)[V], const Statistics& of) {
#pragma unroll
  for (int i = 0; i < V; i++) {
    dweight[i] = fmaf(dy[i], (z[i] - of.mean) * of.rstd, dweight[i]);
    dbias[i] += dy[i];
  }
}

// mean(wdy), 0 where the norm has no mean, and mean(wdy * xhat).
struct RowMeans {
  float wdy, wdy_xhat;

  __device__ RowMeans(const float (&sums)[2], const Statistics& of, const Quotient& by_cols,
                      bool has_mean)
      : wdy(has_mean ? by_cols(sums[0]) : 0.0f), wdy_xhat(by_cols(sums[1] * of.rstd)) {}
};

// dz of a vector, in the place of dz_in.
template <int V>
__device__ inline void add_dz(float (&dz)[V], const float (&dy)[V], const float (&z)[V],
                              const float (&weight)[V], const RowMeans& means,
                              const Statistics& of) {
#pragma unroll
  for (int i = 0; i < V; i++) {
    const float xhat = (z[i] - of.mean) * of.rstd;
    // In this order nothing is left of a row of one column.
    const float rest = fmaf(-xhat, means.wdy_xhat, dy[i] * weight[i]) - means.wdy;
    dz[i] = fmaf(rest, of.rstd, dz[i]);
  }
}

// Writes a vector of dz and dx.
template <typename T, int V>
__device__ inline void store_gradients(float (&dz)[V], const NormBackward& call, int64_t at,
                                       uint32_t keep, int count, bool whole) {
  if (call.dz.ptr != nullptr) store_known<T>(call.dz, at, dz, count, whole);
  if (call.dx.ptr == nullptr) return;
  drop(dz, keep, call.dropout);
  store_known<T>(call.dx, at, dz, count, whole);
}

// The second half of a row's work: the sums of the columns, dz and dx.
template <typename DY, typename Z, int V, bool kWarps>
__device__ inline void finish_row(ColumnSums<V>* totals, const Source<DY, Z, V, kWarps>& source,
                                  const ColumnCopies& weights, const RowMeans& means,
                                  const Statistics& of, const NormBackward& call,
                                  const RowThread<V, kWarps>& me, int64_t row, uint32_t keep) {
  // Of DY and Z the half one, if there is one: results are of that dtype or floats.
  using T = std::conditional_t<std::is_same_v<DY, float>, Z, DY>;
  const int64_t first = row * call.cols + me.col;
#pragma unroll
  for (int k = 0; k < kRowItems / V; k++) {
    if (me.ends_at(k)) break;
    float dy[V], z[V], weight[V], dz[V];
    source.get(dy, z, k);
    add_columns(totals->dweight[k], totals->dbias[k], dy, z, of);
    weights.get(weight, k);
    fill(dz, 0.0f);
    if (call.dz_in.ptr != nullptr) unpack(dz, *source.dz_in.at(source.place, k));
    add_dz(dz, dy, z, weight, means, of);
    if (k < me.vectors && row < call.rows) {
      store_gradients<T>(dz, call, first + k * me.apart(), keep >> V * k, V, true);
    }
  }
}

// Of Any with a loop of its own for what depends on dtypes: code for all of them is long.
template <int V, bool kWarps>
__device__ inline void finish_row(ColumnSums<V>* totals, const Source<Any, Any, V, kWarps>& source,
                                  const ColumnCopies& weights, const RowMeans& means,
                                  const Statistics& of, const NormBackward& call,
                                  const RowThread<V, kWarps>& me, int64_t row, uint32_t keep) {
  const bool whole = me.plan.aligned;
  float dy[V], z[V], weight[V], dz[V];
#pragma unroll
  for (int k = 0; k < kRowItems / V; k++) {
    source.get(dy, z, k);
    add_columns(totals->dweight[k], totals->dbias[k], dy, z, of);
  }
#pragma unroll 1
  for (int k = 0; k < me.vectors && row < call.rows; k++) {
    source.get(dy, z, k);
    weights.get(weight, k);
    fill(dz, 0.0f);
    const int count = me.count(k, call.cols, whole);
    if (call.dz_in.ptr != nullptr) {
      load_floats(dz, call.dz_in, row * call.dz_in.stride + me.at(k), count, whole);
    }
    add_dz(dz, dy, z, weight, means, of);
    store_gradients<Any>(dz, call, row * call.cols + me.at(k), keep >> V * k, count, whole);
  }
}

// A block's row of sums of the columns, from those of its threads, in the order of their rows.
// `scratch` is shared memory for all of them, and free.
template <int V, bool kWarps>
__device__ inline void store_partial(float* partial, const float (&mine)[kRowItems / V][V],
                                     const RowThread<V, kWarps>& me, int64_t cols,
                                     Vector<float, 4>* scratch) {
  const int threads = me.plan.threads, lanes = me.plan.lanes;
  int thread = static_cast<int>(threadIdx.x);
  forget(thread);  // what follows from it takes no registers before
#pragma unroll
  for (int k = 0; k < kRowItems / V; k++) {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      const float four[4] = {mine[k][i], mine[k][i + 1], mine[k][i + 2], mine[k][i + 3]};
      pack(&scratch[(k * V + i) / 4 * threads + thread], four);
    }
  }
  sync_block();
  for (int place = thread; place < lanes * (kRowItems / 4); place += threads) {
    const int lane = place % lanes, item = place / lanes * 4;
    float sums[4] = {};
    for (int other = lane; other < threads; other += lanes) {
      float four[4];
      unpack(four, scratch[item / 4 * threads + other]);
#pragma unroll
      for (int i = 0; i < 4; i++) sums[i] += four[i];
    }
    const int within = (kWarps ? lane % kWarp : lane) * V + item / V * me.apart() + item % V;
    const int col = within + (kWarps ? lane / kWarp * me.plan.part : 0);
    if (within >= me.plan.part) continue;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (col + i < cols) partial[col + i] = sums[i];
    }
  }
  sync_block();
}

template <typename DY, typename Z, int V, bool kWarps>
__global__ void __launch_bounds__(kRowThreads, 1) norm_bwd_kernel(NormBackward call, RowPlan plan) {
  constexpr bool kAny = std::is_same_v<Z, Any>;
  const RowThread<V, kWarps> me(plan, call.cols);
  float* shared = shared_memory<float>();
  // On their way first: all else that happens before the first row happens meanwhile.
  Source<DY, Z, V, kWarps> source(call, me, reinterpret_cast<char*>(shared + plan.places_at));
  Statistics next(call, me.row);
  const ColumnCopies weights(shared + kSlots, me.lane);
  const bool one = call.weight.ptr == nullptr || call.kind == NormKind::kGemma;
  copy_columns<kAny>(weights, call.weight, one ? 1.0f : 0.0f, me, call.cols);
  RowSum<kWarps> row_sum(shared, me);
  sync_block();

  ColumnSums<V> totals;
  int64_t next_row = me.row;
  for (int turns = me.turns(call.rows); turns > 0; turns--, next_row += plan.step) {
    int64_t row = next_row;
    forget(row);  // addresses of every vector, each with its step, would take too many registers
    const Statistics of = next;
    next = Statistics(call, row + plan.step);
    source.wait(call, me, row);
    float sums[2];
    add_sums(sums, source, weights, of, me);
    row_sum(sums, turns % 2 * 2);
    const RowMeans means(sums, of, plan.by_cols, call.kind == NormKind::kLayer);
    uint32_t keep = ~0u;
    if (call.dropout.seed != nullptr && call.dx.ptr != nullptr) {
      keep = keep_bits(call.dropout, row, me);
    }
    finish_row(&totals, source, weights, means, of, call, me, row, keep);
    source.free(call, me, row);
  }

  sync_block();
  auto* scratch = reinterpret_cast<Vector<float, 4>*>(shared + plan.places_at);
  const int64_t partial = blockIdx.x * call.cols;
  if (call.dweight_partials != nullptr) {
    store_partial(call.dweight_partials + partial, totals.dweight, me, call.cols, scratch);
  }
  if (call.dbias_partials != nullptr) {
    store_partial(call.dbias_partials + partial, totals.dbias, me, call.cols, scratch);
  }
}

RowNeeds needs_of(const NormBackward& call) {
  const int z = element_size(call.z.dtype), dz_in = call.dz_in.ptr != nullptr ? z : 0;
  return {4, element_size(call.dy.dtype) + z + dz_in, 2 * 4};
}

// `places` is 0 where a block has no room for a row.
cudaError_t plan_of(RowPlan* plan, const NormBackward& call) {
  *plan = RowPlan{};
  if (call.rows == 0) return cudaSuccess;
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  *plan = plan_rows(call.rows, call.cols, vector_of(call), needs_of(call), device);
  if (plan->places == 0) plan->blocks = wide_partials(call.rows, device);
  return cudaSuccess;
}

template <typename DY, typename Z, int V>
cudaError_t launch_rows(BackwardTypes<DY, Z, V>, const NormBackward& call, RowPlan plan,
                        bool aligned, cudaStream_t stream) {
  if (std::is_same_v<Z, Any>) plan = plan_of_any(plan, needs_of(call));
  plan.aligned = aligned;
  return launch_plan<norm_bwd_kernel<DY, Z, V, false>, norm_bwd_kernel<DY, Z, V, true>>(call, plan,
                                                                                        stream);
}

}  // namespace

cudaError_t norm_bwd_partials(const NormBackward& call, int* partials) {
  RowPlan plan;
  const cudaError_t error = plan_of(&plan, call);
  *partials = plan.blocks;
  return error;
}

cudaError_t norm_bwd(const NormBackward& call, cudaStream_t stream) {
  if (call.rows > 0) {
    RowPlan plan;
    cudaError_t error = plan_of(&plan, call);
    if (error != cudaSuccess) return error;
    error = plan.places == 0 ? norm_bwd_wide(call, stream)
                             : with_backward_types(call, [&](auto types, bool aligned) {
                                 return launch_rows(types, call, plan, aligned, stream);
                               });
    if (error != cudaSuccess) return error;
  }
  const ColumnSum sums[] = {{call.dweight_partials, call.dweight.ptr, call.dweight.dtype},
                            {call.dbias_partials, call.dbias.ptr, call.dbias.dtype}};
  return column_sums(sums, call.partials, call.cols, stream);
}

}  // namespace fastlm
