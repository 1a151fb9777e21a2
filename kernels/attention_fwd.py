"""Attention forward: tiles of queries against blocks of keys, with an online softmax.

    s = score(q k^T);  lse = log(sum_keys exp(s) + exp(sink));  out = dropout(exp(s - lse)) v

in base 2 where halves have no other option: `scale * log2(e)` is one factor then, and exp2 needs no
product of its own.
Blocks of keys that no row of the tile may see by its place (causal, window, lengths) are skipped,
those that every row may see are not compared with it. A row that sees no key gives out = 0 and
lse = -inf. Layout (batch, seqlen, nheads, headdim) or packed (tokens, nheads, headdim), any strides
with last stride 1; statistics are fp32. Scores: attention_scores.py.

Source: Dao, FlashAttention-2, arXiv:2307.08691; Milakov and Gimelshein, arXiv:1805.02867.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastlm.kernels.attention_configs import attention_config, attention_section
from fastlm.kernels.attention_scores import (
    OPTIONS_RUNTIME,
    Options,
    block_descriptors,
    has_nan,
    key_ranges,
    load_block,
    load_tile,
    logits,
    option_arguments,
    place_in_blocks,
    seen_keys,
    sequence,
    zero_rows,
)
from fastlm.kernels.configs import aligned_strides, ceil_div, dot_precision, next_power_of_2
from fastlm.kernels.launch import launch
from fastlm.kernels.primitives import (
    LN_2,
    LOG2_E,
    add_dot,
    dot,
    dropout_keep,
    load_rows,
    store_rows,
    tile_and_head,
)

# Lengths, head counts and strides vary from call to call: one binary serves them all.
RUNTIME = ["H", "GROUP", "M", "N", "T", "section", *OPTIONS_RUNTIME]
RUNTIME += [f"stride_{x}" for x in ("qb", "qm", "qh", "kb", "kn", "kh", "vb", "vn", "vh")]


@triton.jit
def _softmax(s, m_i, l_i, scale_log2):
    """(p, alpha, m, l): adds a block that all rows see to the running maximum and sum."""
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
    p = tl.exp2(s * scale_log2 - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def _attend_whole(
    acc, m_i, l_i, q, k_desc, v_desc, place, begin, end, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """`_attend` for PLAIN calls without dropout or left window and keys that all rows see, by
    descriptors.

    Each product with v is issued one block late: it then runs beside a softmax that does not need
    it. Before the first block p is 0, and v lies before the tensor, where it reads as 0.
    """
    # What the late product reads must not be written beside it. fp32 takes registers, that there
    # are for narrow heads; halves take moves.
    P: tl.constexpr = tl.float32 if BLOCK_DV <= 64 else q.dtype
    p = tl.zeros([BLOCK_M, BLOCK_N], P)
    alpha = tl.full([BLOCK_M], 1.0, tl.float32)
    before = -place[1] - BLOCK_N
    for start in range(begin, end, BLOCK_N):
        k = load_block(k_desc, place, start, BLOCK_N, BLOCK_D)
        s = tl.dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        late = tl.where(start > begin, start - BLOCK_N, before)
        v = load_block(v_desc, place, late, BLOCK_N, BLOCK_DV)
        if P != tl.float32:  # else p goes through shared memory, and its product is waited for
            p = p.to(tl.int16, bitcast=True).to(P, bitcast=True)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        p, alpha, m_i, l_i = _softmax(s, m_i, l_i, scale * LOG2_E)
        p = p.to(P)
    if begin < end:
        v = load_block(v_desc, place, end - BLOCK_N, BLOCK_N, BLOCK_DV)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, m_i, l_i


@triton.jit
def _attend(
    acc, m_i, l_i, q, k_ptr, v_ptr, stride_kn, stride_vn, begin, end, low, first_key, last_key,
    rows, M, N, diagonal, scale, options, seed_ptr, threshold, batch, head, k_desc, v_desc, place,
    D: tl.constexpr, DV: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr,
    PLAIN: tl.constexpr, ZERO: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Adds keys [begin, end) to the running maximum, sum and output of a tile of queries.

    MASKED: no row sees keys below `low` and from `end` on; they may hold NaN. ZERO: so may keys
    that a mask or a bias forbids to all rows. PLAIN: scores and maxima are in base 2.
    """
    scale_log2 = scale * LOG2_E
    # Zeros that an empty loop leaves would be moved into the sums of wgmmas, and these serialized
    # for that (C7515 in the log of ptxas).
    if begin < end:
        for start in range(begin, end, BLOCK_N):
            k = load_tile(
                k_desc, place, k_ptr, start, stride_kn, end, BLOCK_N, D, BLOCK_D, MASKED, 0, False
            )
            s = dot(q, tl.trans(k), PRECISION)  # [BLOCK_M, BLOCK_N]
            v = load_tile(
                v_desc, place, v_ptr, start, stride_vn, end, BLOCK_N, DV, BLOCK_DV, MASKED, low,
                HAS_LEFT,
            )  # fmt: skip
            local = tl.arange(0, BLOCK_N)
            cols = start + local
            if not PLAIN:
                s, _ = logits(
                    s, rows[:, None], start, local[None, :], M, N, diagonal, scale, batch, head,
                    options,
                )  # fmt: skip
            elif MASKED:
                s *= scale_log2
            if ZERO:
                visible = tl.max((s != float("-inf")).to(tl.int32), 0)
                v = zero_rows(v, visible)
            if MASKED:
                seen = cols[None, :] <= last_key[:, None]
                if HAS_LEFT:
                    seen = seen & (cols[None, :] >= first_key[:, None])
                s = tl.where(seen, s, float("-inf"))
            if PLAIN and not MASKED:
                p, alpha, m_i, l_i = _softmax(s, m_i, l_i, scale_log2)
            else:
                m_new = tl.maximum(m_i, tl.max(s, 1))
                # Of a row that has seen no key yet exp2(-inf - -inf) is NaN, exp2(-inf - 0) is 0.
                shift = tl.where(m_new == float("-inf"), 0.0, m_new)
                if PLAIN:
                    p = tl.exp2(s - shift[:, None])
                    alpha = tl.exp2(m_i - shift)
                else:
                    p = tl.exp2((s - shift[:, None]) * LOG2_E)
                    alpha = tl.exp2((m_i - shift) * LOG2_E)
                l_i = l_i * alpha + tl.sum(p, 1)
                m_i = m_new
            if seed_ptr is not None:
                keep = dropout_keep(tl.load(seed_ptr), threshold, batch, head, rows, start, BLOCK_N)
                p = tl.where(keep, p, 0.0)
            acc = add_dot(acc * alpha[:, None], p.to(v.dtype), v, PRECISION)
    return acc, m_i, l_i


