"""Attention backward, deterministic: one kernel for dq, one for dk and dv, no atomics.

    p = exp(scale * q k^T - lse);  delta = rowsum(do * out) - dlse
    dv = p^T do;  ds = p * (do v^T - delta);  dq = scale * ds k;  dk = scale * ds^T q

Probabilities are recomputed from lse, in base 2 as in the forward. dq goes over blocks of keys; dk
and dv over blocks of queries of every head that shares the key head, summed in fp32. That is 7
matrix products where atomics on dq would need 5, and the price of equal bits from equal inputs.

Source: Dao, FlashAttention-2, arXiv:2307.08691, algorithm 2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastlm.kernels.configs import (
    aligned_strides,
    attention_config,
    attention_section,
    ceil_div,
    dot_precision,
    next_power_of_2,
)
from fastlm.kernels.primitives import (
    LN_2,
    LOG2_E,
    key_range,
    load_rows,
    store_rows,
    tile_and_head,
)

# Lengths, head counts and strides vary from call to call: one binary serves them all.
RUNTIME = ["H", "GROUP", "M", "N", "diagonal", "section"]
RUNTIME += [f"stride_{x}{y}" for x in ("q", "do") for y in "bmh"]
RUNTIME += [f"stride_{x}{y}" for x in "kv" for y in "bnh"]


@triton.jit(do_not_specialize=RUNTIME)
def _attention_bwd_delta_kernel(
    do_ptr, out_ptr, lse_ptr, dlse_ptr, delta_ptr, lse2_ptr,
    stride_dob: tl.int64, stride_dom: tl.int64, stride_doh: tl.int64, H, M,
    D: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta, and lse in base 2, +inf for rows without keys: their p = exp2(s - inf) is then 0."""
    tiles = tl.cdiv(M, BLOCK_M)
    batch_head = tl.program_id(0) // tiles
    batch = (batch_head // H).to(tl.int64)
    head = (batch_head % H).to(tl.int64)
    first_row = tl.program_id(0) % tiles * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    mask = rows < M
    do_ptr += (batch * stride_dob + head * stride_doh) * UNIT
    out_ptr += (batch * M * H + head) * D
    do = load_rows(do_ptr, first_row, stride_dom * UNIT, M, BLOCK_M, D, BLOCK_D, True)
    out = load_rows(out_ptr, first_row, H.to(tl.int64) * D, M, BLOCK_M, D, BLOCK_D, True)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    stats = batch_head.to(tl.int64) * M + rows
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + stats, mask=mask, other=0.0)
    lse = tl.load(lse_ptr + stats, mask=mask, other=0.0)
    dead = lse == float("-inf")
    tl.store(delta_ptr + stats, tl.where(dead, 0.0, delta), mask=mask)
    tl.store(lse2_ptr + stats, tl.where(dead, float("inf"), lse * LOG2_E), mask=mask)


