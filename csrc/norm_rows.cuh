// What the two passes of a norm share for rows that one block has whole.
//
// A multiprocessor has one block, which goes over the rows. A row belongs to `lanes` threads, a
// power of two below a warp or a few warps, kRowItems columns each at most. A thread copies the
// vectors that it will itself work on, of as many next rows as shared memory has places for, so
// that waiting for them takes no barrier, and the memory always has something to do: at 4 TB/s and
// 700 ns a multiprocessor of 132 needs some 22 KB on their way at any time, and one place of all
// threads is 32 KB for each tensor of 2-byte elements. Threads of a row meet for its sums alone,
// those of different rows never, until the block ends.
//
// Which columns a thread has depends on the width and on V alone, so a row's sums do.
#pragma once

#include <cfloat>

#include "arch/device.cuh"
#include "norm.cuh"

namespace fastlm {

constexpr int kRowItems = 32;
constexpr int kRowThreads = 512;  // of a block at most, so that each may have 128 registers
constexpr int kWidestRow = kRowItems * kRowThreads;
constexpr int kMostPlaces = 4;
constexpr int kMostSums = 4;
constexpr int kSlots = kMostSums * 32;  // floats, of RowSum

// x / n to the last place or so, without a division; an x that is not finite stays as it is.
struct Quotient {
  float n, inverse;

  __device__ float operator()(float x) const {
    const float guess = x * inverse;
    if (!(fabsf(guess) <= FLT_MAX)) return guess;
    return fmaf(fmaf(-guess, n, x), inverse, guess);
  }
};

// How a call is cut up, the same for all of its blocks.
struct RowPlan {
  int lanes;      // threads of a row
  int part;       // columns of a warp, or of all lanes where they are fewer
  int threads;    // of a block
  int blocks;
  int step;       // rows that all blocks have at once
  int places;     // rows of a thread in shared memory
  int places_at;  // where they begin there, in floats
  bool aligned;   // for Any: the others are always
  size_t shared_bytes;
  Quotient by_cols;

  // Floats of shared memory for each column of a row, at least a warp's.
  __host__ __device__ int padded() const {
    return (lanes > kWarp ? lanes : kWarp) * kRowItems;
  }
};

// What of the call's rows a thread has: of every plan.step-th from `row` on the vectors at(0) to
// at(vectors - 1). kWarps: a row has whole warps, and vectors are a constant apart.
template <int V, bool kWarps>
struct RowThread {
  static constexpr int kVectors = kRowItems / V;
  const RowPlan& plan;
  int lane, team;
  int col, vectors;
  int64_t row;

  __device__ RowThread(const RowPlan& plan, int64_t cols)
      : plan(plan),
        lane(static_cast<int>(threadIdx.x) % plan.lanes),
        team(static_cast<int>(threadIdx.x) / plan.lanes) {
    const int part = kWarps ? lane / kWarp * plan.part : 0;
    const int end = min(part + plan.part, static_cast<int>(cols));
    col = part + (kWarps ? lane % kWarp : lane) * V;
    vectors = col < end ? ceil_div(end - col, apart()) : 0;
    row = static_cast<int64_t>(blockIdx.x) * (plan.threads / plan.lanes) + team;
  }

  __device__ int apart() const { return kWarps ? kWarp * V : plan.lanes * V; }
  __device__ int at(int k) const { return col + k * apart(); }

  // Of the columns of vector k, how many the row has.
  __device__ int count(int k, int64_t cols, bool whole) const {
    if (k >= vectors) return 0;
    return whole ? V : min(V, static_cast<int>(cols) - at(k));
  }

  // Whether k is a thread's last vector and no thread has it: of halves, whose arithmetic takes more
  // of the time, rows of 768 columns are worth a branch.
  __device__ bool ends_at(int k) const {
    return V == 8 && k == kVectors - 1 && plan.part <= k * apart();
  }

