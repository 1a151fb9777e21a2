// Runs CUDA C++ kernels on a CPU: one fiber for each CUDA thread, one block at a time.
//
// csrc/arch includes this in the place of nvcc's device code (FASTLM_SIMT). What a kernel may not
// rely on is made as bad as the hardware may make it: shared memory begins as NaN, asynchronous
// copies land as early or as late as the ISA allows, warps and blocks run in one of four orders.
// What is wrong whatever happens (a barrier that not all threads reach, lanes at different
// shuffles, misaligned 16-byte accesses, copies that nobody waits for) fails the launch, with a
// message.
//
// Not modelled: time, banks, registers, blocks that run at once, a weak memory order.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace simt {

constexpr int kWarp = 32;

// --- for kernels and launchers

uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
int lane();
void* shared_memory();

// Of the device that launchers see; simt_device changes it.
int device_shared_bytes();

// Ends the launch with this message and the place of the running thread.
[[noreturn]] void fail(const char* message);

// `kernel` is kept for `simt_launched`.
cudaError_t run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                const std::function<void()>& thread);

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                   const Args&... args) {
  return run(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
             [&] { kernel(args...); });
}

// What went wrong in the last launch that failed.
const char* failure();

// --- barriers, and what the lanes of a warp do together. Lanes that meet must come from the same
// call in the kernel, which is told by the return address: callers of these have to be inlined.

enum class Collective { kSyncBlock, kSyncThreads, kSyncWarp, kShuffle, kLoadMatrix, kMma };

void sync_block();
void sync_threads(int barrier, int threads);
void sync_warp();

// A lane's part in a collective: what it brings and what it gets, in 32-bit words.
struct Exchange {
  alignas(8) uint32_t in[8], out[8];
};
using Lanes = Exchange* const (&)[kWarp];

// Waits for the 32 lanes of the warp; the last to come runs `all`, which fills each lane's `out`.
Exchange& exchange();
void meet(Collective what, const void* site, void (*all)(Lanes));

template <typename T>
[[gnu::noinline]] T shuffle(T x, int from) {
  static_assert(sizeof(T) == 4 && std::is_trivially_copyable_v<T>, "one word");
  Exchange& mine = exchange();
  std::memcpy(&mine.in[0], &x, 4);
  mine.in[1] = static_cast<uint32_t>(from) % kWarp;
  meet(Collective::kShuffle, __builtin_return_address(0), [](Lanes lanes) {
    for (Exchange* each : lanes) each->out[0] = lanes[each->in[1]]->in[0];
  });
  std::memcpy(&x, &mine.out[0], 4);
  return x;
}

// --- copies

void copy_async(void* shared, const void* global, bool valid, int bytes);
void copy_async_commit();
void copy_async_wait(int pending);

inline void require_aligned(const void* p, const char* message, int bytes = 16) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail(message);
}

// The bytes at `p` are shared memory of the block.
void require_shared(const void* p, const char* message, int bytes = 16);

inline uint4 load_16(const void* global) {
  require_aligned(global, "16-byte load from an address that is not aligned to 16 bytes");
  uint4 x;
  std::memcpy(&x, global, 16);
  return x;
}

inline void store_8(void* global, uint2 x) { std::memcpy(global, &x, 8); }

inline void store_16(void* global, uint4 x) {
  require_aligned(global, "16-byte store to an address that is not aligned to 16 bytes");
  std::memcpy(global, &x, 16);
}

// --- tensor cores; the layouts are those of csrc/arch/mma.cuh

void load_matrix(uint32_t (&r)[4], const void* row, bool transposed);

// Of fp16 or bf16.
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16);

}  // namespace simt

// --- CUDA's functions that a host compiler lacks

using std::max;
using std::min;

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
