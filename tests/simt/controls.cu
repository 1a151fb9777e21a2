// Kernels with seeded bugs, each beside the same kernel without it: what tests/test_simt.py wants
// the host build to catch.
#include "arch/copy.cuh"
#include "arch/mma.cuh"
#include "arch/warp.cuh"

namespace fastlm {
namespace {

enum Bug {
  kNone,
  kMissingWait,
  kMissingBarrierAfterWait,
  kMissingBarrierBeforeReuse,
  kMissingWarpBarrier,
  kSkippedBarrier,
  kTwoBarriers,
  kExitBeforeBarrier,
  kTooFewThreads,
  kHalfWarpBarrier,
  kExitBeforeShuffle,
  kDifferentShuffles,
  kDifferentCollectives,
  kHalfWarpShuffle,
  kMisalignedCopy,
  kMisalignedLoad,
  kMisalignedStore,
  kMisalignedMatrix,
  kCopyOutOfBounds,
  kMatrixOutOfBounds,
  kCopyNotWaitedFor,
  kBlocksInOrder,
  kOutOfBounds,
  kOutOfBoundsShared,
  kInt32Overflow,
};

constexpr int kThreads = 64, kTile = 4 * kThreads;

// out[i] = the sum over tiles of x[tile][kTile - 1 - i]: copied by one thread, read by another.
template <Bug bug>
__global__ void pipeline_kernel(const float* x, float* out, int tiles) {
  auto* buffers = shared_memory<float>();
  const int first = 4 * static_cast<int>(threadIdx.x);
  const auto copy = [&](int tile) {
    copy_async_16(buffers + tile % 2 * kTile + first, x + tile * kTile + first, true);
  };
  float sums[4] = {};
  copy(0);
  copy_async_commit();
  for (int tile = 0; tile < tiles; tile++) {
    if (tile + 1 < tiles) copy(tile + 1);
    copy_async_commit();
    copy_async_wait<bug == kMissingWait ? 2 : 1>();
    if (bug != kMissingBarrierAfterWait) sync_block();
    for (int i = 0; i < 4; i++) sums[i] += buffers[tile % 2 * kTile + kTile - 1 - first - i];
    if (bug != kMissingBarrierBeforeReuse) sync_block();
  }
  copy_async_wait<0>();
  for (int i = 0; i < 4; i++) out[first + i] = sums[i];
}

// out[i] = x[i] + x[i ^ 1], in some way.
template <Bug bug>
__global__ void pairs_kernel(const float* x, float* out, int n) {
  auto* shared = shared_memory<float>();
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  if (bug == kExitBeforeBarrier && thread == 5) return;
  shared[thread + (bug == kOutOfBoundsShared && thread == 63 ? 1 : 0)] = x[thread];
  if (bug == kTwoBarriers && lane < 16) {
    sync_block();
  } else if (bug == kTooFewThreads) {
    if (thread < 32) sync_threads(1, kThreads);
  } else if (bug == kHalfWarpBarrier) {
    sync_threads(1, kThreads / 4);
  } else if (bug != kSkippedBarrier || thread < 32) {
    sync_block();
  }
  if (bug == kExitBeforeShuffle && thread == 37) return;
  float y = shared[thread];
  if (bug == kDifferentShuffles && lane < 16) {
    y += shuffle_xor(y, 1);
  } else if (bug == kDifferentCollectives && lane == 3) {
    sync_warp();
  } else if (bug != kHalfWarpShuffle || lane < 16) {
    y = shuffle_xor(y, 1) + y;
  }
  uint32_t r[4];
  if (bug == kCopyNotWaitedFor) copy_async_16(shared, x, true);
  if (bug == kMisalignedCopy) copy_async_16(shared, x + 1, true);
  if (bug == kCopyOutOfBounds) copy_async_16(shared + n, x, true);
  if (bug == kMisalignedLoad) y += static_cast<float>(load_16_once(x + 1).x);
  if (bug == kMisalignedStore) store_16_once(out + 1, uint4{});
  if (bug == kMisalignedMatrix) load_matrix_x4(r, shared + 2);
  if (bug == kMatrixOutOfBounds) load_matrix_x4_trans(r, shared + n);
  if (bug == kOutOfBounds && thread == 63) y += x[n];
  out[thread] = y;
}

// The same again, through shared memory with the barriers of a warp, not all at one place, or with
// a barrier that each warp has for itself.
template <Bug bug>
__global__ void warps_kernel(const float* x, float* out, bool named) {
  auto* shared = shared_memory<float>();
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = x[thread];
  if (named) {
    sync_threads(1 + warp_id(), kWarp);
  } else if (bug != kMissingWarpBarrier) {
    if (thread % 2 == 0) {
      sync_warp();
    } else {
      sync_warp();
    }
  }
  out[thread] = shared[thread] + shared[thread ^ 1];
}

// out[block] = 1 + out[block - 1].
__global__ void chain_kernel(float* out) {
  const int block = static_cast<int>(blockIdx.x);
  if (threadIdx.x == 0) out[block] = block == 0 ? 1.0f : 1.0f + out[block - 1];
}

// Reads the last of n rows that are 2^30 elements apart.
template <Bug bug>
__global__ void rows_kernel(const char* x, float* out, int n, int stride) {
  const int row = n - 1;
  if (bug == kInt32Overflow) {
    out[0] = static_cast<float>(x[row * stride]);
  } else {
    out[0] = static_cast<float>(x[static_cast<int64_t>(row) * stride]);
  }
}

template <Bug bug>
cudaError_t run(const float* x, float* out, int n) {
  switch (bug) {
    case kMissingWait:
    case kMissingBarrierAfterWait:
    case kMissingBarrierBeforeReuse:
      return launch(pipeline_kernel<bug>, dim3(1), kThreads, 2 * kTile * 4, nullptr, x, out, n);
    case kMissingWarpBarrier:
      return launch(warps_kernel<bug>, dim3(1), kThreads, kThreads * 4, nullptr, x, out, false);
    case kBlocksInOrder: return launch(chain_kernel, dim3(n), 32, 0, nullptr, out);
    case kInt32Overflow:
      return launch(rows_kernel<bug>, dim3(1), 1, 0, nullptr, reinterpret_cast<const char*>(x),
                    out, n, 1 << 30);
    default:
      return launch(pairs_kernel<bug>, dim3(1), kThreads, kThreads * 4, nullptr, x, out, n);
  }
}

}  // namespace
}  // namespace fastlm

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int control_pipeline(const float* x, float* out, int tiles) {
  using namespace fastlm;
  return launch(pipeline_kernel<kNone>, dim3(1), kThreads, 2 * kTile * 4, nullptr, x, out, tiles);
}

