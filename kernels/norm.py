"""LayerNorm and RMSNorm with dropout and residual add, forward and backward.

    z = residual + dropout(x);  xhat = (z - mean) * rstd;  y = xhat * weight + bias
    dz = rstd * (wdy - mean(wdy) - xhat * mean(wdy * xhat)) + dz_in,   wdy = dy * weight
    dresidual = dz;  dx = dropout(dz);  dweight = sum_rows(dy * xhat);  dbias = sum_rows(dy)

RMSNorm has no mean and drops the mean(wdy) term. The mask is replayed from the seed; dweight and
dbias are sums of one fp32 row per program, which `column_sums` adds in a fixed order. In elements
of memory a row of N columns costs, and N more for each of residual, z, dz_in and a dx of its own:

    forward   up to 8,192 columns: 2 N, reads x and writes y; wider: 3 N, reads x (and residual,
              which then costs 2 N) twice
    backward  up to 8,192 columns: 3 N, reads dy and z and writes dz
              up to 16,384: 5 N, reads dy and z once more for dweight and dbias
              wider: 7 N, of which 2 N are read again soon, by then in the L2 cache

Partial sums, written once and read once, are for each vector 1 to 4 rows a multiprocessor, of 4 N
bytes each, up to 8,192 columns, and about 16 KB a multiprocessor beyond.

Source: Ba et al., arXiv:1607.06450; Zhang and Sennrich, arXiv:1910.07467.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlm.kernels.column_sum import column_sums
from fastlm.kernels.configs import (
    WIDEST_ROW,
    ceil_div,
    dropout_args,
    multiprocessors,
    norm_bwd_config,
    row_config,
)
from fastlm.kernels.launch import launch
from fastlm.kernels.primitives import dropout_keep

_TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}
KINDS = {"layer": 0, "rms": 1, "rms_llama": 2, "rms_gemma": 3}


@triton.jit
def _load_z(
    x_ptr, residual_ptr, seed_ptr, z_dtype: tl.constexpr, rows, cols, mask,
    stride_xm, stride_rm, threshold, scale, first_col, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """residual + dropout(x), rounded to z's dtype as the reference rounds it. [BLOCK_M, BLOCK_N]"""
    z = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0)
    z = z.to(tl.float32)
    if seed_ptr is not None:
        keep = dropout_keep(tl.load(seed_ptr), threshold, 0, 0, rows, first_col, BLOCK_N)
        z = tl.where(keep, z * scale, 0.0)
    if residual_ptr is not None:
        r = tl.load(residual_ptr + rows[:, None] * stride_rm + cols[None, :], mask=mask, other=0.0)
        z += r.to(tl.float32)
    return z.to(z_dtype).to(tl.float32)


