// dk and dv of attention: a block of warps has a tile of keys of one key head and walks over the
// queries that see some of them, of every head that shares the key head, in order. Scores are
// transposed, keys by queries, so that p and ds stay in registers for the products
//
//   dv = (keep p)^T do;  dk = scale ds^T q,  ds = p (keep dp - delta)
//
// Traffic: k, v, dk and dv once; q, do, lse and delta once a tile of keys, mostly from the L2 cache.
#pragma once

#include "attention_bwd.cuh"

namespace fastlm {

// Per thread, dk and dv take row_tiles * headdim / 2 registers each, scores and dp together
// row_tiles * chunk, and what is kept of k or v row_tiles * headdim / 4 each. With 32 keys a warp,
// fragments of q and do feed four products each; from head dim 96 on registers hold 16, and k, kept
// there, leaves shared memory to a stage of 64 queries and stays below the 99 KiB of sm_86. At 128
// only a stage of a single chunk leaves the last registers that ptxas wants for either target. At
// 256 there is no room for both results: dv and dk have a pass each, 5 products in the place of 4,
// and only dk without dropout has the registers to keep k.
__host__ __device__ constexpr BackwardTile dkv_tile(int headdim, bool dropout, bool dk) {
  const int chunk = headdim == 96 && !dropout ? 32 : 16;
  if (headdim <= 32) return {2, 4, 32, 4, chunk, true, true, dropout ? 2 : 3};
  if (headdim <= 64) return {2, 4, 32, 3, chunk, false, false, 2};
  if (headdim <= 96) return {1, 8, 64, 2, chunk, true, false, 1};
  if (headdim <= 128) return {1, 8, dropout ? 32 : 16, 4, chunk, true, false, 1};
  return {1, 8, 16, dk && !dropout ? 4 : 2, 16, dk && !dropout, false, 1};
}

// What a program works on: a tile of keys of one key head.
struct KeyTilePlace {
  int tile, head_k, batch;
};

// Within sections of key heads, the first tiles first: causal ones have the most to do.
__device__ inline KeyTilePlace key_tile_place(const AttentionParams& p, int tiles, int section) {
  const int program = static_cast<int>(blockIdx.x);
  const int first = program / (tiles * section) * section;
  const int width = min(section, p.batch * p.nheads_k - first);
  const int rest = program - first * tiles;
  const int head = first + rest % width;
  return {rest / width, head % p.nheads_k, head / p.nheads_k};
}

// Philox's words for a 16x8 tile of keys and queries. Four neighbouring keys of a query come from
// one call and are in four lanes, which make the calls for their 4x4 elements, one each, and
// transpose them.
__device__ inline void dropout_words_trans(uint32_t (&words)[4], uint64_t seed, int key, int row,
                                           int head, int batch) {
  const int lane = lane_id();
  const bool odd = lane / 4 % 2 != 0, high = lane / 8 % 2 != 0;
  const uint4 own = philox(seed, key / 4 + lane / 16 + (high ? 2 : 0), row + lane % 4 * 2 + odd,
                           head, batch);
  const uint32_t even0 = shuffle_xor(odd ? own.x : own.y, 4);
  const uint32_t even1 = shuffle_xor(odd ? own.z : own.w, 4);
  const uint32_t x = odd ? even0 : own.x, y = odd ? own.y : even0;
  const uint32_t z = odd ? even1 : own.z, w = odd ? own.w : even1;
  const uint32_t other0 = shuffle_xor(high ? x : z, 8);
  const uint32_t other1 = shuffle_xor(high ? y : w, 8);
  words[0] = high ? other0 : x;
  words[1] = high ? other1 : y;
  words[2] = high ? z : other0;
  words[3] = high ? w : other1;
}

// What keys need to know of a query.
struct QueryStats {
  float lse, delta;  // of `safe_lse`
};

// A block of queries of one of the heads that share a key head.
struct QueryBlock {
  int head, start;
};

// Block i of `group` heads: first the blocks that an edge cuts, of one head after the other, then
// the whole ones.
__device__ inline QueryBlock query_block(const OtherBlocks& blocks, int group, int i, int step) {
  const bool whole = i >= group * blocks.cut;
  const int each = whole ? blocks.whole : blocks.cut;
  const int index = whole ? i - group * blocks.cut : i;
  const int head = index / each;
  return {head, blocks.start(index - head * each + (whole ? blocks.cut : 0), step)};
}

// Turns scores into p, as dv needs it, and dp into ds: queries from `start` on, keys from `key` on.
// `stats`: of the first query, in shared memory.
template <bool kMasked, bool kDropout, bool kDk, int kRowTiles, int kTiles>
__device__ inline void probabilities_and_gradients(
    float (&s)[kRowTiles][kTiles][4], float (&dp)[kRowTiles][kTiles][4], const QueryStats* stats,
    const AttentionParams& p, int diagonal, float scale_log2, uint64_t seed, int start, int key,
    int head, int batch) {
  const int lane = lane_id();
#pragma unroll
  for (int n = 0; n < kTiles; n++) {
    float4 pair;  // of two queries
    memcpy(&pair, stats + n * 8 + lane % 4 * 2, sizeof pair);
    const float lse[2] = {pair.x, pair.z}, delta[2] = {pair.y, pair.w};
#pragma unroll
    for (int i = 0; i < kRowTiles; i++) {
      uint32_t words[4];
      if constexpr (kDropout) {
        dropout_words_trans(words, seed, key + i * 16, start + n * 8, head, batch);
      }
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float x = exp2_approx(fmaf(s[i][n][e], scale_log2, -lse[e % 2]));
        if constexpr (kMasked) {
          const int distance = key + i * 16 + e / 2 * 8 + lane / 4 -
                               (start + n * 8 + lane % 4 * 2 + e % 2 + diagonal);
          x = distance <= p.right && -distance <= p.left ? x : 0.0f;
        }
        float gradient = dp[i][n][e];
        bool keep = true;
        if constexpr (kDropout) {
          keep = words[e] >= p.dropout.threshold;
          gradient = keep ? gradient * p.dropout.scale : 0.0f;
        }
        if constexpr (kDk) dp[i][n][e] = x * (gradient - delta[e % 2]);
        s[i][n][e] = keep ? x : 0.0f;
      }
    }
  }
}

