"""Rows that count, moved to the front, and matrix products that stop behind the last of them.

How many rows of a batch are kept (targets that are not ignored) only the device knows. `compact`
writes their indices in order, and their number into device memory; the kernels here read that
number. Grids have the size for all rows: programs without a row return at once, nothing waits.

A buffer of gathered rows ends with zeros up to the next multiple of `row_padding`, so that a
product along rows needs no mask: what lies behind is not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlm.kernels.configs import (
    MatmulConfig,
    ceil_div,
    dot_precision,
    matmul_splits,
    multiprocessors,
    next_power_of_2,
    row_padding,
)

ALIGNMENT = 64  # elements: rows of buffers begin at multiples of 16 bytes, for the copy engine


@triton.jit
def rows_left(count_ptr, first, ROWS):
    """How many of the ROWS rows from `first` on are kept, 0 to ROWS. int32"""
    return tl.maximum(tl.minimum(tl.load(count_ptr) - first, ROWS), 0).to(tl.int32)


@triton.jit
def padded_rows(left, PADDING: tl.constexpr):
    return tl.cdiv(left, PADDING) * PADDING


@triton.jit
def _compact_kernel(
    target_ptr, class_weight_ptr, index_ptr, count_ptr, total_ptr, T, V, stride_t, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: indices of kept rows, their number, and the sum of their targets' weights.

    Bytes a row: reads its target, 4 or 8; of a kept row writes its index, 4, and with class weights
    reads one.
    """
    count = tl.zeros([1], tl.int32)
    total = tl.zeros([1], tl.float32)
    for start in range(0, T, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        target = tl.load(target_ptr + rows.to(tl.int64) * stride_t, mask=rows < T, other=0)
        target = target.to(tl.int64)
        kept = (rows < T) & (target != ignore_index)
        before = tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(index_ptr + count + before, rows, mask=kept)
        count += tl.sum(kept.to(tl.int32), 0)
        w = tl.where(kept, 1.0, 0.0)
        if class_weight_ptr is not None:
            named = kept & (target >= 0) & (target < V)
            w = tl.load(class_weight_ptr + target, mask=named, other=0.0).to(tl.float32)
        total += tl.sum(w, 0)
    one = tl.arange(0, 1)
    tl.store(count_ptr + one, count)
    tl.store(total_ptr + one, total)


@triton.jit
def _gather_kernel(
    x_ptr, index_ptr, count_ptr, out_ptr, stride_xm, stride_xn, stride_om, ROWS, N, blocks_n, first,
    PADDING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of out[r] = x[index[first + r]] for kept rows; zeros behind them.

    Bytes an element of e of a kept row: reads x, writes out: 2 e, 4 for halves.
    """
    pid_m, pid_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n
    left = rows_left(count_ptr, first, ROWS)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if pid_m * BLOCK_M < padded_rows(left, PADDING):
        source = tl.load(index_ptr + first + rows, mask=rows < left, other=0).to(tl.int64)
        mask = (rows < left)[:, None] & (cols < N)[None, :]
        columns = cols.to(tl.int64) * stride_xn
        x = tl.load(x_ptr + (source * stride_xm)[:, None] + columns[None, :], mask=mask, other=0.0)
        out = out_ptr + (rows.to(tl.int64) * stride_om)[:, None] + cols[None, :]
        tl.store(out, x, mask=(cols < N)[None, :])


@triton.jit
def _scatter_kernel(
    partial_ptr, index_ptr, count_ptr, out_ptr, stride_s, stride_om, ROWS, N, blocks_n, first,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of out[index[first + r]] = the sum of a product's parts, for kept rows.

    Bytes an element of e of a kept row: reads parts in fp32, writes out: 4 SPLITS + e.
    """
    pid_m, pid_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n
    left = rows_left(count_ptr, first, ROWS)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if pid_m * BLOCK_M < left:
        mask = (rows < left)[:, None] & (cols < N)[None, :]
        offsets = (rows.to(tl.int64) * N)[:, None] + cols[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for split in range(SPLITS):
            part = partial_ptr + tl.cast(split, tl.int64) * stride_s + offsets
            acc += tl.load(part, mask=mask, other=0.0)
        row = tl.load(index_ptr + first + rows, mask=rows < left, other=0).to(tl.int64)
        tl.store(out_ptr + (row * stride_om)[:, None] + cols[None, :], acc, mask=mask)


@triton.jit
def _load_tile(
    desc, ptr, row, col, stride, R, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Rows from `row`, columns from `col` of an R x C matrix, 0 outside: by the copy engine where
    there is a descriptor. [BLOCK_R, BLOCK_C]"""
    if desc is not None:
        return desc.load([row, col])
    else:
        rows, cols = row + tl.arange(0, BLOCK_R), col + tl.arange(0, BLOCK_C)
        mask = (rows < R)[:, None] & (cols < C)[None, :]
        offsets = (rows.to(tl.int64) * stride)[:, None] + cols[None, :]
        return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _matmul_tile(
    tile, tiles, left, a_desc, b_desc, a_ptr, b_ptr, c_ptr, bias_ptr,
    stride_a, stride_b, stride_c, stride_split, M, N, K, ROWS,
    ALONG_ROWS: tl.constexpr, TRANS_B: tl.constexpr, ACCUMULATE: tl.constexpr,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of one part of a product, see `_matmul_kernel`; `left` is M or, ALONG_ROWS, K."""
    split = 0
    if ALONG_ROWS:
        K = left
        blocks_n = tl.cdiv(N, BLOCK_N)
        pid_m, pid_n = tile // blocks_n, tile % blocks_n
    else:
        M = left
        split = tile // tiles
        tile -= split * tiles
        blocks_m = tl.cdiv(M, BLOCK_M)
        pid_m, pid_n = tile % blocks_m, tile // blocks_m
    first_m, first_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    blocks_k = tl.cdiv(K, BLOCK_K)
    low, high = 0, blocks_k
    if not ALONG_ROWS:
        # Not empty, and known not to be: the zeros of an empty loop would be moved into the sums of
        # wgmmas, each of which then waits for the one before it (ptxas of Triton 3.6).
        high = tl.maximum(blocks_k, 1)
    if SPLITS > 1:
        per_split = tl.cdiv(blocks_k, SPLITS)
        low = split * per_split
        high = tl.minimum(low + per_split, blocks_k)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(low, high):
        k = block * BLOCK_K
        if ALONG_ROWS:  # behind the last row are zeros up to the next multiple of `row_padding`
            a = _load_tile(a_desc, a_ptr, k, first_m, stride_a, ROWS, M, BLOCK_K, BLOCK_M)
            a = tl.trans(a)
            b = _load_tile(b_desc, b_ptr, k, first_n, stride_b, ROWS, N, BLOCK_K, BLOCK_N)
        else:
            a = _load_tile(a_desc, a_ptr, first_m, k, stride_a, ROWS, K, BLOCK_M, BLOCK_K)
            if TRANS_B:
                b = _load_tile(b_desc, b_ptr, first_n, k, stride_b, N, K, BLOCK_N, BLOCK_K)
                b = tl.trans(b)
            else:
                b = _load_tile(b_desc, b_ptr, k, first_n, stride_b, K, N, BLOCK_K, BLOCK_N)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    rows, cols = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    if TRANS_B:
        # What lies between N and the stride belongs to the row, and becomes 0: with N, which need
        # not be a multiple of 8, the mask would cut stores into single elements.
        mask = (rows < M)[:, None] & (cols < stride_c)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    c = c_ptr + tl.cast(split, tl.int64) * stride_split if SPLITS > 1 else c_ptr
    c += (rows.to(tl.int64) * stride_c)[:, None] + cols[None, :]
    if ACCUMULATE:
        acc += tl.load(c, mask=mask, other=0.0).to(tl.float32)
    tl.store(c, acc.to(c_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _matmul_kernel(
    a_desc, b_desc, a_ptr, b_ptr, c_ptr, bias_ptr, count_ptr,
    stride_a, stride_b, stride_c, stride_split, M, N, K, first, ROWS,
    ALONG_ROWS: tl.constexpr, TRANS_B: tl.constexpr, ACCUMULATE: tl.constexpr,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STRIDED: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Tiles of parts of a product with kept rows alone: c, or c + it. One a program or, STRIDED,
    strided over programs; FLATTEN: in one pipeline, which loads the next tile during an epilogue.

    Not ALONG_ROWS: c (M, N) = a (M, K) b, where M is at most ROWS; b is (N, K) with TRANS_B, else
    (K, N). ALONG_ROWS: c (M, N) = a^T b, a is (K, M), b (K, N), and K is at most ROWS. Rows are
    counted from `first`. Tiles that share the larger operand's tile are neighbours.
    Bytes an element of e of c: writes SPLITS parts of it, SPLITS e; with ACCUMULATE reads it too,
    2 e. Operands: of elements of f, K f / BLOCK_N of a and K f / BLOCK_M of b, which tiles in work
    at a time share in the L2 cache.
    """
    left = rows_left(count_ptr, first, ROWS)
    tiles = tl.cdiv(M if ALONG_ROWS else left, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    if ACCUMULATE:
        tiles = tl.where(left > 0, tiles, 0)
    if STRIDED:
        for tile in tl.range(tl.program_id(0), tiles * SPLITS, tl.num_programs(0), flatten=FLATTEN):
            _matmul_tile(
                tile, tiles, left, a_desc, b_desc, a_ptr, b_ptr, c_ptr, bias_ptr,
                stride_a, stride_b, stride_c, stride_split, M, N, K, ROWS,
                ALONG_ROWS, TRANS_B, ACCUMULATE, SPLITS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    elif tl.program_id(0) < tiles * SPLITS or (ALONG_ROWS and not ACCUMULATE):  # has all tiles
        _matmul_tile(
            tl.program_id(0), tiles, left, a_desc, b_desc, a_ptr, b_ptr, c_ptr, bias_ptr,
            stride_a, stride_b, stride_c, stride_split, M, N, K, ROWS,
            ALONG_ROWS, TRANS_B, ACCUMULATE, SPLITS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _column_sum_kernel(
    x_ptr, count_ptr, out_ptr, stride_xm, ROWS, N, first,
    ACCUMULATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of columns: out, or out + it = the sum over kept rows, in fp32.

    Bytes an element of e of a kept row: it is read, e. A column: 4, with ACCUMULATE 8.
    """
    left = rows_left(count_ptr, first, ROWS)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = cols < stride_xm  # what lies between N and the stride is read, and dropped
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, left, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < left)[:, None] & mask_n[None, :]
        offsets = (rows.to(tl.int64) * stride_xm)[:, None] + cols[None, :]
        acc += tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    out = tl.sum(acc, 0)
    if ACCUMULATE:
        out += tl.load(out_ptr + cols, mask=cols < N, other=0.0)
    tl.store(out_ptr + cols, out, mask=cols < N)


def compact(
    target: torch.Tensor, class_weight: torch.Tensor | None, ignore_index: int, vocab: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index, count, total) of a vector of targets.

    index (tokens,) int32 begins with the `count` (1,) int32 kept rows, in order; the rest is not
    written. total (1,) fp32 is the sum of their class weights (their number without them).
    """
    tokens = target.shape[0]
    index = torch.empty(tokens, dtype=torch.int32, device=target.device)
    count = torch.empty(1, dtype=torch.int32, device=target.device)
    total = torch.empty(1, dtype=torch.float32, device=target.device)
    block = min(max(next_power_of_2(tokens), 128), 4096)
    _compact_kernel[(1,)](
        target, class_weight, index, count, total, tokens, vocab, target.stride(0), ignore_index,
        BLOCK=block, num_warps=4 if block < 2048 else 8, enable_fp_fusion=True,
    )  # fmt: skip
    return index, count, total


def padded_shape(rows: int, cols: int, device: torch.device) -> tuple[int, int]:
    """Of a buffer that holds all kept rows of `rows`, their padding included."""
    padding = row_padding(device)
    return ceil_div(rows, padding) * padding, ceil_div(cols, ALIGNMENT) * ALIGNMENT


def new_rows(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A buffer of `rows` rows of at least `cols` columns, aligned."""
    padded = ceil_div(cols, ALIGNMENT) * ALIGNMENT
    return torch.empty((rows, padded), dtype=dtype, device=device)


def with_unit_stride(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A matrix in the products' dtype, with its last stride 1: itself where it is so."""
    weight = weight.to(dtype)
    return weight if weight.stride(1) == 1 or weight.shape[1] == 1 else weight.contiguous()


def is_aligned(x: torch.Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes, at different ones each."""
    stride = x.stride(0) * x.element_size()
    return x.data_ptr() % 16 == 0 and stride % 16 == 0 and stride != 0


def gather(x: torch.Tensor, index, count, first: int, out: torch.Tensor) -> None:
    """out (rows, >= cols), last stride 1: kept rows of x (tokens, cols), any strides, and zeros."""
    (rows, _), N = out.shape, x.shape[1]
    block_n = min(max(next_power_of_2(N), 16), 1024)
    padding = row_padding(x.device)
    block_m = min(max(2048 // block_n, 1), padding)
    blocks_n = ceil_div(N, block_n)
    _gather_kernel[(ceil_div(rows, block_m) * blocks_n,)](
        x, index, count, out, x.stride(0), x.stride(1), out.stride(0), rows, N, blocks_n, first,
        PADDING=padding, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def scatter(partial: torch.Tensor, index, count, first: int, out: torch.Tensor) -> None:
    """Rows of out (tokens, cols), contiguous: sums of partial (splits, rows, cols), contiguous."""
    splits, rows, N = partial.shape
    block_n = min(max(next_power_of_2(N), 16), 1024)
    block_m = max(2048 // block_n, 1)
    blocks_n = ceil_div(N, block_n)
    _scatter_kernel[(ceil_div(rows, block_m) * blocks_n,)](
        partial, index, count, out, partial.stride(0), out.stride(0), rows, N, blocks_n, first,
        SPLITS=splits, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def column_sum(x: torch.Tensor, count, first: int, out: torch.Tensor, accumulate: bool) -> None:
    """out (cols,) fp32 (+)= the sum of kept rows of x (rows, >= cols), contiguous."""
    rows, N = x.shape[0], out.shape[0]
    _column_sum_kernel[(ceil_div(N, 128),)](
        x, count, out, x.stride(0), rows, N, first,
        ACCUMULATE=accumulate, BLOCK_M=32, BLOCK_N=128, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def rows_times_weight(
    x: torch.Tensor, weight: torch.Tensor, bias, count, first: int, out: torch.Tensor,
    config: MatmulConfig,
) -> None:  # fmt: skip
    """Kept rows of out (rows, >= vocab) = x @ weight.T + bias, and what a tile has behind column
    `vocab`, zeros; x (rows, dim), weight (vocab, dim)."""
    _launch(x, weight, out, bias, count, first, config, trans_b=True)


def rows_times_matrix(
    x: torch.Tensor, weight: torch.Tensor, count, first: int, partial: torch.Tensor,
    config: MatmulConfig,
) -> None:  # fmt: skip
    """partial (splits, rows, dim) sums to x @ weight; x (rows, vocab), weight (vocab, dim)."""
    _launch(x, weight, partial, None, count, first, config)


def rows_outer(
    x: torch.Tensor, y: torch.Tensor, count, first: int, out: torch.Tensor, accumulate: bool,
    config: MatmulConfig,
) -> None:  # fmt: skip
    """out (n, m) (+)= x.T @ y over kept rows; x (rows, n), y (rows, m), both zero behind them."""
    _launch(x, y, out, None, count, first, config, along_rows=True, accumulate=accumulate)


def new_partial(rows: int, dim: int, vocab: int, config: MatmulConfig, device) -> torch.Tensor:
    """For `rows_times_matrix`: the product along `vocab`, in enough parts to fill the device."""
    splits = matmul_splits(rows, dim, vocab, config, device)
    return torch.empty((splits, rows, dim), dtype=torch.float32, device=device)


def _launch(
    a, b, c, bias, count, first, config, trans_b=False, along_rows=False, accumulate=False
) -> None:
    rows, splits = a.shape[0], c.shape[0] if c.dim() == 3 else 1
    M, N, K = rows, b.shape[0] if trans_b else b.shape[1], a.shape[1]
    block_a, block_b = (config.block_m, config.block_k), (config.block_k, config.block_n)
    if along_rows:
        M, K, block_a = a.shape[1], rows, block_a[::-1]
    if trans_b:
        block_b = block_b[::-1]
    descriptors = _descriptors((a, block_a), (b, block_b)) if config.tma else (None, None)
    tiles = ceil_div(M, config.block_m) * ceil_div(N, config.block_n) * splits
    programs = min(tiles, config.programs * multiprocessors(a.device)) or tiles
    _matmul_kernel[(programs,)](
        *descriptors, a, b, c, bias, count,
        a.stride(0), b.stride(0), c.stride(-2), c.stride(0) if c.dim() == 3 else 0,
        M, N, K, first, rows,
        ALONG_ROWS=along_rows, TRANS_B=trans_b, ACCUMULATE=accumulate, SPLITS=splits,
        PRECISION=dot_precision(a.dtype), **config.options(),
    )  # fmt: skip


def _descriptors(*operands) -> tuple[TensorDescriptor, ...] | tuple[None, ...]:
    if not all(x.numel() and is_aligned(x) for x, _ in operands):
        return (None,) * len(operands)
    return tuple(
        TensorDescriptor(x, list(x.shape), [x.stride(0), 1], list(block)) for x, block in operands
    )
