// dq of attention: a block of warps has a tile of queries of one head and walks over the keys that
// some of them see. Of p = exp(score - lse), dp = do v^T and delta = rowsum(do out) - dlse,
//
//   ds = p (keep dp - delta);  dq = scale ds k
//
// Traffic: q, do and dq once; k and v once a tile of queries and head, mostly from the L2 cache.
#pragma once

#include "attention_bwd.cuh"

namespace fastlm {

// Per thread, dq takes row_tiles * headdim / 2 registers, scores and dp together row_tiles * chunk,
// and what is kept of q or do row_tiles * headdim / 4 each. With 32 queries a warp, fragments of k
// and v feed four products each; from head dim 96 on registers hold 16, and q and do kept there
// leave shared memory's bandwidth to k and v. At 256 only q fits, and with dropout neither. Dropout's
// words take registers of their own, so its chunks are smaller.
__host__ __device__ constexpr BackwardTile dq_tile(int headdim, bool dropout) {
  const int chunk = dropout || headdim > 128 ? 16 : 32;
  if (headdim <= 64) return {2, 4, 32, 4, chunk, true, true, 2};
  if (headdim <= 96) return {1, 8, 64, 2, chunk, true, true, 1};
  if (headdim <= 128) return {1, 8, 32, 4, chunk, true, true, 1};
  return {1, 8, 16, dropout ? 2 : 4, 16, !dropout, false, 1};
}

// Philox's words for a 16x8 tile of queries and keys, as `drop` of the forward has them.
__device__ inline void dropout_words(uint32_t (&words)[4], uint64_t seed, int key, int row,
                                     int head, int batch) {
  const int lane = lane_id();
  const bool odd = lane % 2 != 0;
  const uint4 own = philox(seed, key / 4 + lane % 4 / 2, row + lane / 4 + (odd ? 8 : 0), head,
                           batch);
  const uint32_t other0 = shuffle_xor(odd ? own.x : own.z, 1);
  const uint32_t other1 = shuffle_xor(odd ? own.y : own.w, 1);
  words[0] = odd ? other0 : own.x;
  words[1] = odd ? other1 : own.y;
  words[2] = odd ? own.z : other0;
  words[3] = odd ? own.w : other1;
}

// What a thread knows of its rows, of which tile i has rows 2 i and 2 i + 1.
template <int kRowTiles>
struct QueryRows {
  float lse[kRowTiles * 2], delta[kRowTiles * 2];

  __device__ QueryRows(const float* lse_row, const float* delta_row, int row, int n_q) {
#pragma unroll
    for (int i = 0; i < kRowTiles * 2; i++) {
      const int own = row + i * 8 + lane_id() / 4;
      lse[i] = own < n_q ? safe_lse(lse_row[own]) : INFINITY;
      delta[i] = own < n_q ? delta_row[own] : 0.0f;
    }
  }
};

// Turns scores into ds: keys from `start` on, rows from `row` on.
template <bool kMasked, bool kDropout, int kRowTiles, int kTiles>
__device__ inline void score_gradients(float (&s)[kRowTiles][kTiles][4],
                                       const float (&dp)[kRowTiles][kTiles][4],
                                       const QueryRows<kRowTiles>& rows, const AttentionParams& p,
                                       const Sequence& sequence, float scale_log2, uint64_t seed,
                                       int start, int row, const TilePlace& place) {
  const int lane = lane_id();
#pragma unroll
  for (int i = 0; i < kRowTiles; i++) {
    int first[2], end[2];
    if constexpr (kMasked) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int own = row + i * 16 + h * 8 + lane / 4;
        first[h] = first_key(p, sequence, own) - start - lane % 4 * 2;
        end[h] = end_key(p, sequence, own) - start - lane % 4 * 2;
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      uint32_t words[4];
      if constexpr (kDropout) {
        dropout_words(words, seed, start + n * 8, row + i * 16, place.head, place.batch);
      }
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int h = e / 2, key = n * 8 + e % 2;
        const float x = exp2_approx(fmaf(s[i][n][e], scale_log2, -rows.lse[i * 2 + h]));
        float gradient = dp[i][n][e];
        if constexpr (kDropout) {
          gradient = words[e] >= p.dropout.threshold ? gradient * p.dropout.scale : 0.0f;
        }
        const float ds = x * (gradient - rows.delta[i * 2 + h]);
        s[i][n][e] = kMasked && (key < first[h] || key >= end[h]) ? 0.0f : ds;
      }
    }
  }
}