EXPORT int control_pairs(const float* x, float* out, int n) {
  using namespace fastlm;
  return launch(pairs_kernel<kNone>, dim3(1), kThreads, kThreads * 4, nullptr, x, out, n);
}

EXPORT int control_warps(const float* x, float* out, int) {
  using namespace fastlm;
  return launch(warps_kernel<kNone>, dim3(1), kThreads, kThreads * 4, nullptr, x, out, false);
}

EXPORT int control_barriers(const float* x, float* out, int) {
  using namespace fastlm;
  return launch(warps_kernel<kNone>, dim3(1), kThreads, kThreads * 4, nullptr, x, out, true);
}

EXPORT int control_rows(const char* x, float* out, int n) {
  using namespace fastlm;
  return launch(rows_kernel<kNone>, dim3(1), 1, 0, nullptr, x, out, n, 1 << 30);
}

#define CONTROL(bug)                                             \
  EXPORT int control_##bug(const float* x, float* out, int n) { \
    return fastlm::run<fastlm::bug>(x, out, n);                 \
  }
CONTROL(kMissingWait)
CONTROL(kMissingBarrierAfterWait)
CONTROL(kMissingBarrierBeforeReuse)
CONTROL(kMissingWarpBarrier)
CONTROL(kSkippedBarrier)
CONTROL(kTwoBarriers)
CONTROL(kExitBeforeBarrier)
CONTROL(kTooFewThreads)
CONTROL(kHalfWarpBarrier)
CONTROL(kExitBeforeShuffle)
CONTROL(kDifferentShuffles)
CONTROL(kDifferentCollectives)
CONTROL(kHalfWarpShuffle)
CONTROL(kMisalignedCopy)
CONTROL(kMisalignedLoad)
CONTROL(kMisalignedStore)
CONTROL(kMisalignedMatrix)
CONTROL(kCopyOutOfBounds)
CONTROL(kMatrixOutOfBounds)
CONTROL(kCopyNotWaitedFor)
CONTROL(kBlocksInOrder)
CONTROL(kOutOfBounds)
CONTROL(kOutOfBoundsShared)
CONTROL(kInt32Overflow)

// An empty launch of any configuration.
EXPORT int control_configuration(int grid_x, int grid_y, int threads, int shared_bytes) {
  return fastlm::launch(fastlm::pairs_kernel<fastlm::kNone>, dim3(grid_x, grid_y), threads,
                        shared_bytes, nullptr, static_cast<const float*>(nullptr),
                        static_cast<float*>(nullptr), 0);
}
