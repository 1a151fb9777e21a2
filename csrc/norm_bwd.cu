// Backward of LayerNorm and RMSNorm; wdy = dy * weight, xhat = (z - mean) * rstd:
//
//   dz = rstd * (wdy - mean(wdy) - xhat * mean(wdy * xhat)) + dz_in;   dx = dropout(dz)
//   dweight = sum_rows(dy * xhat);   dbias = sum_rows(dy)
//
// RMSNorm drops the mean(wdy) term. As many blocks as the device holds go over the rows. A thread
// keeps its columns: their sums of dweight and dbias stay in registers, their weight in shared
// memory as fp32, and next rows are on their way there while this one is worked on. dy and z are
// read once, dz and dx written once: of 2-byte elements 6 bytes an element, 8 with dz_in, and 2
// more where dx is not dz. Each block leaves one fp32 row of sums, which column_sum adds up in
// order. Rows wider than kWidest are norm_bwd_wide.cu's.
#include "column_sum.h"
#include "norm_bwd.cuh"

namespace fastlm {
namespace {

using Plan = NormBackwardPlan;

constexpr int kItems = 8;          // columns of a thread
constexpr int kNarrowBlock = 256;  // threads where a row has fewer
constexpr int kWidest = kItems * 1024;
constexpr int kThreadsResident = 1024;  // of a multiprocessor, by their registers
constexpr int kSlots = 2 * 32;          // of row_sum: two floats a warp

// How many rows norm_bwd_kernel has in shared memory at least, the next one arriving while it works
// on this one: none where vectors have fewer than 16 bytes. With a single place the next row comes
// after the sums of this one, vector by vector as that makes room. Two places are a ring, of
// kMostPlaces where the multiprocessor has room for that: three rows are then on their way.
template <typename DY, typename Z>
constexpr int kPlaces = !std::is_same_v<DY, Z> || std::is_same_v<Z, Any> ? 0
                        : sizeof(Z) == 2                                 ? 2
                                                                         : 1;
constexpr int kMostPlaces = 4;

// Whether it holds the row in registers while the row's sums are made; else it reads it again.
template <typename DY, typename Z>
constexpr bool kHoldsRow = kPlaces<DY, Z> == 0 && !std::is_same_v<Z, Any>;

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

// What a thread adds up over its rows, of its own columns: in registers, or of Any, for which they
// do not suffice, in places of its own in shared memory.
template <int V, bool kShared>
struct ColumnSums {
  static constexpr int kVectors = kItems / V;
  float dweight[kVectors][V] = {}, dbias[kVectors][V] = {};
  Columns<V> own;
  Vector<float, 4>*shared_dweight, *shared_dbias;

  __device__ ColumnSums(Columns<V> own, float* shared) : own(own) {
    shared_dweight = reinterpret_cast<Vector<float, 4>*>(shared);
    shared_dbias = shared_dweight + kItems / 4 * own.lanes;
#pragma unroll
    for (int k = 0; k < kVectors; k++) leave(k);
  }

  template <typename In>
  __device__ void add(const In& in, int k, const NormBackward& call) {
    take(k);
    add_columns(dweight[k], dbias[k], in, k, call);
    leave(k);
  }

  __device__ void take(int k) {
    if constexpr (kShared) {
      recall(dweight[k], shared_dweight, own, k);
      recall(dbias[k], shared_dbias, own, k);
    }
  }

  __device__ void leave(int k) {
    if constexpr (kShared) {
      remember(shared_dweight, dweight[k], own, k);
      remember(shared_dbias, dbias[k], own, k);
    }
  }
};

// Where a thread has its vectors of a row from: places of its own in shared memory, vectors of dy,
// then of z, or the tensors themselves.
template <typename DY, typename Z, int V>
struct RowSource {
  const NormBackward& call;
  Columns<V> columns, own;
  Vector<Z, V>* places;
  bool whole;