@triton.jit
def _add_dq(
    dq, q, do, lse2, delta, k_ptr, v_ptr, stride_kn, stride_vn, begin, end, last_key, scale_log2,
    D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds what keys [begin, end) contribute to dq / scale of a tile of queries."""
    for start in range(begin, end, BLOCK_N):
        k = load_rows(k_ptr, start, stride_kn, end, BLOCK_N, D, BLOCK_D, MASKED)
        v = load_rows(v_ptr, start, stride_vn, end, BLOCK_N, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(s * scale_log2 - lse2[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        if MASKED:
            seen = start + tl.arange(0, BLOCK_N)[None, :] <= last_key[:, None]
            ds = tl.where(seen, ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=RUNTIME)
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse2_ptr, delta_ptr, dq_ptr,
    stride_qb: tl.int64, stride_qm: tl.int64, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kn: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vn: tl.int64, stride_vh: tl.int64,
    stride_dob: tl.int64, stride_dom: tl.int64, stride_doh: tl.int64,
    H, GROUP, M, N, diagonal, section, scale_log2,
    D: tl.constexpr, IS_CAUSAL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries of one head. Strides count UNIT elements."""
    tile, batch_head = tile_and_head(tl.program_id(0), tl.cdiv(M, BLOCK_M), True, section)
    batch = (batch_head // H).to(tl.int64)
    head = (batch_head % H).to(tl.int64)
    head_k = head // GROUP
    first_row = tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    q_ptr += (batch * stride_qb + head * stride_qh) * UNIT
    k_ptr += (batch * stride_kb + head_k * stride_kh) * UNIT
    v_ptr += (batch * stride_vb + head_k * stride_vh) * UNIT
    do_ptr += (batch * stride_dob + head * stride_doh) * UNIT

    q = load_rows(q_ptr, first_row, stride_qm * UNIT, M, BLOCK_M, D, BLOCK_D, True)
    do = load_rows(do_ptr, first_row, stride_dom * UNIT, M, BLOCK_M, D, BLOCK_D, True)
    stats = batch_head.to(tl.int64) * M + rows
    lse2 = tl.load(lse2_ptr + stats, mask=rows < M, other=float("inf"))
    delta = tl.load(delta_ptr + stats, mask=rows < M, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full, end = key_range(first_row, BLOCK_M, M, N, diagonal, IS_CAUSAL, BLOCK_N)
    last_key = tl.zeros([BLOCK_M], tl.int32) + (N - 1)
    if IS_CAUSAL:
        last_key = tl.minimum(rows + diagonal, last_key)
    dq = _add_dq(
        dq, q, do, lse2, delta, k_ptr, v_ptr, stride_kn * UNIT, stride_vn * UNIT, 0, full, last_key,
        scale_log2, D, False, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = _add_dq(
        dq, q, do, lse2, delta, k_ptr, v_ptr, stride_kn * UNIT, stride_vn * UNIT, full, end,
        last_key, scale_log2, D, True, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq_ptr += (batch * M * H + head) * D
    dq *= scale_log2 * LN_2
    store_rows(dq_ptr, first_row, H.to(tl.int64) * D, M, dq, BLOCK_M, D, BLOCK_D)


@triton.jit
def _add_dk_dv(
    dk, dv, k, v, q_ptr, do_ptr, lse2_ptr, delta_ptr,
    stride_qm, stride_qh, stride_dom, stride_doh,
    stride_stats, GROUP, M, begin, count, full, first_seeing, scale_log2,
    D: tl.constexpr, MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds to dk / scale and dv of a block of keys what `count` tiles of queries, from tile `begin`
    on, of each of GROUP heads contribute. MASKED: what would be tile `full` is the incomplete one.

    Heads and tiles are one loop: in two, every pointer would live twice, and registers spill.
    """
    rows = tl.arange(0, BLOCK_M)
    tiles = tl.maximum(count, 1)  # the compiler may divide before it looks whether count is 0
    for i in range(0, GROUP * count):
        head = (i // tiles).to(tl.int64)
        tile = begin + i % tiles
        if MASKED:
            tile = tl.where(tile < full, tile, M // BLOCK_M)
        start = tile * BLOCK_M
        q = load_rows(q_ptr + head * stride_qh, start, stride_qm, M, BLOCK_M, D, BLOCK_D, MASKED)
        do = load_rows(
            do_ptr + head * stride_doh, start, stride_dom, M, BLOCK_M, D, BLOCK_D, MASKED
        )
        stats = head * stride_stats + start + rows
        if MASKED:  # rows from M on: p = exp2(0 - inf) = 0
            lse2 = tl.load(lse2_ptr + stats, mask=rows < M - start, other=float("inf"))
            delta = tl.load(delta_ptr + stats, mask=rows < M - start, other=0.0)
        else:
            lse2 = tl.load(lse2_ptr + stats)
            delta = tl.load(delta_ptr + stats)
        # Scores are transposed, [BLOCK_N, BLOCK_M]: p and ds stay in registers for dv and dk.
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - lse2[None, :])
        if MASKED and IS_CAUSAL:
            p = tl.where(start + rows[None, :] >= first_seeing[:, None], p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=RUNTIME)
def _attention_bwd_dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb: tl.int64, stride_qm: tl.int64, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kn: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vn: tl.int64, stride_vh: tl.int64,
    stride_dob: tl.int64, stride_dom: tl.int64, stride_doh: tl.int64,
    H, GROUP, M, N, diagonal, section, scale_log2,
    D: tl.constexpr, IS_CAUSAL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one key head, over all query heads of its group.

    Keys from N on get nonsense in rows of their own, which are not stored.
    """
    tile, batch_head = tile_and_head(tl.program_id(0), tl.cdiv(N, BLOCK_N), False, section)
    H_K = H // GROUP
    batch = (batch_head // H_K).to(tl.int64)
    head_k = (batch_head % H_K).to(tl.int64)
    head = head_k * GROUP
    first_key = tile * BLOCK_N
    stats = (batch * H + head) * M
    stride_stats = M
    seen = N  # keys from here on are seen by no row and not read; they may hold NaN
    if IS_CAUSAL:
        # Nor are rows that see no key, which come first: the others are counted from 0.
        seen = tl.minimum(N, M + diagonal)
        dead = tl.maximum(-diagonal, 0)
        q_ptr += dead.to(tl.int64) * stride_qm * UNIT
        do_ptr += dead.to(tl.int64) * stride_dom * UNIT
        stats += dead
        M -= dead
        diagonal += dead
    q_ptr += (batch * stride_qb + head * stride_qh) * UNIT
    k_ptr += (batch * stride_kb + head_k * stride_kh) * UNIT
    v_ptr += (batch * stride_vb + head_k * stride_vh) * UNIT
    do_ptr += (batch * stride_dob + head * stride_doh) * UNIT
    lse2_ptr += stats
    delta_ptr += stats
    k = load_rows(k_ptr, first_key, stride_kn * UNIT, seen, BLOCK_N, D, BLOCK_D, True)
    v = load_rows(v_ptr, first_key, stride_vn * UNIT, seen, BLOCK_N, D, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    # Tiles of rows [begin, full) see some of the keys, [full, whole) all; the next is incomplete.
    whole = M // BLOCK_M
    begin = 0
    full = 0
    ragged = whole * BLOCK_M < M
    first_seeing = first_key - diagonal + tl.arange(0, BLOCK_N)  # first row that sees the key
    if IS_CAUSAL:
        begin = tl.maximum(first_key - diagonal, 0) // BLOCK_M
        last_key = tl.minimum(first_key + BLOCK_N, N) - 1
        full = tl.cdiv(tl.maximum(last_key - diagonal, 0), BLOCK_M)
        ragged = ragged & (first_key < seen)
    masked = tl.maximum(tl.minimum(full, whole) - begin, 0) + ragged.to(tl.int32)
    dk, dv = _add_dk_dv(
        dk, dv, k, v, q_ptr, do_ptr, lse2_ptr, delta_ptr, stride_qm * UNIT, stride_qh * UNIT,
        stride_dom * UNIT, stride_doh * UNIT, stride_stats, GROUP, M, begin, masked, full,
        first_seeing, scale_log2, D, True, IS_CAUSAL, PRECISION, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    dk, dv = _add_dk_dv(
        dk, dv, k, v, q_ptr, do_ptr, lse2_ptr, delta_ptr, stride_qm * UNIT, stride_qh * UNIT,
        stride_dom * UNIT, stride_doh * UNIT, stride_stats, GROUP, M, full,
        tl.maximum(whole - full, 0), full, first_seeing,
        scale_log2, D, False, IS_CAUSAL, PRECISION, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    offset = (batch * N * H_K + head_k) * D
    stride = H_K.to(tl.int64) * D
    dk *= scale_log2 * LN_2
    store_rows(dk_ptr + offset, first_key, stride, N, dk, BLOCK_N, D, BLOCK_D)
    store_rows(dv_ptr + offset, first_key, stride, N, dv, BLOCK_N, D, BLOCK_D)


def _delta_and_lse2(do, out, lse, dlse):
    """rowsum(do * out) - dlse, and lse in base 2: fp32 (batch, nheads, seqlen_q) both."""
    batch, seqlen_q, nheads, headdim = out.shape
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    block_d = max(16, next_power_of_2(headdim))
    block_m = 8192 // (block_d * do.element_size())
    unit, strides = aligned_strides(do)
    _attention_bwd_delta_kernel[(ceil_div(seqlen_q, block_m) * batch * nheads,)](
        do, out, lse, None if dlse is None else dlse.contiguous(), delta, lse2, *strides,
        H=nheads,
        M=seqlen_q,
        D=headdim,
        UNIT=unit,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
    )  # fmt: skip
    return delta, lse2


def attention_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    causal: str,
    softmax_scale: float,
    need_dq: bool,
    need_dkv: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launches the backward.

    Args:
        do: gradient of out, any strides; q, k, v, causal, softmax_scale: as in the forward.
        out, lse: what the forward returned.
        dlse: gradient of lse, or None.
        need_dq, need_dkv: what is not needed is returned with 0 elements.

    Returns:
        dq, dk, dv, contiguous, in the dtypes and shapes of q, k, v.
    """
    batch, seqlen_q, nheads, headdim = q.shape
    seqlen_k, nheads_k = k.shape[1:3]
    dq = torch.empty(q.shape if need_dq else (0,), dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape if need_dkv else (0,), dtype=k.dtype, device=q.device)
    dv = torch.empty(v.shape if need_dkv else (0,), dtype=v.dtype, device=q.device)
    if dq.numel() == 0 and dk.numel() == 0:
        return dq, dk, dv
    if do.stride(-1) != 1:  # such as the expanded gradient of a sum
        do = do.contiguous()
    delta, lse2 = lse, lse
    if out.numel():
        delta, lse2 = _delta_and_lse2(do, out, lse, dlse)
    unit, strides = aligned_strides(q, k, v, do)
    call = dict(
        H=nheads,
        GROUP=nheads // nheads_k,
        M=seqlen_q,
        N=seqlen_k,
        diagonal=seqlen_k - seqlen_q if causal == "bottom_right" else 0,
        scale_log2=softmax_scale * math.log2(math.e),
        D=headdim,
        IS_CAUSAL=causal != "none",
        UNIT=unit,
        PRECISION=dot_precision(q.dtype),
        BLOCK_D=max(16, next_power_of_2(headdim)),
    )
    row_bytes = 2 * headdim * q.element_size()
    if dq.numel():
        config = attention_config("dq", q.device, headdim, q.dtype, unit)
        heads = batch * nheads
        section = attention_section(q.device, causal, seqlen_k * row_bytes, heads)
        _attention_bwd_dq_kernel[(ceil_div(seqlen_q, config.block_m) * heads,)](
            q, k, v, do, lse2, delta, dq, *strides, section=section, **call, **config.options()
        )
    if dk.numel():
        config = attention_config("dkv", q.device, headdim, q.dtype, unit)
        heads = batch * nheads_k
        head_bytes = call["GROUP"] * seqlen_q * row_bytes
        section = attention_section(q.device, causal, head_bytes, heads)
        _attention_bwd_dk_dv_kernel[(ceil_div(seqlen_k, config.block_n) * heads,)](
            q, k, v, do, lse2, delta, dk, dv, *strides, section=section, **call, **config.options()
        )
    return dq, dk, dv
