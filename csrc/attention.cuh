// What the attention kernels share: places of sequences, tiles in shared memory, fragments.
#pragma once

#include "arch/copy.cuh"
#include "arch/math.cuh"
#include "arch/mma.cuh"
#include "arch/warp.cuh"
#include "attention.h"
#include "common.cuh"
#include "dispatch.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

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

// What the launcher adds to a call.
struct TileLaunch {
  int tiles;         // a head
  int section;       // heads in work at a time
  float scale_log2;  // scale log2(e), in the forward of |scale|
};

// What a program of a grid of tiles * nheads * batch works on.
struct TilePlace {
  int tile, head, head_k, batch;
};

// Within sections of heads, the last tiles first: causal ones have the most to do, so that the last
// programs are short. Heads that share keys follow each other.
__device__ inline TilePlace tile_place(const AttentionParams& p, int tiles, int section) {
  const int heads = p.batch * p.nheads;
  const int program = static_cast<int>(blockIdx.x);
  const int first = program / (tiles * section) * section;
  const int width = min(section, heads - first);
  const int rest = program - first * tiles;
  const int head = first + rest % width;
  return {tiles - 1 - rest / width, head % p.nheads, head % p.nheads / (p.nheads / p.nheads_k),
          head / p.nheads};
}

// The first row of a sequence of a head.
template <typename T>
__device__ inline T* row_0(const AttentionTensor& x, int batch, int64_t first, int head) {
  return static_cast<T*>(x.ptr) + batch * x.stride_b + first * x.stride_m + head * x.stride_h;
}

// Where the same row is in lse.
__device__ inline int64_t stats_row_0(const AttentionParams& p, const Sequence& s, int batch,
                                      int head) {
  if (p.cu_seqlens_q != nullptr) return head * p.lse_stride_h + s.first_q;
  return (int64_t{batch} * p.nheads + head) * p.lse_stride_h;
}

// Returns launch(Type<T>{}, std::bool_constant<kDropout>{}) for the T and kDropout of a call.
template <typename Launch>
cudaError_t with_instance(const AttentionParams& p, const Launch& launch) {
  const auto with_type = [&](auto type) {
    return p.dropout.seed != nullptr ? launch(type, std::true_type()) : launch(type, std::false_type());
  };
  return p.bf16 ? with_type(Type<__nv_bfloat16>{}) : with_type(Type<__half>{});
}

