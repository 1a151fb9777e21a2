// Forward of LayerNorm and RMSNorm: z = residual + dropout(x), y = norm(z) * weight + bias.
//
// Each tensor is read or written once: of 2-byte elements 4 bytes an element without a residual, 6
// with one, 8 where z is written. z is in registers in its dtype while the row's sums are made, so
// its place in shared memory is already a next row's. The mean comes first and the squares of
// deviations from it second, for means of thousands of deviations. weight and bias lie in shared
// memory as fp32. Rows for which a block has no room are norm_fwd_wide.cu's.
#include "dispatch.h"
#include "norm_fwd.cuh"
#include "norm_rows.cuh"

namespace fastlm {
namespace {

// A thread's z of one row: in registers, or of Any in shared memory, for which loops need not be
// unrolled: code for every dtype is long.
template <typename Z, int V>
struct RowZ {
  static constexpr int kUnroll = kRowItems / V;
  float values[kRowItems / V][V];

  __device__ void get(float (&to)[V], int k) const { memcpy(to, values[k], sizeof(to)); }
  __device__ void set(int k, const float (&x)[V]) { memcpy(values[k], x, sizeof(x)); }
};
template <int V>
struct RowZ<Any, V> {
  static constexpr int kUnroll = 1;
  Vector<Any, V>* mine;

  __device__ void get(float (&to)[V], int k) const { unpack(to, mine[k * kWarp]); }
  __device__ void set(int k, const float (&x)[V]) { pack(&mine[k * kWarp], x); }
};

// Where a thread has its z from, row after row: x and residual that arrive in shared memory.
template <typename X, typename Z, int V, bool kWarps>
struct Source {
  Ring<X, V, kWarps> x;
  Ring<Z, V, kWarps> residual;
  int place = 0;

  __device__ Source(const NormForward& call, const RowThread<V, kWarps>& me, char* shared)
      : x(shared, me), residual(shared + x.bytes(me.plan), me) {
    for (int64_t i = 0; i < me.plan.places; i++) begin(call, me, me.row + i * me.plan.step, i);
    x.clear(me);
    if (call.residual.ptr != nullptr) residual.clear(me);
  }

  __device__ void begin(const NormForward& call, const RowThread<V, kWarps>& me, int64_t row,
                        int into) const {
    x.begin(into, call.x, row, call.rows, me);
    if (call.residual.ptr != nullptr) residual.begin(into, call.residual, row, call.rows, me);
    copy_async_commit();
  }

  // z of the next row, which is `row`.
  __device__ void take(RowZ<Z, V>* z, const NormForward& call, const RowThread<V, kWarps>& me,
                       int64_t row, uint32_t keep) {
    wait_for_row(me.plan.places);
    if (std::is_same_v<X, Z> && call.residual.ptr == nullptr && call.dropout.seed == nullptr) {
#pragma unroll
      for (int k = 0; k < kRowItems / V; k++) unpack(z->values[k], *x.at(place, k));
    } else {
      add_up(z, call, me, row, keep);
    }
    begin(call, me, row + int64_t{me.plan.places} * me.plan.step, place);
    place = place + 1 == me.plan.places ? 0 : place + 1;
  }

  __device__ void add_up(RowZ<Z, V>* z, const NormForward& call, const RowThread<V, kWarps>& me,
                         int64_t row, uint32_t keep) const {
    Z* to = static_cast<Z*>(call.z.ptr) + row * call.cols + me.col;
#pragma unroll
    for (int k = 0; k < kRowItems / V; k++) {
      float sum[V], more[V];
      unpack(sum, *x.at(place, k));
      drop(sum, keep >> V * k, call.dropout);
      if (call.residual.ptr != nullptr) {
        unpack(more, *residual.at(place, k));
#pragma unroll
        for (int i = 0; i < V; i++) sum[i] += more[i];
      }
      Vector<Z, V> vector;
      pack(&vector, sum);
      unpack(z->values[k], vector);
      if (call.z.ptr != nullptr && k < me.vectors && row < call.rows) {
        store_whole<false>(to + k * me.apart(), vector);
      }
    }
  }
};

// The tensors themselves, where they are needed.
template <int V, bool kWarps>
struct Source<Any, Any, V, kWarps> {
  Vector<Any, V>* mine;

