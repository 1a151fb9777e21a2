"""LayerNorm and RMSNorm with dropout and residual add, forward and backward.

    z = residual + dropout(x);  xhat = (z - mean) * rstd;  y = xhat * weight + bias
    dz = rstd * (wdy - mean(wdy) - xhat * mean(wdy * xhat)) + dz_in,   wdy = dy * weight
    dresidual = dz;  dx = dropout(dz);  dweight = sum_rows(dy * xhat);  dbias = sum_rows(dy)

RMSNorm has no mean and drops the mean(wdy) term. For rows up to `WIDEST_ROW` columns the forward
reads x (and residual) and writes y (and z) once, and the backward reads dy and z once. Wider rows
are looped over and read twice. The mask is replayed from the seed; dweight and dbias are sums of
one fp32 row per program, added in a fixed order.

Source: Ba et al., arXiv:1607.06450; Zhang and Sennrich, arXiv:1910.07467.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlm.kernels.column_sum import column_sums
from fastlm.kernels.configs import WIDEST_ROW, ceil_div, dropout_args, multiprocessors, row_config
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
def _load_xhat_wdy(
    dy_ptr, z_ptr, weight_ptr, mean, rstd, rows, cols, mask_m, mask_n,
    stride_dym, stride_zm, KIND: tl.constexpr,
):  # fmt: skip
    """dy, xhat and dy * weight of a tile, 0 outside the mask. [BLOCK_M, BLOCK_N] each"""
    mask = mask_m[:, None] & mask_n[None, :]
    dy = tl.load(dy_ptr + rows[:, None] * stride_dym + cols[None, :], mask=mask, other=0.0)
    dy = dy.to(tl.float32)
    z = tl.load(z_ptr + rows[:, None] * stride_zm + cols[None, :], mask=mask, other=0.0)
    xhat = tl.where(mask, (z.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
    wdy = dy
    if weight_ptr is not None:
        w = tl.load(weight_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)
        if KIND == 3:
            w += 1.0
        wdy = dy * w[None, :]
    return dy, xhat, wdy


@triton.jit
def _store_dz(
    dz, dz_in_ptr, seed_ptr, dz_ptr, dx_ptr, rows, cols, mask,
    stride_dzm, N, threshold, scale, first_col, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the gradient that arrives at z itself; stores dz, and dx = dropout(dz)."""
    if dz_in_ptr is not None:
        more = tl.load(dz_in_ptr + rows[:, None] * stride_dzm + cols[None, :], mask=mask, other=0.0)
        dz += more.to(tl.float32)
    out = rows[:, None] * N + cols[None, :]
    if dz_ptr is not None:
        tl.store(dz_ptr + out, dz, mask=mask)
    if dx_ptr is not None:
        if seed_ptr is not None:
            keep = dropout_keep(tl.load(seed_ptr), threshold, 0, 0, rows, first_col, BLOCK_N)
            dz = tl.where(keep, dz * scale, 0.0)
        tl.store(dx_ptr + out, dz, mask=mask)