// How many heads are in work at a time, of which each reads `head_bytes` again and again: one, whose
// tiles then share them in the L2 cache; where tiles differ in length (causal, windows), as many as
// the cache holds, so that the shortest tiles of all come last.
inline int heads_in_work(const AttentionParams& p, int64_t head_bytes, int64_t heads) {
  if (p.right >= p.seqlen_q + p.seqlen_k) return 1;
  constexpr int64_t kBytes = 16 << 20;
  return static_cast<int>(std::clamp<int64_t>(kBytes / std::max<int64_t>(head_bytes, 1), 1, heads));
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

// How the threads of a block share the 16-byte pieces of a tile: neighbours copy neighbouring
// pieces of a row, and the rows of a thread are `kDown` apart.
template <int D, int Threads>
struct CopyPlace {
  static constexpr int kAcross = D % 256 == 0 ? 32 : D % 128 == 0 ? 16 : D % 64 == 0 ? 8 : 4;
  static constexpr int kDown = Threads / kAcross;
  int row, col;

  __device__ CopyPlace()
      : row(static_cast<int>(threadIdx.x) / kAcross),
        col(static_cast<int>(threadIdx.x) % kAcross * 8) {}

  // Of the piece `down` rows and `across` columns on, in shared memory.
  __device__ int operator()(int down, int across) const {
    if constexpr (kDown % 8 == 0) return tile_offset<D>(row, col) + down * D + across;
    return tile_offset<D>(row + down, col + across);
  }
};

// Begins to copy rows [start, start + Rows) of a sequence of a head; rows outside [low, end) and
// columns from `headdim` on become 0. `from` is where this thread's first piece comes from.
template <typename T, int Rows, int D, int Threads>
__device__ inline void load_cut_tile(T* tile, const T* from, int64_t stride_m, int start, int low,
                                     int end, int headdim) {
  using Place = CopyPlace<D, Threads>;
  static_assert(Rows % Place::kDown == 0, "every thread has as many pieces");
  Place place;
  forget(place.row);  // a loop that copies tiles has no registers to spare for their addresses
  // As unsigned numbers, distances below 0 are not below a length.
  const uint32_t from_low = static_cast<uint32_t>(start + place.row - low);
  const uint32_t length = static_cast<uint32_t>(max(end - low, 0));
#pragma unroll
  for (int row = 0; row < Rows; row += Place::kDown) {
#pragma unroll
    for (int col = 0; col < D; col += Place::kAcross * 8) {
      const bool valid = from_low + row < length && place.col + col < headdim;
      copy_async_16(tile + place(row, col), from + col, valid);
    }
    from += Place::kDown * stride_m;
  }
}

// The same, of a sequence whose row 0 is `source`.
template <typename T, int Rows, int D, int Threads>
__device__ inline void load_tile(T* tile, const T* source, int64_t stride_m, int start, int low,
                                 int end, int headdim) {
  const CopyPlace<D, Threads> place;
  load_cut_tile<T, Rows, D, Threads>(tile, source + (start + place.row) * stride_m + place.col,
                                     stride_m, start, low, end, headdim);
}

// load_cut_tile of rows that all count.
template <typename T, int Rows, int D, int Threads>
__device__ inline void load_whole_tile(T* tile, const T* from, int64_t stride_m, int headdim) {
  using Place = CopyPlace<D, Threads>;
  const Place place;
#pragma unroll
  for (int row = 0; row < Rows; row += Place::kDown) {
#pragma unroll
    for (int col = 0; col < D; col += Place::kAcross * 8) {
      copy_async_16(tile + place(row, col), from + col, place.col + col < headdim);
    }
    from += Place::kDown * stride_m;
  }
}

// A lane's addresses for ldmatrix in tiles of D columns. The permutation repeats every eight rows
// and 64 (or 32) columns, so a few offsets and constants give them all; a compiler left to find
// that out keeps a register for each address.
template <int D>
struct LanePlaces {
  static constexpr int kTurns = D % 64 == 0 ? 4 : 2;
  int at[kTurns];

  // `row`, `col`: the lane's own in the 16x16 numbers that an ldmatrix reads.
  __device__ LanePlaces(int row, int col) : LanePlaces(tile_offset<D>(row, col)) {}

  // `first`: that of the first 16x16 numbers.
  __device__ explicit LanePlaces(int first) {
#pragma unroll
    for (int i = 0; i < kTurns; i++) at[i] = first ^ (i * 16);
  }

  // Of the 16x16 numbers `row` rows (a multiple of 8) and `col` columns (of 16) on.
  __device__ int operator()(int row, int col) const {
    return at[col / 16 % kTurns] + row * D + col / (16 * kTurns) * (16 * kTurns);
  }
};

// For load_a and load_b of tiles from their row `row` on, a multiple of 8.
template <int D>
__device__ inline LanePlaces<D> lane_places(int row) {
  return {row + lane_id() % 16, lane_id() / 16 * 8};
}

// For load_b_trans. (The other places would give the same numbers, but not each fragment in two
// neighbouring registers, where mma wants it.)
template <int D>
__device__ inline LanePlaces<D> lane_places_trans(int row) {
  return {row + lane_id() % 8 + lane_id() / 16 * 8, lane_id() / 8 % 2 * 8};
}

// mma's `a` fragment: rows [row, row + 16), columns [col, col + 16) of a tile.
template <int D, typename T>
__device__ inline void load_a(uint32_t (&a)[4], const T* tile, const LanePlaces<D>& places, int row,
                              int col) {
  load_matrix_x4(a, tile + places(row, col));
}

// mma's `b` fragments for a product with the transposed tile, x @ tile^T: its rows
// [row, row + 16) are columns of b, its columns [col, col + 16) are summed over.
// b[0], b[1]: the first eight rows; b[2], b[3]: the others.
template <int D, typename T>
__device__ inline void load_b_trans(uint32_t (&b)[4], const T* tile,
                                    const LanePlaces<D>& places_trans, int row, int col) {
  load_matrix_x4(b, tile + places_trans(row, col));
}

// mma's `b` fragments for x @ tile: its rows [row, row + 16) are summed over, its columns
// [col, col + 16) are columns of b. b[0], b[1]: the first eight columns; b[2], b[3]: the others.
template <int D, typename T>
__device__ inline void load_b(uint32_t (&b)[4], const T* tile, const LanePlaces<D>& places, int row,
                              int col) {
  load_matrix_x4_trans(b, tile + places(row, col));
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

// Writes a warp's rows, from row `row` of a tile that starts with row `first_row`, once its lanes
// have put them there: 16 bytes at a time. Rows from `end` on are not written. kUnroll: pieces
// of a thread at a time; registers decide, and the forward has them.
template <typename T, int D, int kRowTiles, int kUnroll>
__device__ inline void store_pieces(const T* tile, T* to, int64_t stride_m, int first_row, int row,
                                    int end, int headdim) {
  sync_warp();
  constexpr int kPieces = D / 8;
#pragma unroll kUnroll
  for (int i = 0; i < kRowTiles * 16 * kPieces / kWarp; i++) {
    const int piece = i * kWarp + lane_id();
    const int own = row + piece / kPieces, col = piece % kPieces * 8;
    if (first_row + own < end && col < headdim) {
      *reinterpret_cast<uint4*>(to + (first_row + own) * stride_m + col) =
          *reinterpret_cast<const uint4*>(tile + tile_offset<D>(own, col));
    }
  }
}

}  // namespace fastlm
