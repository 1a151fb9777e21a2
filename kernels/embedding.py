"""Token, position and type embeddings with LayerNorm and dropout, forward and backward.

    z = token[ids] + position[positions] + type[type_ids];   y = dropout(layer_norm(z))
    dz = rstd * (wdy - mean(wdy) - xhat * mean(wdy * xhat)),   wdy = dropout(dy) * weight
    dtable[v] = sum of dz over the tokens that looked up row v

The rows of positions and types come from the L2 cache. The forward keeps mean and rstd, and not z:
to keep it would cost a write and a read of each element, to look it up again is a read alone. The
backward writes dz in the widest dtype of the tables that want it, and each table's gradient reads
dz once and writes every row of the table once (kernels/segments.py) or, for positions 0, 1, ... and
one type, adds dz along the batch. Without LayerNorm and dropout dz is dy, and there is no kernel
but those of the tables. dweight and dbias are sums of one fp32 row for each program, added in a
fixed order.

Rows of up to `WIDEST_ROW` columns are normalised in registers; wider ones look z up twice. An id
outside its table reads nothing outside it: its token's result is NaN, and its gradient goes to no
row of that table.

Sources: Vaswani et al., arXiv:1706.03762, section 3.4; Devlin et al., arXiv:1810.04805.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlm.kernels.column_sum import column_sums
from fastlm.kernels.configs import (
    WIDEST_ROW,
    RowConfig,
    ceil_div,
    dropout_args,
    multiprocessors,
    row_config,
    tile_config,
)
from fastlm.kernels.norm import _scale_shift
from fastlm.kernels.primitives import dropout_keep
from fastlm.kernels.segments import segment_sum

# NORM of the kernels: no LayerNorm; of rows that are within a tile; by sums that are given.
_NO_NORM, _IN_TILE, _GIVEN = 0, 1, 2


@triton.jit
def _table_rows(
    ids_ptr, table_ptr, at, mask_m, cols, mask_n, table_rows, stride_v, stride_n
):  # fmt: skip
    """Rows of a table in fp32, NaN where the id is outside. [BLOCK_M, BLOCK_N]"""
    ids = tl.load(ids_ptr + at, mask=mask_m, other=0).to(tl.int64)
    inside = (ids >= 0) & (ids < table_rows)
    row = tl.where(inside, ids, 0)[:, None] * stride_v
    mask = (mask_m & inside)[:, None] & mask_n[None, :]
    w = tl.load(table_ptr + row + (cols * stride_n)[None, :], mask=mask, other=float("nan"))
    return w.to(tl.float32)


@triton.jit
def _lookup(
    ids_ptr, positions_ptr, type_ids_ptr, token_ptr, position_ptr, type_ptr,
    stride_ib, stride_is, stride_pb, stride_ps, stride_tb, stride_ts,
    stride_wv, stride_wn, stride_qv, stride_qn, stride_uv, stride_un,
    vocab, max_seqlen, num_types, S, rows, cols, mask_m, mask_n,
):  # fmt: skip
    """z of some tokens in fp32, added in the reference's order; 0 outside the mask."""
    batch, token = rows // S, rows % S
    z = _table_rows(ids_ptr, token_ptr, batch * stride_ib + token * stride_is, mask_m, cols,
                    mask_n, vocab, stride_wv, stride_wn)  # fmt: skip
    if position_ptr is not None:
        if positions_ptr is not None:
            z += _table_rows(positions_ptr, position_ptr, batch * stride_pb + token * stride_ps,
                             mask_m, cols, mask_n, max_seqlen, stride_qv, stride_qn)  # fmt: skip
        else:
            at = (token * stride_qv)[:, None] + (cols * stride_qn)[None, :]
            mask = mask_m[:, None] & mask_n[None, :]
            z += tl.load(position_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if type_ptr is not None:
        if type_ids_ptr is not None:
            z += _table_rows(type_ids_ptr, type_ptr, batch * stride_tb + token * stride_ts,
                             mask_m, cols, mask_n, num_types, stride_uv, stride_un)  # fmt: skip
        else:
            w = tl.load(type_ptr + cols * stride_un, mask=mask_n, other=0.0)
            z += w.to(tl.float32)[None, :]
    return tl.where(mask_m[:, None] & mask_n[None, :], z, 0.0)


@triton.jit
def _embedding_fwd_kernel(
    ids_ptr, positions_ptr, type_ids_ptr, token_ptr, position_ptr, type_ptr,
    stride_ib, stride_is, stride_pb, stride_ps, stride_tb, stride_ts,
    stride_wv, stride_wn, stride_qv, stride_qn, stride_uv, stride_un,
    vocab, max_seqlen, num_types, S,
    weight_ptr, bias_ptr, seed_ptr, y_ptr, mean_ptr, rstd_ptr,
    M, N, eps, col_tiles, threshold: tl.uint32, scale,
    NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of y, and where the tile has whole rows, their mean and rstd.

    Bytes an element of e: reads the token's, writes y: 2 e, 4 for halves. A row for each block of
    columns: ids of 4 or 8 each, and 8 of mean and rstd.
    """
    pid = tl.program_id(0)
    first_col = (pid % col_tiles).to(tl.int64) * BLOCK_N
    rows = (pid // col_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    mask_m, mask_n = rows < M, cols < N
    mask = mask_m[:, None] & mask_n[None, :]
    y = _lookup(
        ids_ptr, positions_ptr, type_ids_ptr, token_ptr, position_ptr, type_ptr,
        stride_ib, stride_is, stride_pb, stride_ps, stride_tb, stride_ts,
        stride_wv, stride_wn, stride_qv, stride_qn, stride_uv, stride_un,
        vocab, max_seqlen, num_types, S, rows, cols, mask_m, mask_n,
    )  # fmt: skip
    if NORM > 0:
        if NORM == 1:
            mean = tl.sum(y, 1) / N
            y = tl.where(mask, y - mean[:, None], 0.0)
            rstd = tl.rsqrt(tl.sum(y * y, 1) / N + eps)
            tl.store(mean_ptr + rows, mean, mask=mask_m)
            tl.store(rstd_ptr + rows, rstd, mask=mask_m)
        else:
            y = y - tl.load(mean_ptr + rows, mask=mask_m, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)
        y = _scale_shift(y * rstd[:, None], None, None, weight_ptr, bias_ptr, cols,
                         mask_n, token_ptr.dtype.element_ty, 0)  # fmt: skip
    if seed_ptr is not None:
        keep = dropout_keep(tl.load(seed_ptr), threshold, 0, 0, rows, first_col, BLOCK_N)
        y = tl.where(keep, y * scale, 0.0)
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y, mask=mask)


@triton.jit
def _embedding_stats_kernel(
    ids_ptr, positions_ptr, type_ids_ptr, token_ptr, position_ptr, type_ptr,
    stride_ib, stride_is, stride_pb, stride_ps, stride_tb, stride_ts,
    stride_wv, stride_wn, stride_qv, stride_qn, stride_uv, stride_un,
    vocab, max_seqlen, num_types, S, mean_ptr, rstd_ptr, N, eps, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mean and rstd of one wide row: those of blocks of columns, merged (Chan et al.).

    Bytes an element of e: the token's is read, e: 2 for halves. A row: 8 of mean and rstd.
    """
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    mask_m = rows >= 0
    mean = tl.zeros([1], tl.float32)
    m2 = tl.zeros([1], tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask_n = cols < N
        z = _lookup(
            ids_ptr, positions_ptr, type_ids_ptr, token_ptr, position_ptr, type_ptr,
            stride_ib, stride_is, stride_pb, stride_ps, stride_tb, stride_ts,
            stride_wv, stride_wn, stride_qv, stride_qn, stride_uv, stride_un,
            vocab, max_seqlen, num_types, S, rows, cols, mask_m, mask_n,
        )  # fmt: skip
        count = tl.minimum(BLOCK_N, N - start).to(tl.float32)
        block_mean = tl.sum(z, 1) / count
        z = tl.where(mask_n[None, :], z - block_mean[:, None], 0.0)
        delta = block_mean - mean
        share = count / (start + count)
        mean += delta * share
        m2 += delta * delta * share * start + tl.sum(z * z, 1)
    tl.store(mean_ptr + rows, mean)
    tl.store(rstd_ptr + rows, tl.rsqrt(m2 / N + eps))


@triton.jit
def _load_dropped(
    dy_ptr, seed_ptr, rows, cols, mask, stride_dym, threshold, scale, first_col,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dropout(dy) in fp32, 0 outside the mask. [BLOCK_M, BLOCK_N]"""
    dy = tl.load(dy_ptr + rows[:, None] * stride_dym + cols[None, :], mask=mask, other=0.0)
    dy = dy.to(tl.float32)
    if seed_ptr is not None:
        keep = dropout_keep(tl.load(seed_ptr), threshold, 0, 0, rows, first_col, BLOCK_N)
        dy = tl.where(keep, dy * scale, 0.0)
    return dy


@triton.jit
def _embedding_bwd_kernel(
    ids_ptr, positions_ptr, type_ids_ptr, token_ptr, position_ptr, type_ptr,
    stride_ib, stride_is, stride_pb, stride_ps, stride_tb, stride_ts,
    stride_wv, stride_wn, stride_qv, stride_qn, stride_uv, stride_un,
    vocab, max_seqlen, num_types, S,
    dy_ptr, weight_ptr, seed_ptr, mean_ptr, rstd_ptr, sums_ptr, dz_ptr, dweight_ptr, dbias_ptr,
    stride_dym, M, N, groups, threshold: tl.uint32, scale,
    NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of columns over every `groups`-th tile of rows: dz, a row of dweight and dbias.

    Bytes an element of e: reads dy and the token's, writes dz: 3 e, 6 for halves; without
    LayerNorm reads no token, 2 e. A row for each block of columns: ids of 4 or 8 each, 8 of mean
    and rstd, and 8 of sums that are given. A group: 4 a column of each of dweight and dbias.
    """
    pid = tl.program_id(0)
    group = (pid % groups).to(tl.int64)
    first_col = (pid // groups).to(tl.int64) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    mask_n = cols < N
    dweight = tl.zeros([BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(group, tl.cdiv(M, BLOCK_M), groups):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = rows < M
        mask = mask_m[:, None] & mask_n[None, :]
        dz = _load_dropped(dy_ptr, seed_ptr, rows, cols, mask, stride_dym, threshold, scale,
                           first_col, BLOCK_N)  # fmt: skip
        if NORM > 0:
            mean = tl.load(mean_ptr + rows, mask=mask_m, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)
            z = _lookup(
                ids_ptr, positions_ptr, type_ids_ptr, token_ptr, position_ptr, type_ptr,
                stride_ib, stride_is, stride_pb, stride_ps, stride_tb, stride_ts,
                stride_wv, stride_wn, stride_qv, stride_qn, stride_uv, stride_un,
                vocab, max_seqlen, num_types, S, rows, cols, mask_m, mask_n,
            )  # fmt: skip
            xhat = tl.where(mask, (z - mean[:, None]) * rstd[:, None], 0.0)
            dweight += tl.sum(dz * xhat, 0)
            dbias += tl.sum(dz, 0)
            if dz_ptr is not None:
                w = tl.load(weight_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)
                dz = dz * w[None, :]
                if NORM == 1:
                    mean_wdy, mean_wdy_xhat = tl.sum(dz, 1) / N, tl.sum(dz * xhat, 1) / N
                else:
                    mean_wdy = tl.load(sums_ptr + rows, mask=mask_m, other=0.0)
                    mean_wdy_xhat = tl.load(sums_ptr + M + rows, mask=mask_m, other=0.0)
                dz = (dz - mean_wdy[:, None] - xhat * mean_wdy_xhat[:, None]) * rstd[:, None]
        if dz_ptr is not None:
            tl.store(dz_ptr + rows[:, None] * N + cols[None, :], dz, mask=mask)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + group * N + cols, dweight, mask=mask_n)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + group * N + cols, dbias, mask=mask_n)


@triton.jit
def _embedding_bwd_sums_kernel(
    ids_ptr, positions_ptr, type_ids_ptr, token_ptr, position_ptr, type_ptr,
    stride_ib, stride_is, stride_pb, stride_ps, stride_tb, stride_ts,
    stride_wv, stride_wn, stride_qv, stride_qn, stride_uv, stride_un,
    vocab, max_seqlen, num_types, S,
    dy_ptr, weight_ptr, seed_ptr, mean_ptr, rstd_ptr, sums_ptr,
    stride_dym, M, N, threshold: tl.uint32, scale, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """mean(wdy) and mean(wdy * xhat) of one wide row, in blocks of columns. sums: (2, M)

    Bytes an element of e: reads dy and the token's: 2 e, 4 for halves. A row: 8 of mean and rstd,
    8 of sums.
    """
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    mask_m = rows < M
    mean, rstd = tl.load(mean_ptr + rows), tl.load(rstd_ptr + rows)
    sum_wdy = tl.zeros([1], tl.float32)
    sum_wdy_xhat = tl.zeros([1], tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask_n = cols < N
        mask = mask_m[:, None] & mask_n[None, :]
        dy = _load_dropped(dy_ptr, seed_ptr, rows, cols, mask, stride_dym, threshold, scale,
                           start, BLOCK_N)  # fmt: skip
        z = _lookup(
            ids_ptr, positions_ptr, type_ids_ptr, token_ptr, position_ptr, type_ptr,
            stride_ib, stride_is, stride_pb, stride_ps, stride_tb, stride_ts,
            stride_wv, stride_wn, stride_qv, stride_qn, stride_uv, stride_un,
            vocab, max_seqlen, num_types, S, rows, cols, mask_m, mask_n,
        )  # fmt: skip
        xhat = tl.where(mask, (z - mean[:, None]) * rstd[:, None], 0.0)
        wdy = dy * tl.load(weight_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        sum_wdy += tl.sum(wdy, 1)
        sum_wdy_xhat += tl.sum(wdy * xhat, 1)
    tl.store(sums_ptr + rows, sum_wdy / N)
    tl.store(sums_ptr + M + rows, sum_wdy_xhat / N)


def _lookup_args(ids, positions, type_ids, token, position, type_weight) -> tuple:
    """The arguments of `_lookup` up to S; what is None has strides and sizes 0."""
    indices, tables = (ids, positions, type_ids), (token, position, type_weight)
    strides = []
    for x in indices:  # (seqlen,) is the same for every sequence
        given = (0, 0) if x is None else x.stride()
        strides += given if len(given) == 2 else (0, *given)
    for x in tables:
        strides += (0, 0) if x is None else x.stride()
    return (
        *indices,
        *tables,
        *strides,
        *(0 if x is None else x.shape[0] for x in tables),
        (ids.shape[1]),
    )


def embedding_fwd(
    ids: torch.Tensor,
    positions: torch.Tensor | None,
    type_ids: torch.Tensor | None,
    token_weight: torch.Tensor,
    position_weight: torch.Tensor | None,
    type_weight: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    eps: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, mean, rstd) of tokens in rows; the last two are empty without LayerNorm.

    Args:
        ids: (batch, seqlen), any strides; positions and type_ids the same or (seqlen,).
        token_weight, position_weight, type_weight: (rows, dim), any strides.
        norm_weight, norm_bias: (dim,), contiguous.
    """
    M, N = ids.numel(), token_weight.shape[1]
    new = lambda shape, dtype: torch.empty(shape, dtype=dtype, device=ids.device)
    y = new((M, N), token_weight.dtype)
    norm = norm_weight is not None
    mean, rstd = (new(M if norm else 0, torch.float32) for _ in range(2))
    if M == 0 or N == 0:
        return y, mean, rstd
    lookup = _lookup_args(ids, positions, type_ids, token_weight, position_weight, type_weight)
    mode, config = _mode(norm, N)
    if mode == _GIVEN:
        wide = row_config(N)
        _embedding_stats_kernel[(M,)](
            *lookup, mean, rstd, N, eps, BLOCK_N=wide.block_n, num_warps=wide.num_warps,
            enable_fp_fusion=True,
        )  # fmt: skip
    threshold, scale = dropout_args(dropout_p)
    col_tiles = ceil_div(N, config.block_n)
    _embedding_fwd_kernel[(ceil_div(M, config.block_m) * col_tiles,)](
        *lookup, norm_weight, norm_bias, seed, y, mean, rstd, M, N, eps, col_tiles, threshold,
        scale, NORM=mode, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return y, mean, rstd


def _mode(norm: bool, N: int) -> tuple[int, RowConfig]:
    """NORM, and tiles: of whole rows where the kernel itself adds them up."""
    if norm and N <= WIDEST_ROW:
        return _IN_TILE, row_config(N)
    return _GIVEN if norm else _NO_NORM, tile_config(N, 4096)


def embedding_bwd(
    dy: torch.Tensor,
    ids: torch.Tensor,
    positions: torch.Tensor | None,
    type_ids: torch.Tensor | None,
    token_weight: torch.Tensor | None,
    position_weight: torch.Tensor | None,
    type_weight: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    padding_idx: int,
    table_rows: list[int],
    token_dtype: torch.dtype | None,
    position_dtype: torch.dtype | None,
    type_dtype: torch.dtype | None,
    norm_weight_dtype: torch.dtype | None,
    norm_bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the three tables, norm_weight and norm_bias; those whose dtype is None are
    empty and cost nothing.

    Args:
        dy: (tokens, dim), last stride 1; the rest as in `embedding_fwd`.
        token_weight, position_weight, type_weight: read for LayerNorm alone.
        padding_idx: the row of token_weight whose gradient is 0, or -1.
        table_rows: rows of the three tables.
    """
    dtypes = (token_dtype, position_dtype, type_dtype)
    norm_dtypes = (norm_weight_dtype, norm_bias_dtype)
    N = dy.shape[1]
    dz, dvectors = dy, [torch.empty(0, device=dy.device) for _ in norm_dtypes]
    if dy.numel() == 0:
        dvectors = [
            torch.zeros(0 if t is None else N, dtype=t or torch.float32, device=dy.device)
            for t in norm_dtypes
        ]
    elif norm_weight is not None or seed is not None:
        lookup = (ids, positions, type_ids, token_weight, position_weight, type_weight)
        dz, *dvectors = _sum_gradient(
            dy, lookup, norm_weight, mean, rstd, seed, dropout_p, dtypes, norm_dtypes
        )
    indices = (
        ids,
        "arange" if positions is None else positions,
        "zeros" if type_ids is None else type_ids,
    )
    tables = [
        torch.empty(0, device=dy.device)
        if dtype is None
        else _table_gradient(dz.unflatten(0, ids.shape), index, rows, dtype, skip)
        for index, rows, dtype, skip in zip(
            indices, table_rows, dtypes, (padding_idx, -1, -1), strict=True
        )
    ]
    return *tables, *dvectors


def _sum_gradient(
    dy, lookup, norm_weight, mean, rstd, seed, dropout_p, dtypes, norm_dtypes
) -> list[torch.Tensor]:
    """dz, in the widest dtype of `dtypes` (without any, empty), dweight and dbias."""
    M, N = dy.shape
    wanted = [t for t in dtypes if t is not None]
    dz_dtype = wanted[0] if wanted else torch.float32
    for t in wanted:
        dz_dtype = torch.promote_types(dz_dtype, t)
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=dy.device)
    dz = new(M, N, dtype=dz_dtype) if wanted else new(0)
    lookup = (*[None] * 6, *[0] * 15, 1) if norm_weight is None else _lookup_args(*lookup)
    threshold, scale = dropout_args(dropout_p)
    mode, config = _mode(norm_weight is not None, N)
    sums = None
    if mode == _GIVEN and wanted:
        sums, wide = new(2, M), row_config(N)
        _embedding_bwd_sums_kernel[(M,)](
            *lookup, dy, norm_weight, seed, mean, rstd, sums, dy.stride(0), M, N, threshold, scale,
            BLOCK_N=wide.block_n, num_warps=wide.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    # Half of the forward's tile: twice as many values are alive.
    block_m, col_tiles = max(config.block_m // 2, 1), ceil_div(N, config.block_n)
    groups = min(ceil_div(M, block_m), max(4 * multiprocessors(dy.device) // col_tiles, 1))
    parts = [None if t is None else new(groups, N) for t in norm_dtypes]
    _embedding_bwd_kernel[(groups * col_tiles,)](
        *lookup, dy, norm_weight, seed, mean, rstd, sums, dz if wanted else None, *parts,
        dy.stride(0), M, N, groups, threshold, scale,
        NORM=mode, BLOCK_M=block_m, BLOCK_N=config.block_n, num_warps=config.num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    vectors = column_sums(parts, norm_dtypes)
    return [dz, *(new(0) if x is None else x for x in vectors)]


def _table_gradient(dz, index, rows: int, dtype, skip: int) -> torch.Tensor:
    """(rows, dim). dz (batch, seqlen, dim); index: (batch, seqlen), (seqlen,), "arange", or
    "zeros"."""
    batch, seqlen, N = dz.shape
    if isinstance(index, str) or index.dim() == 1:  # the same in every sequence
        over = (0, 1) if isinstance(index, str) and index == "zeros" else 0
        dz = dz[0] if batch == 1 and over == 0 else dz.sum(over, dtype=torch.float32)
    if not isinstance(index, str):
        return segment_sum(dz.reshape(-1, N), index.reshape(-1), rows, dtype, skip)
    out = torch.zeros((rows, N), dtype=dtype, device=dz.device)
    out[: seqlen if index == "arange" else 1] = dz
    return out
