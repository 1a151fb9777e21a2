// Tensor cores as sm_80 has them: ldmatrix and mma.sync, in the fragment layouts of the PTX ISA,
// section "Matrix multiply-accumulate operation using mma instruction", m16n8k16.
//
// Of lane l, with g = l / 4 and t = l % 4, in words of two neighbouring 16-bit numbers:
//   a[0]: row g,     columns 2t, 2t+1       b[0]: rows 2t, 2t+1 of column g
//   a[1]: row g + 8, the same columns       b[1]: rows 2t + 8, 2t + 9 of column g
//   a[2], a[3]: as a[0], a[1], 8 columns on
//   d[0], d[1]: row g, columns 2t, 2t+1     d[2], d[3]: row g + 8
#pragma once

#include <type_traits>

#include "copy.cuh"
#include "platform.cuh"

namespace fastlm {

// Four 8x8 matrices of 16-bit numbers from shared memory. Lane l gives the address of row l % 8 of
// matrix l / 8 (16 bytes, aligned) and gets, of each matrix, the word at row l / 4, columns
// 2 (l % 4) and on.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef FASTLM_SIMT
  simt::load_matrix(r, row, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_matrix_x4_trans(uint32_t (&r)[4], const void* row) {
#ifdef FASTLM_SIMT
  simt::load_matrix(r, row, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// d += a b for a 16x16, b 16x8 of T (__half or __nv_bfloat16), d 16x8 in fp32.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             uint32_t b0, uint32_t b1) {
#ifdef FASTLM_SIMT
  simt::mma_m16n8k16(d, a, b0, b1, std::is_same_v<T, __nv_bfloat16>);
#else
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

}  // namespace fastlm