  // How many turns it takes; as many for all lanes of a warp.
  __device__ int turns(int64_t rows) const {
    const int64_t first = kWarps ? row : row - lane_id() / plan.lanes;
    return first < rows ? static_cast<int>(ceil_div<int64_t>(rows - first, plan.step)) : 0;
  }
};

// Where a thread has its vectors in shared memory, one every warp: neighbours are neighbours there,
// and distances are constants.
template <typename Element>
__device__ inline Element* own_vectors(void* shared, int thread, int vectors) {
  return static_cast<Element*>(shared) + thread / kWarp * kWarp * vectors + thread % kWarp;
}

// One fp32 number of each column of a row, in shared memory for all rows of the block.
struct ColumnCopies {
  Vector<float, 4>* mine;

  __device__ ColumnCopies(float* shared, int lane)
      : mine(own_vectors<Vector<float, 4>>(shared, lane, kRowItems / 4)) {}

  template <int V>
  __device__ void set(int k, const float (&x)[V]) const {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      const float four[4] = {x[i], x[i + 1], x[i + 2], x[i + 3]};
      pack(&mine[(k * V + i) / 4 * kWarp], four);
    }
  }

  template <int V>
  __device__ void get(float (&x)[V], int k) const {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      float four[4];
      unpack(four, mine[(k * V + i) / 4 * kWarp]);
#pragma unroll
      for (int j = 0; j < 4; j++) x[i + j] = four[j];
    }
  }
};

// x + `plus` as such copies, from `x`, of which all that a thread loads is on its way at once.
template <typename T, int V, bool kWarps>
__device__ inline void copy_columns_of(const ColumnCopies& to, const T* x, float plus,
                                       const RowThread<V, kWarps>& me) {
  constexpr int kVectors = kRowItems / V;
  const int teams = me.plan.threads / me.plan.lanes;
  float values[kVectors][V];
#pragma unroll
  for (int i = 0; i < kVectors; i++) {
    const int k = me.team + i * teams;
    fill(values[i], 0.0f);
    if (k < me.vectors) load_floats_of(values[i], x + me.at(k), V, true);
  }
#pragma unroll
  for (int i = 0; i < kVectors; i++) {
    if (me.team + i * teams >= kVectors) continue;
#pragma unroll
    for (int j = 0; j < V; j++) values[i][j] += plus;
    to.set(me.team + i * teams, values[i]);
  }
}

// The same, or `plus` alone where there is no x, for all threads of the block: those of different
// rows share the vectors out among them. kAny: x need not be aligned.
template <bool kAny, int V, bool kWarps>
__device__ inline void copy_columns(const ColumnCopies& to, const RowTensor& x, float plus,
                                    const RowThread<V, kWarps>& me, int64_t cols) {
  if (!kAny && x.ptr != nullptr) {
    switch (x.dtype) {
      case Dtype::kFloat32: return copy_columns_of(to, static_cast<const float*>(x.ptr), plus, me);
      case Dtype::kFloat16: return copy_columns_of(to, static_cast<const __half*>(x.ptr), plus, me);
      case Dtype::kBFloat16:
        return copy_columns_of(to, static_cast<const __nv_bfloat16*>(x.ptr), plus, me);
    }
  }
#pragma unroll 1
  for (int k = me.team; k < me.kVectors; k += me.plan.threads / me.plan.lanes) {
    float values[V];
    fill(values, 0.0f);
    if constexpr (kAny) {
      const int count = me.count(k, cols, me.plan.aligned);
      if (count > 0 && x.ptr != nullptr) {
        load_floats(values, x, me.at(k), count, me.plan.aligned);
      }
    }
#pragma unroll
    for (int i = 0; i < V; i++) values[i] += plus;
    to.set(k, values);
  }
}

// A thread's vectors of rows of one tensor, arrived or on their way. Vectors past a row's end are
// zeros, and where a warp has several rows, those of rows that there are not.
template <typename T, int V, bool kWarps>
struct Ring {
  static constexpr int kVectors = kRowItems / V;
  Vector<T, V>* mine;
  int threads;

  // Of all threads of the block, for `shared`.
  __device__ static int bytes(const RowPlan& plan) {
    return plan.places * plan.threads * kRowItems * static_cast<int>(sizeof(T));
  }

