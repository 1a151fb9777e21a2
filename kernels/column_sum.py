"""Sums of columns in a fixed order: the last step of gradients of which each program leaves a row.

One launch for two of them, where torch's sum and cast are two for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastlm.kernels.configs import ceil_div
from fastlm.kernels.launch import launch

_BLOCK_M, _BLOCK_N = 64, 32  # a warp reads 128 bytes of a row


@triton.jit
def _column_sums_kernel(
    first_ptr, second_ptr, first_sum_ptr, second_sum_ptr, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sums of a block of columns, of either matrix or both."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = cols < N
    first = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    second = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, M, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        offsets = rows.to(tl.int64)[:, None] * N + cols[None, :]
        mask = (rows < M)[:, None] & mask_n[None, :]
        if first_ptr is not None:
            first += tl.load(first_ptr + offsets, mask=mask, other=0.0)
        if second_ptr is not None:
            second += tl.load(second_ptr + offsets, mask=mask, other=0.0)
    if first_ptr is not None:
        tl.store(first_sum_ptr + cols, tl.sum(first, 0), mask=mask_n)
    if second_ptr is not None:
        tl.store(second_sum_ptr + cols, tl.sum(second, 0), mask=mask_n)


def column_sums(
    partials: Sequence[torch.Tensor | None], sums: Sequence[torch.Tensor | None]
) -> None:
    """Writes the sums of the columns of two fp32 matrices of one shape (rows, cols), contiguous.

    Args:
        partials: the matrices; None where nothing is wanted.
        sums: (cols,) each, of any dtype; None beside None.
    """
    given = next((x for x in partials if x is not None), None)
    if given is None:
        return
    if partials[0] is None:
        partials, sums = partials[::-1], sums[::-1]
    M, N = given.shape
    launch(
        _column_sums_kernel, ceil_div(N, _BLOCK_N), *partials, *sums, M, N,
        BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, enable_fp_fusion=True,
    )  # fmt: skip
