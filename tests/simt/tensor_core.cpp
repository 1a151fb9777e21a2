// ldmatrix and mma.sync of tests/simt/simt.h.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "simt.h"

namespace simt {
namespace {

// Where an accumulator (row, column) lives: in which lane, in which of its words.
struct Place {
  int lane, word;
};
constexpr Place place_of_sum(int row, int column) {
  return {row % 8 * 4 + column / 2, row / 8 * 2 + column % 2};
}

float number(uint32_t word, int part, bool bf16) {
  const auto bits = static_cast<unsigned short>(word >> 16 * part);
  return bf16 ? __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits}))
              : __half2float(__half(__half_raw{bits}));
}

// Products of 16-bit numbers are exact in fp32; the sums are rounded one by one, k ascending.
void multiply(Lanes lanes) {
  const bool bf16 = lanes[0]->in[6] != 0;
  float left[16][16], right[16][8];
  for (int k = 0; k < 16; k++) {
    const int t = k % 8 / 2;
    for (int m = 0; m < 16; m++) {
      left[m][k] = number(lanes[m % 8 * 4 + t]->in[m / 8 + 2 * (k / 8)], k % 2, bf16);
    }
    for (int n = 0; n < 8; n++) {
      right[k][n] = number(lanes[n * 4 + t]->in[4 + k / 8], k % 2, bf16);
    }
  }
  for (int m = 0; m < 16; m++) {
    float sums[8];
    for (int n = 0; n < 8; n++) {
      const auto [lane, word] = place_of_sum(m, n);
      std::memcpy(&sums[n], &lanes[lane]->out[word], 4);
    }
    for (int k = 0; k < 16; k++) {
      for (int n = 0; n < 8; n++) sums[n] += left[m][k] * right[k][n];
    }
    for (int n = 0; n < 8; n++) {
      const auto [lane, word] = place_of_sum(m, n);
      std::memcpy(&lanes[lane]->out[word], &sums[n], 4);
    }
  }
}

// Lane l brings the address of row l % 8 of matrix l / 8, and gets a word of each matrix.
template <bool kTransposed>
void distribute(Lanes lanes) {
  for (int lane = 0; lane < kWarp; lane++) {
    auto* out = reinterpret_cast<uint16_t*>(lanes[lane]->out);
    for (int i = 0; i < 8; i++) {
      const int matrix = i / 2, word = lane % 4 * 2 + i % 2;
      const int row = kTransposed ? word : lane / 4, column = kTransposed ? lane / 4 : word;
      const uint16_t* source;
      std::memcpy(&source, lanes[8 * matrix + row]->in, sizeof source);
      out[i] = source[column];
    }
  }
}

}  // namespace

void load_matrix(uint32_t (&r)[4], const void* row, bool transposed) {
  require_aligned(row, "ldmatrix of a row that is not aligned to 16 bytes");
  require_shared(row, "ldmatrix of a row that is not in the block's shared memory");
  Exchange& mine = exchange();
  std::memcpy(mine.in, &row, sizeof row);
  meet(Collective::kLoadMatrix, __builtin_return_address(0),
       transposed ? distribute<true> : distribute<false>);
  std::memcpy(r, mine.out, sizeof r);
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16) {
  Exchange& mine = exchange();
  std::memcpy(mine.in, a, sizeof a);
  mine.in[4] = b0;
  mine.in[5] = b1;
  mine.in[6] = bf16;
  std::memcpy(mine.out, d, sizeof d);
  meet(Collective::kMma, __builtin_return_address(0), multiply);
  std::memcpy(d, mine.out, sizeof d);
}

}  // namespace simt