  __device__ Source(const NormForward&, const RowThread<V, kWarps>&, char* shared)
      : mine(own_vectors<Vector<Any, V>>(shared, static_cast<int>(threadIdx.x), kRowItems / V)) {}

  __device__ void take(RowZ<Any, V>* z, const NormForward& call, const RowThread<V, kWarps>& me,
                       int64_t row, uint32_t keep) const {
    const bool whole = me.plan.aligned;
    z->mine = mine;
#pragma unroll 1
    for (int k = 0; k < kRowItems / V; k++) {
      float sum[V], more[V];
      fill(sum, 0.0f);
      const int col = me.at(k), count = me.count(k, call.cols, whole);
      if (count > 0 && row < call.rows) {
        load_floats(sum, call.x, row * call.x.stride + col, count, whole);
        drop(sum, keep >> V * k, call.dropout);
        if (call.residual.ptr != nullptr) {
          load_floats(more, call.residual, row * call.residual.stride + col, count, whole);
#pragma unroll
          for (int i = 0; i < V; i++) sum[i] += more[i];
        }
        round_as<Any>(sum, call.z_dtype);
        if (call.z.ptr != nullptr) {
          store_floats<true>(call.z, row * call.cols + col, sum, count, whole);
        }
      }
      pack(&mine[k * kWarp], sum);
    }
  }
};

// This thread's part of a sum over the row: four sums in turn, which do not wait for each other.
template <typename Z, int V>
__device__ inline float sum_of(const RowZ<Z, V>& z) {
  float sums[4] = {};
#pragma unroll RowZ<Z, V>::kUnroll
  for (int k = 0; k < kRowItems / V; k++) {
    float values[V];
    z.get(values, k);
#pragma unroll
    for (int i = 0; i < V; i++) sums[i % 4] += values[i];
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The same of squares, of z - mean, which then takes the place of z.
template <typename Z, int V, bool kWarps>
__device__ inline float center(RowZ<Z, V>* z, float mean, const RowThread<V, kWarps>& me,
                               int64_t cols, bool whole) {
  float sums[4] = {};
#pragma unroll RowZ<Z, V>::kUnroll
  for (int k = 0; k < kRowItems / V; k++) {
    const int count = me.count(k, cols, whole);
    float x[V];
    z->get(x, k);
#pragma unroll
    for (int i = 0; i < V; i++) {
      x[i] -= i < count ? mean : 0.0f;
      sums[i % 4] = fmaf(x[i], x[i], sums[i % 4]);
    }
    z->set(k, x);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// y, as elements of Y, of a centered z. No branch is in the way of what comes from shared memory.
template <typename X, typename Y, bool kBias, typename Z, int V, bool kWarps>
__device__ inline void store_y(const RowZ<Z, V>& z, float rstd, const ColumnCopies& weights,
                               const ColumnCopies& biases, const NormForward& call,
                               const RowThread<V, kWarps>& me, int64_t row, bool whole) {
#pragma unroll RowZ<Z, V>::kUnroll
  for (int k = 0; k < kRowItems / V; k++) {
    float y[V], weight[V], bias[V];
    z.get(y, k);
#pragma unroll
    for (int i = 0; i < V; i++) y[i] *= rstd;
    if (!kBias && call.kind == NormKind::kLlama) round_as<X>(y, call.x.dtype);
    weights.get(weight, k);
    fill(bias, 0.0f);
    if constexpr (kBias) biases.get(bias, k);
#pragma unroll
    for (int i = 0; i < V; i++) y[i] = fmaf(y[i], weight[i], bias[i]);
    const int count = me.count(k, call.cols, whole);
    const int64_t at = row * call.cols + me.at(k);
    if (count == 0) continue;
    if constexpr (std::is_same_v<Y, Any>) {
      store_floats<true>(call.y, at, y, count, whole);
    } else {
      store_floats_of<false>(static_cast<Y*>(call.y.ptr) + at, y, V, true);
    }
  }
}

template <typename X, typename Z, int V, bool kWarps>
__global__ void __launch_bounds__(kRowThreads, 1) norm_fwd_kernel(NormForward call, RowPlan plan) {
  constexpr bool kAny = std::is_same_v<X, Any>;
  const bool whole = !kAny || plan.aligned;
  const RowThread<V, kWarps> me(plan, call.cols);
  float* shared = shared_memory<float>();
  // On their way first: all else that happens before the first row happens meanwhile.
  Source<X, Z, V, kWarps> source(call, me, reinterpret_cast<char*>(shared + plan.places_at));
  const ColumnCopies weights(shared + kSlots, me.lane);
  const ColumnCopies biases(shared + kSlots + plan.padded(), me.lane);
  const bool one = call.weight.ptr == nullptr || call.kind == NormKind::kGemma;
  copy_columns<kAny>(weights, call.weight, one ? 1.0f : 0.0f, me, call.cols);
  if (call.bias.ptr != nullptr) copy_columns<kAny>(biases, call.bias, 0.0f, me, call.cols);
  RowSum<kWarps> row_sum(shared, me);
  const auto store = [&](auto type, const RowZ<Z, V>& z, int64_t row, float rstd) {
    using Y = typename decltype(type)::type;
    if (call.bias.ptr != nullptr) {
      store_y<X, Y, true>(z, rstd, weights, biases, call, me, row, whole);
    } else {
      store_y<X, Y, false>(z, rstd, weights, biases, call, me, row, whole);
    }
  };
  sync_block();

  int64_t next_row = me.row;
  for (int turns = me.turns(call.rows); turns > 0; turns--, next_row += plan.step) {
    int64_t row = next_row;
    forget(row);  // addresses of every vector, each with its step, would take too many registers
    uint32_t keep = ~0u;
    if (call.dropout.seed != nullptr) keep = keep_bits(call.dropout, row, me);
    RowZ<Z, V> z;
    source.take(&z, call, me, row, keep);
    float mean[1] = {0.0f};
    if (call.kind == NormKind::kLayer) {
      mean[0] = sum_of(z);
      row_sum(mean, turns % 2);
      mean[0] = plan.by_cols(mean[0]);
    }
    float squares[1] = {center(&z, mean[0], me, call.cols, whole)};
    row_sum(squares, 2 + turns % 2);
    const float rstd = rsqrtf(plan.by_cols(squares[0]) + call.eps);
    if (row >= call.rows) continue;
    if (me.lane == 0) store_statistics(call, row, mean[0], rstd);
    if (!kAny && call.y.dtype == Dtype::kFloat32) {
      store(Type<std::conditional_t<kAny, Any, float>>{}, z, row, rstd);
    } else {
      store(Type<X>{}, z, row, rstd);
    }
  }
}

template <typename X, typename Z, int V>
cudaError_t launch_rows(ForwardTypes<X, Z, V>, const NormForward& call, RowPlan plan,
                        const RowNeeds& needs, bool aligned, cudaStream_t stream) {
  if (std::is_same_v<X, Any>) plan = plan_of_any(plan, needs);
  plan.aligned = aligned;
  return launch_plan<norm_fwd_kernel<X, Z, V, false>, norm_fwd_kernel<X, Z, V, true>>(call, plan,
                                                                                      stream);
}

}  // namespace

cudaError_t norm_fwd(const NormForward& call, cudaStream_t stream) {
  if (call.rows == 0) return cudaSuccess;
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  const int float_bytes = 4;
  const int copies = call.bias.ptr != nullptr ? 2 : 1;
  const int residual = call.residual.ptr != nullptr ? element_size(call.z_dtype) : 0;
  const RowNeeds needs{copies * float_bytes, element_size(call.x.dtype) + residual, float_bytes};
  const RowPlan plan = plan_rows(call.rows, call.cols, vector_of(call), needs, device);
  if (plan.places == 0) return norm_fwd_wide(call, stream);
  return with_forward_types(call, [&](auto types, bool aligned) {
    return launch_rows(types, call, plan, needs, aligned, stream);
  });
}

}  // namespace fastlm
