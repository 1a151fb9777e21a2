"""Sums of rows that share an id: gradients of tables, each row of which is written once.

    out[v] = sum over i with ids[i] = v of x[i], added in fp32, in the order of i

The ids are sorted on the device, stably, so that equal ones are neighbours: a segment. Sorted rows
come in chunks. The first kernel adds the parts of segments that cross into another chunk, two at
most for each chunk, the one that it begins with and the one that it ends with. The second kernel
has a program for each row of the table: it adds a segment's rows, at most a chunk of them, or the
parts of its chunks, and writes 0 where no id asks for the row. So a row of x is read once, however
many share its id, and no program is long where one id has half of them. No atomics: the same
inputs give the same bits. Ids outside the table belong to no row and are left out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlm.kernels.configs import ceil_div, segment_chunk, segment_config

_ID_TYPES = (torch.int8, torch.int16, torch.int32, torch.int64)


@triton.jit
def _load_rows(x_ptr, rows, mask_m, cols, mask_n, stride_xm):
    """Rows of x in fp32, 0 outside the masks. [BLOCK_M, BLOCK_N]"""
    mask = mask_m[:, None] & mask_n[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _sum_of_id(
    x_ptr, ids_ptr, order_ptr, wanted, count, cols, mask_n, stride_xm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sum of the first `count` rows, as sorted, whose id is `wanted`. [BLOCK_N]"""
    acc = tl.zeros([BLOCK_N], tl.float32)
    for i in range(0, count, BLOCK_M):
        at = i + tl.arange(0, BLOCK_M)
        ids = tl.load(ids_ptr + at, mask=at < count, other=0)
        row = tl.load(order_ptr + at, mask=at < count, other=0)
        mask_m = (at < count) & (ids == wanted)
        acc += tl.sum(_load_rows(x_ptr, row, mask_m, cols, mask_n, stride_xm), 0)
    return acc


@triton.jit
def _segment_parts_kernel(
    x_ptr, ids_ptr, order_ptr, parts_ptr, stride_xm, rows, N, skip, col_tiles,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A chunk's two parts: of the segment it begins with, and of another that it ends with. What
    lies within the chunk is left to the second kernel, and its parts are not written.

    Bytes an element of e: x is read where its segment crosses, e, and 4 written for each of at most
    two parts a chunk. A row of x for each part and block of columns: its id and place, 9 to 16.
    """
    chunk = (tl.program_id(0) // col_tiles).to(tl.int64)
    cols = (tl.program_id(0) % col_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = cols < N
    start = chunk * CHUNK
    stop = tl.minimum(start + CHUNK, rows)
    first, last = tl.load(ids_ptr + start), tl.load(ids_ptr + stop - 1)
    before = tl.load(ids_ptr + tl.maximum(start - 1, 0))
    after = tl.load(ids_ptr + tl.minimum(stop, rows - 1))
    comes = (start > 0) & (before == first)
    goes = (stop < rows) & (after == last)
    first_crosses = (comes | (goes & (first == last))) & (first != skip)
    last_crosses = goes & (first != last) & (last != skip)
    count = (stop - start).to(tl.int32)
    ids_ptr += start
    order_ptr += start
    acc_first = _sum_of_id(x_ptr, ids_ptr, order_ptr, first, tl.where(first_crosses, count, 0),
                           cols, mask_n, stride_xm, BLOCK_M, BLOCK_N)  # fmt: skip
    acc_last = _sum_of_id(x_ptr, ids_ptr, order_ptr, last, tl.where(last_crosses, count, 0),
                          cols, mask_n, stride_xm, BLOCK_M, BLOCK_N)  # fmt: skip
    parts = parts_ptr + 2 * chunk * N + cols
    tl.store(parts, acc_first, mask=cols < tl.where(first_crosses, N, 0))
    tl.store(parts + N, acc_last, mask=cols < tl.where(last_crosses, N, 0))


@triton.jit
def _segment_sum_kernel(
    x_ptr, order_ptr, starts_ptr, parts_ptr, out_ptr, stride_xm, N, skip, col_tiles,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A row of the table: the sum of its segment's rows, or of its parts.

    Bytes an element of e: x is read where its segment does not cross, e, or 4 a part where it does;
    the table's is written, e. For each block of columns 16 a row of the table of starts, and 8 a
    row of x of its place.
    """
    v = (tl.program_id(0) // col_tiles).to(tl.int64)
    cols = (tl.program_id(0) % col_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = cols < N
    start, stop = tl.load(starts_ptr + v), tl.load(starts_ptr + v + 1)
    stop = tl.where(v == skip, start, stop)
    first_chunk, last_chunk = start // CHUNK, (stop - 1) // CHUNK
    crosses = (stop > start) & (last_chunk > first_chunk)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for i in range(start, tl.where(crosses, start, stop), BLOCK_M):
        at = i + tl.arange(0, BLOCK_M)
        inside = at < stop
        row = tl.load(order_ptr + at, mask=inside, other=0)
        acc += tl.sum(_load_rows(x_ptr, row, inside, cols, mask_n, stride_xm), 0)
    # It ends its first chunk, unless it also begins it.
    second = tl.where(start % CHUNK > 0, 1, 0)
    for chunk in range(first_chunk, tl.where(crosses, last_chunk + 1, first_chunk), BLOCK_M):
        at = (chunk + tl.arange(0, BLOCK_M)).to(tl.int64)
        part = 2 * at + tl.where(at == first_chunk, second, 0)
        acc += tl.sum(_load_rows(parts_ptr, part, at <= last_chunk, cols, mask_n, N), 0)
    tl.store(out_ptr + v * N + cols, acc, mask=mask_n)


def segment_sum(
    x: torch.Tensor, ids: torch.Tensor, table_rows: int, dtype: torch.dtype, skip: int = -1
) -> torch.Tensor:
    """(table_rows, cols) in `dtype`.

    Args:
        x: (rows, cols), last stride 1.
        ids: (rows,) integers.
        skip: an id whose rows are left out.
    """
    rows, N = x.shape
    if rows == 0 or N == 0:
        return torch.zeros((table_rows, N), dtype=dtype, device=x.device)
    out = torch.empty((table_rows, N), dtype=dtype, device=x.device)
    # A radix sort takes a pass for each byte. Ids outside stay outside.
    narrow = next(t for t in _ID_TYPES if table_rows <= torch.iinfo(t).max)
    ids, order = torch.sort(ids.clamp(-1, table_rows).to(narrow), stable=True)
    # Where each row's segment begins, and the last one's ends.
    bounds = torch.arange(table_rows + 1, dtype=ids.dtype, device=x.device)
    starts = torch.searchsorted(ids, bounds)
    chunk = segment_chunk(rows, x.device)
    chunks = ceil_div(rows, chunk)
    parts = torch.empty((2 * chunks, N), dtype=torch.float32, device=x.device)
    for kernel, units, tensors, sizes in (
        (_segment_parts_kernel, chunks, (x, ids, order, parts), (x.stride(0), rows, N)),
        (_segment_sum_kernel, table_rows, (x, order, starts, parts, out), (x.stride(0), N)),
    ):
        config = segment_config(units, N, x.device)
        col_tiles = ceil_div(N, config.block_n)
        kernel[(units * col_tiles,)](
            *tensors, *sizes, skip, col_tiles, CHUNK=chunk, BLOCK_M=config.block_m,
            BLOCK_N=config.block_n, num_warps=config.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out
