// Forward attention by mma.sync: out = softmax(scale q k^T) v, and lse; no score is ever in memory.
//
// A block of warps has a tile of queries of one head and walks over the blocks of keys that some of
// them see. Tiles of k and v follow each other through a ring in shared memory: k of the first
// block, v of it, k of the next, ... A warp has all keys of its own queries, 32 of them where the
// registers allow it: a fragment of k or v that is read from shared memory then feeds four
// products, and with 16 queries a warp these reads would take as long as the products.
//
// Traffic: q and out once; k and v once a tile of queries and head, mostly from the L2 cache, since
// heads that share keys and tiles of a head run together.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>

#include "attention.cuh"

namespace fastlm {

struct ForwardTile {
  int row_tiles;  // of 16 queries, a warp
  int warps;
  int keys;    // of a block
  int blocks;  // a multiprocessor, which bounds the registers of a thread

  __host__ __device__ constexpr int threads() const { return warps * kWarp; }
  __host__ __device__ constexpr int rows() const { return row_tiles * warps * 16; }
  __host__ __device__ constexpr int shared_bytes(int headdim) const {
    return (rows() + 3 * keys) * headdim * 2;
  }
};

// A thread's fp32 results take row_tiles * headdim / 2 registers, its scores row_tiles * keys / 2:
// 64 keys where both and the fragments fit into 255, else 32. Up to head dim 128 two blocks share a
// multiprocessor: one computes exponentials while the other multiplies. Dropout needs registers for
// Philox, which then is the limit: fewer keys, or fewer queries a warp. At 256, 16 queries a warp
// are all that fits, and one block of eight warps reads k and v half as often as two of four would.
__host__ __device__ constexpr ForwardTile forward_tile(int headdim, bool dropout) {
  if (headdim <= 96) return {2, 4, dropout ? 32 : 64, 2};
  if (headdim <= 128 && !dropout) return {2, 4, 32, 2};
  return {1, 8, headdim > 128 && dropout ? 32 : 64, 1};
}

// The blocks of keys of a tile of queries, in the order in which they are computed: first those
// that an edge cuts, the right one, then the left one; then those that all queries see.
struct KeyBlocks {
  int low, end;            // keys outside are seen by no query of the tile
  int right, left, whole;  // where these blocks start
  int cut_right, cut, count;  // how many: at the right edge, at both, in all

  __device__ int start(int i, int keys) const {
    const int first = i < cut_right ? right : i < cut ? left : whole;
    return first + (i - (i < cut_right ? 0 : i < cut ? cut_right : cut)) * keys;
  }
};

__device__ inline KeyBlocks key_blocks(const AttentionParams& p, const Sequence& s, int first_row,
                                       int rows, int keys) {
  const int last_row = min(first_row + rows, s.n_q) - 1;
  KeyBlocks b;
  b.low = first_key(p, s, first_row);
  b.end = max(end_key(p, s, last_row), 0);
  b.left = b.low / keys * keys;
  b.whole = ceil_div(first_key(p, s, last_row), keys) * keys;
  b.right = max(b.whole, max(end_key(p, s, first_row), 0) / keys * keys);
  b.cut_right = max(ceil_div(b.end - b.right, keys), 0);
  b.cut = b.cut_right + max(ceil_div(min(b.whole, b.end) - b.left, keys), 0);
  b.count = b.cut + (b.right - b.whole) / keys;
  return b;
}

// Changes the signs of what this thread has copied of a tile by load_tile: before a barrier.
template <typename T, int Rows, int D, int Threads>
__device__ inline void negate_copied(T* tile) {
  using Place = CopyPlace<D, Threads>;
  const Place place;
  copy_async_wait<0>();
#pragma unroll 1
  for (int row = 0; row < Rows; row += Place::kDown) {
#pragma unroll
    for (int col = 0; col < D; col += Place::kAcross * 8) {
      uint4& x = *reinterpret_cast<uint4*>(tile + place(row, col));
      constexpr uint32_t kSigns = 0x80008000u;
      x = uint4{x.x ^ kSigns, x.y ^ kSigns, x.z ^ kSigns, x.w ^ kSigns};
    }
  }
}

// s = q k^T for the queries of a warp, whose rows of their tile `q` points to.
template <typename T, int D, int kRowTiles, int kKeys>
__device__ inline void multiply_keys(float (&s)[kRowTiles][kKeys / 8][4], const T* q, const T* k,
                                     const LanePlaces<D>& places,
                                     const LanePlaces<D>& places_trans) {
#pragma unroll
  for (int i = 0; i < kRowTiles; i++) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) s[i][n][e] = 0.0f;
    }
  }
#pragma unroll
  for (int col = 0; col < D; col += 16) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; i++) load_a(a[i], q, places, i * 16, col);