@triton.jit(do_not_specialize=RUNTIME)
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, out_ptr, lse_ptr, lse_low_ptr, sinks_ptr,
    stride_qb: tl.int64, stride_qm: tl.int64, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kn: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vn: tl.int64, stride_vh: tl.int64,
    H, GROUP, M, N, T, section, scale,
    mask_ptr, stride_mask_b: tl.int64, stride_mask_h: tl.int64, stride_mask_m,
    stride_mask_n: tl.int64, bias_ptr, stride_bias_b: tl.int64, stride_bias_h: tl.int64,
    stride_bias_m, stride_bias_n: tl.int64, values_ptr, extent, slopes_ptr,
    stride_sb: tl.int64, softcap, cu_q_ptr, cu_k_ptr, seqlens_k_ptr, seed_ptr,
    threshold: tl.uint32, dropout_scale, left, right, bottom_right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PLAIN: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. Strides count UNIT elements: what they are aligned to.

    M, N: lengths, of packed sequences the longest's. T: rows of a head in lse.
    k_desc, v_desc: from `block_descriptors`, for the blocks of keys that all rows see, or None.
    Bytes a row, of elements of e: reads q, writes out and lse: (D + DV) e + 4. For each key that a
    tile sees k and v, (D + DV) e, which tiles in work at a time share in the L2 cache; for each
    pair the element of a mask or a bias.
    """
    tile, batch_head = tile_and_head(tl.program_id(0), tl.cdiv(M, BLOCK_M), True, section)
    batch = (batch_head // H).to(tl.int64)
    head = (batch_head % H).to(tl.int64)
    head_k = head // GROUP
    first_row = tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    first_q, first_k, n_q, n_k, diagonal = sequence(
        batch, M, N, cu_q_ptr, cu_k_ptr, seqlens_k_ptr, bottom_right
    )
    options = (
        mask_ptr, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
        bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
        values_ptr, extent, slopes_ptr, stride_sb, softcap,
    )  # fmt: skip
    q_ptr += (batch * stride_qb + first_q * stride_qm + head * stride_qh) * UNIT
    k_ptr += (batch * stride_kb + first_k * stride_kn + head_k * stride_kh) * UNIT
    v_ptr += (batch * stride_vb + first_k * stride_vn + head_k * stride_vh) * UNIT
    place = place_in_blocks(batch, first_k, head_k, cu_k_ptr)

    q = load_rows(q_ptr, first_row, stride_qm * UNIT, n_q, BLOCK_M, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    begin, full, full_end, low, end = key_ranges(
        first_row, BLOCK_M, n_q, n_k, diagonal, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    first_key, last_key = seen_keys(rows, n_k, diagonal, left, right, HAS_LEFT, HAS_RIGHT)
    if HAS_LEFT:
        acc, m_i, l_i = _attend(
            acc, m_i, l_i, q, k_ptr, v_ptr, stride_kn * UNIT, stride_vn * UNIT, begin,
            tl.minimum(full, end), low, first_key, last_key, rows, n_q, n_k, diagonal, scale,
            options, seed_ptr, threshold, batch, head, k_desc, v_desc, place, D, DV, True, True,
            PLAIN, False, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    if k_desc is not None and PLAIN and seed_ptr is None and not HAS_LEFT:
        acc, m_i, l_i = _attend_whole(
            acc, m_i, l_i, q, k_desc, v_desc, place, full, full_end, scale, BLOCK_M, BLOCK_N,
            BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    else:
        acc, m_i, l_i = _attend(
            acc, m_i, l_i, q, k_ptr, v_ptr, stride_kn * UNIT, stride_vn * UNIT, full, full_end, low,
            first_key, last_key, rows, n_q, n_k, diagonal, scale, options, seed_ptr, threshold,
            batch, head, k_desc, v_desc, place, D, DV, False, False, PLAIN, False, PRECISION,
            BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    acc, m_i, l_i = _attend(
        acc, m_i, l_i, q, k_ptr, v_ptr, stride_kn * UNIT, stride_vn * UNIT, full_end, end, low,
        first_key, last_key, rows, n_q, n_k, diagonal, scale, options, seed_ptr, threshold, batch,
        head, k_desc, v_desc, place, D, DV, True, HAS_LEFT, PLAIN, False, PRECISION, BLOCK_N,
        BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    if mask_ptr is not None or bias_ptr is not None:
        if has_nan(acc):  # of a key that is forbidden, maybe: 0 * NaN is NaN
            acc, m_i, l_i = _attend(
                tl.zeros_like(acc), tl.full([BLOCK_M], float("-inf"), tl.float32),
                tl.zeros([BLOCK_M], tl.float32), q, k_ptr, v_ptr, stride_kn * UNIT,
                stride_vn * UNIT, begin, end, low, first_key, last_key, rows, n_q, n_k, diagonal,
                scale, options, seed_ptr, threshold, batch, head, k_desc, v_desc, place, D, DV,
                True, HAS_LEFT, PLAIN, True, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip

    dead = m_i == float("-inf")
    if PLAIN:
        m_i *= LN_2
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        m_new = tl.maximum(m_i, sink)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2((m_i - shift) * LOG2_E)
        l_i = l_i * alpha + tl.exp2((sink - shift) * LOG2_E)
        acc *= alpha[:, None]
        m_i = m_new
    l_i = tl.where(dead, 1.0, l_i)
    inverse = 1.0 / l_i
    if seed_ptr is not None:
        inverse *= dropout_scale
    out = acc * inverse[:, None]
    first_out = ((batch * M + first_q) * H + head) * DV
    stats = batch_head.to(tl.int64) * T + rows
    if cu_q_ptr is not None:
        first_out -= batch * M * H * DV
        stats += first_q - batch * H * T
    stride_om = H.to(tl.int64) * DV
    store_rows(out_ptr + first_out, first_row, stride_om, n_q, out, BLOCK_M, DV, BLOCK_DV)
    log_sum = tl.log2(l_i) * LN_2
    lse = m_i + log_sum
    tl.store(lse_ptr + stats, tl.where(dead, float("-inf"), lse), mask=rows < n_q)
    if lse_low_ptr is not None:  # what the sum lost; Knuth's two-sum
        back = lse - m_i
        low = (m_i - (lse - back)) + (log_sum - back)
        tl.store(lse_low_ptr + stats, tl.where(dead, 0.0, low), mask=rows < n_q)


def attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Options,
    exact: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Launches the forward.

    Args:
        q: (batch, seqlen_q, nheads, headdim), last stride 1, as are
        k, v: (batch, seqlen_k, nheads_k, ...); nheads is a multiple of nheads_k. With cu_seqlens,
            all three have tokens in the place of batch and seqlen.
        exact: gives the last result.

    Returns:
        out, contiguous, as q but with the head dim of v; lse, fp32 (batch, nheads, seqlen_q) or
        (nheads, tokens_q), natural logarithm; lse_low, what lse lost to rounding, without which
        exp(score - lse) has fewer digits than a probability in fp32.
    """
    packed = options.cu_seqlens_q is not None
    nheads, headdim, headdim_v = q.shape[-2], q.shape[-1], v.shape[-1]
    shape = (*q.shape[:-1], headdim_v)
    if packed:  # tokens of no sequence are written by no program
        batch, seqlen_q, seqlen_k = len(options.cu_seqlens_q) - 1, *options[-2:]
        out = q.new_zeros(shape)
        lse = q.new_full((nheads, q.shape[0]), -math.inf, dtype=torch.float32)
        q, k, v = q[None], k[None], v[None]
    else:
        batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
        out = q.new_empty(shape)
        lse = q.new_empty((batch, nheads, seqlen_q), dtype=torch.float32)
    lse_low = (torch.zeros_like if packed else torch.empty_like)(lse) if exact else None
    results = out, lse, lse_low
    if out.numel() == 0 or batch * seqlen_q == 0:
        return results
    softmax_scale = options.softmax_scale
    if softmax_scale < 0:  # the running maximum assumes a scale that keeps the order
        q, softmax_scale = -q, -softmax_scale
    unit, strides = aligned_strides(q, k, v)
    config = attention_config(
        "fwd", q.device, max(headdim, headdim_v), q.dtype, unit, options.burden
    )
    descriptors = block_descriptors(config.block_n, k, v) if config.tma else (None, None)
    tiles = ceil_div(seqlen_q, config.block_m)
    head_bytes = seqlen_k * (headdim + headdim_v) * q.element_size()
    launch(
        _attention_fwd_kernel, tiles * batch * nheads,
        q, k, v, *descriptors, out, lse, lse_low, options.sinks, *strides,
        H=nheads,
        GROUP=nheads // k.shape[2],
        M=seqlen_q,
        N=seqlen_k,
        T=lse.shape[-1],
        section=attention_section(q.device, options.causal, head_bytes, batch * nheads),
        scale=softmax_scale,
        **option_arguments((seqlen_q, seqlen_k), q.dtype, options),
        D=headdim,
        DV=headdim_v,
        UNIT=unit,
        PRECISION=dot_precision(q.dtype),
        BLOCK_D=max(16, next_power_of_2(headdim)),
        BLOCK_DV=max(16, next_power_of_2(headdim_v)),
        **config.options(),
    )  # fmt: skip
    return results
