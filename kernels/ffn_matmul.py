"""The feed-forward's matrix products with everything elementwise in their epilogues.

    ffn:    z = x w1^T + b1;  a = dropout(activation(z))
            dz = dropout(dy w2) * activation'(z);  db1 = sum_rows(dz);  a again
    gated:  gate = x w_gate^T, up = x w_up^T;  a = activation(gate) * up
            da = dy w_down;  dgate = da * up * activation'(gate);  dup = da * activation(gate);  a

The epilogue takes the product in fp32, where a kernel of its own reads it rounded to half. Without
such a kernel an element of the hidden layer costs 2 bytes forward and 4 backward less, gated 4 and
4. db1 is the sum of one fp32 row for each tile of rows, in a fixed order.

Programs are persistent: each takes every `programs`-th tile. Where alignment allows it tiles come
and go through tensor descriptors (the copy engine), else through pointers. Halves alone: fp32 goes
the other way.

Source: Hendrycks and Gimpel, arXiv:1606.08415; Shazeer, arXiv:2002.05202.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlm.kernels.column_sum import column_sums
from fastlm.kernels.configs import (
    EpilogueConfig,
    ceil_div,
    dropout_args,
    epilogue_config,
    multiprocessors,
)
from fastlm.kernels.primitives import activate, dropout_keep


@triton.jit
def _load(desc, ptr, first_row, first_col, stride, M, N, BLOCK_M: tl.constexpr,
          BLOCK_N: tl.constexpr):  # fmt: skip
    """[BLOCK_M, BLOCK_N] of an M x N matrix, with 0 outside of it."""
    if desc is not None:
        return desc.load([first_row, first_col])
    else:
        rows = tl.cast(first_row, tl.int64) + tl.arange(0, BLOCK_M)
        cols = first_col + tl.arange(0, BLOCK_N)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _store(desc, ptr, first_row, first_col, M, N, x, BLOCK_M: tl.constexpr,
           BLOCK_N: tl.constexpr):  # fmt: skip
    """Stores to a contiguous matrix where `_load` loads; nothing if there is none."""
    if desc is not None:
        desc.store([first_row, first_col], x.to(desc.dtype))
    elif ptr is not None:
        rows = tl.cast(first_row, tl.int64) + tl.arange(0, BLOCK_M)
        cols = first_col + tl.arange(0, BLOCK_N)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        out = ptr + rows[:, None] * N + cols[None, :]
        tl.store(out, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _place(tile, row_tiles, col_tiles, GROUP: tl.constexpr):
    """(row tile, column tile): GROUP rows of tiles at a time, so that tiles in work share rows of
    both matrices in the L2 cache."""
    group = tile // (GROUP * col_tiles)
    rows = tl.minimum(row_tiles - group * GROUP, GROUP)
    rest = tile - group * (GROUP * col_tiles)
    return group * GROUP + rest % rows, rest // rows


@triton.jit
def _slice(x, i: tl.constexpr, SLICES: tl.constexpr):
    """The i-th of SLICES blocks of columns, a power of two of them. Moves no register."""
    if SLICES == 1:
        return x
    else:
        half: tl.constexpr = SLICES // 2
        x = x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1)
        left, right = x.split()
        if i < half:
            return _slice(left, i, half)
        else:
            return _slice(right, i - half, half)


@triton.jit(do_not_specialize=["M"])
def _ffn_up_kernel(
    x_desc, x_ptr, w_desc, w_ptr, up_desc, up_ptr, bias_ptr, seed_ptr,
    z_desc, z_ptr, u_desc, u_ptr, a_desc, a_ptr,
    stride_x, stride_w, stride_up, M, N, K, threshold: tl.uint32, scale,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Tiles of z = x w^T + bias and of a, with GATED also of u = x up^T. x M x K, weights N x K.

    Bytes an element of a: writes z and a, 4; GATED u too, 6; a alone, 2. Operands: 2 K / BLOCK_N
    of x, 2 K / BLOCK_M of each weight, which tiles in work at a time share in the L2 cache.
    """
    row_tiles, col_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    PART: tl.constexpr = BLOCK_N // SLICES
    for tile in tl.range(
        tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0), flatten=FLATTEN
    ):
        row, col = _place(tile, row_tiles, col_tiles, GROUP)
        first_row, first_col = row * BLOCK_M, col * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc_u = acc
        for k in range(0, K, BLOCK_K):
            x = _load(x_desc, x_ptr, first_row, k, stride_x, M, K, BLOCK_M, BLOCK_K)
            w = _load(w_desc, w_ptr, first_col, k, stride_w, N, K, BLOCK_N, BLOCK_K)
            acc = tl.dot(x, tl.trans(w), acc)
            if GATED:
                up = _load(up_desc, up_ptr, first_col, k, stride_up, N, K, BLOCK_N, BLOCK_K)
                acc_u = tl.dot(x, tl.trans(up), acc_u)
        for i in tl.static_range(SLICES):
            first = first_col + i * PART
            z = _slice(acc, i, SLICES)
            if bias_ptr is not None:
                cols = first + tl.arange(0, PART)
                z += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
            _store(z_desc, z_ptr, first_row, first, M, N, z, BLOCK_M, PART)
            if GATED:
                u = _slice(acc_u, i, SLICES)
                _store(u_desc, u_ptr, first_row, first, M, N, u, BLOCK_M, PART)
            if a_ptr is not None:
                a, _ = activate(z, ACTIVATION)
                if GATED:
                    a *= u
                if seed_ptr is not None:
                    rows = first_row + tl.arange(0, BLOCK_M)
                    keep = dropout_keep(tl.load(seed_ptr), threshold, 0, 0, rows, first, PART)
                    a = tl.where(keep, a * scale, 0.0)
                _store(a_desc, a_ptr, first_row, first, M, N, a, BLOCK_M, PART)