// kDk, kDv: which of the two a pass has.
template <typename T, int D, bool kDropout, bool kDk, bool kDv>
__global__ void __launch_bounds__(dkv_tile(D, kDropout, kDk).threads(), dkv_tile(D, kDropout, kDk).blocks)
    attention_dkv_kernel(const AttentionBackwardParams backward, const TileLaunch launched) {
  constexpr BackwardTile kTile = dkv_tile(D, kDropout, kDk);
  constexpr int kRows = kTile.rows(), kRowTiles = kTile.row_tiles, kThreads = kTile.threads();
  constexpr int kQueries = kTile.others, kChunk = kTile.chunk;
  const AttentionParams& p = backward.forward;
  const KeyTilePlace place = key_tile_place(p, launched.tiles, launched.section);
  const Sequence sequence = sequence_of(p, place.batch);
  const int first_key = place.tile * kRows;
  // Packed, rows of other sequences follow.
  const int stored = p.cu_seqlens_q == nullptr ? p.seqlen_k : sequence.n_k;
  if (first_key >= stored) return;
  const int group = p.nheads / p.nheads_k, first_head = place.head_k * group;
  const int last_key = min(first_key + kRows, sequence.n_k) - 1;
  const OtherBlocks blocks(first_key, last_key, -sequence.diagonal, p.right, p.left, sequence.n_q,
                           kQueries);
  const int64_t stats = stats_row_0(p, sequence, place.batch, first_head);
  const T* q = row_0<T>(p.q, place.batch, sequence.first_q, first_head);
  const T* dout = row_0<T>(backward.dout, place.batch, sequence.first_q, first_head);

  T* ring = shared_memory<T>() + (2 - kTile.kept()) * kRows * D;
  QueryStats* ring_stats = reinterpret_cast<QueryStats*>(ring + kTile.ring(D));
  const int cut = first_key < sequence.n_k ? group * blocks.cut : 0;
  const int count = first_key < sequence.n_k ? group * blocks.count() : 0;
  // Copies block i of q, then of do, into the ring; past the last one, an empty group. Returns what
  // keys need to know of the query that this thread brings to the others, if there is one.
  const int own_query = static_cast<int>(threadIdx.x);
  auto copy = [&](int i) {
    QueryStats x{INFINITY, 0.0f};
    if (i < count) {
      const QueryBlock block = query_block(blocks, group, i, kQueries);
      T* stage = ring + i % kTile.stages * (2 * kQueries * D);
      load_tile<T, kQueries, D, kThreads>(stage, q + block.head * p.q.stride_h, p.q.stride_m,
                                          block.start, blocks.low, blocks.end, p.headdim);
      load_tile<T, kQueries, D, kThreads>(
          stage + kQueries * D, dout + block.head * backward.dout.stride_h, backward.dout.stride_m,
          block.start, blocks.low, blocks.end, p.headdim);
      if (own_query < kQueries && block.start + own_query < sequence.n_q) {
        const int64_t at = stats + block.head * p.lse_stride_h + block.start + own_query;
        x = {p.lse[at], backward.delta[at]};
      }
    }
    copy_async_commit();
    return x;
  };
  auto store_stats = [&](int i, QueryStats x) {
    if (own_query >= kQueries) return;
    ring_stats[i % kTile.stages * kQueries + own_query] = {safe_lse(x.lse), x.delta};
  };

  // Keys that no query sees are not read: they may hold NaN.
  const int low = max(sequence.diagonal - p.left, 0);
  const int end = min(sequence.n_k, sequence.n_q + sequence.diagonal + p.right);
  T* k_tile = kTile.keep_first ? ring : shared_memory<T>();
  T* v_tile = kTile.keep_second ? ring + kRows * D : ring - kRows * D;
  load_tile<T, kRows, D, kThreads>(k_tile,
                                   row_0<T>(p.k, place.batch, sequence.first_k, place.head_k),
                                   p.k.stride_m, first_key, low, end, p.headdim);
  if constexpr (kDk) {
    load_tile<T, kRows, D, kThreads>(v_tile,
                                     row_0<T>(p.v, place.batch, sequence.first_k, place.head_k),
                                     p.v.stride_m, first_key, low, end, p.headdim);
  }
  copy_async_commit();
  copy_async_wait<0>();
  sync_block();
  const int row = warp_id() * kRowTiles * 16;
  const OwnRows<T, D, kRowTiles, kTile.keep_first> k_rows(k_tile, row);
  const OwnRows<T, D, kRowTiles, kTile.keep_second> v_rows(v_tile, row);
  sync_block();
#pragma unroll
  for (int i = 0; i < kTile.stages - 1; i++) store_stats(i, copy(i));

  const LanePlaces<D> places = lane_places<D>(0), places_trans = lane_places_trans<D>(0);
  const uint64_t seed = kDropout ? static_cast<uint64_t>(*p.dropout.seed) : 0;
  float dk[kRowTiles][D / 8][4] = {}, dv[kRowTiles][D / 8][4] = {};
  auto add = [&](int i, auto masked) {
    copy_async_wait<kTile.stages - 2>();
    sync_block();  // block i is there, and nobody reads block i - 1
    const QueryStats next = copy(i + kTile.stages - 1);
    const QueryBlock block = query_block(blocks, group, i, kQueries);
    const T* q_tile = ring + i % kTile.stages * (2 * kQueries * D);
    const T* do_tile = q_tile + kQueries * D;
#pragma unroll 1
    for (int query = 0; query < kQueries; query += kChunk) {
      float s[kRowTiles][kChunk / 8][4], dp[kRowTiles][kChunk / 8][4];
      multiply_others<T, D, kRowTiles, kChunk>(s, k_rows, q_tile, places, places_trans,
                                              query);
      if constexpr (kDk) {
        multiply_others<T, D, kRowTiles, kChunk>(dp, v_rows, do_tile, places,
                                                places_trans, query);
      }
      probabilities_and_gradients<decltype(masked)::value, kDropout, kDk>(
          s, dp, ring_stats + i % kTile.stages * kQueries + query, p, sequence.diagonal, launched.scale_log2,
          seed, block.start + query, first_key + row,
          first_head + block.head, place.batch);
      if constexpr (kDv) add_product<T, D, kRowTiles, kChunk>(dv, s, do_tile, places, query);
      if constexpr (kDk) add_product<T, D, kRowTiles, kChunk>(dk, dp, q_tile, places, query);
    }
    store_stats(i + kTile.stages - 1, next);
  };
#pragma unroll 1
  for (int i = 0; i < cut; i++) add(i, std::true_type());
#pragma unroll 1
  for (int i = cut; i < count; i++) add(i, std::false_type());

  copy_async_wait<0>();
  sync_block();
  if constexpr (kDk) {
    store_result<T, D, kRowTiles>(
        shared_memory<T>(), dk, p.scale, row_0<T>(backward.dk, place.batch, sequence.first_k, place.head_k),
        backward.dk.stride_m, first_key, row, sequence.n_k, stored, p.headdim);
  }
  if constexpr (kDv) {
    store_result<T, D, kRowTiles>(
        shared_memory<T>(), dv, kDropout ? p.dropout.scale : 1.0f,
        row_0<T>(backward.dv, place.batch, sequence.first_k, place.head_k), backward.dv.stride_m,
        first_key, row, sequence.n_k, stored, p.headdim);
  }
}

