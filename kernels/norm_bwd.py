"""LayerNorm and RMSNorm with dropout and residual add: the backward pass.

    dz = rstd * (wdy - mean(wdy) - xhat * mean(wdy * xhat)) + dz_in,   wdy = dy * weight
    dresidual = dz;  dx = dropout(dz);  dweight = sum_rows(dy * xhat);  dbias = sum_rows(dy)

RMSNorm drops the mean(wdy) term. The mask is replayed from the seed; dweight and dbias are sums of
one fp32 row per program, which `column_sums` adds in a fixed order. How often dy and z are read:

    up to 8,192 columns    once
    up to 12,288           the same for halves without dropout, in whole 32 bytes, and up to 16,384
                           where there is no dbias; not measured
    else, up to 16,384     twice: once more for dweight and dbias
    wider                  three times, of which one is soon after another, by then in the L2 cache

Partial sums, written once and read once, are for each vector 1 to 4 rows a multiprocessor, of 4
bytes a column, where rows are read once, and about 16 KB a multiprocessor else.

Source: Ba et al., arXiv:1607.06450; Zhang and Sennrich, arXiv:1910.07467.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlm.kernels.column_sum import column_sums
from fastlm.kernels.configs import ceil_div, dropout_args, multiprocessors, norm_config
from fastlm.kernels.launch import launch
from fastlm.kernels.norm import KINDS
from fastlm.kernels.primitives import dropout_keep


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
def _load_weight(weight_ptr, cols, mask_n):
    # As a tile of one row: its layout is dy's, without an exchange between warps.
    return tl.load(weight_ptr + cols[None, :], mask=mask_n[None, :], other=0.0)


@triton.jit
def _xhat_wdy(dy, z, mean, rstd, w, weight_ptr, cols, mask, mask_n, KIND: tl.constexpr):
    """dy, xhat and dy * weight in fp32, 0 outside the mask. [BLOCK_M, BLOCK_N] each

    w: from `_load_weight`, or None where it is loaded here.
    """
    dy = dy.to(tl.float32)
    xhat = tl.where(mask, (z.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
    wdy = dy
    if weight_ptr is not None:
        if w is None:
            w = _load_weight(weight_ptr, cols, mask_n)
        w = w.to(tl.float32)
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
    STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of whole rows, strided over programs: dz, dx, a row of dweight and dbias a program.

    AHEAD: a tile is loaded, into registers, before the one before it is worked on. STAGES: of the
    loop, which loads STAGES - 1 tiles ahead, into shared memory.
    Bytes an element of e: reads dy and z, writes dz: 3 e, 6 for halves; e more for each of dz_in
    and a dx of its own. A row: 4 for each of mean and rstd. weight stays in the cache.
    """
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask_n = cols < N
    # Rows of narrow tiles lie in different warps, which exchange at the end alone.
    spread: tl.constexpr = BLOCK_N < 1024
    dweight = tl.zeros([BLOCK_M if spread else 1, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M if spread else 1, BLOCK_N], tl.float32)
    w = None
    if STAGES > 1 and weight_ptr is not None:  # or the loop would copy it for every tile
        w = _load_weight(weight_ptr, cols, mask_n)
    if AHEAD:
        rows = pid * BLOCK_M + tl.arange(0, BLOCK_M)
        dy, z, mean, rstd = _load_rows(
            dy_ptr, z_ptr, mean_ptr, rstd_ptr, rows, cols, rows < M, mask_n,
            stride_dym, stride_zm, KIND,
        )  # fmt: skip
    for tile in tl.range(pid, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
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
        dy32, xhat, wdy = _xhat_wdy(dy, z, mean, rstd, w, weight_ptr, cols, mask, mask_n, KIND)
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
def _part_columns(part: tl.constexpr, PARTS: tl.constexpr, N, BLOCK_N: tl.constexpr):
    """The columns of a block, and which of them there are: of all blocks but the last, all."""
    cols = part * BLOCK_N + tl.arange(0, BLOCK_N)
    if part < PARTS - 1:
        return cols, tl.full([BLOCK_N], True, tl.int1)
    else:
        return cols, cols < N


@triton.jit
def _norm_bwd_parts_kernel(
    dy_ptr, dz_in_ptr, z_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr,
    dz_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    stride_dym, stride_dzm, stride_zm, M, N, threshold: tl.uint32, scale,
    KIND: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`_norm_bwd_kernel` for one row at a time, in PARTS blocks of columns that stay in registers
    with their sums: one tile of a power of two of columns would not.

    All blocks but the last are whole, and need no mask.
    Bytes an element of e: 3 e, 6 for halves, and the rest, as in `_norm_bwd_kernel`.
    """
    pid = tl.program_id(0).to(tl.int64)
    there = tl.full([1], True, tl.int1)
    dweights, dbiases = (), ()
    for _i in tl.static_range(PARTS):
        dweights += (tl.zeros([1, BLOCK_N], tl.float32),)
        dbiases += (tl.zeros([1, BLOCK_N], tl.float32),)
    for row in tl.range(pid, M, tl.num_programs(0), num_stages=STAGES):
        rows = tl.cast(row, tl.int64) + tl.arange(0, 1)
        dys, zs, mores = (), (), ()
        for part in tl.static_range(PARTS):
            cols, mask_n = _part_columns(part, PARTS, N, BLOCK_N)
            dy, z, mean, rstd = _load_rows(
                dy_ptr, z_ptr, mean_ptr, rstd_ptr, rows, cols, there, mask_n,
                stride_dym, stride_zm, KIND,
            )  # fmt: skip
            dys, zs = dys + (dy,), zs + (z,)
            if dz_in_ptr is not None:
                mores += (tl.load(dz_in_ptr + rows[:, None] * stride_dzm + cols[None, :],
                                  mask=mask_n[None, :], other=0.0),)  # fmt: skip
        sums_wdy = tl.zeros([1, BLOCK_N], tl.float32)
        sums_wdy_xhat = tl.zeros([1, BLOCK_N], tl.float32)
        new_dweights, new_dbiases = (), ()
        for part in tl.static_range(PARTS):
            cols, mask_n = _part_columns(part, PARTS, N, BLOCK_N)
            dy, xhat, wdy = _xhat_wdy(dys[part], zs[part], mean, rstd, None, weight_ptr, cols,
                                      mask_n[None, :], mask_n, KIND)  # fmt: skip
            new_dweights += (dweights[part] + dy * xhat,)
            new_dbiases += (dbiases[part] + dy,)
            sums_wdy += wdy
            sums_wdy_xhat += wdy * xhat
        dweights, dbiases = new_dweights, new_dbiases
        sum_wdy, sum_wdy_xhat = tl.sum(sums_wdy, 1), tl.sum(sums_wdy_xhat, 1)
        for part in tl.static_range(PARTS):
            cols, mask_n = _part_columns(part, PARTS, N, BLOCK_N)
            mask = mask_n[None, :]
            dy, xhat, wdy = _xhat_wdy(dys[part], zs[part], mean, rstd, None, weight_ptr, cols, mask,
                                      mask_n, KIND)  # fmt: skip
            dz = _dz(wdy, xhat, rstd, sum_wdy, sum_wdy_xhat, N, KIND)
            if dz_in_ptr is not None:
                dz += mores[part].to(tl.float32)
            _store_dz(dz, seed_ptr, dz_ptr, dx_ptr, rows, cols, mask, N, threshold, scale,
                      part * BLOCK_N, BLOCK_N)  # fmt: skip
    for part in tl.static_range(PARTS):
        cols, mask_n = _part_columns(part, PARTS, N, BLOCK_N)
        if dweight_ptr is not None:
            tl.store(dweight_ptr + pid * N + cols, tl.sum(dweights[part], 0), mask=mask_n)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + pid * N + cols, tl.sum(dbiases[part], 0), mask=mask_n)


@triton.jit
def _norm_bwd_wide_kernel(
    dy_ptr, dz_in_ptr, z_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr, dz_ptr, dx_ptr,
    stride_dym, stride_dzm, stride_zm, M, N, threshold: tl.uint32, scale,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr, EARLY: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One row: dz and dx. WHOLE: it is one block; else blocks are read for the two sums first.

    EARLY: dz_in is loaded before the sums are formed; registers allow it for halves.
    Bytes an element of e: reads dy and z, writes dz: 3 e, 6 for halves; e more for each of dz_in
    and a dx of its own; not WHOLE, dy and z once more, 2 e, from the L2 cache.
    """
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    mask_m = rows < M
    sum_wdy = tl.zeros([1], tl.float32)
    sum_wdy_xhat = tl.zeros([1], tl.float32)
    if not WHOLE:
        for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
            cols = start + tl.arange(0, BLOCK_N)
            mask = (cols < N)[None, :]
            dy, z, mean, rstd = _load_rows(
                dy_ptr, z_ptr, mean_ptr, rstd_ptr, rows, cols, mask_m, cols < N,
                stride_dym, stride_zm, KIND,
            )  # fmt: skip
            _, xhat, wdy = _xhat_wdy(
                dy, z, mean, rstd, None, weight_ptr, cols, mask, cols < N, KIND
            )
            sum_wdy_xhat += tl.sum(wdy * xhat, 1)
            sum_wdy += tl.sum(wdy, 1)
    for start in tl.range(0, BLOCK_N if WHOLE else N, BLOCK_N, num_stages=STAGES):
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
        _, xhat, wdy = _xhat_wdy(dy, z, mean, rstd, None, weight_ptr, cols, mask, cols < N, KIND)
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
    """dweight and dbias of wide rows: a block of columns over every `groups`-th tile of rows.

    Bytes an element of e: reads dy and z: 2 e, 4 for halves. 4 for each of mean and rstd of a row
    for each block of columns; 4 for each of dweight and dbias of a column for each group.
    """
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
        dy, xhat, _ = _xhat_wdy(dy, z, mean, rstd, None, None, cols, mask, mask_n, KIND)
        dweight += dy * xhat
        dbias += dy
    partial = group * N + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=mask_n)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=mask_n)


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
    itemsize = max(x.element_size() for x in (dy, z, dz) if x is not None)
    biased, dropout = dbias_dtype is not None, seed is not None
    config = norm_config("bwd", N, itemsize, biased, dropout, z.device)
    together = config.programs > 0  # dweight and dbias with dz
    # Else of blocks of 512 columns: partials are few, and programs fill the device.
    col_tiles, tile_rows, on_each = 1, config.block_m, config.programs
    if not together:
        col_tiles, tile_rows = ceil_div(N, 512), 4
        on_each = 32 if z.device.type == "cpu" else 8
    programs = ceil_div(on_each * multiprocessors(z.device), col_tiles)
    programs = min(ceil_div(M, tile_rows), programs)
    partials = [new((programs, N), None if x is None else torch.float32) for x in dtypes]
    threshold, scale = dropout_args(dropout_p)
    common = dict(KIND=KINDS[kind], **config.options())
    ins = (dy, dz, z, weight, mean, rstd, seed, out_dz, out_dx)
    sizes = (dy.stride(0), 0 if dz is None else dz.stride(0), z.stride(0), M, N, threshold, scale)
    if together and N > config.block_n:
        parts = ceil_div(N, config.block_n)
        launch(_norm_bwd_parts_kernel, programs, *ins, *partials, *sizes, PARTS=parts, **common)
    elif together:
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
                KIND=KINDS[kind], BLOCK_M=tile_rows, BLOCK_N=512, enable_fp_fusion=True,
            )  # fmt: skip
    return out_dz, out_dx, *column_sums(partials, dtypes)
