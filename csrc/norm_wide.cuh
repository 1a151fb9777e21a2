// What the kernels of a norm share for rows that no block has in registers: a block of kWideBlock
// threads goes over a row tile by tile, a tile being as many vectors as its threads take at once.
#pragma once

#include "norm.cuh"

namespace fastlm {

constexpr int kWideBlock = 512;

// The columns of one of `lanes` threads in tile after tile of a row: vector k of the tile from
// column `first` on.
template <int V>
struct Columns {
  int lanes, lane;

  __device__ int64_t at(int64_t first, int k) const { return first + (k * lanes + lane) * V; }
};

// Bit V * k + i: whether dropout keeps element i of vector k of the tile.
template <int Items, int V>
__device__ inline uint32_t keep_bits(const Dropout& dropout, int64_t row, Columns<V> columns,
                                     int64_t first) {
  static_assert(Items <= 32 && V % 4 == 0);
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  uint32_t bits = 0;
#pragma unroll 1
  for (int i = 0; i < Items; i += 4) {
    const int64_t group = (columns.at(first, i / V) + i % V) / 4;
    const uint4 words =
        philox(seed, static_cast<uint32_t>(group), static_cast<uint32_t>(row), 0, 0);
    bits |= keep_four(words, dropout.threshold) << i;
  }
  return bits;
}

// Sums of each x over the threads of the block. `slots` is shared memory for N floats a warp, which
// no thread may still be reading from an earlier sum.
template <int N>
__device__ inline void block_sum(float (&x)[N], float* slots) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    x[i] = warp_sum(x[i]);
    if (lane_id() == 0) slots[warp_id() * N + i] = x[i];
  }
  sync_block();
#pragma unroll
  for (int i = 0; i < N; i++) {
    x[i] = warp_sum(lane_id() < kWideBlock / kWarp ? slots[lane_id() * N + i] : 0.0f);
  }
}

// Wide rows are summed up segment by segment, and the sums of segments in order: by one block, or,
// where rows are too few for the device, by a block for each segment in a first launch and by all
// of them again in a second. Either way a row gets the same bits.
constexpr int64_t kSegment = 16384;  // a multiple of the tiles
enum class Phase { kAll, kSums, kResults };

struct Segments {
  int64_t row, begin, end;  // of segments

  __device__ Segments(int64_t cols, int splits, Phase phase)
      : row(blockIdx.x), begin(0), end(ceil_div(cols, kSegment)) {
    if (phase == Phase::kAll) return;
    row = blockIdx.x / splits;
    begin = blockIdx.x % splits;
    end = begin + 1;
  }
};

// Calls launch(phase, blocks) once, for `most` blocks if there are as many rows, or for the sums
// and then for the results.
template <typename Launch>
cudaError_t launch_phases(int64_t rows, int splits, int64_t most, const Launch& launch) {
  if (splits == 1) return launch(Phase::kAll, dim3(static_cast<unsigned>(min(rows, most))));
  const dim3 blocks(static_cast<unsigned>(rows * splits));
  const cudaError_t error = launch(Phase::kSums, blocks);
  return error != cudaSuccess ? error : launch(Phase::kResults, blocks);
}

}  // namespace fastlm