template <typename T, int D, bool kDropout, bool kDk, bool kDv>
cudaError_t launch_attention_dkv_pass(const AttentionBackwardParams& backward,
                                      cudaStream_t stream) {
  constexpr BackwardTile kTile = dkv_tile(D, kDropout, kDk);
  constexpr size_t kShared = kTile.shared_bytes(D) + kTile.stages * kTile.others * sizeof(QueryStats);
  const AttentionParams& p = backward.forward;
  const int64_t heads = int64_t{p.batch} * p.nheads_k;
  const int tiles = ceil_div(p.seqlen_k, kTile.rows());
  if (heads * tiles == 0) return cudaSuccess;
  const int64_t group = p.nheads / p.nheads_k;
  const int section =
      heads_in_work(p, 4 * group * p.seqlen_q * p.headdim, heads);
  return launch(bounded<attention_dkv_kernel<T, D, kDropout, kDk, kDv>, kTile.threads(), kShared>,
                dim3(static_cast<unsigned>(heads * tiles)), stream, backward,
                TileLaunch{tiles, section, p.scale * kLog2E});
}

template <typename T, int D, bool kDropout>
cudaError_t launch_attention_dkv(const AttentionBackwardParams& p, cudaStream_t stream) {
  if constexpr (D <= 128) {
    return launch_attention_dkv_pass<T, D, kDropout, true, true>(p, stream);
  } else {
    const cudaError_t error = launch_attention_dkv_pass<T, D, kDropout, false, true>(p, stream);
    if (error != cudaSuccess) return error;
    return launch_attention_dkv_pass<T, D, kDropout, true, false>(p, stream);
  }
}

template <int D>
cudaError_t attention_dkv_of(const AttentionBackwardParams& p, cudaStream_t stream) {
  return with_instance(p.forward, [&](auto type, auto dropout) {
    using T = typename decltype(type)::type;
    return launch_attention_dkv<T, D, decltype(dropout)::value>(p, stream);
  });
}

}  // namespace fastlm
