// Chunks: the 16 bytes of a row that one thread moves at once and computes with as floats; and
// which thread has which chunks of a matrix that is gone through element by element.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common.cuh"
#include "ffn.h"

namespace fastlm {

// In place of an element type: tensors of several dtypes, each known at run time alone.
struct Mixed {};

// As it lies in memory, so that chunks that are on their way take few registers.
template <typename T>
struct Chunk {
  static constexpr int kSize = 16 / sizeof(T);  // elements
  uint4 words;
};
template <>
struct Chunk<Mixed> {
  static constexpr int kSize = 4;  // 16 bytes of the widest dtype
  float at[kSize];
};

__device__ inline void round_to(float* to, const float* from) { to[0] = from[0], to[1] = from[1]; }
__device__ inline void round_to(__half* to, const float* from) {
  const __half2 pair = __floats2half2_rn(from[0], from[1]);
  memcpy(static_cast<void*>(to), &pair, 4);
}
__device__ inline void round_to(__nv_bfloat16* to, const float* from) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(from[0], from[1]);
  memcpy(static_cast<void*>(to), &pair, 4);
}

// V elements in pieces of 16 bytes, or of 8 where that is all.
template <typename T, int V>
__device__ inline void load_words(T (&to)[V], const T* p) {
  if constexpr (sizeof(to) == 8) {
    const uint2 words = *reinterpret_cast<const uint2*>(p);
    memcpy(static_cast<void*>(to), &words, 8);
  } else {
    constexpr int kStep = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < V; i += kStep) {
      const uint4 words = load_16(p + i);
      memcpy(static_cast<void*>(to + i), &words, 16);
    }
  }
}

template <typename T, int V>
__device__ inline void store_words(T* p, const T (&from)[V]) {
  if constexpr (sizeof(from) == 8) {
    uint2 words;
    memcpy(&words, from, 8);
    *reinterpret_cast<uint2*>(p) = words;
  } else {
    static_assert(sizeof(from) == 16);
    uint4 words;
    memcpy(&words, from, 16);
    store_16(p, words);
  }
}

// `count` elements at p, then zeros. kWhole: all V of them, aligned to 16 bytes, or to the size of
// V where that is less.
template <bool kWhole, typename T, int V>
__device__ inline void load_floats(float (&to)[V], const T* p, int count) {
  if constexpr (kWhole) {
    T at[V];
    load_words(at, p);
#pragma unroll
    for (int i = 0; i < V; i++) to[i] = to_float(at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) to[i] = i < count ? to_float(p[i]) : 0.0f;
  }
}

template <bool kWhole, int V>
__device__ inline void load_floats(float (&to)[V], const void* p, Dtype dtype, int64_t at,
                                   int count) {
  switch (dtype) {
    case Dtype::kFloat32:
      return load_floats<kWhole>(to, static_cast<const float*>(p) + at, count);
    case Dtype::kFloat16:
      return load_floats<kWhole>(to, static_cast<const __half*>(p) + at, count);
    case Dtype::kBFloat16:
      return load_floats<kWhole>(to, static_cast<const __nv_bfloat16*>(p) + at, count);
  }
}

// Rounds, and stores what `load_floats` would load.
template <bool kWhole, typename T, int V>
__device__ inline void store_floats(T* p, const float (&from)[V], int count) {
  T at[V];
#pragma unroll
  for (int i = 0; i < V; i += 2) round_to(at + i, from + i);
  if constexpr (kWhole) {
    store_words(p, at);
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) {
      if (i < count) p[i] = at[i];
    }
  }
}

// The chunk of x from element `at` on, which is not read again: `count` elements, then zeros.
template <bool kWhole, typename T>
__device__ inline void load_chunk(Chunk<T>* chunk, const RowTensor& x, int64_t at, int count) {
  if constexpr (std::is_same_v<T, Mixed>) {
    load_floats<kWhole>(chunk->at, x.ptr, x.dtype, at, count);
  } else {
    const T* p = static_cast<const T*>(x.ptr) + at;
    if constexpr (kWhole) {
      chunk->words = load_16_once(p);
    } else {
      T elements[Chunk<T>::kSize];
#pragma unroll
      for (int i = 0; i < Chunk<T>::kSize; i++) {
        elements[i] = i < count ? p[i] : from_float<T>(0.0f);
      }
      memcpy(&chunk->words, elements, 16);
    }
  }
}

