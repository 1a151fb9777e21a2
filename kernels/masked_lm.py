"""The transform of a masked language model's head, on the masked rows alone.

    z = x @ dense_weight.T + dense_bias;  a = activation(z);  y = LayerNorm(a)
    da = rstd * (wdy - mean(wdy) - ahat * mean(wdy * ahat)),   wdy = dy * norm_weight
    dz = da * activation'(z);  dx = dz @ dense_weight;  ddense_weight = dz.T @ x

The rows that have a label are gathered in order (kernels/compact.py), and nothing is computed for
the others: x is read and dx written where they are, zeros elsewhere. Between the products one
program handles whole rows: the forward reads z and writes y once, the backward reads dy and z once,
writes dz, and leaves one fp32 row a program of the sums for the vectors, added in a fixed order.
z is kept; x is gathered again for the backward.

Source: Devlin et al., "BERT", arXiv:1810.04805, and its code (the transform of the head).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlm.kernels.compact import (
    compact,
    gather,
    is_aligned,
    new_rows,
    padded_rows,
    padded_shape,
    rows_left,
    rows_outer,
    rows_times_matrix,
    rows_times_weight,
    scatter,
    with_unit_stride,
)
from fastlm.kernels.configs import (
    matmul_config,
    multiprocessors,
    row_config,
    row_padding,
)
from fastlm.kernels.primitives import activate


@triton.jit
def _transform_fwd_kernel(
    z_ptr, weight_ptr, bias_ptr, target_ptr, index_ptr, count_ptr,
    y_ptr, mean_ptr, rstd_ptr, label_ptr,
    stride_zm, stride_t, ROWS, N, eps, ignore_index,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row: y, mean, rstd, and its label; `ignore_index` behind the last masked row.

    Bytes an element of e of a masked row: reads z, writes y: 2 e, 4 for halves; a masked row: 8 of
    mean and rstd, 4 of index, 4 or 8 of its target. Every row: a label, 8.
    """
    row = tl.program_id(0)
    left = rows_left(count_ptr, 0, ROWS)
    rows = row.to(tl.int64) + tl.arange(0, 1)
    source = tl.load(index_ptr + rows, mask=rows < left, other=0).to(tl.int64)
    label = tl.load(target_ptr + source * stride_t, mask=rows < left, other=0).to(tl.int64)
    tl.store(label_ptr + rows, tl.where(rows < left, label, ignore_index))
    if row < left:
        cols = tl.arange(0, BLOCK_N)
        mask = (cols < N)[None, :]
        z = tl.load(z_ptr + (rows * stride_zm)[:, None] + cols[None, :], mask=mask, other=0.0)
        a, _ = activate(z.to(tl.float32), ACTIVATION)
        mean = tl.sum(tl.where(mask, a, 0.0), 1) / N
        a = tl.where(mask, a - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(a * a, 1) / N + eps)
        w = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        b = tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        y = a * rstd[:, None] * w[None, :] + b[None, :]
        tl.store(y_ptr + (rows * N)[:, None] + cols[None, :], y, mask=mask)
        tl.store(mean_ptr + rows, mean)
        tl.store(rstd_ptr + rows, rstd)


