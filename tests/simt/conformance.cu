// Each wrapper of csrc/arch alone: random bits in, results out. nvcc builds this for a GPU, g++ for
// the host build; tests/test_cuda_conformance.py compares the two.
#include "arch/copy.cuh"
#include "arch/math.cuh"
#include "arch/mma.cuh"
#include "arch/warp.cuh"
#include "common.cuh"

namespace fastlm {
namespace {

// One warp; what it writes is the same for every kernel: 32 lanes of up to 8 words.
constexpr int kWords = 8;

__device__ inline float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
__device__ inline uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

__global__ void shuffles_kernel(const uint32_t* in, uint32_t* out) {
  const int lane = lane_id();
  const float x = as_float(in[lane]);
  uint32_t* mine = out + lane * kWords;
  for (int i = 0; i < 5; i++) mine[i] = as_bits(shuffle_xor(x, 1 << i));
  mine[5] = as_bits(shuffle(x, (lane * 7 + 3) % 32));
  mine[6] = as_bits(warp_max(x));
  mine[7] = as_bits(warp_sum(x));
}

// 16-byte pieces through shared memory: copied, zero-filled, loaded and stored, with a hint too.
__global__ void copies_kernel(const uint32_t* in, uint32_t* out) {
  auto* shared = shared_memory<uint4>();
  const int lane = lane_id();
  const auto* pieces = reinterpret_cast<const uint4*>(in);
  copy_async_16(shared + lane, pieces + lane, lane % 3 != 0);
  copy_async_commit();
  const uint4 moved = load_16_once(pieces + (lane + 5) % 32);
  store_16(out + lane * kWords, uint4{moved.x, moved.y, 0, 0});
  store_8(out + lane * kWords + 2, uint2{moved.z, moved.w});
  shared[32 + lane] = load_16(pieces + lane);
  copy_async_wait<0>();
  sync_block();
  const uint4 copied = shared[31 - lane], loaded = shared[32 + 31 - lane];
  store_16_once(out + lane * kWords + 4,
                uint4{copied.x, copied.y, copied.z ^ loaded.x, copied.w ^ loaded.w});
}

// 16 bytes of each lane and then 8 of another, which its neighbours read behind a named barrier.
__global__ void ring_copies_kernel(const uint32_t* in, uint32_t* out) {
  auto* shared = shared_memory<uint4>();
  auto* small = reinterpret_cast<uint2*>(shared + 32);
  const int lane = lane_id();
  copy_async<16>(shared + lane, in + 4 * lane);
  copy_async_commit();
  copy_async<8>(small + lane, in + 2 * ((lane + 7) % 32));
  copy_async_commit();
  copy_async_wait<0>();
  sync_threads(3, 32);
  const uint4 copied = shared[31 - lane];
  const uint2 more = small[31 - lane];
  store_16(out + lane * kWords, copied);
  store_16(out + lane * kWords + 4, uint4{more.x, more.y, 0, 0});
}

template <bool Transposed>
__global__ void matrices_kernel(const uint32_t* in, uint32_t* out) {
  auto* shared = shared_memory<uint4>();
  const int lane = lane_id();
  shared[lane] = reinterpret_cast<const uint4*>(in)[lane];
  sync_warp();
  uint32_t r[4];
  // Rows in another order than in memory.
  const uint4* row = shared + (lane * 5 + 2) % 32;
  if constexpr (Transposed) {
    load_matrix_x4_trans(r, row);
  } else {
    load_matrix_x4(r, row);
  }
  for (int i = 0; i < 4; i++) out[lane * kWords + i] = r[i];
  for (int i = 4; i < kWords; i++) out[lane * kWords + i] = 0;
}

template <typename T>
__global__ void mma_kernel(const uint32_t* in, uint32_t* out) {
  const uint32_t* mine = in + lane_id() * 16;
  const uint32_t a[4] = {mine[0], mine[1], mine[2], mine[3]};
  float d[4];
  for (int i = 0; i < 4; i++) d[i] = as_float(mine[6 + i]);
  mma_m16n8k16<T>(d, a, mine[4], mine[5]);
  for (int i = 0; i < 4; i++) out[lane_id() * kWords + i] = as_bits(d[i]);
  for (int i = 4; i < kWords; i++) out[lane_id() * kWords + i] = 0;
}

template <float (*function)(float)>
__global__ void math_kernel(const uint32_t* in, uint32_t* out) {
  for (int i = 0; i < kWords; i++) {
    const int place = lane_id() * kWords + i;
    out[place] = as_bits(function(as_float(in[place])));
  }
}

__global__ void conversions_kernel(const uint32_t* in, uint32_t* out) {
  for (int i = 0; i < kWords / 2; i++) {
    const float x = as_float(in[lane_id() * kWords + i]);
    uint32_t* to = out + lane_id() * kWords + 2 * i;
    to[0] = as_bits(to_float(from_float<__half>(x)));
    to[1] = as_bits(to_float(from_float<__nv_bfloat16>(x)));
  }
}

__global__ void philox_kernel(const uint32_t* in, uint32_t* out) {
  const uint32_t* mine = in + lane_id() * 6;
  const uint64_t seed = static_cast<uint64_t>(mine[1]) << 32 | mine[0];
  const uint4 words = philox(seed, mine[2], mine[3], mine[4], mine[5]);
  uint32_t* to = out + lane_id() * kWords;
  to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
  for (int i = 4; i < kWords; i++) to[i] = 0;
}

cudaError_t run(int wrapper, const uint32_t* in, uint32_t* out) {
  const auto one_warp = [&](auto kernel) {
    return launch(kernel, dim3(1), 32, 1024, nullptr, in, out);
  };
  switch (wrapper) {
    case 0: return one_warp(shuffles_kernel);
    case 1: return one_warp(copies_kernel);
    case 2: return one_warp(matrices_kernel<false>);
    case 3: return one_warp(matrices_kernel<true>);
    case 4: return one_warp(mma_kernel<__half>);
    case 5: return one_warp(mma_kernel<__nv_bfloat16>);
    case 6: return one_warp(math_kernel<exp2_approx>);
    case 7: return one_warp(math_kernel<reciprocal_approx>);
    case 8: return one_warp(conversions_kernel);
    case 9: return one_warp(philox_kernel);
    case 10: return one_warp(ring_copies_kernel);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace fastlm

// Runs wrapper number `wrapper` on 512 words and writes 256; host pointers in the host build, else
// pointers to a GPU's memory. Waits for it. 0 if all went well.
extern "C" __attribute__((visibility("default"))) int conformance(int wrapper, const uint32_t* in,
                                                                  uint32_t* out) {
  const cudaError_t error = fastlm::run(wrapper, in, out);
#ifdef FASTLM_SIMT
  return error;
#else
  return error != cudaSuccess ? error : cudaDeviceSynchronize();
#endif
}
