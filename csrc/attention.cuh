// What the attention kernels share: places of sequences, tiles in shared memory, fragments.
#pragma once

#include "arch/copy.cuh"
#include "arch/math.cuh"
#include "arch/mma.cuh"
#include "arch/warp.cuh"
#include "attention.h"
#include "common.cuh"

#include <cstring>

namespace fastlm {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Where a sequence's tokens start, how many count, and what is added to a query's index to give
// the key at distance 0.
struct Sequence {
  int64_t first_q, first_k;
  int n_q, n_k, diagonal;
};

__device__ inline Sequence sequence_of(const AttentionParams& p, int batch) {
  Sequence s{0, 0, p.seqlen_q, p.seqlen_k, 0};
  int length_q = p.seqlen_q;
  if (p.cu_seqlens_q != nullptr) {
    s.first_q = p.cu_seqlens_q[batch];
    s.first_k = p.cu_seqlens_k[batch];
    length_q = static_cast<int>(p.cu_seqlens_q[batch + 1] - s.first_q);
    s.n_k = min(static_cast<int>(p.cu_seqlens_k[batch + 1] - s.first_k), p.seqlen_k);
  }
  if (p.seqlens_k != nullptr) s.n_k = min(s.n_k, p.seqlens_k[batch]);
  s.n_q = min(length_q, p.seqlen_q);
  s.diagonal = p.bottom_right ? s.n_k - length_q : 0;
  return s;
}

// The keys that a query sees by its place: [first, end), nothing where first >= end.
__device__ inline int first_key(const AttentionParams& p, const Sequence& s, int row) {
  return max(row + s.diagonal - p.left, 0);
}
__device__ inline int end_key(const AttentionParams& p, const Sequence& s, int row) {
  return min(row + s.diagonal + p.right + 1, s.n_k);
}

// Tiles of D columns of 16-bit numbers, rows side by side in shared memory. The 16-byte pieces of
// a row are permuted so that neither eight rows of one column (ldmatrix) nor one row meet a bank
// twice.
template <int D>
__device__ inline int tile_offset(int row, int col) {
  static_assert(D % 32 == 0, "rows of whole 64 bytes");
  const int piece = col / 8;
  const int turn = D % 64 == 0 ? row % 8 : row / 2 % 4;
  return row * D + (piece ^ turn) * 8 + col % 8;
}

// Begins to copy rows [start, start + Rows) of a sequence of a head; rows outside [low, end) and
// columns from `headdim` on become 0. `source` is the sequence's row 0.
template <typename T, int Rows, int D, int Threads>
__device__ inline void load_tile(T* tile, const T* source, int64_t stride_m, int start, int low,
                                 int end, int headdim) {
  constexpr int kPieces = D / 8;
#pragma unroll
  for (int i = 0; i < ceil_div(Rows * kPieces, Threads); i++) {
    const int piece = i * Threads + static_cast<int>(threadIdx.x);
    if (Rows * kPieces % Threads != 0 && piece >= Rows * kPieces) break;
    const int row = piece / kPieces, col = piece % kPieces * 8;
    const bool valid = start + row >= low && start + row < end && col < headdim;
    // An address that may be formed, though nothing is read from it.
    const T* from = valid ? source + (start + row) * stride_m + col : source;
    copy_async_16(tile + tile_offset<D>(row, col), from, valid);
  }
}

// mma's `a` fragment: rows [row, row + 16), columns [col, col + 16) of a tile.
template <int D, typename T>
__device__ inline void load_a(uint32_t (&a)[4], const T* tile, int row, int col) {
  const int lane = lane_id();
  load_matrix_x4(a, tile + tile_offset<D>(row + lane % 16, col + lane / 16 * 8));
}

// mma's `b` fragments for a product with the transposed tile, x @ tile^T: its rows
// [row, row + 16) are columns of b, its columns [col, col + 16) are summed over.
// b[0], b[1]: the first eight rows; b[2], b[3]: the others.
template <int D, typename T>
__device__ inline void load_b_trans(uint32_t (&b)[4], const T* tile, int row, int col) {
  const int lane = lane_id();
  load_matrix_x4(b, tile + tile_offset<D>(row + lane % 8 + lane / 16 * 8, col + lane / 8 % 2 * 8));
}

// mma's `b` fragments for x @ tile: its rows [row, row + 16) are summed over, its columns
// [col, col + 16) are columns of b. b[0], b[1]: the first eight columns; b[2], b[3]: the others.
template <int D, typename T>
__device__ inline void load_b(uint32_t (&b)[4], const T* tile, int row, int col) {
  const int lane = lane_id();
  load_matrix_x4_trans(b, tile + tile_offset<D>(row + lane % 16, col + lane / 16 * 8));
}

template <typename T>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<__half>(float low, float high) {
  const __half2 x = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &x, sizeof word);
  return word;
}
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &x, sizeof word);
  return word;
}

// mma's `a` fragment from two neighbouring 16x8 results of an mma: the first product's rows stay
// rows, its columns are summed over in the next.
template <typename T>
__device__ inline void as_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

}  // namespace fastlm
