// What all kernels of a norm share: vectors of V elements of a row, whose dtype is a template
// parameter or known at run time.
//
// Which element a thread has depends on the width and on V alone, and V on the dtypes alone;
// products that are added are written as fmaf, so that no compiler chooses. So a row has the same
// bits however many there are, wherever they lie, and whichever template serves them.
#pragma once

#include <cstring>
#include <type_traits>

#include "common.cuh"
#include "norm.h"

namespace fastlm {

// In place of an element type: a tensor whose dtype or alignment is known at run time alone.
struct Any {};

template <typename T>
struct PairOf {};
template <>
struct PairOf<float> {
  using type = float2;
};
template <>
struct PairOf<__half> {
  using type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};

__device__ inline float2 to_floats(float2 x) { return x; }
__device__ inline float2 to_floats(__half2 x) { return __half22float2(x); }
// bf16 is the upper half of fp32: one instruction each, where CUDA's own takes three for two.
__device__ inline float2 to_floats(__nv_bfloat162 x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t parts[2] = {bits << 16, bits & 0xffff0000u};
  float2 pair;
  memcpy(&pair, parts, 8);
  return pair;
}

__device__ inline void from_floats(float2* to, float a, float b) { *to = float2{a, b}; }
__device__ inline void from_floats(__half2* to, float a, float b) {
  *to = __floats2half2_rn(a, b);
}
__device__ inline void from_floats(__nv_bfloat162* to, float a, float b) {
  *to = __floats2bfloat162_rn(a, b);
}

// V elements as they lie in memory, 8 or 16 bytes; of Any, as floats.
template <typename T, int V>
struct Vector {
  std::conditional_t<V * sizeof(T) == 16, uint4, uint2> words;
};
template <int V>
struct alignas(16) Vector<Any, V> {
  float at[V];
};

// Accesses of a whole vector in one instruction.
template <typename T, int V>
__device__ inline Vector<T, V> load_whole(const T* from) {
  if constexpr (sizeof(Vector<T, V>) == 16) return {load_16(from)};
  else return {*reinterpret_cast<const uint2*>(from)};
}

// Of a kernel for any dtype, ptxas knows better how to order stores than to spill for one access.
template <bool kAny, typename T, int V>
__device__ inline void store_whole(T* to, const Vector<T, V>& x) {
  if constexpr (kAny) *reinterpret_cast<decltype(Vector<T, V>::words)*>(to) = x.words;
  else if constexpr (sizeof(x) == 16) store_16(to, x.words);
  else store_8(to, x.words);
}

template <typename T, int V>
__device__ inline void unpack(float (&to)[V], const Vector<T, V>& x) {
  if constexpr (std::is_same_v<T, Any>) {
#pragma unroll
    for (int i = 0; i < V; i += 4) {  // by itself the compiler goes float by float
      const uint4 words = *reinterpret_cast<const uint4*>(x.at + i);
      memcpy(to + i, &words, 16);
    }
  } else {
    const auto words = x.words;  // memcpy from memory that x may be in goes byte by byte
    typename PairOf<T>::type pairs[V / 2];
    memcpy(static_cast<void*>(pairs), &words, sizeof(words));
#pragma unroll
    for (int i = 0; i < V / 2; i++) {
      const float2 pair = to_floats(pairs[i]);
      to[2 * i] = pair.x;
      to[2 * i + 1] = pair.y;
    }
  }
}

template <typename T, int V>
__device__ inline void pack(Vector<T, V>* to, const float (&x)[V]) {
  if constexpr (std::is_same_v<T, Any>) {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      uint4 words;
      memcpy(&words, x + i, 16);
      *reinterpret_cast<uint4*>(to->at + i) = words;
    }
  } else {
    typename PairOf<T>::type pairs[V / 2];
#pragma unroll
    for (int i = 0; i < V / 2; i++) from_floats(&pairs[i], x[2 * i], x[2 * i + 1]);
    decltype(to->words) words;
    memcpy(&words, pairs, sizeof(words));
    to->words = words;
  }
}

template <int V>
__device__ inline void fill(float (&x)[V], float value) {
#pragma unroll
  for (int i = 0; i < V; i++) x[i] = value;
}

// Of x what the bits of `keep` say.
template <int V>
__device__ inline void drop(float (&x)[V], uint32_t keep, const Dropout& dropout) {
  if (dropout.seed == nullptr) return;
#pragma unroll
  for (int i = 0; i < V; i++) x[i] = keep >> i & 1 ? x[i] * dropout.scale : 0.0f;
}

__device__ inline float rounded(float x, Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat16:
      return to_float(from_float<__half>(x));
    case Dtype::kBFloat16:
      return to_float(from_float<__nv_bfloat16>(x));
    default:
      return x;
  }
}