  __device__ Ring(char* shared, const RowThread<V, kWarps>& me)
      : mine(own_vectors<Vector<T, V>>(shared, static_cast<int>(threadIdx.x), kVectors)),
        threads(me.plan.threads) {}

  __device__ Vector<T, V>* at(int place, int k) const {
    return mine + place * kVectors * threads + k * kWarp;
  }

  __device__ void clear(const RowThread<V, kWarps>& me) const {
    for (int place = 0; place < me.plan.places; place++) {
      for (int k = me.vectors; k < kVectors; k++) *at(place, k) = Vector<T, V>{};
    }
  }

  // Begins to copy a row, if x has it.
  __device__ void begin(int place, const RowTensor& x, int64_t row, int64_t rows,
                        const RowThread<V, kWarps>& me) const {
    if (row < rows) {
      const T* from = static_cast<const T*>(x.ptr) + row * x.stride + me.col;
#pragma unroll
      for (int k = 0; k < kVectors; k++) {
        if (k < me.vectors) copy_async<sizeof(Vector<T, V>)>(at(place, k), from + k * me.apart());
      }
    } else if (!kWarps) {
#pragma unroll
      for (int k = 0; k < kVectors; k++) *at(place, k) = Vector<T, V>{};
    }
  }
};

// Waits for the oldest of `places` rows.
__device__ inline void wait_for_row(int places) {
  static_assert(kMostPlaces == 4);
  switch (places) {
    case 1: return copy_async_wait<0>();
    case 2: return copy_async_wait<1>();
    case 3: return copy_async_wait<2>();
    default: return copy_async_wait<3>();
  }
}

// Sums over the threads of a row.
template <bool kWarps>
struct RowSum {
  int lanes, warp, barrier;
  float* slots;  // of the row's threads

  // `shared` has kSlots floats. A barrier of the block comes before the first sum.
  template <int V>
  __device__ RowSum(float* shared, const RowThread<V, kWarps>& me)
      : lanes(me.plan.lanes),
        warp(me.lane / kWarp),
        barrier(me.team + 1),
        slots(shared + me.team * (ceil_div(lanes, 4 * kWarp) * 4)) {
    for (int i = static_cast<int>(threadIdx.x); i < kSlots; i += me.plan.threads) shared[i] = 0.0f;
  }