@triton.jit(do_not_specialize=["M"])
def _ffn_down_bwd_kernel(
    dy_desc, dy_ptr, w_desc, w_ptr, z_desc, z_ptr, u_desc, u_ptr, seed_ptr,
    dz_desc, dz_ptr, du_desc, du_ptr, a_desc, a_ptr, dbias_ptr,
    stride_dy, stride_w, stride_z, stride_u, M, N, K, threshold: tl.uint32, scale,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Tiles of dy w and from them of dz and a, with GATED of du, and their rows of dbias.

    dy M x K, w K x N; z and u as the forward wrote them.
    Bytes an element of a: reads z, writes dz and a, 6; GATED u and du too, 10; 4 / BLOCK_M of
    dbias. Operands: 2 K / BLOCK_N of dy, 2 K / BLOCK_M of w, shared as in `_ffn_up_kernel`.
    """
    row_tiles, col_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    PART: tl.constexpr = BLOCK_N // SLICES
    for tile in tl.range(
        tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0), flatten=FLATTEN
    ):
        row, col = _place(tile, row_tiles, col_tiles, GROUP)
        first_row, first_col = row * BLOCK_M, col * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            dy = _load(dy_desc, dy_ptr, first_row, k, stride_dy, M, K, BLOCK_M, BLOCK_K)
            w = _load(w_desc, w_ptr, k, first_col, stride_w, K, N, BLOCK_K, BLOCK_N)
            acc = tl.dot(dy, w, acc)
        for i in tl.static_range(SLICES):
            first = first_col + i * PART
            g = _slice(acc, i, SLICES)
            if seed_ptr is not None:  # before z is there: both take registers
                rows = first_row + tl.arange(0, BLOCK_M)
                keep = dropout_keep(tl.load(seed_ptr), threshold, 0, 0, rows, first, PART)
                g = tl.where(keep, g * scale, 0.0)
            z = _load(z_desc, z_ptr, first_row, first, stride_z, M, N, BLOCK_M, PART)
            a, slope = activate(z.to(tl.float32), ACTIVATION)
            if GATED:
                u = _load(u_desc, u_ptr, first_row, first, stride_u, M, N, BLOCK_M, PART)
                u = u.to(tl.float32)
                _store(du_desc, du_ptr, first_row, first, M, N, g * a, BLOCK_M, PART)
                g *= u
                a *= u
            if seed_ptr is not None:
                a = tl.where(keep, a * scale, 0.0)
            dz = g * slope
            _store(dz_desc, dz_ptr, first_row, first, M, N, dz, BLOCK_M, PART)
            _store(a_desc, a_ptr, first_row, first, M, N, a, BLOCK_M, PART)
            if dbias_ptr is not None:  # dz is 0 in rows that are not there: dy is
                cols = first + tl.arange(0, PART)
                out = dbias_ptr + row.to(tl.int64) * N + cols
                tl.store(out, tl.sum(dz, 0), mask=cols < N)


def ffn_up(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    seed: torch.Tensor | None,
    activation: str,
    dropout_p: float,
    need_z: bool,
    need_a: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (rows, dim), w1 (hidden_dim, dim), halves of one dtype; b1 contiguous, of any.

    Returns z and a, (rows, hidden_dim); what is not needed is empty.
    """
    z, _, a = _up(x, w1, None, b1, seed, activation, dropout_p, need_z, need_a)
    return z, a


def gated_up(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    activation: str,
    need_products: bool,
    need_a: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns gate, up and a, as `ffn_up`."""
    return _up(x, w_gate, w_up, None, None, activation, 0.0, need_products, need_a)


def _up(x, w, w_up, bias, seed, activation, dropout_p, need_z, need_a):
    (M, K), N, gated = x.shape, w.shape[0], w_up is not None
    new = lambda needed: x.new_empty((M, N) if needed else (0,))
    z, u, a = new(need_z), new(need_z and gated), new(need_a)
    if M * N == 0:
        return z, u, a
    x, w, w_up = _unit_stride(x), _unit_stride(w), _unit_stride(w_up)
    outputs = [t if t.numel() else None for t in (z, u, a)]
    aligned = _are_aligned(x, w, w_up, *outputs)
    config = epilogue_config("gated_up" if gated else "up", x.device, aligned)
    m, n, k, part = config.block_m, config.block_n, config.block_k, config.part
    inputs = _described(config, (x, m, k), (w, n, k), (w_up, n, k))
    outputs = _described(config, *((t, m, part) for t in outputs))
    threshold, scale = dropout_args(dropout_p)
    _ffn_up_kernel[_grid(config, M, N, x.device)](
        *inputs, bias, seed, *outputs, x.stride(0), w.stride(0),
        w_up.stride(0) if gated else 0, M, N, K, threshold, scale,
        GATED=gated, ACTIVATION=activation, **config.options(),
    )  # fmt: skip
    return z, u, a


def ffn_down_bwd(
    dy: torch.Tensor,
    w2: torch.Tensor,
    z: torch.Tensor,
    seed: torch.Tensor | None,
    activation: str,
    dropout_p: float,
    need_dz: bool,
    db1_dtype: torch.dtype | None,
    need_a: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dy (rows, out_dim), w2 (out_dim, hidden_dim), z (rows, hidden_dim), halves of one dtype.

    Returns dz, db1 and a; what is not needed is empty.
    """
    need_db1 = db1_dtype is not None
    dz, _, a, partial = _down_bwd(
        dy, w2, z, None, seed, activation, dropout_p, need_dz, False, need_db1, need_a
    )
    db1 = z.new_empty(0)
    if need_db1:
        (db1,) = column_sums([partial], [db1_dtype])
    return dz, db1, a


def gated_down_bwd(
    dy: torch.Tensor,
    w_down: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    need_dgate: bool,
    need_dup: bool,
    need_a: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns dgate, dup and a, as `ffn_down_bwd`."""
    *results, _ = _down_bwd(
        dy, w_down, gate, up, None, activation, 0.0, need_dgate, need_dup, False, need_a
    )
    return tuple(results)


def _down_bwd(dy, w, z, u, seed, activation, dropout_p, need_dz, need_du, need_db, need_a):
    (M, K), N, gated = dy.shape, w.shape[1], u is not None
    new = lambda needed: z.new_empty((M, N) if needed else (0,))
    dz, du, a = new(need_dz), new(need_du), new(need_a)
    dy, w, z, u = map(_unit_stride, (dy, w, z, u))
    outputs = [t if t.numel() else None for t in (dz, du, a)]
    aligned = _are_aligned(dy, w, z, u, *outputs)
    config = epilogue_config("gated_down" if gated else "down", dy.device, aligned)
    rows = ceil_div(M, config.block_m)
    partial = z.new_empty((rows, N) if need_db else (0,), dtype=torch.float32)
    if M * N == 0:
        return dz, du, a, partial
    m, n, k, part = config.block_m, config.block_n, config.block_k, config.part
    inputs = _described(config, (dy, m, k), (w, k, n), (z, m, part), (u, m, part))
    outputs = _described(config, *((t, m, part) for t in outputs))
    threshold, scale = dropout_args(dropout_p)
    _ffn_down_bwd_kernel[_grid(config, M, N, dy.device)](
        *inputs, seed, *outputs, partial if need_db else None, dy.stride(0), w.stride(0),
        z.stride(0), u.stride(0) if gated else 0, M, N, K, threshold, scale,
        GATED=gated, ACTIVATION=activation, **config.options(),
    )  # fmt: skip
    return dz, du, a, partial


def _unit_stride(x: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _grid(config: EpilogueConfig, M: int, N: int, device: torch.device) -> tuple[int]:
    tiles = ceil_div(M, config.block_m) * ceil_div(N, config.block_n)
    return (min(tiles, config.programs * multiprocessors(device)),)


def _described(config: EpilogueConfig, *blocks) -> list:
    """(descriptor or None, matrix) for each (matrix or None, rows, columns of a tile)."""
    pairs = []
    for x, *block in blocks:
        descriptor = None
        if config.tma and x is not None:
            # The stride of a single row means nothing, but has to be aligned.
            stride = x.stride(0) if x.shape[0] > 1 else ceil_div(x.shape[1], 8) * 8
            descriptor = TensorDescriptor(x, list(x.shape), [stride, 1], block)
        pairs += [descriptor, x]
    return pairs


def _are_aligned(*matrices: torch.Tensor | None) -> bool:
    """Whether the rows of all are as tensor descriptors ask: none of them empty or repeated."""
    for x in matrices:
        if x is not None:
            unit = 16 // x.element_size()
            stride = x.stride(0) if x.shape[0] > 1 else unit
            if x.numel() == 0 or x.data_ptr() % 16 or stride % unit or stride == 0:
                return False
    return True
