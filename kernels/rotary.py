"""Rotary position embedding, forward and backward.

    y[a] = x[a] * c - x[b] * s;       y[b] = x[b] * c + x[a] * s
    dx:    the same of dy, with -s
    dc   = sum_heads(dy[a] * x[a] + dy[b] * x[b]);   ds = sum_heads(dy[b] * x[a] - dy[a] * x[b])

with (a, b) = (i, i + rotary_dim / 2) or, interleaved, (2 i, 2 i + 1). A program has some tokens
and all of their heads, so that an angle is read once a token. The gradients of cos and sin, where
they are asked for, are sums over heads in the same pass, which then reads x too, and over the
tokens that share a row in a fixed order.

A position outside the table reads nothing outside it, and its token's result is NaN.

Source: Su et al., "RoFormer", arXiv:2104.09864.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlm.kernels.configs import aligned_strides, ceil_div, next_power_of_2, rotary_config
from fastlm.kernels.segments import segment_sum


@triton.jit
def _offsets(tokens, heads, cols, stride_s, stride_h, stride_d, UNIT: tl.constexpr):
    """Offsets of a tile, [BLOCK_T, BLOCK_H, columns]; strides of tokens and heads in UNITs."""
    token_offsets = tokens.to(tl.int64) * (stride_s * UNIT)
    head_offsets = heads.to(tl.int64) * (stride_h * UNIT)
    start = token_offsets[:, None, None] + head_offsets[None, :, None]
    return start + (cols * stride_d)[None, None, :]


@triton.jit
def _load_pairs(
    ptr, tokens, heads, mask, stride_s, stride_h, stride_d,
    HALF: tl.constexpr, BLOCK_P: tl.constexpr, UNIT: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Both members of each pair in fp32, 0 outside the mask. [BLOCK_T, BLOCK_H, BLOCK_P] each"""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_P)
        offsets = _offsets(tokens, heads, cols, stride_s, stride_h, stride_d, UNIT)
        x = tl.load(ptr + offsets, mask=mask & (cols < 2 * HALF)[None, None, :], other=0.0)
        x = tl.reshape(x, [tokens.shape[0], heads.shape[0], BLOCK_P, 2])
        a, b = tl.split(x.to(tl.float32))
    else:
        cols = tl.arange(0, BLOCK_P)
        offsets = _offsets(tokens, heads, cols, stride_s, stride_h, stride_d, UNIT)
        mask = mask & (cols < HALF)[None, None, :]
        a = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(ptr + HALF * stride_d + offsets, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store_pairs(
    ptr, a, b, tokens, heads, mask, stride_s,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK_P: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Stores where `_load_pairs` loads, of a tensor whose heads lie side by side."""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_P)
        x = tl.reshape(tl.join(a, b), [tokens.shape[0], heads.shape[0], 2 * BLOCK_P])
        offsets = _offsets(tokens, heads, cols, stride_s, D, 1, 1)
        tl.store(ptr + offsets, x, mask=mask & (cols < 2 * HALF)[None, None, :])
    else:
        cols = tl.arange(0, BLOCK_P)
        offsets = _offsets(tokens, heads, cols, stride_s, D, 1, 1)
        mask = mask & (cols < HALF)[None, None, :]
        tl.store(ptr + offsets, a, mask=mask)
        tl.store(ptr + HALF + offsets, b, mask=mask)


@triton.jit
def _rotary_kernel(
    x_ptr, other_ptr, cos_ptr, sin_ptr, positions_ptr, y_ptr, dangles_ptr,
    stride_xb, stride_xs, stride_xh, stride_xd, stride_ob, stride_os, stride_oh, stride_od,
    stride_cb, stride_cr, stride_cd, stride_nb, stride_nr, stride_nd, stride_pb, stride_ps,
    S, H, table_rows, sign,
    D: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Tokens of one sequence with all of their heads: y = x turned by sign * angle.

    In the backward pass x is dy and sign -1. With `other`, the forward's x, also (dcos, dsin) of
    each token, fp32.
    Bytes an element of e: reads x, writes y: 2 e, 4 for halves; cos and sin, of f each, add
    2 HALF f / (H D), for fp32 1 / 8 at 32 heads of 128. With `other` its 2 HALF / D of e, and
    8 HALF / (H D) of dangles, more; where y is not wanted, e less.
    """
    tiles = tl.cdiv(S, BLOCK_T)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tokens = (tl.program_id(0) % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    pairs = tl.arange(0, BLOCK_P)
    mask_t = tokens < S
    row = tokens.to(tl.int64)
    if positions_ptr is not None:
        at = batch * stride_pb + row * stride_ps
        row = tl.load(positions_ptr + at, mask=mask_t, other=0).to(tl.int64)
    inside = mask_t & (row >= 0) & (row < table_rows)
    row = tl.where(inside, row, 0)
    mask_p = inside[:, None] & (pairs < HALF)[None, :]
    at = batch * stride_cb + row[:, None] * stride_cr + (pairs * stride_cd)[None, :]
    cos = tl.load(cos_ptr + at, mask=mask_p, other=float("nan")).to(tl.float32)[:, None, :]
    at = batch * stride_nb + row[:, None] * stride_nr + (pairs * stride_nd)[None, :]
    sin = tl.load(sin_ptr + at, mask=mask_p, other=float("nan")).to(tl.float32)[:, None, :]
    sin = sin * sign
    dcos = tl.zeros([BLOCK_T, BLOCK_P], tl.float32)
    dsin = tl.zeros([BLOCK_T, BLOCK_P], tl.float32)
    x_ptr += batch * (stride_xb * UNIT)
    for first_head in range(0, H, BLOCK_H):
        heads = first_head + tl.arange(0, BLOCK_H)
        mask = mask_t[:, None, None] & (heads < H)[None, :, None]
        a, b = _load_pairs(x_ptr, tokens, heads, mask, stride_xs, stride_xh, stride_xd,
                           HALF, BLOCK_P, UNIT, INTERLEAVED)  # fmt: skip
        if y_ptr is not None:
            y = y_ptr + batch * S * H * D
            _store_pairs(y, a * cos - b * sin, b * cos + a * sin, tokens, heads, mask, H * D,
                         D, HALF, BLOCK_P, INTERLEAVED)  # fmt: skip
            if 2 * HALF < D:  # the other dimensions pass through
                cols = 2 * HALF + tl.arange(0, BLOCK_R)
                mask_r = mask & (cols < D)[None, None, :]
                offsets = _offsets(tokens, heads, cols, stride_xs, stride_xh, stride_xd, UNIT)
                rest = tl.load(x_ptr + offsets, mask=mask_r, other=0.0)
                tl.store(y + _offsets(tokens, heads, cols, H * D, D, 1, 1), rest, mask=mask_r)
        if other_ptr is not None:
            other = other_ptr + batch * (stride_ob * UNIT)
            p, q = _load_pairs(other, tokens, heads, mask, stride_os, stride_oh, stride_od,
                               HALF, BLOCK_P, UNIT, INTERLEAVED)  # fmt: skip
            dcos += tl.sum(a * p + b * q, 1)
            dsin += tl.sum(b * p - a * q, 1)
    if other_ptr is not None:
        at = (batch * S + tokens)[:, None] * (2 * HALF) + pairs[None, :]
        mask_p = mask_t[:, None] & (pairs < HALF)[None, :]
        tl.store(dangles_ptr + at, dcos, mask=mask_p)
        tl.store(dangles_ptr + HALF + at, dsin, mask=mask_p)


def _launch(x, other, cos, sin, positions, y, dangles, interleaved: bool, sign: float) -> None:
    batch, seqlen, nheads, headdim = x.shape
    half = cos.shape[-1]
    unit, strides = aligned_strides(x, *([] if other is None else [other]))
    x_strides, other_strides = strides[:3], strides[3:] or [0, 0, 0]
    own = cos.dim() == 3 and cos.shape[0] > 1  # angles of each sequence
    tables = [n for t in (cos, sin) for n in (t.stride(0) if own else 0, *t.stride()[-2:])]
    stride_p = (0, 0)
    if positions is not None:
        stride_p = (positions.stride(0) if positions.dim() == 2 else 0, positions.stride(-1))
    config = rotary_config(seqlen, nheads, half)
    _rotary_kernel[(batch * ceil_div(seqlen, config.block_t),)](
        x, other, cos, sin, positions, y, dangles, *x_strides, x.stride(3),
        *other_strides, 0 if other is None else other.stride(3), *tables, *stride_p,
        seqlen, nheads, cos.shape[-2], sign,
        D=headdim, HALF=half, UNIT=unit, INTERLEAVED=interleaved,
        BLOCK_T=config.block_t, BLOCK_H=config.block_h, BLOCK_P=next_power_of_2(half),
        BLOCK_R=next_power_of_2(max(headdim - 2 * half, 1)),
        num_warps=config.num_warps, enable_fp_fusion=True,
    )  # fmt: skip


def rotary_fwd(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    interleaved: bool,
) -> torch.Tensor:
    """y, contiguous. x (batch, seqlen, nheads, headdim); any strides of all."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if cos.shape[-1] == 0:
        return y.copy_(x)
    if x.numel():
        _launch(x, None, cos, sin, positions, y, None, interleaved, 1.0)
    return y


def rotary_bwd(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    interleaved: bool,
    need_dx: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dcos, dsin); dx is empty unless `need_dx`, dcos and dsin are empty without x."""
    half = cos.shape[-1]
    new = lambda shape, dtype: torch.empty(shape, dtype=dtype, device=dy.device)
    dx = new(dy.shape if need_dx else (0,), dy.dtype)
    if x is None:
        empty = new(0, cos.dtype), new(0, sin.dtype)
        if half == 0:
            return dx.copy_(dy), *empty
        if dy.numel():
            _launch(dy, None, cos, sin, positions, dx, None, interleaved, -1.0)
        return dx, *empty
    dangles = new((*dy.shape[:2], 2 * half), torch.float32)
    if dy.numel() == 0 or half == 0:
        dangles.zero_()
        if need_dx:
            dx.copy_(dy)
    else:
        _launch(dy, x, cos, sin, positions, dx if need_dx else None, dangles, interleaved, -1.0)
    dtables = _sum_tokens(dangles, cos, positions)
    dcos, dsin = dtables[..., :half], dtables[..., half:]
    return dx, dcos.to(cos.dtype, copy=True), dsin.to(sin.dtype, copy=True)


def _sum_tokens(dangles, cos, positions) -> torch.Tensor:
    """Per token (batch, seqlen, cols) to the rows of the tables (fp32): those that share a row
    are added in a fixed order."""
    batch, seqlen, cols = dangles.shape
    if cos.dim() == 3 and cos.shape[0] == batch:
        return dangles
    if positions is None or positions.dim() == 1:
        dangles = dangles.sum(0)
    if cos.dim() == 3:
        return dangles[None]
    if positions is not None:
        ids = positions.reshape(-1)
        return segment_sum(dangles.view(-1, cols), ids, cos.shape[0], torch.float32)
    out = torch.zeros((cos.shape[0], cols), dtype=torch.float32, device=dangles.device)
    out[:seqlen] = dangles
    return out