#pragma unroll
    for (int n = 0; n < kKeys / 8; n += 2) {
      uint32_t b[4];
      load_b_trans(b, k, places_trans, n * 8, col);
#pragma unroll
      for (int i = 0; i < kRowTiles; i++) {
        mma_m16n8k16<T>(s[i][n], a[i], b[0], b[1]);
        mma_m16n8k16<T>(s[i][n + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// Sets to -inf the scores of keys that a row does not see. Keys start at `start`, rows at `row`.
template <int kRowTiles, int kKeys>
__device__ inline void mask_scores(float (&s)[kRowTiles][kKeys / 8][4], const AttentionParams& p,
                                   const Sequence& sequence, int row, int start) {
  const int lane = lane_id();
  start += lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kRowTiles * 2; i++) {
    const int own = row + i * 8 + lane / 4;
    const int first = first_key(p, sequence, own) - start;
    const int end = end_key(p, sequence, own) - start;
#pragma unroll
    for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float& x = s[i / 2][n][i % 2 * 2 + e];
        x = n * 8 + e >= first && n * 8 + e < end ? x : -INFINITY;
      }
    }
  }
}

// Of the rows of a thread, of which tile i has rows 2 i and 2 i + 1: the greatest score so far, in
// base 2, and the sum of the probabilities of this thread's keys.
template <int kRowTiles>
struct RowStats {
  float max[kRowTiles * 2], sum[kRowTiles * 2];
};

// What is subtracted from a row's scores in base 2. Of a row that has seen no key the maximum is
// -inf, and -inf - -inf would be NaN; that happens in blocks that an edge cuts.
template <bool kCut>
__device__ inline float shift_of(float max) {
  return kCut && max == -INFINITY ? 0.0f : max;
}

// Takes a block's scores into the maxima and rescales what was summed up under the old ones.
template <bool kCut, int kRowTiles, int kKeyTiles, int kColTiles>
__device__ inline void rescale(RowStats<kRowTiles>& stats, float (&out)[kRowTiles][kColTiles][4],
                               const float (&s)[kRowTiles][kKeyTiles][4], float scale_log2) {
#pragma unroll
  for (int i = 0; i < kRowTiles * 2; i++) {
    float m = s[i / 2][0][i % 2 * 2];
#pragma unroll
    for (int n = 0; n < kKeyTiles; n++) {
      m = fmaxf(m, fmaxf(s[i / 2][n][i % 2 * 2], s[i / 2][n][i % 2 * 2 + 1]));
    }
    m = fmaxf(m, shuffle_xor(m, 1));
    m = fmaxf(m, shuffle_xor(m, 2));
    m = fmaxf(stats.max[i], m * scale_log2);
    const float alpha = exp2_approx(stats.max[i] - shift_of<kCut>(m));
    stats.max[i] = m;
    stats.sum[i] *= alpha;
#pragma unroll
    for (int n = 0; n < kColTiles; n++) {
      out[i / 2][n][i % 2 * 2] *= alpha;
      out[i / 2][n][i % 2 * 2 + 1] *= alpha;
    }
  }
}

// Drops probabilities of a 16x8 tile whose first key is `key` and whose first row is `row`. Four
// neighbouring keys of a row come from one Philox call and are in two lanes: one of them calls for
// row g, the other for row g + 8, and they exchange what is not theirs.
__device__ inline void drop(float (&s)[4], uint32_t threshold, uint64_t seed, int key, int row,
                            const TilePlace& place) {
  const int lane = lane_id();
  const uint32_t odd = 0u - lane % 2u;  // all bits, or none
  const auto select = [&](uint32_t a, uint32_t b) { return (a & odd) | (b & ~odd); };
  const uint4 words = philox(seed, key / 4 + lane % 4 / 2, row + lane / 4 + (odd & 8), place.head,
                             place.batch);
  const uint32_t other0 = shuffle_xor(select(words.x, words.z), 1);
  const uint32_t other1 = shuffle_xor(select(words.y, words.w), 1);
  s[0] = select(other0, words.x) >= threshold ? s[0] : 0.0f;
  s[1] = select(other1, words.y) >= threshold ? s[1] : 0.0f;
  s[2] = select(words.z, other0) >= threshold ? s[2] : 0.0f;
  s[3] = select(words.w, other1) >= threshold ? s[3] : 0.0f;
}

// out += p v, with p = 2^(s scale - shift), and the sums of p before dropout.
template <typename T, int D, bool kCut, bool kDropout, int kRowTiles, int kKeyTiles>
__device__ inline void multiply_values(float (&out)[kRowTiles][D / 8][4],
                                       RowStats<kRowTiles>& stats,
                                       float (&s)[kRowTiles][kKeyTiles][4], const T* v,
                                       const LanePlaces<D>& places, float scale_log2,
                                       uint32_t threshold, uint64_t seed, int start, int row,
                                       const TilePlace& place) {
#pragma unroll
  for (int n = 0; n < kKeyTiles; n += 2) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; i++) {
#pragma unroll
      for (int m = n; m < n + 2; m++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          float& x = s[i][m][e];
          x = exp2_approx(fmaf(x, scale_log2, -shift_of<kCut>(stats.max[i * 2 + e / 2])));
          stats.sum[i * 2 + e / 2] += x;
        }
        if constexpr (kDropout) {
          drop(s[i][m], threshold, seed, start + m * 8, row + i * 16, place);
        }
      }
      as_a<T>(a[i], s[i][n], s[i][n + 1]);
    }