template <typename T>
__device__ inline void unpack(float (&to)[Chunk<T>::kSize], const Chunk<T>& chunk) {
  if constexpr (std::is_same_v<T, Mixed>) {
    memcpy(to, chunk.at, sizeof(to));
  } else {
    T at[Chunk<T>::kSize];
    memcpy(static_cast<void*>(at), &chunk.words, 16);
#pragma unroll
    for (int i = 0; i < Chunk<T>::kSize; i++) to[i] = to_float(at[i]);
  }
}

// Results are what the next kernel reads: no hint keeps them out of the caches.
template <bool kWhole, typename T>
__device__ inline void store_chunk(const RowTensor& y, int64_t at,
                                   const float (&from)[Chunk<T>::kSize], int count) {
  if constexpr (std::is_same_v<T, Mixed>) {
    switch (y.dtype) {
      case Dtype::kFloat32:
        return store_floats<kWhole>(static_cast<float*>(y.ptr) + at, from, count);
      case Dtype::kFloat16:
        return store_floats<kWhole>(static_cast<__half*>(y.ptr) + at, from, count);
      case Dtype::kBFloat16:
        return store_floats<kWhole>(static_cast<__nv_bfloat16*>(y.ptr) + at, from, count);
    }
  } else {
    store_floats<kWhole>(static_cast<T*>(y.ptr) + at, from, count);
  }
}

constexpr int kTileThreads = 256;

// How a matrix is cut into tiles, one a block: up to a warp of chunks wide, and as many rows high
// as the block then has threads, times the chunks of a thread.
struct Tiling {
  int lane_bits;  // log2 of the threads side by side in a row
  unsigned col_tiles;

  __host__ __device__ int row_lanes() const { return kTileThreads >> lane_bits; }
};

template <typename T>
Tiling tiling_of(int64_t cols) {
  const int64_t chunks = ceil_div<int64_t>(cols, Chunk<T>::kSize);
  Tiling tiling{0, 0};
  while (tiling.lane_bits < 5 && (1 << tiling.lane_bits) < chunks) tiling.lane_bits++;
  tiling.col_tiles = static_cast<unsigned>(ceil_div<int64_t>(chunks, 1 << tiling.lane_bits));
  return tiling;
}

// Whether the (rows, cols) matrix x consists of aligned chunks of T.
template <typename T>
bool is_whole(const RowTensor& x, int64_t rows, int64_t cols) {
  if (x.ptr == nullptr) return true;
  const int64_t bytes = std::min(16, Chunk<T>::kSize * element_size(x.dtype));
  return cols % Chunk<T>::kSize == 0 && reinterpret_cast<uintptr_t>(x.ptr) % bytes == 0 &&
         (rows <= 1 || x.stride * element_size(x.dtype) % bytes == 0);
}

// What a thread has of a tile: the `count` columns from `col` on, in the rows `row_lane`,
// `row_lane + row_lanes` and so on.
struct Place {
  int64_t col;
  int count;
  int row_lane;
};

template <typename T>
__device__ inline Place place_of(const Tiling& tiling, int64_t cols) {
  constexpr int kSize = Chunk<T>::kSize;
  const unsigned col_tile = blockIdx.x % tiling.col_tiles;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread & ((1 << tiling.lane_bits) - 1);
  const int64_t col = ((static_cast<int64_t>(col_tile) << tiling.lane_bits) + lane) * kSize;
  const int64_t left = cols - col;
  const int count = left <= 0 ? 0 : left < kSize ? static_cast<int>(left) : kSize;
  return {col, count, thread >> tiling.lane_bits};
}

}  // namespace fastlm