template <typename T, int D, bool kDropout>
__global__ void __launch_bounds__(dq_tile(D, kDropout).threads(), dq_tile(D, kDropout).blocks)
    attention_dq_kernel(const AttentionBackwardParams backward, const TileLaunch launched) {
  constexpr BackwardTile kTile = dq_tile(D, kDropout);
  constexpr int kRows = kTile.rows(), kRowTiles = kTile.row_tiles, kThreads = kTile.threads();
  constexpr int kKeys = kTile.others, kChunk = kTile.chunk;
  const AttentionParams& p = backward.forward;
  const TilePlace place = tile_place(p, launched.tiles, launched.section);
  const Sequence sequence = sequence_of(p, place.batch);
  const int first_row = place.tile * kRows;
  if (first_row >= sequence.n_q) return;
  const OtherBlocks blocks(first_row, min(first_row + kRows, sequence.n_q) - 1, sequence.diagonal,
                           p.left, p.right, sequence.n_k, kKeys);
  const T* k = row_0<T>(p.k, place.batch, sequence.first_k, place.head_k);
  const T* v = row_0<T>(p.v, place.batch, sequence.first_k, place.head_k);

  T* ring = shared_memory<T>() + (2 - kTile.kept()) * kRows * D;
  // Copies block i of k, then of v, into the ring; past the last one, an empty group.
  auto copy = [&](int i) {
    if (i < blocks.count()) {
      T* stage = ring + i % kTile.stages * (2 * kKeys * D);
      const int start = blocks.start(i, kKeys);
      load_tile<T, kKeys, D, kThreads>(stage, k, p.k.stride_m, start, blocks.low, blocks.end,
                                       p.headdim);
      load_tile<T, kKeys, D, kThreads>(stage + kKeys * D, v, p.v.stride_m, start, blocks.low,
                                       blocks.end, p.headdim);
    }
    copy_async_commit();
  };

  T* q_tile = kTile.keep_first ? ring : shared_memory<T>();
  T* do_tile = kTile.keep_second ? ring + kRows * D : ring - kRows * D;
  load_tile<T, kRows, D, kThreads>(q_tile,
                                   row_0<T>(p.q, place.batch, sequence.first_q, place.head),
                                   p.q.stride_m, first_row, 0, sequence.n_q, p.headdim);
  load_tile<T, kRows, D, kThreads>(
      do_tile, row_0<T>(backward.dout, place.batch, sequence.first_q, place.head),
      backward.dout.stride_m, first_row, 0, sequence.n_q, p.headdim);
  copy_async_commit();
  const int row = warp_id() * kRowTiles * 16;
  const int64_t stats = stats_row_0(p, sequence, place.batch, place.head);
  const QueryRows<kRowTiles> rows(p.lse + stats, backward.delta + stats, first_row + row,
                                  sequence.n_q);
  copy_async_wait<0>();
  sync_block();
  const OwnRows<T, D, kRowTiles, kTile.keep_first> q_rows(q_tile, row);
  const OwnRows<T, D, kRowTiles, kTile.keep_second> do_rows(do_tile, row);
  sync_block();
#pragma unroll
  for (int i = 0; i < kTile.stages - 1; i++) copy(i);

  int first = lane_places<D>(0).at[0], first_trans = lane_places_trans<D>(0).at[0];
  const uint64_t seed = kDropout ? static_cast<uint64_t>(*p.dropout.seed) : 0;
  float dq[kRowTiles][D / 8][4] = {};
  auto add = [&](int i, auto masked) {
    copy_async_wait<kTile.stages - 2>();
    sync_block();  // block i is there, and nobody reads block i - 1
    copy(i + kTile.stages - 1);
    forget(first);
    forget(first_trans);
    const LanePlaces<D> places(first), places_trans(first_trans);
    const T* k_tile = ring + i % kTile.stages * (2 * kKeys * D);
    const T* v_tile = k_tile + kKeys * D;
    const int start = blocks.start(i, kKeys);
#pragma unroll 1
    for (int key = 0; key < kKeys; key += kChunk) {
      float s[kRowTiles][kChunk / 8][4], dp[kRowTiles][kChunk / 8][4];
      multiply_others<T, D, kRowTiles, kChunk>(s, q_rows, k_tile, places, places_trans,
                                              key);
      multiply_others<T, D, kRowTiles, kChunk>(dp, do_rows, v_tile, places, places_trans,
                                              key);
      score_gradients<decltype(masked)::value, kDropout>(s, dp, rows, p, sequence,
                                                         launched.scale_log2, seed, start + key,
                                                         first_row + row, place);
      add_product<T, D, kRowTiles, kChunk>(dq, s, k_tile, places, key);
    }
  };
#pragma unroll 1
  for (int i = 0; i < blocks.cut; i++) add(i, std::true_type());
#pragma unroll 1
  for (int i = blocks.cut; i < blocks.count(); i++) add(i, std::false_type());

  copy_async_wait<0>();
  sync_block();
  store_result<T, D, kRowTiles>(shared_memory<T>(), dq, p.scale,
                                row_0<T>(backward.dq, place.batch, sequence.first_q, place.head),
                                backward.dq.stride_m, first_row, row, sequence.n_q, sequence.n_q,
                                p.headdim);
}

template <typename T, int D, bool kDropout>
cudaError_t launch_attention_dq(const AttentionBackwardParams& backward, cudaStream_t stream) {
  constexpr BackwardTile kTile = dq_tile(D, kDropout);
  const AttentionParams& p = backward.forward;
  const int64_t heads = int64_t{p.batch} * p.nheads;
  const int tiles = ceil_div(p.seqlen_q, kTile.rows());
  if (heads * tiles == 0) return cudaSuccess;
  const int section =
      heads_in_work(p, int64_t{4} * p.seqlen_k * p.headdim, heads);
  return launch(
      bounded<attention_dq_kernel<T, D, kDropout>, kTile.threads(), kTile.shared_bytes(D)>,
      dim3(static_cast<unsigned>(heads * tiles)), stream, backward,
      TileLaunch{tiles, section, p.scale * kLog2E});
}

template <int D>
cudaError_t attention_dq_of(const AttentionBackwardParams& p, cudaStream_t stream) {
  return with_instance(p.forward, [&](auto type, auto dropout) {
    using T = typename decltype(type)::type;
    return launch_attention_dq<T, D, decltype(dropout)::value>(p, stream);
  });
}

}  // namespace fastlm