#pragma unroll
    for (int col = 0; col < D; col += 16) {
      uint32_t b[4];
      load_b(b, v, places, n * 8, col);
#pragma unroll
      for (int i = 0; i < kRowTiles; i++) {
        mma_m16n8k16<T>(out[i][col / 8], a[i], b[0], b[1]);
        mma_m16n8k16<T>(out[i][col / 8 + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// Divides by the sums and writes the rows of a warp, from row `row` of the tile on: lse, and out
// through the warp's own rows of `tile`, so that 16 bytes go to memory at a time.
template <typename T, int D, int kRowTiles>
__device__ inline void store_rows(T* tile, float (&out)[kRowTiles][D / 8][4],
                                  const RowStats<kRowTiles>& stats, const AttentionParams& p,
                                  int n_q, T* to, float* lse, int first_row, int row) {
  const int lane = lane_id();
#pragma unroll
  for (int i = 0; i < kRowTiles * 2; i++) {
    float sum = stats.sum[i];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const bool dead = stats.max[i] == -INFINITY;  // the row sees no key
    const float inverse = dead ? 0.0f : p.dropout.scale / sum;
    const int own = row + i * 8 + lane / 4;
    if (lane % 4 == 0 && first_row + own < n_q) {
      lse[first_row + own] =
          dead ? -INFINITY : (stats.max[i] + log2f(sum)) * kLn2;
    }
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
      const float* x = &out[i / 2][n][i % 2 * 2];
      *reinterpret_cast<uint32_t*>(tile + tile_offset<D>(own, n * 8 + lane % 4 * 2)) =
          pack<T>(x[0] * inverse, x[1] * inverse);
    }
  }
  store_pieces<T, D, kRowTiles, kRowTiles * D / 16>(tile, to, p.out.stride_m, first_row, row, n_q, p.headdim);
}

template <typename T, int D, bool kDropout>
__global__ void __launch_bounds__(forward_tile(D, kDropout).threads(),
                                  forward_tile(D, kDropout).blocks)
    attention_fwd_kernel(const AttentionParams p, const TileLaunch launched) {
  constexpr ForwardTile kTile = forward_tile(D, kDropout);
  constexpr int kKeys = kTile.keys, kThreads = kTile.threads(), kRowTiles = kTile.row_tiles;
  const TilePlace place = tile_place(p, launched.tiles, launched.section);
  const Sequence sequence = sequence_of(p, place.batch);
  const int first_row = place.tile * kTile.rows();
  if (first_row >= sequence.n_q) return;
  const KeyBlocks blocks = key_blocks(p, sequence, first_row, kTile.rows(), kKeys);
  const T* q = row_0<T>(p.q, place.batch, sequence.first_q, place.head);

  T* q_tile = shared_memory<T>();
  T* ring = q_tile + kTile.rows() * D;
  constexpr int kLastStage = 2 * kKeys * D;
  auto next_stage = [](int stage) { return stage == kLastStage ? 0 : stage + kKeys * D; };
  // Where this thread's part of a block comes from: first of the first one, then of the next.
  int start = blocks.start(0, kKeys);
  const CopyPlace<D, kThreads> mine;
  const T* k_from = row_0<T>(p.k, place.batch, sequence.first_k, place.head_k) +
                    (start + mine.row) * p.k.stride_m + mine.col;
  const T* v_from = row_0<T>(p.v, place.batch, sequence.first_k, place.head_k) +
                    (start + mine.row) * p.v.stride_m + mine.col;
  auto copy = [&](T* tile, const T*& from, int64_t stride_m, int step, int i, auto cut) {
    if (i < blocks.count) {
      from += step * stride_m;
      if constexpr (decltype(cut)::value) {
        load_cut_tile<T, kKeys, D, kThreads>(tile, from, stride_m, start + step, blocks.low,
                                             blocks.end, p.headdim);
      } else {
        load_whole_tile<T, kKeys, D, kThreads>(tile, from, stride_m, p.headdim);
      }
    }
    copy_async_commit();  // an empty group past the end, which keeps their number
  };
  load_tile<T, kTile.rows(), D, kThreads>(q_tile, q, p.q.stride_m, first_row, 0, sequence.n_q,
                                          p.headdim);
  copy(ring, k_from, p.k.stride_m, 0, 0, std::true_type());
  copy(ring + kKeys * D, v_from, p.v.stride_m, 0, 0, std::true_type());
  // Maxima are taken of q k, so the sign of the scale goes into q.
  if (p.scale < 0.0f) negate_copied<T, kTile.rows(), D, kThreads>(q_tile);

  const int row = warp_id() * kRowTiles * 16;
  int lane_place = lane_places<D>(0).at[0], lane_place_trans = lane_places_trans<D>(0).at[0];
  const uint64_t seed = kDropout ? static_cast<uint64_t>(*p.dropout.seed) : 0;
  float out[kRowTiles][D / 8][4] = {};
  RowStats<kRowTiles> stats;
#pragma unroll
  for (int i = 0; i < kRowTiles * 2; i++) {
    stats.max[i] = -INFINITY;
    stats.sum[i] = 0.0f;
  }
  int stage = 0;  // where in the ring k of the block is
  auto attend = [&](int i, auto cut) {
    constexpr bool kCut = decltype(cut)::value;
    const int step = kCut ? blocks.start(i + 1, kKeys) - start : kKeys;
    // The registers are full: addresses are made of two offsets in each block, not kept.
    forget(lane_place);
    forget(lane_place_trans);
    const LanePlaces<D> places(lane_place), places_trans(lane_place_trans);
    const int stage_v = next_stage(stage), stage_next = next_stage(stage_v);
    float s[kRowTiles][kKeys / 8][4];
    copy_async_wait<1>();  // for all but v
    sync_block();
    copy(ring + stage_next, k_from, p.k.stride_m, step, i + 1, cut);
    multiply_keys<T, D, kRowTiles, kKeys>(s, q_tile + row * D, ring + stage, places,
                                          places_trans);
    if constexpr (kCut) {
      int from_row = first_row + row;
      forget(from_row);
      mask_scores<kRowTiles, kKeys>(s, p, sequence, from_row, start);
    }
    rescale<kCut>(stats, out, s, launched.scale_log2);
    copy_async_wait<1>();  // for all but the next k
    sync_block();
    copy(ring + stage, v_from, p.v.stride_m, step, i + 1, cut);
    multiply_values<T, D, kCut, kDropout>(out, stats, s, ring + stage_v, places,
                                          launched.scale_log2, p.dropout.threshold, seed, start,
                                          first_row + row, place);
    stage = stage_next;
    start += step;
  };
#pragma unroll 1
  for (int i = 0; i < blocks.cut; i++) attend(i, std::true_type());
#pragma unroll 1
  for (int i = blocks.cut; i < blocks.count; i++) attend(i, std::false_type());

  copy_async_wait<0>();  // of q, where no key is seen, so that its tile is free
  sync_block();
  const Sequence again = sequence_of(p, place.batch);  // read again, not kept through the loops
  T* to = row_0<T>(p.out, place.batch, again.first_q, place.head);
  float* lse = p.lse + stats_row_0(p, again, place.batch, place.head);
  store_rows<T, D, kRowTiles>(q_tile, out, stats, p, again.n_q, to, lse, first_row, row);
}

template <typename T, int D, bool kDropout>
cudaError_t launch_attention_fwd(const AttentionParams& p, cudaStream_t stream) {
  constexpr ForwardTile kTile = forward_tile(D, kDropout);
  const int64_t heads = int64_t{p.batch} * p.nheads;
  const int tiles = ceil_div(p.seqlen_q, kTile.rows());
  if (heads * tiles == 0) return cudaSuccess;
  // A scale of 0 would turn a score of -inf into NaN; the least scale that is not 0 gives the
  // same probabilities.
  const float scale_log2 = std::max(std::fabs(p.scale) * kLog2E, FLT_MIN);
  const TileLaunch launched{tiles, heads_in_work(p, int64_t{4} * p.seqlen_k * p.headdim, heads), scale_log2};
  return launch(
      bounded<attention_fwd_kernel<T, D, kDropout>, kTile.threads(), kTile.shared_bytes(D)>,
      dim3(static_cast<unsigned>(heads * tiles)), stream, p, launched);
}

template <int D>
cudaError_t attention_fwd_of(const AttentionParams& p, cudaStream_t stream) {
  return with_instance(p, [&](auto type, auto dropout) {
    using T = typename decltype(type)::type;
    return launch_attention_fwd<T, D, decltype(dropout)::value>(p, stream);
  });
}

}  // namespace fastlm