// All of x, by T where that is no Any.
template <typename T, int V>
__device__ inline void round_as(float (&x)[V], Dtype dtype) {
  if constexpr (std::is_same_v<T, Any>) {
#pragma unroll
    for (int i = 0; i < V; i++) x[i] = rounded(x[i], dtype);
  } else if constexpr (!std::is_same_v<T, float>) {
    Vector<T, V> vector;
    pack(&vector, x);
    unpack(x, vector);
  }
}

// How many of the V columns from `col` on a row has; where it is `aligned`, all or none.
template <int V, typename Index>
__device__ inline int columns_at(Index col, int64_t row_cols, bool aligned) {
  const Index cols = static_cast<Index>(row_cols);
  if (aligned) return col < cols ? V : 0;
  return col >= cols ? 0 : cols - col < V ? static_cast<int>(cols - col) : V;
}

template <typename T, int V>
__device__ inline void load_floats_of(float (&to)[V], const T* from, int count, bool aligned) {
  if (aligned) {
    constexpr int kStep = V * sizeof(T) > 16 ? 16 / sizeof(T) : V;
#pragma unroll
    for (int i = 0; i < V; i += kStep) {
      float part[kStep];
      unpack(part, load_whole<T, kStep>(from + i));
#pragma unroll
      for (int j = 0; j < kStep; j++) to[i + j] = part[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) to[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

// `count` elements of x from element `at` on, then zeros.
template <int V>
__device__ inline void load_floats(float (&to)[V], const RowTensor& x, int64_t at, int count,
                                   bool aligned) {
  switch (x.dtype) {
    case Dtype::kFloat32:
      return load_floats_of(to, static_cast<const float*>(x.ptr) + at, count, aligned);
    case Dtype::kFloat16:
      return load_floats_of(to, static_cast<const __half*>(x.ptr) + at, count, aligned);
    case Dtype::kBFloat16:
      return load_floats_of(to, static_cast<const __nv_bfloat16*>(x.ptr) + at, count, aligned);
  }
}

template <bool kAny, typename T, int V>
__device__ inline void store_floats_of(T* to, const float (&x)[V], int count, bool aligned) {
  if (aligned) {
    constexpr int kStep = V * sizeof(T) > 16 ? 16 / sizeof(T) : V;
#pragma unroll
    for (int i = 0; i < V; i += kStep) {
      float part[kStep];
#pragma unroll
      for (int j = 0; j < kStep; j++) part[j] = x[i + j];
      Vector<T, kStep> vector;
      pack(&vector, part);
      store_whole<kAny>(to + i, vector);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) {
      if (i < count) to[i] = from_float<T>(x[i]);
    }
  }
}

// kAny: in a kernel of Any.
template <bool kAny, int V>
__device__ inline void store_floats(const RowTensor& to, int64_t at, const float (&x)[V],
                                    int count, bool aligned) {
  switch (to.dtype) {
    case Dtype::kFloat32:
      return store_floats_of<kAny>(static_cast<float*>(to.ptr) + at, x, count, aligned);
    case Dtype::kFloat16:
      return store_floats_of<kAny>(static_cast<__half*>(to.ptr) + at, x, count, aligned);
    case Dtype::kBFloat16:
      return store_floats_of<kAny>(static_cast<__nv_bfloat16*>(to.ptr) + at, x, count, aligned);
  }
}

// The same in a kernel of T, which knows tensors of T and of floats; in one of floats, of all.
template <typename T, int V>
__device__ inline void store_known(const RowTensor& to, int64_t at, const float (&x)[V], int count,
                                   bool aligned) {
  if constexpr (std::is_same_v<T, Any> || std::is_same_v<T, float>) {
    store_floats<std::is_same_v<T, Any>>(to, at, x, count, aligned);
  } else if (to.dtype == Dtype::kFloat32) {
    store_floats_of<false>(static_cast<float*>(to.ptr) + at, x, count, aligned);
  } else {
    store_floats_of<false>(static_cast<T*>(to.ptr) + at, x, count, aligned);
  }
}

// V elements of x from element `at` on, as they are; x is not read again.
template <typename T, int V>
__device__ inline Vector<T, V> load_once(const RowTensor& x, int64_t at, int count,
                                         bool aligned) {
  Vector<T, V> result;
  if constexpr (std::is_same_v<T, Any>) {
    load_floats(result.at, x, at, count, aligned);
  } else if constexpr (sizeof(result) == 16) {
    result.words = load_16_once(static_cast<const T*>(x.ptr) + at);
  } else {
    result = load_whole<T, V>(static_cast<const T*>(x.ptr) + at);
  }
  return result;
}

// Whether all vectors of V elements of the rows of x can be accessed whole.
inline bool is_aligned(const RowTensor& x, int64_t cols, int v) {
  if (x.ptr == nullptr) return true;
  const int bytes = v * element_size(x.dtype);
  return cols % v == 0 && x.stride % v == 0 &&
         reinterpret_cast<uintptr_t>(x.ptr) % (bytes < 16 ? bytes : 16) == 0;
}

}  // namespace fastlm
