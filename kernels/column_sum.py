"""Sums over the rows of fp32 partial results, which backward kernels leave one row a program.

    out[v, n] = sum_m partial[v, m, n]

One launch reads each partial once and writes up to two vectors (dweight and dbias), each in its own
dtype. Rows are added in a fixed order, so the same partials give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastlm.kernels.configs import ceil_div, column_sum_config
from fastlm.kernels.launch import launch


@triton.jit
def _sum_columns(
    partial_ptr, out_ptr, block, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The sums of one block of columns. Tiles of rows are added up before their rows are, so that
    warps exchange values once."""
    cols = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = cols < N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, M, BLOCK_M):
        rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (rows < M)[:, None] & mask_n[None, :]
        total += tl.load(partial_ptr + rows[:, None] * N + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, 0), mask=mask_n)


@triton.jit
def _column_sum_kernel(
    first_ptr, second_ptr, first_out_ptr, second_out_ptr, M, N, blocks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of columns of the first or, past `blocks`, of the second partial (M, N).

    Bytes an element of a partial: it is read, 4. A column: its sum, in the vector's dtype.
    """
    program = tl.program_id(0)
    if second_ptr is None:
        _sum_columns(first_ptr, first_out_ptr, program, M, N, BLOCK_M, BLOCK_N)
    else:
        if program < blocks:
            _sum_columns(first_ptr, first_out_ptr, program, M, N, BLOCK_M, BLOCK_N)
        else:
            _sum_columns(second_ptr, second_out_ptr, program - blocks, M, N, BLOCK_M, BLOCK_N)


def column_sums(
    partials: Sequence[torch.Tensor | None], dtypes: Sequence[torch.dtype | None]
) -> list[torch.Tensor | None]:
    """Sums over rows of up to two contiguous fp32 tensors of one shape (rows, cols).

    Returns one (cols,) of each dtype, and None where that is None, whose partial is not read.
    Without rows the sums are 0.
    """
    kept = [(x, dtype) for x, dtype in zip(partials, dtypes, strict=True) if dtype is not None]
    sums = [x.new_empty(x.shape[1], dtype=dtype) for x, dtype in kept]
    if kept and kept[0][0].shape[1]:
        M, N = kept[0][0].shape
        config = column_sum_config(M, N, len(kept), kept[0][0].device)
        blocks = ceil_div(N, config.block_n)
        inputs, outputs = [x for x, _ in kept], [*sums]
        if len(kept) == 1:
            inputs, outputs = [*inputs, None], [*outputs, None]
        launch(
            _column_sum_kernel, len(kept) * blocks, *inputs, *outputs, M, N, blocks,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps,
            enable_fp_fusion=True,
        )  # fmt: skip
    done = iter(sums)
    return [None if dtype is None else next(done) for dtype in dtypes]