  // The same in all threads of the row. There are slots for kMostSums numbers at once, the first of
  // these at `first`; slots are used again when another sum with its barrier was between.
  template <int N>
  __device__ __forceinline__ void operator()(float (&x)[N], int first) const {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
#pragma unroll
      for (int i = 0; i < N; i++) {
        const float more = shuffle_xor(x[i], mask);
        x[i] += kWarps || mask < lanes ? more : 0.0f;
      }
    }
    if (!kWarps || lanes == kWarp) return;
    float* from = slots + first * 32;
    if (lane_id() == 0) {
#pragma unroll
      for (int i = 0; i < N; i++) from[i * 32 + warp] = x[i];
    }
    sync_threads(barrier, lanes);
#pragma unroll
    for (int i = 0; i < N; i++) {
      float sums[kRowThreads / kWarp / 4];
#pragma unroll
      for (int j = 0; j < kRowThreads / kWarp / 4; j++) {
        float four[4] = {};
        if (4 * j * kWarp < lanes) {
          unpack(four, *reinterpret_cast<const Vector<float, 4>*>(from + i * 32 + 4 * j));
        }
        sums[j] = (four[0] + four[1]) + (four[2] + four[3]);
      }
      x[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
  }
};

// Bit V * k + i: whether dropout keeps element i of the thread's vector k.
template <int V, bool kWarps>
__device__ inline uint32_t keep_bits(const Dropout& dropout, int64_t row,
                                     const RowThread<V, kWarps>& me) {
  static_assert(kRowItems == 32 && V % 4 == 0);
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  uint32_t bits = 0;
#pragma unroll 1
  for (int i = 0; i < me.vectors * V; i += 4) {
    const int group = (me.at(i / V) + i % V) / 4;
    const uint4 words =
        philox(seed, static_cast<uint32_t>(group), static_cast<uint32_t>(row), 0, 0);
    bits |= keep_four(words, dropout.threshold) << i;
  }
  return bits;
}

// A block's shared memory beside RowSum's slots, in bytes for each column: once for all rows, and
// for each row that is there or on its way; of Any a thread has one, as floats.
struct RowNeeds {
  int once, place, any;
};

inline int row_lanes(int64_t cols, int v) {
  if (cols > kWarp / 2 * kRowItems) {
    return static_cast<int>(ceil_div<int64_t>(cols, kWarp * kRowItems)) * kWarp;
  }
  // Up to 8 as long as each has work, so that what they load lies side by side.
  int lanes = 1;
  while (lanes * kRowItems < cols || (lanes < 8 && lanes * v < cols)) lanes *= 2;
  return lanes;
}

// Few rows are spread over all multiprocessors. Of many, a block has as many at once as its threads
// suffice for, but rather fewer than no next ones on their way. The plan's `places` is 0 where
// shared memory does not suffice for one row, of Any or not.
inline RowPlan plan_rows(int64_t rows, int64_t cols, int v, const RowNeeds& needs,
                         const Device& device) {
  RowPlan plan{};
  if (cols > kWidestRow) return plan;
  plan.by_cols = {static_cast<float>(cols), 1.0f / static_cast<float>(cols)};
  plan.lanes = row_lanes(cols, v);
  const int parts = ceil_div(plan.lanes, kWarp);
  const int unit = plan.lanes < kWarp ? plan.lanes * v : kWarp * v;
  plan.part = ceil_div(ceil_div(static_cast<int>(cols), unit), parts) * unit;

  const int least = plan.lanes < kWarp ? kWarp : plan.lanes;  // threads
  const int64_t once = kSlots * static_cast<int64_t>(sizeof(float)) + needs.once * plan.padded();
  const int64_t left = device.shared_bytes - once;
  const auto places = [&](int threads) {
    return static_cast<int>(left / (int64_t{needs.place} * threads * kRowItems));
  };
  if (left < int64_t{needs.any} * least * kRowItems || left < 0 || places(least) < 1) return plan;

  const int64_t each = ceil_div<int64_t>(rows, device.multiprocessors) * plan.lanes;
  const int64_t teams = min(int64_t{kRowThreads / least}, ceil_div<int64_t>(each, least));
  plan.threads = static_cast<int>(teams) * least;
  while (plan.threads > least && places(plan.threads) < 2) plan.threads -= least;
  plan.places = min(kMostPlaces, places(plan.threads));
  plan.blocks = static_cast<int>(min(int64_t{device.multiprocessors},
                                     ceil_div<int64_t>(rows, plan.threads / plan.lanes)));
  plan.step = plan.blocks * (plan.threads / plan.lanes);
  plan.places_at = static_cast<int>(once / sizeof(float));
  plan.shared_bytes = static_cast<size_t>(once) +
                      size_t{1} * plan.places * needs.place * plan.threads * kRowItems;
  return plan;
}

// The same for a kernel of Any, in which every thread has one row as floats.
inline RowPlan plan_of_any(RowPlan plan, const RowNeeds& needs) {
  const int columns = plan.threads * kRowItems;
  plan.shared_bytes -= static_cast<size_t>(plan.places * needs.place - needs.any) * columns;
  plan.places = 1;
  return plan;
}

// Launches the kernel for rows of parts of a warp, or that for rows of whole warps.
template <auto kParts, auto kWarps, typename Call>
cudaError_t launch_plan(const Call& call, const RowPlan& plan, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(plan.blocks));
  const auto most = plan.lanes < kWarp ? bounded<kParts, kRowThreads, kAllShared>
                                       : bounded<kWarps, kRowThreads, kAllShared>;
  return launch(most.kernel, blocks, plan.threads, plan.shared_bytes, stream, call, plan);
}

}  // namespace fastlm
