"""Attention forward: tiles of queries against blocks of keys, with an online softmax.

    s = scale * q k^T;  lse = log(sum_keys exp(s));  out = exp(s - lse) v

in base 2: `scale * log2(e)` is folded into one factor, so that exp2 needs no product of its own.
Blocks of keys that no row of the tile sees are skipped, those that every row sees are not masked.
A row that sees no key gives out = 0 and lse = -inf. Layout (batch, seqlen, nheads, headdim), any
strides with last stride 1; statistics are fp32.

Source: Dao, FlashAttention-2, arXiv:2307.08691; Milakov and Gimelshein, arXiv:1805.02867.
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
from fastlm.kernels.primitives import LN_2, key_range, load_rows, store_rows, tile_and_head

# Lengths, head counts and strides vary from call to call: one binary serves them all.
RUNTIME = ["H", "GROUP", "M", "N", "diagonal", "section"]
RUNTIME += [f"stride_{x}" for x in ("qb", "qm", "qh", "kb", "kn", "kh", "vb", "vn", "vh")]


@triton.jit
def _attend(
    acc, m_i, l_i, q, k_ptr, v_ptr, stride_kn, stride_vn, begin, end, last_key, scale_log2,
    D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds keys [begin, end) to the running maximum, sum and output of a tile of queries.

    MASKED: no row sees keys from `end` on, which are not read; they may hold NaN.
    """
    for start in range(begin, end, BLOCK_N):
        k = load_rows(k_ptr, start, stride_kn, end, BLOCK_N, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if MASKED:
            seen = start + tl.arange(0, BLOCK_N)[None, :] <= last_key[:, None]
            s = tl.where(seen, s * scale_log2, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(s, 1))
            # A row that has seen no key yet: exp2(-inf - -inf) would be NaN, exp2(-inf - 0) is 0.
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s - shift[:, None])
        else:
            m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
            shift = m_new
            p = tl.exp2(s * scale_log2 - shift[:, None])
        alpha = tl.exp2(m_i - shift)
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_new
        v = load_rows(v_ptr, start, stride_vn, end, BLOCK_N, D, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_i, l_i


@triton.jit(do_not_specialize=RUNTIME)
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_qb: tl.int64, stride_qm: tl.int64, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kn: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vn: tl.int64, stride_vh: tl.int64,
    H, GROUP, M, N, diagonal, section, scale_log2,
    D: tl.constexpr, IS_CAUSAL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. Strides count UNIT elements: what they are aligned to."""
    tile, batch_head = tile_and_head(tl.program_id(0), tl.cdiv(M, BLOCK_M), True, section)
    batch = (batch_head // H).to(tl.int64)
    head = (batch_head % H).to(tl.int64)
    head_k = head // GROUP
    first_row = tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    q_ptr += (batch * stride_qb + head * stride_qh) * UNIT
    k_ptr += (batch * stride_kb + head_k * stride_kh) * UNIT
    v_ptr += (batch * stride_vb + head_k * stride_vh) * UNIT

    q = load_rows(q_ptr, first_row, stride_qm * UNIT, M, BLOCK_M, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    full, end = key_range(first_row, BLOCK_M, M, N, diagonal, IS_CAUSAL, BLOCK_N)
    last_key = tl.zeros([BLOCK_M], tl.int32) + (N - 1)
    if IS_CAUSAL:
        last_key = tl.minimum(rows + diagonal, last_key)
    acc, m_i, l_i = _attend(
        acc, m_i, l_i, q, k_ptr, v_ptr, stride_kn * UNIT, stride_vn * UNIT, 0, full, last_key,
        scale_log2, D, False, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, m_i, l_i = _attend(
        acc, m_i, l_i, q, k_ptr, v_ptr, stride_kn * UNIT, stride_vn * UNIT, full, end, last_key,
        scale_log2, D, True, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    dead = m_i == float("-inf")
    l_i = tl.where(dead, 1.0, l_i)
    out_ptr += (batch * M * H + head) * D
    store_rows(out_ptr, first_row, H.to(tl.int64) * D, M, acc / l_i[:, None], BLOCK_M, D, BLOCK_D)
    lse = tl.where(dead, float("-inf"), (m_i + tl.log2(l_i)) * LN_2)
    tl.store(lse_ptr + batch_head.to(tl.int64) * M + rows, lse, mask=rows < M)


def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: str, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the forward.

    Args:
        q: (batch, seqlen_q, nheads, headdim), last stride 1, as are
        k, v: (batch, seqlen_k, nheads_k, headdim); nheads is a multiple of nheads_k.
        causal: "none", "top_left" or "bottom_right".

    Returns:
        out, contiguous, as q; lse, fp32 (batch, nheads, seqlen_q), natural logarithm.
    """
    batch, seqlen_q, nheads, headdim = q.shape
    seqlen_k, nheads_k = k.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, nheads, seqlen_q), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if softmax_scale < 0:  # the running maximum assumes a scale that keeps the order
        q, softmax_scale = -q, -softmax_scale
    unit, strides = aligned_strides(q, k, v)
    config = attention_config("fwd", q.device, headdim, q.dtype, unit)
    tiles = ceil_div(seqlen_q, config.block_m)
    head_bytes = 2 * seqlen_k * headdim * q.element_size()
    _attention_fwd_kernel[(tiles * batch * nheads,)](
        q, k, v, out, lse, *strides,
        H=nheads,
        GROUP=nheads // nheads_k,
        M=seqlen_q,
        N=seqlen_k,
        diagonal=seqlen_k - seqlen_q if causal == "bottom_right" else 0,
        section=attention_section(q.device, causal, head_bytes, batch * nheads),
        scale_log2=softmax_scale * math.log2(math.e),
        D=headdim,
        IS_CAUSAL=causal != "none",
        UNIT=unit,
        PRECISION=dot_precision(q.dtype),
        BLOCK_D=max(16, next_power_of_2(headdim)),
        **config.options(),
    )  # fmt: skip
    return out, lse