  __device__ void begin_copy(int64_t row, int k, int place) const {
    const int col = columns.at(0, k);
    const bool valid = row < call.rows && col < call.cols;
    const int64_t dy_at = valid ? row * call.dy.stride + col : 0;
    const int64_t z_at = valid ? row * call.z.stride + col : 0;
    Vector<Z, V>* to = places + (place * 2 * kItems / V + k) * own.lanes + own.lane;
    copy_async_16(to, static_cast<const DY*>(call.dy.ptr) + dy_at, valid);
    copy_async_16(to + kItems / V * own.lanes, static_cast<const Z*>(call.z.ptr) + z_at, valid);
  }

  // A group without a copy where there is no `more`: whoever waits counts groups.
  __device__ void begin_row(int64_t row, int place, bool more) const {
    if (more) {
#pragma unroll
      for (int k = 0; k < kItems / V; k++) begin_copy(row, k, place);
    }
    copy_async_commit();
  }

  __device__ void fetch(Incoming<DY, Z, V, kItems>* in, int64_t row, int k, int place) const {
    if constexpr (kPlaces<DY, Z> > 0) {
      const Vector<Z, V>* from = places + (place * 2 * kItems / V + k) * own.lanes + own.lane;
      in->dy[k] = from[0];
      in->z[k] = from[kItems / V * own.lanes];
    } else {
      load_vector(in, k, call, row, columns.at(0, k), whole);
    }
  }
};

// Rows that fit into registers: `lanes` threads each, as many rows at once as the block has room
// for, and on to the next ones a grid further.
template <typename DY, typename Z, int V>
__global__ void __launch_bounds__(1024) norm_bwd_kernel(NormBackward call, Plan plan) {
  constexpr int kVectors = kItems / V, kRowPlaces = kPlaces<DY, Z>;
  constexpr bool kHolds = kHoldsRow<DY, Z>;
  const bool whole = is_whole<Z>(plan);
  const int groups = static_cast<int>(blockDim.x) / plan.lanes;
  const int group = static_cast<int>(threadIdx.x) / plan.lanes;
  const Columns<V> columns{plan.lanes, static_cast<int>(threadIdx.x) % plan.lanes};
  const Columns<V> own{static_cast<int>(blockDim.x), static_cast<int>(threadIdx.x)};
  float* slots = shared_memory<float>();
  Vector<float, 4>* weights = reinterpret_cast<Vector<float, 4>*>(slots + 2 * kSlots);
  float* scratch = slots + 2 * kSlots + plan.lanes * kItems;
  float* mine = scratch + plan.scratch;  // of each thread

  if (group == 0) {  // for the threads of all rows
#pragma unroll
    for (int k = 0; k < kVectors; k++) {
      float weight[V];
      load_weight(weight, call, columns.at(0, k), whole);
      remember(weights, weight, columns, k);
    }
  }
  sync_block();
  ColumnSums<V, std::is_same_v<Z, Any>> totals(own, mine);
  const RowSource<DY, Z, V> source{call, columns, own, reinterpret_cast<Vector<Z, V>*>(mine),
                                   whole};
  const int64_t step = static_cast<int64_t>(gridDim.x) * groups;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * groups;
  int64_t row = first + group;
  // As many turns for all of the block, which meets in the sum.
  int left = static_cast<int>(ceil_div(call.rows - first, step));
  Incoming<DY, Z, V, kItems> in, next;
  const int ahead = kRowPlaces == 2 ? plan.places - 1 : 1;  // rows on their way
  if constexpr (kRowPlaces > 0) {
    load_statistics(&next, call, row);
    for (int i = 0; i < ahead; i++) {
      source.begin_row(row + i * step, kRowPlaces == 2 ? (left - i) & ahead : 0, i < left);
    }
  }
  for (; left > 0; left--, row += step) {
    const int place = kRowPlaces == 2 ? left & ahead : 0;  // `ahead` is 1 or 3
    if constexpr (kRowPlaces > 0) {
      in.mean = next.mean;
      in.rstd = next.rstd;
      load_statistics(&next, call, row + step);
      if (kRowPlaces == 2 && ahead == kMostPlaces - 1) {
        copy_async_wait<kMostPlaces - 2>();
      } else {
        copy_async_wait<0>();
      }
    } else {
      load_statistics(&in, call, row);
    }
    if constexpr (kRowPlaces == 2) {  // into the place of the row before
      source.begin_row(row + ahead * step, (left + 1) & ahead, ahead < left);
    }
    if constexpr (kHolds) {
#pragma unroll
      for (int k = 0; k < kVectors; k++) source.fetch(&in, row, k, place);
    }
    float sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < kVectors; k++) {
      if constexpr (!kHolds) source.fetch(&in, row, k, place);
      float weight[V];
      recall(weight, weights, columns, k);
      add_sums(sums, in, k, weight);
    }
    // Slots in turn: the barrier of the sum between frees these ones.
    row_sum(sums, plan.lanes, slots + left % 2 * kSlots);
    const float n = static_cast<float>(call.cols);
    const float means[2] = {call.kind == NormKind::kLayer ? sums[0] / n : 0.0f, sums[1] / n};
    const uint32_t keep = keep_bits_of<V, kItems>(call, row, columns, 0);
#pragma unroll
    for (int k = 0; k < kVectors; k++) {
      if constexpr (!kHolds) source.fetch(&in, row, k, place);
      if constexpr (kRowPlaces == 1) {
        if (left > 1) source.begin_copy(row + step, k, place);
      }
      totals.add(in, k, call);
      float weight[V];
      recall(weight, weights, columns, k);
      store_vector(in, k, means, weight, call, row, columns.at(0, k), keep, whole);
    }
    if constexpr (kRowPlaces == 1) copy_async_commit();
  }

#pragma unroll
  for (int k = 0; k < kVectors; k++) totals.take(k);
  const int64_t partial = blockIdx.x * call.cols;
  if (call.dweight_partials != nullptr) {
    store_partial<V, kItems>(call.dweight_partials + partial, totals.dweight, groups, group,
                             columns, call.cols, scratch);
  }
  if (call.dbias_partials != nullptr) {
    store_partial<V, kItems>(call.dbias_partials + partial, totals.dbias, groups, group, columns,
                             call.cols, scratch);
  }
}

// The threads of a block of norm_bwd_kernel, for rows of `lanes` threads.
int block_threads(int lanes) {
  return lanes >= kNarrowBlock ? lanes : kNarrowBlock / lanes * lanes;
}

template <typename DY, typename Z, int V>
cudaError_t launch_narrow(Dtypes<DY, Z, V>, const NormBackward& call, Plan plan,
                          cudaStream_t stream) {
  plan.lanes = lanes_of_row(call.cols, kItems);
  const int threads = block_threads(plan.lanes);
  plan.scratch = threads > plan.lanes ? plan.lanes * kItems : 0;
  size_t shared = (2 * kSlots + plan.lanes * kItems + plan.scratch) * sizeof(float);
  if (std::is_same_v<Z, Any>) shared += 2 * threads * kItems * sizeof(float);
  const size_t place = threads * kItems * 2 * sizeof(Z);
  plan.places = kPlaces<DY, Z>;
  if (plan.places == 2) {
    Device device;
    const cudaError_t error = current_device(&device);
    if (error != cudaSuccess) return error;
    const size_t block = shared + kMostPlaces * place, reserved = 1024;
    const size_t all = kThreadsResident / threads * (block + reserved);
    const bool fits = block <= static_cast<size_t>(device.shared_bytes);
    if (fits && all <= static_cast<size_t>(device.multiprocessor_bytes)) plan.places = kMostPlaces;
  }
  shared += plan.places * place;
  return launch(norm_bwd_kernel<DY, Z, V>, dim3(call.partials), threads, shared, stream, call,
                plan);
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
    const cudaError_t error =
        call.cols > kWidest ? norm_bwd_wide(call, stream)
                            : with_dtypes(call, [&](auto dtypes, const Plan& plan) {
                                return launch_narrow(dtypes, call, plan, stream);
                              });
    if (error != cudaSuccess) return error;
  }
  const struct {
    const RowTensor& sum;
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