@triton.jit
def _scale_shift(
    xhat, weight_ptr, bias_ptr, cols, mask_n, x_dtype: tl.constexpr, KIND: tl.constexpr
):
    """weight and bias in fp32; KIND 2 rounds xhat first (Llama), 3 adds 1 to weight (Gemma)."""
    if KIND == 2:
        xhat = xhat.to(x_dtype).to(tl.float32)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)
        if KIND == 3:
            w += 1.0
        xhat = xhat * w[None, :]
    if bias_ptr is not None:
        xhat += tl.load(bias_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    return xhat


@triton.jit
def _norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr,
    y_ptr, z_ptr, mean_ptr, rstd_ptr,
    stride_xm, stride_rm, M, N, eps, threshold: tl.uint32, scale,
    Z_DTYPE: tl.constexpr, KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of whole rows: y, z, mean and rstd."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask_m, mask_n = rows < M, cols < N
    mask = mask_m[:, None] & mask_n[None, :]
    z = _load_z(x_ptr, residual_ptr, seed_ptr, Z_DTYPE, rows, cols, mask,
                stride_xm, stride_rm, threshold, scale, 0, BLOCK_N)  # fmt: skip
    out = rows[:, None] * N + cols[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + out, z, mask=mask)
    if KIND == 0:
        mean = tl.sum(z, 1) / N
        tl.store(mean_ptr + rows, mean, mask=mask_m)
        # Two passes over registers: the mean may be thousands of standard deviations.
        z = tl.where(mask, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(z * z, 1) / N + eps)
    tl.store(rstd_ptr + rows, rstd, mask=mask_m)
    y = _scale_shift(z * rstd[:, None], weight_ptr, bias_ptr, cols, mask_n,
                     x_ptr.dtype.element_ty, KIND)  # fmt: skip
    tl.store(y_ptr + out, y, mask=mask)


@triton.jit
def _norm_fwd_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr,
    y_ptr, z_ptr, mean_ptr, rstd_ptr,
    stride_xm, stride_rm, M, N, eps, threshold: tl.uint32, scale,
    Z_DTYPE: tl.constexpr, KIND: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row in blocks of columns: means and squares are merged block by block (Chan et al.)."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    mean = tl.zeros([1], tl.float32)
    m2 = tl.zeros([1], tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = (cols < N)[None, :]
        z = _load_z(x_ptr, residual_ptr, seed_ptr, Z_DTYPE, rows, cols, mask,
                    stride_xm, stride_rm, threshold, scale, start, BLOCK_N)  # fmt: skip
        if z_ptr is not None:
            tl.store(z_ptr + rows[:, None] * N + cols[None, :], z, mask=mask)
        if KIND == 0:
            count = tl.minimum(BLOCK_N, N - start).to(tl.float32)
            block_mean = tl.sum(z, 1) / count
            z = tl.where(mask, z - block_mean[:, None], 0.0)
            delta = block_mean - mean
            share = count / (start + count)
            mean += delta * share
            m2 += delta * delta * share * start
        m2 += tl.sum(z * z, 1)
    rstd = tl.rsqrt(m2 / N + eps)
    tl.store(rstd_ptr + rows, rstd)
    if KIND == 0:
        tl.store(mean_ptr + rows, mean)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = (cols < N)[None, :]
        z = _load_z(x_ptr, residual_ptr, seed_ptr, Z_DTYPE, rows, cols, mask,
                    stride_xm, stride_rm, threshold, scale, start, BLOCK_N)  # fmt: skip
        y = _scale_shift((z - mean[:, None]) * rstd[:, None], weight_ptr, bias_ptr, cols, cols < N,
                         x_ptr.dtype.element_ty, KIND)  # fmt: skip
        tl.store(y_ptr + rows[:, None] * N + cols[None, :], y, mask=mask)


@triton.jit
def _load_rows(
    dy_ptr, z_ptr, mean_ptr, rstd_ptr, rows, cols, mask_m, mask_n,
    stride_dym, stride_zm, KIND: tl.constexpr,
):  # fmt: skip
    """dy and z of a tile in their own dtypes, 0 outside the mask, and its rows' mean and rstd."""
    mask = mask_m[:, None] & mask_n[None, :]
    dy = tl.load(dy_ptr + rows[:, None] * stride_dym + cols[None, :], mask=mask, other=0.0)
    z = tl.load(z_ptr + rows[:, None] * stride_zm + cols[None, :], mask=mask, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)
    mean = tl.zeros_like(rstd)
    if KIND == 0:
        mean = tl.load(mean_ptr + rows, mask=mask_m, other=0.0)
    return dy, z, mean, rstd


@triton.jit
def _xhat_wdy(dy, z, mean, rstd, weight_ptr, cols, mask, mask_n, KIND: tl.constexpr):
    """dy, xhat and dy * weight in fp32, 0 outside the mask. [BLOCK_M, BLOCK_N] each"""
    dy = dy.to(tl.float32)
    xhat = tl.where(mask, (z.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
    wdy = dy
    if weight_ptr is not None:
        # As a tile of one row: its layout is dy's, without an exchange between warps.
        w = tl.load(weight_ptr + cols[None, :], mask=mask_n[None, :], other=0.0).to(tl.float32)
        if KIND == 3:
            w += 1.0
        wdy = dy * w
    return dy, xhat, wdy


@triton.jit
def _dz(wdy, xhat, rstd, sum_wdy, sum_wdy_xhat, N, KIND: tl.constexpr):
    """The gradient that reaches z through y, from a row's two sums."""
    dz = wdy - xhat * (sum_wdy_xhat / N)[:, None]
    if KIND == 0:
        dz -= (sum_wdy / N)[:, None]
    return dz * rstd[:, None]


@triton.jit
def _store_dz(
    dz, seed_ptr, dz_ptr, dx_ptr, rows, cols, mask, N, threshold, scale, first_col,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dz, and dx = dropout(dz)."""
    if dz_ptr is not None:
        tl.store(dz_ptr + rows[:, None] * N + cols[None, :], dz, mask=mask)
    if dx_ptr is not None:
        if seed_ptr is not None:
            keep = dropout_keep(tl.load(seed_ptr), threshold, 0, 0, rows, first_col, BLOCK_N)
            dz = tl.where(keep, dz * scale, 0.0)
        tl.store(dx_ptr + rows[:, None] * N + cols[None, :], dz, mask=mask)


@triton.jit
def _norm_bwd_kernel(
    dy_ptr, dz_in_ptr, z_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr,
    dz_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    stride_dym, stride_dzm, stride_zm, M, N, threshold: tl.uint32, scale,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Tiles of whole rows, strided over programs: dz, dx, a row of dweight and dbias a program.

    AHEAD: a tile is loaded before the one before it is worked on.
    """
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask_n = cols < N
    # Rows of narrow tiles lie in different warps, which exchange at the end alone.
    spread: tl.constexpr = BLOCK_N < 1024
    dweight = tl.zeros([BLOCK_M if spread else 1, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M if spread else 1, BLOCK_N], tl.float32)
    if AHEAD:
        rows = pid * BLOCK_M + tl.arange(0, BLOCK_M)
        dy, z, mean, rstd = _load_rows(
            dy_ptr, z_ptr, mean_ptr, rstd_ptr, rows, cols, rows < M, mask_n,
            stride_dym, stride_zm, KIND,
        )  # fmt: skip
    for tile in range(pid, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = rows < M
        mask = mask_m[:, None] & mask_n[None, :]
        if dz_in_ptr is not None:  # early: it arrives while the sums are formed
            more = tl.load(
                dz_in_ptr + rows[:, None] * stride_dzm + cols[None, :], mask=mask, other=0.0
            )
        ahead = rows
        if AHEAD:
            ahead += tl.num_programs(0) * BLOCK_M
        next_dy, next_z, next_mean, next_rstd = _load_rows(
            dy_ptr, z_ptr, mean_ptr, rstd_ptr, ahead, cols, ahead < M, mask_n,
            stride_dym, stride_zm, KIND,
        )  # fmt: skip
        if not AHEAD:
            dy, z, mean, rstd = next_dy, next_z, next_mean, next_rstd
        dy32, xhat, wdy = _xhat_wdy(dy, z, mean, rstd, weight_ptr, cols, mask, mask_n, KIND)
        if spread:
            dweight += dy32 * xhat
            dbias += dy32
        else:
            dweight += tl.sum(dy32 * xhat, 0)[None, :]
            dbias += tl.sum(dy32, 0)[None, :]
        dz = _dz(wdy, xhat, rstd, tl.sum(wdy, 1), tl.sum(wdy * xhat, 1), N, KIND)
        if dz_in_ptr is not None:
            dz += more.to(tl.float32)
        _store_dz(dz, seed_ptr, dz_ptr, dx_ptr, rows, cols, mask, N, threshold, scale, 0, BLOCK_N)
        if AHEAD:
            dy, z, mean, rstd = next_dy, next_z, next_mean, next_rstd
    partial = pid * N + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=mask_n)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=mask_n)


@triton.jit
def _norm_bwd_wide_kernel(
    dy_ptr, dz_in_ptr, z_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr, dz_ptr, dx_ptr,
    stride_dym, stride_dzm, stride_zm, M, N, threshold: tl.uint32, scale,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row: dz and dx. WHOLE: it is one block; else blocks are read for the two sums first.

    EARLY: dz_in is loaded before the sums are formed; registers allow it for halves.
    """
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    mask_m = rows < M
    sum_wdy = tl.zeros([1], tl.float32)
    sum_wdy_xhat = tl.zeros([1], tl.float32)
    if not WHOLE:
        for start in range(0, N, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            mask = (cols < N)[None, :]
            dy, z, mean, rstd = _load_rows(
                dy_ptr, z_ptr, mean_ptr, rstd_ptr, rows, cols, mask_m, cols < N,
                stride_dym, stride_zm, KIND,
            )  # fmt: skip
            _, xhat, wdy = _xhat_wdy(dy, z, mean, rstd, weight_ptr, cols, mask, cols < N, KIND)
            sum_wdy_xhat += tl.sum(wdy * xhat, 1)
            sum_wdy += tl.sum(wdy, 1)
    for start in range(0, BLOCK_N if WHOLE else N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = (cols < N)[None, :]
        dy, z, mean, rstd = _load_rows(
            dy_ptr, z_ptr, mean_ptr, rstd_ptr, rows, cols, mask_m, cols < N,
            stride_dym, stride_zm, KIND,
        )  # fmt: skip
        if dz_in_ptr is not None and EARLY:
            more = tl.load(
                dz_in_ptr + rows[:, None] * stride_dzm + cols[None, :], mask=mask, other=0.0
            )
        _, xhat, wdy = _xhat_wdy(dy, z, mean, rstd, weight_ptr, cols, mask, cols < N, KIND)
        if WHOLE:
            sum_wdy_xhat = tl.sum(wdy * xhat, 1)
            sum_wdy = tl.sum(wdy, 1)
        dz = _dz(wdy, xhat, rstd, sum_wdy, sum_wdy_xhat, N, KIND)
        if dz_in_ptr is not None:
            if not EARLY:
                more = tl.load(
                    dz_in_ptr + rows[:, None] * stride_dzm + cols[None, :], mask=mask, other=0.0
                )
            dz += more.to(tl.float32)
        _store_dz(dz, seed_ptr, dz_ptr, dx_ptr, rows, cols, mask, N, threshold, scale, start,
                  BLOCK_N)  # fmt: skip


@triton.jit
def _norm_dweight_kernel(
    dy_ptr, z_ptr, mean_ptr, rstd_ptr, dweight_ptr, dbias_ptr,
    stride_dym, stride_zm, M, N, groups,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dweight and dbias of wide rows: a block of columns over every `groups`-th tile of rows."""
    group = (tl.program_id(0) % groups).to(tl.int64)
    cols = (tl.program_id(0) // groups).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = cols < N
    # Rows of a tile lie in different warps, which exchange at the end alone.
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(group, tl.cdiv(M, BLOCK_M), groups):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = rows < M
        dy, z, mean, rstd = _load_rows(
            dy_ptr, z_ptr, mean_ptr, rstd_ptr, rows, cols, mask_m, mask_n,
            stride_dym, stride_zm, KIND,
        )  # fmt: skip
        mask = mask_m[:, None] & mask_n[None, :]
        dy, xhat, _ = _xhat_wdy(dy, z, mean, rstd, None, cols, mask, mask_n, KIND)
        dweight += dy * xhat
        dbias += dy
    partial = group * N + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=mask_n)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=mask_n)


def norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    eps: float,
    dropout_p: float,
    kind: str,
    out_dtype: torch.dtype,
    keep_z: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """x, residual (rows, cols), last stride 1. Returns y, z, mean, rstd; None for the unwanted."""
    M, N = x.shape
    z_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty((M, N), dtype=out_dtype)
    z = x.new_empty((M, N), dtype=z_dtype) if keep_z else None
    mean = x.new_empty(M, dtype=torch.float32) if kind == "layer" else None
    rstd = x.new_empty(M, dtype=torch.float32)
    if M == 0:
        return y, z, mean, rstd
    config = row_config(N)
    threshold, scale = dropout_args(dropout_p)
    tensors = (x, residual, weight, bias, seed, y, z, mean, rstd)
    stride_rm = 0 if residual is None else residual.stride(0)
    sizes = (x.stride(0), stride_rm, M, N, eps, threshold, scale)
    constants = dict(
        Z_DTYPE=_TRITON_DTYPES[z_dtype],
        KIND=KINDS[kind],
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    if N > WIDEST_ROW:
        launch(_norm_fwd_wide_kernel, M, *tensors, *sizes, **constants)
    else:
        programs = ceil_div(M, config.block_m)
        constants["BLOCK_M"] = config.block_m
        launch(_norm_fwd_kernel, programs, *tensors, *sizes, **constants)
    return y, z, mean, rstd


def norm_bwd(
    dy: torch.Tensor,
    dz: torch.Tensor | None,
    z: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    kind: str,
    dz_dtype: torch.dtype | None,
    dx_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients (dz, dx, dweight, dbias); those whose dtype is None are None and not computed.

    dz is the gradient of residual; dx differs from it where dropout or another dtype does.
    """
    M, N = z.shape
    new = lambda shape, dtype: None if dtype is None else z.new_empty(shape, dtype=dtype)
    out_dz, out_dx = new((M, N), dz_dtype), new((M, N), dx_dtype)
    dtypes = dweight_dtype, dbias_dtype
    if M == 0:
        return out_dz, out_dx, *(None if x is None else new(N, x).zero_() for x in dtypes)
    wide = N > WIDEST_ROW
    itemsize = max(x.element_size() for x in (dy, z, dz) if x is not None)
    config = norm_bwd_config(N, itemsize, z.device)
    # Of wide rows, blocks of 512 columns: partials are few, and programs fill the device.
    col_tiles = ceil_div(N, 512) if wide else 1
    programs = max(1, ceil_div(config.programs * multiprocessors(z.device), col_tiles))
    programs = min(ceil_div(M, 4 if wide else config.block_m), programs)
    partials = [new((programs, N), None if x is None else torch.float32) for x in dtypes]
    threshold, scale = dropout_args(dropout_p)
    common = dict(KIND=KINDS[kind], **config.options())
    ins = (dy, dz, z, weight, mean, rstd, seed, out_dz, out_dx)
    sizes = (dy.stride(0), 0 if dz is None else dz.stride(0), z.stride(0), M, N, threshold, scale)
    if not wide:
        tile = dict(BLOCK_M=config.block_m, AHEAD=config.ahead)
        launch(_norm_bwd_kernel, programs, *ins, *partials, *sizes, **tile, **common)
    else:
        if out_dz is not None or out_dx is not None:
            whole = dict(WHOLE=N <= config.block_n, EARLY=itemsize <= 2)
            launch(_norm_bwd_wide_kernel, M, *ins, *sizes, **whole, **common)
        if dweight_dtype is not None or dbias_dtype is not None:
            launch(
                _norm_dweight_kernel, col_tiles * programs, dy, z, mean, rstd, *partials,
                dy.stride(0), z.stride(0), M, N, programs,
                KIND=KINDS[kind], BLOCK_M=4, BLOCK_N=512, enable_fp_fusion=True,
            )  # fmt: skip
    return out_dz, out_dx, *column_sums(partials, dtypes)
