// What dq's kernel shares with that of dk and dv. Both have a tile of rows of one side, their own
// (queries for dq, keys for dk and dv), and walk over blocks of rows of the other side:
//
//   scores = own1 other1^T, dp = own2 other2^T, then sums of products of p or ds with other rows
//
// so that a warp has the scores of its own rows against all others of a block, and what comes out of
// one product goes into the next in registers.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "attention.cuh"

namespace fastlm {

struct BackwardTile {
  int row_tiles;  // of 16 own rows, a warp
  int warps;
  int others;  // rows of the other side, a stage of the ring
  int stages;
  int chunk;  // of `others`, whose scores are in registers at a time
  // Own fragments live in registers and pass through the ring, else in shared memory.
  bool keep_first, keep_second;
  int blocks;  // a multiprocessor, which bounds the registers of a thread

  __host__ __device__ constexpr int threads() const { return warps * kWarp; }
  __host__ __device__ constexpr int rows() const { return row_tiles * warps * 16; }
  __host__ __device__ constexpr int kept() const { return keep_first + keep_second; }
  __host__ __device__ constexpr int ring(int headdim) const { return stages * 2 * others * headdim; }
  __host__ __device__ constexpr int shared_bytes(int headdim) const {
    return ((2 - kept()) * rows() * headdim + ring(headdim)) * 2;
  }
};

// The blocks of one side of which a tile of rows of the other, `first` to `last`, has pairs, in the
// order in which they are computed: first those that an edge cuts, the lower one, then the upper
// one; then the whole ones between. A row has the others from row + diagonal - left to row +
// diagonal + right, of `n`.
struct OtherBlocks {
  int low, end;               // others outside have no pair in the tile
  int cut_lower, cut, whole;  // how many: at the lower edge, at both, between

  __device__ OtherBlocks(int first, int last, int diagonal, int left, int right, int n, int step) {
    low = max(first + diagonal - left, 0);
    end = max(min(last + diagonal + right + 1, n), 0);
    const int lower = low / step;
    const int all_from = ceil_div(max(last + diagonal - left, 0), step);
    const int all_to = max(all_from, max(min(first + diagonal + right + 1, n), 0) / step);
    const int upper = ceil_div(end, step);
    cut_lower = max(min(all_from, upper) - lower, 0);
    cut = cut_lower + max(upper - all_to, 0);
    whole = all_to - all_from;
  }

  __device__ int count() const { return cut + whole; }

  __device__ int start(int i, int step) const {
    const int index = i >= cut ? i - cut + cut_lower : i >= cut_lower ? i + whole : i;
    return (low / step + index) * step;
  }
};

// The `a` fragments of a warp's own rows, from row `row` of their tile.
template <typename T, int D, int kRowTiles, bool kKeep>
struct OwnRows;

template <typename T, int D, int kRowTiles>
struct OwnRows<T, D, kRowTiles, true> {
  uint32_t kept[kRowTiles][D / 16][4];

  __device__ OwnRows(const T* tile, int row) {
    const LanePlaces<D> places = lane_places<D>(row);
#pragma unroll
    for (int i = 0; i < kRowTiles; i++) {
#pragma unroll
      for (int c = 0; c < D / 16; c++) load_a<D>(kept[i][c], tile, places, i * 16, c * 16);
    }
  }

  __device__ void get(uint32_t (&a)[4], const LanePlaces<D>&, int i, int col) const {
#pragma unroll
    for (int e = 0; e < 4; e++) a[e] = kept[i][col / 16][e];
  }
};

template <typename T, int D, int kRowTiles>
struct OwnRows<T, D, kRowTiles, false> {
  const T* rows;

  __device__ OwnRows(const T* tile, int row) : rows(tile + row * D) {}

  __device__ void get(uint32_t (&a)[4], const LanePlaces<D>& places, int i, int col) const {
    load_a<D>(a, rows, places, i * 16, col);
  }
};

// x = own rows times rows [row, row + kChunk) of `tile`, transposed.
template <typename T, int D, int kRowTiles, int kChunk, typename Own>
__device__ inline void multiply_others(float (&x)[kRowTiles][kChunk / 8][4], const Own& own,
                                       const T* tile, const LanePlaces<D>& places,
                                       const LanePlaces<D>& places_trans, int row) {
#pragma unroll
  for (int i = 0; i < kRowTiles; i++) {
#pragma unroll
    for (int n = 0; n < kChunk / 8; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) x[i][n][e] = 0.0f;
    }
  }
#pragma unroll
  for (int col = 0; col < D; col += 16) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; i++) own.get(a[i], places, i, col);
#pragma unroll
    for (int n = 0; n < kChunk / 8; n += 2) {
      uint32_t b[4];
      load_b_trans<D>(b, tile, places_trans, row + n * 8, col);
#pragma unroll
      for (int i = 0; i < kRowTiles; i++) {
        mma_m16n8k16<T>(x[i][n], a[i], b[0], b[1]);
        mma_m16n8k16<T>(x[i][n + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// sum += x times rows [row, row + kChunk) of `tile`.
template <typename T, int D, int kRowTiles, int kChunk>
__device__ inline void add_product(float (&sum)[kRowTiles][D / 8][4],
                                   const float (&x)[kRowTiles][kChunk / 8][4], const T* tile,
                                   const LanePlaces<D>& places, int row) {
#pragma unroll
  for (int n = 0; n < kChunk / 8; n += 2) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; i++) as_a<T>(a[i], x[i][n], x[i][n + 1]);
#pragma unroll
    for (int col = 0; col < D; col += 16) {
      uint32_t b[4];
      load_b<D>(b, tile, places, row + n * 8, col);
#pragma unroll
      for (int i = 0; i < kRowTiles; i++) {
        mma_m16n8k16<T>(sum[i][col / 8], a[i], b[0], b[1]);
        mma_m16n8k16<T>(sum[i][col / 8 + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// lse in base 2; +inf for rows that see no key, of which exp2(s - inf) = 0.
__device__ inline float safe_lse(float lse) {
  return lse == -INFINITY ? INFINITY : lse * kLog2E;
}

// Writes `factor` times a warp's rows through its own rows of `tile`, which nobody reads any more, so
// that 16 bytes go to memory at a time. `to`: of row 0; rows from `live` on are 0, rows from `end` on are not written.
template <typename T, int D, int kRowTiles>
__device__ inline void store_result(T* tile, const float (&x)[kRowTiles][D / 8][4], float factor,
                                    T* to, int64_t stride_m, int first_row, int row, int live,
                                    int end, int headdim) {
  const int lane = lane_id();
#pragma unroll
  for (int i = 0; i < kRowTiles * 2; i++) {
    const int own = row + i * 8 + lane / 4;
    const bool zero = first_row + own >= live;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
      const float* pair = &x[i / 2][n][i % 2 * 2];
      const uint32_t word = zero ? 0 : pack<T>(pair[0] * factor, pair[1] * factor);
      void* at = tile + tile_offset<D>(own, n * 8 + lane % 4 * 2);
      memcpy(at, &word, sizeof word);
    }
  }
  store_pieces<T, D, kRowTiles, 4>(tile, to, stride_m, first_row, row, end, headdim);
  sync_warp();
}

}  // namespace fastlm