@triton.jit
def _transform_bwd_kernel(
    dy_ptr, z_ptr, weight_ptr, mean_ptr, rstd_ptr, count_ptr, dz_ptr, dweight_ptr, dbias_ptr,
    ddense_bias_ptr, stride_dym, stride_zm, ROWS, N,
    ACTIVATION: tl.constexpr, PADDING: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows strided over programs: dz, and a row of each vector's gradient a program.

    Bytes an element of e of a masked row: reads dy and z, writes dz: 3 e, 6 for halves; a masked
    row: 8 of mean and rstd. A program: 12 a column of the three gradients.
    """
    pid = tl.program_id(0).to(tl.int64)
    left = rows_left(count_ptr, 0, ROWS)
    cols = tl.arange(0, BLOCK_N)
    mask_n = cols < N
    w = tl.load(weight_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    ddense_bias = tl.zeros([BLOCK_N], tl.float32)
    for row in range(pid, left, tl.num_programs(0)):
        row = tl.cast(row, tl.int64)
        mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
        z = tl.load(z_ptr + row * stride_zm + cols, mask=mask_n, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * stride_dym + cols, mask=mask_n, other=0.0).to(tl.float32)
        a, slope = activate(z, ACTIVATION)
        ahat = tl.where(mask_n, (a - mean) * rstd, 0.0)
        wdy = dy * w
        da = (wdy - tl.sum(wdy, 0) / N - ahat * (tl.sum(wdy * ahat, 0) / N)) * rstd
        dz = da * slope
        tl.store(dz_ptr + row * stride_zm + cols, dz, mask=mask_n)
        dweight += dy * ahat
        dbias += dy
        ddense_bias += tl.where(mask_n, dz, 0.0)
    for row in range(left + pid, padded_rows(left, PADDING), tl.num_programs(0)):
        zeros = tl.zeros([BLOCK_N], tl.float32)
        tl.store(dz_ptr + tl.cast(row, tl.int64) * stride_zm + cols, zeros, mask=mask_n)
    partial = pid * N + cols
    tl.store(dweight_ptr + partial, dweight, mask=mask_n)
    tl.store(dbias_ptr + partial, dbias, mask=mask_n)
    tl.store(ddense_bias_ptr + partial, ddense_bias, mask=mask_n)


def masked_transform_fwd(
    x: torch.Tensor,
    target: torch.Tensor,
    dense_weight: torch.Tensor,
    dense_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    dtype: torch.dtype,
    activation: str,
    eps: float,
    ignore_index: int,
) -> tuple[torch.Tensor, ...]:
    """(y, label, index, count, z, mean, rstd) of the rows whose target is not `ignore_index`.

    y (tokens, width) in `dtype` and label (tokens,) int64 begin with the masked rows, in order; the
    rest of y is not written, that of label is `ignore_index`. index, count: as in `compact`. z:
    (tokens padded, width padded).

    Args:
        x, target: (tokens, dim), (tokens,), any strides.
        dense_weight: (width, dim); the others are (width,), contiguous. Any floating dtype.
        dtype: of the product, which is rounded to it.
    """
    (tokens, dim), width, device = x.shape, dense_weight.shape[0], x.device
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=device)
    y, label = new(tokens, width, dtype=dtype), new(tokens, dtype=torch.int64)
    mean, rstd = new(tokens), new(tokens)
    rows, _ = padded_shape(tokens, width, device)
    index, count, _ = compact(target, None, ignore_index, 0)
    z = new_rows(rows, width, dtype, device)
    if tokens == 0:
        return y, label, index, count, z, mean, rstd
    x_c = new_rows(rows, dim, dtype, device)
    gather(x, index, count, 0, x_c[:, :dim])
    weight = with_unit_stride(dense_weight, dtype)
    product = matmul_config("logits", device, dtype, is_aligned(weight))
    rows_times_weight(x_c[:, :dim], weight, dense_bias, count, 0, z, product)
    config = row_config(width)
    _transform_fwd_kernel[(tokens,)](
        z, norm_weight, norm_bias, target, index, count, y, mean, rstd, label,
        z.stride(0), target.stride(0), tokens, width, eps, ignore_index,
        ACTIVATION=activation, BLOCK_N=config.block_n, num_warps=config.num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y, label, index, count, z, mean, rstd


def masked_transform_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    dense_weight: torch.Tensor,
    norm_weight: torch.Tensor,
    index: torch.Tensor,
    count: torch.Tensor,
    z: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    activation: str,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, ddense_weight, ddense_bias, dnorm_weight, dnorm_bias): the first two in the dtypes of x
    and dense_weight, empty where not needed; the vectors in fp32. dy: (tokens, width), last
    stride 1; its rows behind the masked ones are not read."""
    (tokens, dim), width, device = x.shape, dense_weight.shape[0], x.device
    dx = torch.zeros((tokens, dim) if need_dx else (0,), dtype=x.dtype, device=device)
    shape = (width, dim) if need_dweight else (0,)
    make = torch.zeros if tokens == 0 else torch.empty
    dweight = make(shape, dtype=dense_weight.dtype, device=device)
    if tokens == 0:
        return (
            dx,
            dweight,
            *(torch.zeros(width, dtype=torch.float32, device=device) for _ in range(3)),
        )
    rows, config = z.shape[0], row_config(width)
    dz = torch.empty_like(z)
    programs = min(tokens, 4 * multiprocessors(device))
    partial = torch.empty((3, programs, width), dtype=torch.float32, device=device)
    _transform_bwd_kernel[(programs,)](
        dy, z, norm_weight, mean, rstd, count, dz, *partial,
        dy.stride(0), z.stride(0), tokens, width,
        ACTIVATION=activation, PADDING=row_padding(device), BLOCK_N=config.block_n,
        num_warps=config.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    if need_dx:
        parts = torch.empty((1, rows, dim), dtype=torch.float32, device=device)
        weight = with_unit_stride(dense_weight, z.dtype)
        product = matmul_config("dx", device, z.dtype, is_aligned(weight))
        rows_times_matrix(dz[:, :width], weight, count, 0, parts, product)
        scatter(parts, index, count, 0, dx)
    if need_dweight:
        x_c = new_rows(rows, dim, z.dtype, device)
        gather(x, index, count, 0, x_c[:, :dim])
        rows_outer(dz[:, :width], x_c[:, :dim], count, 0, dweight, False,
                   matmul_config("dweight", device, z.dtype))  # fmt: skip
    dnorm_weight, dnorm_bias, ddense_bias = (p.sum(0) for p in partial)
    return dx, dweight, ddense_bias, dnorm_weight, dnorm_bias
