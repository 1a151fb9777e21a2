"""LayerNorm and RMSNorm with dropout and residual add: the forward pass.

    z = residual + dropout(x);  xhat = (z - mean) * rstd;  y = xhat * weight + bias

RMSNorm has no mean. Rows of up to 8,192 columns are read once; so are those of up to 16,384 of
halves without dropout, in whole 32 bytes (not measured). Others are read twice.

Source: Ba et al., arXiv:1607.06450; Zhang and Sennrich, arXiv:1910.07467.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlm.kernels.configs import ceil_div, dropout_args, multiprocessors, norm_config
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
    xhat, w, b, weight_ptr, bias_ptr, cols, mask_n, x_dtype: tl.constexpr, KIND: tl.constexpr
):
    """weight and bias in fp32; KIND 2 rounds xhat first (Llama), 3 adds 1 to weight (Gemma).

    w, b: weight and bias at `cols` where they are loaded already, else None.
    """
    if KIND == 2:
        xhat = xhat.to(x_dtype).to(tl.float32)
    if weight_ptr is not None:
        if w is None:
            w = tl.load(weight_ptr + cols, mask=mask_n, other=0.0)
        w = w.to(tl.float32)
        if KIND == 3:
            w += 1.0
        xhat = xhat * w[None, :]
    if bias_ptr is not None:
        if b is None:
            b = tl.load(bias_ptr + cols, mask=mask_n, other=0.0)
        xhat += b.to(tl.float32)[None, :]
    return xhat


@triton.jit
def _normalised(
    tile, x_ptr, residual_ptr, seed_ptr, z_ptr, mean_ptr, rstd_ptr,
    stride_xm, stride_rm, M, N, eps, threshold, scale,
    Z_DTYPE: tl.constexpr, KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(xhat, its offsets, their mask) of a tile of whole rows; stores z, mean and rstd."""
    rows = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
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
    return z * rstd[:, None], out, mask


@triton.jit
def _norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr,
    y_ptr, z_ptr, mean_ptr, rstd_ptr,
    stride_xm, stride_rm, M, N, eps, threshold: tl.uint32, scale,
    Z_DTYPE: tl.constexpr, KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, STRIDED: tl.constexpr,
):  # fmt: skip
    """Tiles of whole rows: y, z, mean and rstd.

    One a program; or, STRIDED, strided over programs, and loaded STAGES - 1 ahead.
    Bytes an element of e: reads x, writes y: 2 e, 4 for halves; with residual and z 4 e, 8. A row:
    4 for each of mean and rstd. weight and bias stay in the cache.
    """
    cols = tl.arange(0, BLOCK_N)
    mask_n = cols < N
    w, b = None, None
    if STRIDED:
        # Before the loop, or it would copy them for every tile as it does x.
        if weight_ptr is not None:
            w = tl.load(weight_ptr + cols, mask=mask_n, other=0.0)
        if bias_ptr is not None:
            b = tl.load(bias_ptr + cols, mask=mask_n, other=0.0)
        for tile in tl.range(
            tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=STAGES
        ):
            xhat, out, mask = _normalised(
                tile, x_ptr, residual_ptr, seed_ptr, z_ptr, mean_ptr, rstd_ptr,
                stride_xm, stride_rm, M, N, eps, threshold, scale, Z_DTYPE, KIND, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            y = _scale_shift(xhat, w, b, weight_ptr, bias_ptr, cols, mask_n,
                             x_ptr.dtype.element_ty, KIND)  # fmt: skip
            tl.store(y_ptr + out, y, mask=mask)
    else:
        xhat, out, mask = _normalised(
            tl.program_id(0), x_ptr, residual_ptr, seed_ptr, z_ptr, mean_ptr, rstd_ptr,
            stride_xm, stride_rm, M, N, eps, threshold, scale, Z_DTYPE, KIND, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        y = _scale_shift(xhat, w, b, weight_ptr, bias_ptr, cols, mask_n,
                         x_ptr.dtype.element_ty, KIND)  # fmt: skip
        tl.store(y_ptr + out, y, mask=mask)


@triton.jit
def _norm_fwd_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr,
    y_ptr, z_ptr, mean_ptr, rstd_ptr,
    stride_xm, stride_rm, M, N, eps, threshold: tl.uint32, scale,
    Z_DTYPE: tl.constexpr, KIND: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row in blocks of columns: means and squares are merged block by block (Chan et al.).

    Bytes an element of e: reads x twice, writes y: 3 e, 6 for halves; residual 2 e more, z e. A
    row: 4 for each of mean and rstd.
    """
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    mean = tl.zeros([1], tl.float32)
    m2 = tl.zeros([1], tl.float32)
    for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
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
    for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK_N)
        mask = (cols < N)[None, :]
        z = _load_z(x_ptr, residual_ptr, seed_ptr, Z_DTYPE, rows, cols, mask,
                    stride_xm, stride_rm, threshold, scale, start, BLOCK_N)  # fmt: skip
        y = _scale_shift((z - mean[:, None]) * rstd[:, None], None, None, weight_ptr, bias_ptr,
                         cols, cols < N, x_ptr.dtype.element_ty, KIND)  # fmt: skip
        tl.store(y_ptr + rows[:, None] * N + cols[None, :], y, mask=mask)


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
    config = norm_config("fwd", N, z_dtype.itemsize, bias is not None, seed is not None, x.device)
    threshold, scale = dropout_args(dropout_p)
    tensors = (x, residual, weight, bias, seed, y, z, mean, rstd)
    stride_rm = 0 if residual is None else residual.stride(0)
    sizes = (x.stride(0), stride_rm, M, N, eps, threshold, scale)
    constants = dict(Z_DTYPE=_TRITON_DTYPES[z_dtype], KIND=KINDS[kind], **config.options())
    if N > config.block_n:
        launch(_norm_fwd_wide_kernel, M, *tensors, *sizes, **constants)
    else:
        tiles = ceil_div(M, config.block_m)
        programs = min(tiles, config.programs * multiprocessors(x.device)) or tiles
        strided = dict(BLOCK_M=config.block_m, STRIDED=config.programs > 0)
        launch(_norm_fwd_kernel, programs, *tensors, *sizes, **strided, **constants)
    return y, z, mean, rstd