@triton.jit
def _norm_bwd_kernel(
    dy_ptr, dz_in_ptr, z_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr,
    dz_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    stride_dym, stride_dzm, stride_zm, M, N, threshold: tl.uint32, scale,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tiles of whole rows, strided over programs: dz, dx, a row of dweight and dbias a program."""
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask_n = cols < N
    dweight = tl.zeros([BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(pid, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = rows < M
        mean = tl.zeros([BLOCK_M], tl.float32)
        if KIND == 0:
            mean = tl.load(mean_ptr + rows, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)
        dy, xhat, wdy = _load_xhat_wdy(dy_ptr, z_ptr, weight_ptr, mean, rstd, rows, cols,
                                       mask_m, mask_n, stride_dym, stride_zm, KIND)  # fmt: skip
        dweight += tl.sum(dy * xhat, 0)
        dbias += tl.sum(dy, 0)
        dz = wdy - xhat * (tl.sum(wdy * xhat, 1) / N)[:, None]
        if KIND == 0:
            dz -= (tl.sum(wdy, 1) / N)[:, None]
        _store_dz(dz * rstd[:, None], dz_in_ptr, seed_ptr, dz_ptr, dx_ptr, rows, cols,
                  mask_m[:, None] & mask_n[None, :], stride_dzm, N, threshold, scale, 0,
                  BLOCK_N)  # fmt: skip
    partial = pid * N + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, dweight, mask=mask_n)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, dbias, mask=mask_n)


@triton.jit
def _norm_bwd_wide_kernel(
    dy_ptr, dz_in_ptr, z_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr, dz_ptr, dx_ptr,
    stride_dym, stride_dzm, stride_zm, M, N, threshold: tl.uint32, scale,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row in blocks of columns: its two sums first, then dz and dx."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    mask_m = rows < M
    mean = tl.zeros([1], tl.float32)
    if KIND == 0:
        mean = tl.load(mean_ptr + rows)
    rstd = tl.load(rstd_ptr + rows)
    sum_wdy = tl.zeros([1], tl.float32)
    sum_wdy_xhat = tl.zeros([1], tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        _, xhat, wdy = _load_xhat_wdy(dy_ptr, z_ptr, weight_ptr, mean, rstd, rows, cols,
                                      mask_m, cols < N, stride_dym, stride_zm, KIND)  # fmt: skip
        sum_wdy_xhat += tl.sum(wdy * xhat, 1)
        sum_wdy += tl.sum(wdy, 1)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        _, xhat, wdy = _load_xhat_wdy(dy_ptr, z_ptr, weight_ptr, mean, rstd, rows, cols,
                                      mask_m, cols < N, stride_dym, stride_zm, KIND)  # fmt: skip
        dz = wdy - xhat * (sum_wdy_xhat / N)[:, None]
        if KIND == 0:
            dz -= (sum_wdy / N)[:, None]
        _store_dz(dz * rstd[:, None], dz_in_ptr, seed_ptr, dz_ptr, dx_ptr, rows, cols,
                  (cols < N)[None, :], stride_dzm, N, threshold, scale, start, BLOCK_N)  # fmt: skip


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
    dweight = tl.zeros([BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(group, tl.cdiv(M, BLOCK_M), groups):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = rows < M
        mean = tl.zeros([BLOCK_M], tl.float32)
        if KIND == 0:
            mean = tl.load(mean_ptr + rows, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)
        dy, xhat, _ = _load_xhat_wdy(dy_ptr, z_ptr, None, mean, rstd, rows, cols,
                                     mask_m, mask_n, stride_dym, stride_zm, KIND)  # fmt: skip
        dweight += tl.sum(dy * xhat, 0)
        dbias += tl.sum(dy, 0)
    partial = group * N + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, dweight, mask=mask_n)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, dbias, mask=mask_n)


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
    dweight, dbias = new(N, dweight_dtype), new(N, dbias_dtype)
    if M == 0:
        dweight, dbias = (None if x is None else x.zero_() for x in (dweight, dbias))
        return out_dz, out_dx, dweight, dbias
    config = row_config(N)
    wide = N > WIDEST_ROW
    # Half of the forward's tile: twice as many values are alive, and sm_100 spilled otherwise.
    tile_m = 4 if wide else max(1, config.block_m // 2)
    programs = min(ceil_div(M, tile_m), (1 if wide else 4) * multiprocessors(z.device))
    # One row a program, summed in a fixed order.
    partials = [new((programs, N), None if x is None else torch.float32) for x in (dweight, dbias)]
    threshold, scale = dropout_args(dropout_p)
    ins = (dy, dz, z, weight, mean, rstd, seed, out_dz, out_dx)
    sizes = (dy.stride(0), 0 if dz is None else dz.stride(0), z.stride(0), M, N, threshold, scale)
    fused = dict(KIND=KINDS[kind], enable_fp_fusion=True)
    common = dict(fused, BLOCK_N=config.block_n, num_warps=config.num_warps)
    if not wide:
        launch(_norm_bwd_kernel, programs, *ins, *partials, *sizes, BLOCK_M=tile_m, **common)
    else:
        if out_dz is not None or out_dx is not None:
            launch(_norm_bwd_wide_kernel, M, *ins, *sizes, **common)
        if dweight is not None or dbias is not None:
            launch(
                _norm_dweight_kernel, ceil_div(N, 512) * programs, dy, z, mean, rstd, *partials,
                dy.stride(0), z.stride(0), M, N, programs, BLOCK_M=tile_m, BLOCK_N=512, **fused,
            )  # fmt: skip
    column_sums(partials, (dweight, dbias))
    return out_dz, out_dx, dweight, dbias
