"""Bias, activation and dropout in one pass, and gated activations, forward and backward.

    bias_act: y = dropout(activation(x + bias))
              dx = dropout(dy) * activation'(x + bias);  dbias = sum_rows(dx)
    glu:      y = activation(gate) * up
              dgate = dy * up * activation'(gate);  dup = dy * activation(gate)

The forward reads its inputs once and writes y. The backward reads dy and the forward's inputs once
and writes the gradients, and y again where the caller did not keep it. The mask is replayed from
the seed. dbias is the sum of one fp32 row per program, added in a fixed order.

A gradient that nobody wants is not written. Biases stay in the L2 cache. Partial sums for dbias
are written and read once, and there are no more groups of rows than fill the device eight times.

Source: Hendrycks and Gimpel, arXiv:1606.08415; Shazeer, arXiv:2002.05202.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlm.kernels.column_sum import column_sums
from fastlm.kernels.configs import ceil_div, dropout_args, multiprocessors, tile_config
from fastlm.kernels.launch import launch
from fastlm.kernels.primitives import activate, dropout_keep

# Elements of a tile: the backward holds more values an element.
_FWD_TILE = 4096
_BWD_TILE = 2048


@triton.jit
def _bias_act_fwd_kernel(
    x_ptr, bias_ptr, seed_ptr, y_ptr, stride_xm, M, N, col_tiles, threshold: tl.uint32, scale,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of y = dropout(activation(x + bias)).

    Bytes an element of e: reads x, writes y: 2 e, 4 for halves.
    """
    pid = tl.program_id(0)
    first_col = (pid % col_tiles).to(tl.int64) * BLOCK_N
    rows = (pid // col_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    z = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0)
    z = z.to(tl.float32)  # [BLOCK_M, BLOCK_N]
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    y, _ = activate(z, ACTIVATION)
    if seed_ptr is not None:
        keep = dropout_keep(tl.load(seed_ptr), threshold, 0, 0, rows, first_col, BLOCK_N)
        y = tl.where(keep, y * scale, 0.0)
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y, mask=mask)


@triton.jit
def _bias_act_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, seed_ptr, dx_ptr, dbias_ptr, y_ptr,
    stride_dym, stride_xm, M, N, groups, threshold: tl.uint32, scale,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of columns over every `groups`-th tile of rows: dx, y, this group's row of dbias.

    Bytes an element of e: reads dy and x, writes dx: 3 e, 6 for halves; with y 4 e, 8. A group:
    4 for a column of dbias.
    """
    pid = tl.program_id(0)
    group = (pid % groups).to(tl.int64)
    first_col = (pid // groups).to(tl.int64) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    mask_n = cols < N
    bias = tl.zeros([BLOCK_N], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(group, tl.cdiv(M, BLOCK_M), groups):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (rows < M)[:, None] & mask_n[None, :]
        z = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0)
        g = tl.load(dy_ptr + rows[:, None] * stride_dym + cols[None, :], mask=mask, other=0.0)
        y, slope = activate(z.to(tl.float32) + bias[None, :], ACTIVATION)
        dx = g.to(tl.float32) * slope  # [BLOCK_M, BLOCK_N], 0 outside the mask
        if seed_ptr is not None:
            keep = dropout_keep(tl.load(seed_ptr), threshold, 0, 0, rows, first_col, BLOCK_N)
            dx = tl.where(keep, dx * scale, 0.0)
            y = tl.where(keep, y * scale, 0.0)
        out = rows[:, None] * N + cols[None, :]
        if dx_ptr is not None:
            tl.store(dx_ptr + out, dx, mask=mask)
        if y_ptr is not None:
            tl.store(y_ptr + out, y, mask=mask)
        dbias += dx
    if dbias_ptr is not None:
        tl.store(dbias_ptr + group * N + cols, tl.sum(dbias, 0), mask=mask_n)


@triton.jit
def _glu_fwd_kernel(
    gate_ptr, up_ptr, y_ptr, stride_gm, stride_um, M, N, col_tiles,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of y = activation(gate) * up.

    Bytes an element of e: reads gate and up, writes y: 3 e, 6 for halves.
    """
    pid = tl.program_id(0)
    rows = (pid // col_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (pid % col_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    gate = tl.load(gate_ptr + rows[:, None] * stride_gm + cols[None, :], mask=mask, other=0.0)
    up = tl.load(up_ptr + rows[:, None] * stride_um + cols[None, :], mask=mask, other=0.0)
    y, _ = activate(gate.to(tl.float32), ACTIVATION)
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y * up.to(tl.float32), mask=mask)


