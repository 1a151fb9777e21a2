// Asynchronous copies from global to shared memory, and 16-byte accesses with a cache hint.
#pragma once

#include "platform.cuh"

namespace fastlm {

#ifndef FASTLM_SIMT
__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// Begins to copy 16 bytes, or to write 16 zeros where not `valid`; `global` must then still be
// aligned, and is not read. Done when `copy_async_wait` says so, for the other threads when a
// barrier follows that.
__device__ inline void copy_async_16(void* shared, const void* global, bool valid) {
#ifdef FASTLM_SIMT
  simt::copy_async(shared, global, valid, 16);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#endif
}

// The same of 8 or 16 bytes that are there.
template <int Bytes>
__device__ inline void copy_async(void* shared, const void* global) {
  static_assert(Bytes == 8 || Bytes == 16);
#ifdef FASTLM_SIMT
  simt::copy_async(shared, global, true, Bytes);
#else
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
                 "l"(global)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(shared)),
                 "l"(global)
                 : "memory");
  }
#endif
}

// Closes the group of this thread's copies since the last one closed; a group may be empty.
__device__ inline void copy_async_commit() {
#ifdef FASTLM_SIMT
  simt::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `Pending` of this thread's newest groups are on their way.
template <int Pending>
__device__ inline void copy_async_wait() {
#ifdef FASTLM_SIMT
  simt::copy_async_wait(Pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// 16 bytes, aligned, in one access: a compiler may split an assignment. What is loaded so is not
// written by the same kernel.
__device__ inline uint4 load_16(const void* global) {
#ifdef FASTLM_SIMT
  return simt::load_16(global);
#else
  uint4 x;
  asm("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "l"(global));
  return x;
#endif
}

// The same of 8 bytes.
__device__ inline void store_8(void* global, uint2 x) {
#ifdef FASTLM_SIMT
  simt::store_8(global, x);
#else
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(global), "r"(x.x), "r"(x.y) : "memory");
#endif
}

__device__ inline void store_16(void* global, uint4 x) {
#ifdef FASTLM_SIMT
  simt::store_16(global, x);
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
#endif
}

// 16 bytes that are used once: the hint leaves the caches to what is used again.
__device__ inline uint4 load_16_once(const void* global) {
#ifdef FASTLM_SIMT
  return simt::load_16(global);
#else
  return __ldcs(static_cast<const uint4*>(global));
#endif
}

__device__ inline void store_16_once(void* global, uint4 x) {
#ifdef FASTLM_SIMT
  simt::store_16(global, x);
#else
  __stcs(static_cast<uint4*>(global), x);
#endif
}

}  // namespace fastlm
