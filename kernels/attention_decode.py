"""Attention of a few queries to a long key-value cache: splits of the keys, then their combination.

A tile holds the queries of all heads that share a key head (`m * GROUP + g`), so that keys are
read once for the group. The keys that a tile may see are cut into `splits` ranges, on the device
and by each sequence's own length; every range gives a normalised output and its lse, and a second
kernel adds them up in a fixed order:

    lse = log(sum_s exp(lse_s) + exp(sink));  out = sum_s exp(lse_s - lse) * out_s

Caches have layout (batch, seqlen, nheads_k, headdim); they may have another dtype than the queries.

Source: Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlm.kernels.attention_configs import bucket_starts, decode_config
from fastlm.kernels.configs import aligned_strides, ceil_div, dot_precision, next_power_of_2
from fastlm.kernels.launch import launch
from fastlm.kernels.primitives import (
    LN_2,
    LOG2_E,
    add_dot,
    dot,
    load_rows,
    relative_bucket,
    store_rows,
    tanh,
)

_UNLIMITED = 2**30  # a window's side, as a distance that no pair of keys has

# Lengths, head counts and strides vary from call to call: one binary serves them all.
RUNTIME = [
    "B",
    "H",
    "GROUP",
    "M",
    "N",
    "seqlen_new",
    "splits",
    "top_left",
    "left",
    "right",
    "stride_ab",
]
RUNTIME += [f"stride_{x}" for x in ("qb", "qm", "qh", "kb", "kn", "kh", "vb", "vn", "vh")]
RUNTIME += [f"stride_{x}{y}" for x in ("mask", "bias") for y in "bhmn"]
APPEND_RUNTIME = ["H_K", "N", "length"]
APPEND_RUNTIME += [f"stride_{x}{y}" for x in ("k", "v", "kn", "vn") for y in "bnh"]


@triton.jit(do_not_specialize=APPEND_RUNTIME)
def _attention_decode_append_kernel(
    k_new_ptr, v_new_ptr, seqlens_k_ptr, k_ptr, v_ptr,
    stride_knb: tl.int64, stride_knn: tl.int64, stride_knh: tl.int64,
    stride_vnb: tl.int64, stride_vnn: tl.int64, stride_vnh: tl.int64,
    stride_kb: tl.int64, stride_kn: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vn: tl.int64, stride_vh: tl.int64,
    H_K, N, length,
    D: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Writes some heads of one new key and value into the caches.

    Bytes a key of a head, of elements of e: reads and writes k and v: 2 (D + DV) e.
    """
    tiles = tl.cdiv(H_K, BLOCK_H)
    head = (tl.program_id(0) % tiles) * BLOCK_H
    token = tl.program_id(0) // tiles
    batch = (token // length).to(tl.int64)
    new = (token % length).to(tl.int64)
    position = tl.load(seqlens_k_ptr + batch).to(tl.int64) + new
    fits = (position >= 0) & (position < N)
    tl.device_assert(fits, "attention_decode: the cache is full")
    heads = tl.where(fits, H_K, 0)
    k_new_ptr += (batch * stride_knb + new * stride_knn) * UNIT
    v_new_ptr += (batch * stride_vnb + new * stride_vnn) * UNIT
    k_ptr += (batch * stride_kb + position * stride_kn) * UNIT
    v_ptr += (batch * stride_vb + position * stride_vn) * UNIT
    k = load_rows(k_new_ptr, head, stride_knh * UNIT, heads, BLOCK_H, D, BLOCK_D, True)
    store_rows(k_ptr, head, stride_kh * UNIT, heads, k, BLOCK_H, D, BLOCK_D)
    v = load_rows(v_new_ptr, head, stride_vnh * UNIT, heads, BLOCK_H, DV, BLOCK_DV, True)
    store_rows(v_ptr, head, stride_vh * UNIT, heads, v, BLOCK_H, DV, BLOCK_DV)


@triton.jit
def _finish(acc, m_i, l_i, sinks_ptr, head):
    """(out, lse) of rows with maximum m_i and sum l_i in base 2, joined by their heads' sinks."""
    dead = m_i == float("-inf")
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        m_new = tl.maximum(m_i, sink)
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.exp2(sink - m_new)
        acc *= alpha[:, None]
        m_i = m_new
    out = tl.where(dead[:, None], 0.0, acc / tl.where(dead, 1.0, l_i)[:, None])
    lse = tl.where(dead, float("-inf"), (m_i + tl.log2(l_i)) * LN_2)
    return out, lse


@triton.jit(do_not_specialize=RUNTIME)
def _attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, seqlens_k_ptr, mask_ptr, bias_ptr, table_ptr, alibi_ptr, sinks_ptr,
    out_ptr, lse_ptr,
    stride_qb: tl.int64, stride_qm: tl.int64, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kn: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vn: tl.int64, stride_vh: tl.int64,
    stride_maskb: tl.int64, stride_maskh: tl.int64, stride_maskm: tl.int64, stride_maskn: tl.int64,
    stride_biasb: tl.int64, stride_biash: tl.int64, stride_biasm: tl.int64, stride_biasn: tl.int64,
    stride_ab, B, H, GROUP, M, N, seqlen_new, splits, top_left, left, right, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, SPLIT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    STARTS: tl.constexpr, BIDIRECTIONAL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One range of keys of one key head, for a tile of `m * GROUP + g` rows.

    Query m is at key m + n_k - M, or at m where top_left, and sees `left` keys before and `right`
    after that. SPLIT: out is fp32 (splits, B, M, H, DV) and lse, in base 2, (splits, B, M, H).
    Bytes a key of a key head, of elements of e: k and v once a tile of rows: (D + DV) e. A row:
    reads q, D e, for each split; writes out and lse, DV e + 4, with SPLIT 4 DV + 4 a split.
    """
    tiles = tl.cdiv(M * GROUP, BLOCK_M)
    first_row = tl.program_id(0) % tiles * BLOCK_M
    split = tl.program_id(0) // tiles % splits
    batch_head = tl.program_id(0) // (tiles * splits)
    H_K = H // GROUP
    batch = (batch_head // H_K).to(tl.int64)
    head_k = (batch_head % H_K).to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_M)
    m = rows // GROUP
    inside = m < M
    head = head_k * GROUP + rows % GROUP
    cols = tl.arange(0, BLOCK_D)
    q_ptrs = q_ptr + (batch * stride_qb + m * stride_qm + head * stride_qh)[:, None] * UNIT
    q = tl.load(q_ptrs + cols[None, :], mask=inside[:, None] & (cols < D)[None, :], other=0.0)
    k_ptr += (batch * stride_kb + head_k * stride_kh) * UNIT
    v_ptr += (batch * stride_vb + head_k * stride_vh) * UNIT
    if mask_ptr is not None:
        mask_ptrs = mask_ptr + batch * stride_maskb + head * stride_maskh + m * stride_maskm
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + batch * stride_biasb + head * stride_biash + m * stride_biasm
    if alibi_ptr is not None:
        slope = tl.load(alibi_ptr + batch * stride_ab + head).to(tl.float32)

    n_k = tl.minimum(tl.load(seqlens_k_ptr + batch) + seqlen_new, N).to(tl.int32)
    diagonal = tl.where(top_left != 0, 0, n_k - M)
    last = tl.minimum(first_row + BLOCK_M, M * GROUP) - 1
    low = tl.maximum(first_row // GROUP + diagonal - left, 0)
    high = tl.minimum(tl.maximum(last // GROUP + diagonal + right + 1, 0), n_k)
    width = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BLOCK_N), splits) * BLOCK_N
    begin = low + split * width
    end = tl.minimum(begin + width, high)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    for start in range(begin, end, BLOCK_N):
        k = load_rows(k_ptr, start, stride_kn * UNIT, end, BLOCK_N, D, BLOCK_D, True)
        s = dot(q, tl.trans(k).to(q.dtype), PRECISION) * scale
        v = load_rows(v_ptr, start, stride_vn * UNIT, end, BLOCK_N, DV, BLOCK_DV, True)
        keys = start + tl.arange(0, BLOCK_N)
        distance = keys[None, :] - (m + diagonal)[:, None]
        seen = (distance >= -left) & (distance <= right)
        seen = seen & inside[:, None] & (keys < end)[None, :]
        if HAS_SOFTCAP:
            s = softcap * tanh(s / softcap)
        if bias_ptr is not None:
            ptrs = bias_ptrs[:, None] + keys[None, :] * stride_biasn
            bias = tl.load(ptrs, mask=seen, other=float("-inf")).to(tl.float32)
            s += bias
            seen = seen & (bias != float("-inf"))
        if table_ptr is not None:
            bucket = relative_bucket(distance, STARTS, BIDIRECTIONAL)
            s += tl.load(table_ptr + bucket * H + head[:, None], mask=seen, other=0.0)
        if alibi_ptr is not None:
            s -= slope[:, None] * tl.abs(distance).to(tl.float32)
        if mask_ptr is not None:
            ptrs = mask_ptrs[:, None] + keys[None, :] * stride_maskn
            seen = seen & tl.load(ptrs, mask=seen, other=False)
        s = tl.where(seen, s * LOG2_E, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        # A row that has seen no key yet: exp2(-inf - -inf) would be NaN, exp2(-inf - 0) is 0.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(m_i - shift)
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_new
        if mask_ptr is not None or bias_ptr is not None:  # values that no row sees may be NaN
            v = tl.where((tl.max(seen.to(tl.int32), 0) > 0)[:, None], v, 0.0)
        v = v.to(q.dtype)
        acc = add_dot(acc * alpha[:, None], p.to(q.dtype), v, PRECISION)

    row = (batch * M + m) * H + head
    cols_v = tl.arange(0, BLOCK_DV)
    stored = inside[:, None] & (cols_v < DV)[None, :]
    if SPLIT:
        dead = m_i == float("-inf")
        l_i = tl.where(dead, 1.0, l_i)
        row += tl.cast(split, tl.int64) * B * M * H
        tl.store(lse_ptr + row, m_i + tl.log2(l_i), mask=inside)
        stored = stored & ~dead[:, None]  # the combination does not read these
        out = acc / l_i[:, None]
    else:
        out, lse = _finish(acc, m_i, l_i, sinks_ptr, head)
        tl.store(lse_ptr + (batch * H + head) * M + m, lse, mask=inside)
    out_ptrs = out_ptr + row[:, None] * DV + cols_v[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["H", "M", "rows_total", "splits"])
def _attention_decode_combine_kernel(
    split_out_ptr, split_lse_ptr, sinks_ptr, out_ptr, lse_ptr, H, M, rows_total, splits,
    DV: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Adds up the splits of some rows (batch, query, head), in their order.

    Bytes a row, of elements of e: reads 4 DV + 4 a split that has keys, writes out and lse,
    DV e + 4.
    """
    first_row = tl.program_id(0) * BLOCK_R
    rows = first_row + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_DV)
    inside = rows < rows_total
    offsets = rows.to(tl.int64)[:, None] * DV + cols[None, :]
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_R], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_R], tl.float32)
    for split in range(0, splits):
        first = tl.cast(split, tl.int64) * rows_total
        lse = tl.load(split_lse_ptr + first + rows, mask=inside, other=float("-inf"))
        alive = lse > float("-inf")
        mask = alive[:, None] & (cols < DV)[None, :]
        out = tl.load(split_out_ptr + first * DV + offsets, mask=mask, other=0.0)
        m_new = tl.maximum(m_i, lse)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha, weight = tl.exp2(m_i - shift), tl.exp2(lse - shift)
        acc = acc * alpha[:, None] + weight[:, None] * out
        l_i = l_i * alpha + weight
        m_i = m_new
    head = rows % H
    batch_query = (rows // H).to(tl.int64)
    out, lse = _finish(acc, m_i, l_i, sinks_ptr, head)
    store_rows(out_ptr, first_row, DV, rows_total, out, BLOCK_R, DV, BLOCK_DV)
    lse_ptrs = lse_ptr + ((batch_query // M) * H + head) * M + batch_query % M
    tl.store(lse_ptrs, lse, mask=inside)


def attention_decode_append(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    seqlens_k: torch.Tensor,
) -> None:
    """Writes k_new and v_new (batch, seqlen_new, nheads_k, ...) into the caches from seqlens_k on.

    Last strides are 1. What does not fit is a device assertion, and is not written.
    """
    batch, length, nheads_k, headdim = k_new.shape
    if batch * length == 0:
        return
    block_d, block_dv = (next_power_of_2(x.shape[3]) for x in (k_new, v_new))
    block_h = min(next_power_of_2(nheads_k), max(1, 1024 // max(block_d, block_dv)))
    unit, strides = aligned_strides(k_new, v_new, k_cache, v_cache)
    launch(
        _attention_decode_append_kernel, batch * length * ceil_div(nheads_k, block_h),
        k_new, v_new, seqlens_k, k_cache, v_cache, *strides,
        H_K=nheads_k,
        N=k_cache.shape[1],
        length=length,
        D=headdim,
        DV=v_new.shape[3],
        UNIT=unit,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        num_warps=1,
        enable_fp_fusion=True,
        debug=True,  # keeps the assertion
    )  # fmt: skip


def attention_decode_fwd(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens_k: torch.Tensor,
    seqlen_new: int,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    causal: str,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    bidirectional: bool,
    max_distance: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the splits and, where there are several, their combination.

    Args:
        q: (batch, seqlen_q, nheads, headdim), last stride 1, as are
        k_cache, v_cache: (batch, seqlen_cache, nheads_k, headdim or headdim_v).
        seqlens_k: (batch,), int32 or int64, contiguous; seqlen_new more keys than that count.
        mask, bias: four dimensions, of size 1 where broadcast.
        table: (num_buckets, nheads) of `RelativeBias`, with bidirectional and max_distance.
        alibi_slopes: (nheads,) or (batch, nheads); sinks: (nheads,). These three are contiguous.
        causal: "none", "top_left" or "bottom_right".
        window_left, window_right: -1 is unlimited; softcap: 0 is none.

    Returns:
        out (batch, seqlen_q, nheads, headdim_v), contiguous, in the dtype of q; lse, fp32 (batch,
        nheads, seqlen_q), natural logarithm.
    """
    batch, seqlen_q, nheads, headdim = q.shape
    seqlen_k, nheads_k, headdim_v = v_cache.shape[1:]
    out = q.new_empty((batch, seqlen_q, nheads, headdim_v))
    lse = q.new_empty((batch, nheads, seqlen_q), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    unit, strides = aligned_strides(q, k_cache, v_cache)
    group = nheads // nheads_k
    blocks_d = [max(16, next_power_of_2(n)) for n in (headdim, headdim_v)]
    plain = mask is None and bias is None and table is None and alibi_slopes is None
    plain = plain and q.dtype == k_cache.dtype and headdim == blocks_d[0]
    config, splits = decode_config(
        q.device, group * seqlen_q, batch * nheads_k, seqlen_k, max(blocks_d), q.dtype, plain
    )
    tiles = ceil_div(group * seqlen_q, config.block_m)
    rows = batch * seqlen_q * nheads
    parts = out, lse
    if splits > 1:
        parts = (
            q.new_empty((splits, rows, headdim_v), dtype=torch.float32),
            q.new_empty((splits, rows), dtype=torch.float32),
        )
    starts = bucket_starts(len(table), bidirectional, max_distance) if table is not None else ()
    left = _UNLIMITED if window_left < 0 else window_left
    right = _UNLIMITED if window_right < 0 else window_right
    launch(
        _attention_decode_kernel, tiles * splits * batch * nheads_k,
        q, k_cache, v_cache, seqlens_k, mask, bias, table, alibi_slopes, sinks, *parts, *strides,
        *_broadcast_strides(mask), *_broadcast_strides(bias),
        stride_ab=nheads if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
        B=batch,
        H=nheads,
        GROUP=group,
        M=seqlen_q,
        N=seqlen_k,
        seqlen_new=seqlen_new,
        splits=splits,
        top_left=int(causal == "top_left"),
        left=min(left, _UNLIMITED),
        right=0 if causal != "none" else min(right, _UNLIMITED),
        scale=softmax_scale,
        softcap=softcap,
        D=headdim,
        DV=headdim_v,
        SPLIT=splits > 1,
        HAS_SOFTCAP=softcap > 0.0,
        STARTS=starts,
        BIDIRECTIONAL=bidirectional,
        UNIT=unit,
        PRECISION=dot_precision(q.dtype),
        BLOCK_D=blocks_d[0],
        BLOCK_DV=blocks_d[1],
        **config.options(),
    )  # fmt: skip
    if splits > 1:
        _combine(parts, sinks, out, lse)
    return out, lse


def _combine(parts, sinks, out, lse) -> None:
    """Adds up (out, lse) of the splits."""
    splits, rows, headdim_v = parts[0].shape
    block_d = max(16, next_power_of_2(headdim_v))
    block_r = max(1, 512 // block_d)
    launch(
        _attention_decode_combine_kernel, ceil_div(rows, block_r),
        *parts, sinks, out, lse,
        H=out.shape[2],
        M=out.shape[1],
        rows_total=rows,
        splits=splits,
        DV=headdim_v,
        BLOCK_R=block_r,
        BLOCK_DV=block_d,
        enable_fp_fusion=True,
    )  # fmt: skip


def _broadcast_strides(x: torch.Tensor | None) -> list[int]:
    if x is None:
        return [0] * 4
    return [0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True)]