@triton.jit
def _glu_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, y_ptr,
    stride_dym, stride_gm, stride_um, M, N, col_tiles,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of dgate = dy * up * activation'(gate), dup = dy * activation(gate), and y.

    Bytes an element of e: reads dy, gate and up, writes dgate and dup: 5 e, 10 for halves; with y
    6 e, 12.
    """
    pid = tl.program_id(0)
    rows = (pid // col_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (pid % col_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    dy = tl.load(dy_ptr + rows[:, None] * stride_dym + cols[None, :], mask=mask, other=0.0)
    dy = dy.to(tl.float32)
    gate = tl.load(gate_ptr + rows[:, None] * stride_gm + cols[None, :], mask=mask, other=0.0)
    act, slope = activate(gate.to(tl.float32), ACTIVATION)
    up = tl.load(up_ptr + rows[:, None] * stride_um + cols[None, :], mask=mask, other=0.0)
    up = up.to(tl.float32)
    out = rows[:, None] * N + cols[None, :]
    if dgate_ptr is not None:
        tl.store(dgate_ptr + out, dy * up * slope, mask=mask)
    if dup_ptr is not None:
        tl.store(dup_ptr + out, dy * act, mask=mask)
    if y_ptr is not None:
        tl.store(y_ptr + out, act * up, mask=mask)


def bias_act_fwd(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    activation: str,
    dropout_p: float,
) -> torch.Tensor:
    """x (rows, cols), last stride 1; bias (cols,), contiguous. Returns y in x's dtype."""
    M, N = x.shape
    y = x.new_empty((M, N))
    if y.numel() == 0:
        return y
    config = tile_config(N, _FWD_TILE)
    col_tiles = ceil_div(N, config.block_n)
    threshold, scale = dropout_args(dropout_p)
    launch(
        _bias_act_fwd_kernel, ceil_div(M, config.block_m) * col_tiles,
        x, bias, seed, y, x.stride(0), M, N, col_tiles, threshold, scale,
        ACTIVATION=activation, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def bias_act_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    activation: str,
    dropout_p: float,
    need_dx: bool,
    need_dbias: bool,
    need_y: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Returns dx, dbias and the forward's y; None for what is not needed."""
    M, N = x.shape
    dx = x.new_empty((M, N)) if need_dx else None
    y = x.new_empty((M, N)) if need_y else None
    dbias = None
    if x.numel() == 0:
        return dx, bias.new_zeros(N) if need_dbias else None, y
    config = tile_config(N, _BWD_TILE)
    row_tiles, col_tiles = ceil_div(M, config.block_m), ceil_div(N, config.block_n)
    groups = row_tiles
    if need_dbias:  # few rows to sum, enough programs to fill the device
        groups = min(row_tiles, ceil_div(8 * multiprocessors(x.device), col_tiles))
    partial = x.new_empty((groups, N), dtype=torch.float32) if need_dbias else None
    threshold, scale = dropout_args(dropout_p)
    launch(
        _bias_act_bwd_kernel, groups * col_tiles,
        dy, x, bias, seed, dx, partial, y, dy.stride(0), x.stride(0), M, N, groups,
        threshold, scale,
        ACTIVATION=activation, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    if need_dbias:
        (dbias,) = column_sums([partial], [bias.dtype])
    return dx, dbias, y


def glu_fwd(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """gate and up (rows, cols), last stride 1. Returns y in the wider dtype of the two."""
    M, N = gate.shape
    dtype = torch.promote_types(gate.dtype, up.dtype)
    y = gate.new_empty((M, N), dtype=dtype)
    if y.numel() == 0:
        return y
    config = tile_config(N, _FWD_TILE)
    col_tiles = ceil_div(N, config.block_n)
    launch(
        _glu_fwd_kernel, ceil_div(M, config.block_m) * col_tiles,
        gate, up, y, gate.stride(0), up.stride(0), M, N, col_tiles,
        ACTIVATION=activation, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def glu_bwd(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    need_dgate: bool,
    need_dup: bool,
    need_y: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Returns dgate, dup and the forward's y; None for what is not needed."""
    M, N = gate.shape
    new = lambda needed, dtype: gate.new_empty((M, N), dtype=dtype) if needed else None
    dgate, dup = new(need_dgate, gate.dtype), new(need_dup, up.dtype)
    y = new(need_y, torch.promote_types(gate.dtype, up.dtype))
    if gate.numel() == 0:
        return dgate, dup, y
    config = tile_config(N, _BWD_TILE)
    col_tiles = ceil_div(N, config.block_n)
    launch(
        _glu_bwd_kernel, ceil_div(M, config.block_m) * col_tiles,
        dy, gate, up, dgate, dup, y, dy.stride(0), gate.stride(0), up.stride(0), M, N, col_tiles,
        ACTIVATION=activation, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return dgate, dup, y
