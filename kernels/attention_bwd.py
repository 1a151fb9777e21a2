"""Attention backward, deterministic: one kernel for dq, one for dk and dv, no atomics.

    p = exp(score(q k^T) - lse);  delta = rowsum(do * out) - dlse;  keep: 1 / (1 - dropout_p) or 0
    dv = (keep * p)^T do;  ds = p * (keep * do v^T - delta) * score'
    dq = scale * ds k;  dk = scale * ds^T q

Probabilities are recomputed from lse, in the forward's base. dq goes over blocks of keys; dk
and dv over blocks of queries of every head that shares the key head, summed in fp32. That is 7
matrix products where atomics on dq would need 5, and the price of equal bits from equal inputs.
Gradients of biases, tables, slopes and sinks: attention_dbias.py.

Source: Dao, FlashAttention-2, arXiv:2307.08691, algorithm 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlm.kernels.attention_configs import attention_config, attention_section
from fastlm.kernels.attention_dbias import (
    attention_dalibi,
    attention_dbias,
    attention_delta,
    attention_dsinks,
    attention_dtable,
)
from fastlm.kernels.attention_scores import (
    OPTIONS_RUNTIME,
    Options,
    block_descriptors,
    has_nan,
    key_ranges,
    load_tile,
    logits,
    option_arguments,
    place_in_blocks,
    probabilities,
    seen_keys,
    sequence,
    zero_rows,
)
from fastlm.kernels.configs import aligned_strides, ceil_div, dot_precision, next_power_of_2
from fastlm.kernels.launch import launch
from fastlm.kernels.primitives import (
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
RUNTIME += [f"stride_{x}{y}" for x in ("q", "do") for y in "bmh"]
RUNTIME += [f"stride_{x}{y}" for x in "kv" for y in "bnh"]
DELTA_RUNTIME = ["H", "M", *(f"stride_do{y}" for y in "bmh")]


@triton.jit(do_not_specialize=DELTA_RUNTIME)
def _attention_bwd_delta_kernel(
    do_ptr, out_ptr, lse_ptr, dlse_ptr, delta_ptr, safe_lse_ptr,
    stride_dob: tl.int64, stride_dom: tl.int64, stride_doh: tl.int64, H, M,
    D: tl.constexpr, PLAIN: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta, and lse in its scores' base, +inf for rows without keys: exp2(s - inf) is then 0.

    Bytes a row, of elements of e: reads do, out and lse, writes two fp32: 2 D e + 12; dlse 4 more.
    """
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
    if PLAIN:
        lse *= LOG2_E
    tl.store(safe_lse_ptr + stats, tl.where(dead, float("inf"), lse), mask=mask)


@triton.jit
def _add_dq(
    dq, q, do, lse, lse_low, delta, k_ptr, v_ptr, stride_kn, stride_vn, begin, end, low,
    first_key, last_key, rows, M, N, diagonal, scale, options, seed_ptr, threshold, dropout_scale,
    batch, head, k_desc, v_desc, place,
    D: tl.constexpr, DV: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr,
    PLAIN: tl.constexpr, ZERO: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Adds what keys [begin, end) contribute to dq / scale of a tile of queries.

    MASKED: no row sees keys below `low` and from `end` on; they may hold NaN. ZERO: so may keys
    that a mask or a bias forbids to all rows.
    """
    if begin < end:  # see `_attend`
        for start in range(begin, end, BLOCK_N):
            k = load_tile(
                k_desc, place, k_ptr, start, stride_kn, end, BLOCK_N, D, BLOCK_D, MASKED, low,
                HAS_LEFT,
            )  # fmt: skip
            v = load_tile(
                v_desc, place, v_ptr, start, stride_vn, end, BLOCK_N, DV, BLOCK_DV, MASKED, low,
                HAS_LEFT,
            )  # fmt: skip
            s = dot(q, tl.trans(k), PRECISION)  # [BLOCK_M, BLOCK_N]
            local = tl.arange(0, BLOCK_N)
            cols = start + local
            slope = 1.0
            if PLAIN:
                p = tl.exp2(s * (scale * LOG2_E) - lse[:, None])
            else:
                s, slope = logits(
                    s, rows[:, None], start, local[None, :], M, N, diagonal, scale, batch, head,
                    options,
                )  # fmt: skip
                low_lse = lse_low[:, None] if lse_low is not None else None
                p = probabilities(s, lse[:, None], low_lse)
            if MASKED:
                seen = cols[None, :] <= last_key[:, None]
                if HAS_LEFT:
                    seen = seen & (cols[None, :] >= first_key[:, None])
            dp = dot(do, tl.trans(v), PRECISION)
            if seed_ptr is not None:
                keep = dropout_keep(tl.load(seed_ptr), threshold, batch, head, rows, start, BLOCK_N)
                dp = tl.where(keep, dp * dropout_scale, 0.0)
            ds = p * (dp - delta[:, None]) * slope
            if MASKED:
                ds = tl.where(seen, ds, 0.0)
            if ZERO:
                allowed = s != float("-inf")
                ds = tl.where(allowed, ds, 0.0)
                visible = tl.max(allowed.to(tl.int32), 0)
                k = zero_rows(k, visible)
            dq = add_dot(dq, ds.to(k.dtype), k, PRECISION, False)
    return dq


@triton.jit(do_not_specialize=RUNTIME)
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, k_desc, v_desc, lse_ptr, lse_low_ptr, delta_ptr, dq_ptr,
    stride_qb: tl.int64, stride_qm: tl.int64, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kn: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vn: tl.int64, stride_vh: tl.int64,
    stride_dob: tl.int64, stride_dom: tl.int64, stride_doh: tl.int64,
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
    """dq of one tile of queries of one head. Strides count UNIT elements.

    M, N: lengths, of packed sequences the longest's. T: rows of a head in lse and delta.
    k_desc, v_desc: from `block_descriptors`, for the blocks of keys that all rows see, or None.
    Bytes a row, of elements of e: reads q, do, lse and delta, writes dq: (2 D + DV) e + 8. For each
    key that a tile sees k and v, (D + DV) e, which tiles in work at a time share in the L2 cache.
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
    do_ptr += (batch * stride_dob + first_q * stride_dom + head * stride_doh) * UNIT
    dq_ptr += ((batch * M + first_q) * H + head) * D
    stats = batch_head.to(tl.int64) * T
    if cu_q_ptr is not None:
        dq_ptr -= batch * M * H * D
        stats += first_q - batch * H * T
    place = place_in_blocks(batch, first_k, head_k, cu_k_ptr)

    q = load_rows(q_ptr, first_row, stride_qm * UNIT, n_q, BLOCK_M, D, BLOCK_D, True)
    do = load_rows(do_ptr, first_row, stride_dom * UNIT, n_q, BLOCK_M, DV, BLOCK_DV, True)
    lse = tl.load(lse_ptr + stats + rows, mask=rows < n_q, other=float("inf"))
    lse_low = None
    if lse_low_ptr is not None:
        lse_low = tl.load(lse_low_ptr + stats + rows, mask=rows < n_q, other=0.0)
    delta = tl.load(delta_ptr + stats + rows, mask=rows < n_q, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, full, full_end, low, end = key_ranges(
        first_row, BLOCK_M, n_q, n_k, diagonal, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    first_key, last_key = seen_keys(rows, n_k, diagonal, left, right, HAS_LEFT, HAS_RIGHT)
    if HAS_LEFT:
        dq = _add_dq(
            dq, q, do, lse, lse_low, delta, k_ptr, v_ptr, stride_kn * UNIT, stride_vn * UNIT,
            begin, tl.minimum(full, end), low, first_key, last_key, rows, n_q, n_k, diagonal, scale,
            options, seed_ptr, threshold, dropout_scale, batch, head, k_desc, v_desc, place, D, DV,
            True, True, PLAIN, False, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    dq = _add_dq(
        dq, q, do, lse, lse_low, delta, k_ptr, v_ptr, stride_kn * UNIT, stride_vn * UNIT, full,
        full_end, low, first_key, last_key, rows, n_q, n_k, diagonal, scale, options, seed_ptr,
        threshold, dropout_scale, batch, head, k_desc, v_desc, place, D, DV, False, False, PLAIN,
        False, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    dq = _add_dq(
        dq, q, do, lse, lse_low, delta, k_ptr, v_ptr, stride_kn * UNIT, stride_vn * UNIT,
        full_end, end, low, first_key, last_key, rows, n_q, n_k, diagonal, scale, options, seed_ptr,
        threshold, dropout_scale, batch, head, k_desc, v_desc, place, D, DV, True, HAS_LEFT, PLAIN,
        False, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    if mask_ptr is not None or bias_ptr is not None:
        if has_nan(dq):  # of a key that is forbidden, maybe
            dq = _add_dq(
                tl.zeros_like(dq), q, do, lse, lse_low, delta, k_ptr, v_ptr, stride_kn * UNIT,
                stride_vn * UNIT, begin, end, low, first_key, last_key, rows, n_q, n_k, diagonal,
                scale, options, seed_ptr, threshold, dropout_scale, batch, head, k_desc, v_desc,
                place, D, DV, True, HAS_LEFT, PLAIN, True, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    dq *= scale
    store_rows(dq_ptr, first_row, H.to(tl.int64) * D, n_q, dq, BLOCK_M, D, BLOCK_D)


@triton.jit
def _add_dk_dv(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, lse_low_ptr, delta_ptr, stride_qm, stride_qh,
    stride_dom, stride_doh, GROUP, M, N, T, begin, count, full, jump, low_row, first_row, last_row,
    first_col, diagonal, scale, batch, head_0, options, seed_ptr, threshold, dropout_scale,
    q_desc, do_desc, batch_q, first_q,
    D: tl.constexpr, DV: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, PLAIN: tl.constexpr, ZERO: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Adds to dk / scale and dv of a block of keys what `count` tiles of queries, from tile `begin`
    on, of each of GROUP heads contribute. From tile `full` on, `jump` tiles are left out.

    MASKED: rows from first_row to last_row see a key, those below low_row none; they may hold NaN.
    ZERO: so may rows to which a mask or a bias forbids all keys. Heads and tiles are one loop: in
    two, every pointer would live twice, and registers spill.
    """
    rows = tl.arange(0, BLOCK_M)
    head = tl.cast(0, tl.int32)
    index = tl.cast(0, tl.int32)
    if count > 0:  # see `_attend`
        for _ in range(0, GROUP * count):
            tile = begin + index
            if MASKED:
                tile = tl.where(tile < full, tile, tile + jump)
            start = tile * BLOCK_M
            stats = head.to(tl.int64) * T + start + rows
            if MASKED:  # rows from M on: p = exp2(0 - inf) = 0
                lse = tl.load(lse_ptr + stats, mask=rows < M - start, other=float("inf"))
                delta = tl.load(delta_ptr + stats, mask=rows < M - start, other=0.0)
            else:
                lse = tl.load(lse_ptr + stats)
                delta = tl.load(delta_ptr + stats)
            place = (batch_q, first_q, (head_0 + head).to(tl.int32))
            q_at = q_ptr + head.to(tl.int64) * stride_qh
            do_at = do_ptr + head.to(tl.int64) * stride_doh
            alive = lse < float("inf") if ZERO else None
            q = load_tile(
                q_desc, place, q_at, start, stride_qm, M, BLOCK_M, D, BLOCK_D, MASKED, low_row,
                HAS_RIGHT, alive,
            )  # fmt: skip
            do = load_tile(
                do_desc, place, do_at, start, stride_dom, M, BLOCK_M, DV, BLOCK_DV, MASKED, low_row,
                HAS_RIGHT, alive,
            )  # fmt: skip
            # Scores are transposed, [BLOCK_N, BLOCK_M]: p and ds stay in registers for dv and dk.
            s = dot(k, tl.trans(q), PRECISION)
            slope = 1.0
            if PLAIN:
                p = tl.exp2(s * (scale * LOG2_E) - lse[None, :])
            else:
                s, slope = logits(
                    s, start + rows[None, :], first_col, tl.arange(0, BLOCK_N)[:, None],
                    M, N, diagonal, scale, batch, head_0 + head, options,
                )  # fmt: skip
                low = None
                if lse_low_ptr is not None:
                    low = tl.load(lse_low_ptr + stats, mask=rows < M - start, other=0.0)[None, :]
                p = probabilities(s, lse[None, :], low)
            if MASKED and HAS_RIGHT:
                p = tl.where(start + rows[None, :] >= first_row[:, None], p, 0.0)
            if MASKED and HAS_LEFT:
                p = tl.where(start + rows[None, :] <= last_row[:, None], p, 0.0)
            dp = dot(v, tl.trans(do), PRECISION)
            if seed_ptr is not None:
                keep = dropout_keep(
                    tl.load(seed_ptr), threshold, batch, head_0 + head, start + rows, first_col,
                    BLOCK_N,
                )  # fmt: skip
                keep = tl.trans(keep)
                dp = tl.where(keep, dp * dropout_scale, 0.0)
                kept = tl.where(keep, p * dropout_scale, 0.0)
                dv = add_dot(dv, kept.to(do.dtype), do, PRECISION)
            else:
                dv = add_dot(dv, p.to(do.dtype), do, PRECISION)
            ds = p * (dp - delta[None, :]) * slope
            if ZERO:
                ds = tl.where(s != float("-inf"), ds, 0.0)
            dk = add_dot(dk, ds.to(q.dtype), q, PRECISION)
            index += 1
            head += tl.where(index == count, 1, 0)
            index = tl.where(index == count, 0, index)
    return dk, dv


@triton.jit(do_not_specialize=RUNTIME)
def _attention_bwd_dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, q_desc, do_desc, lse_ptr, lse_low_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb: tl.int64, stride_qm: tl.int64, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kn: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vn: tl.int64, stride_vh: tl.int64,
    stride_dob: tl.int64, stride_dom: tl.int64, stride_doh: tl.int64,
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
    """dk and dv of one block of keys of one key head, over all query heads of its group.

    q_desc, do_desc: from `block_descriptors`, for rows that see all keys, or None. Keys from N on
    get nonsense in their own rows, not stored or stored as 0. Bytes a key, of elements of e: k, v,
    dk, dv: 2 (D + DV) e; q, do, lse, delta once for each row that sees the block, from L2."""
    tile, batch_head = tile_and_head(tl.program_id(0), tl.cdiv(N, BLOCK_N), False, section)
    H_K = H // GROUP
    batch = (batch_head // H_K).to(tl.int64)
    head_k = (batch_head % H_K).to(tl.int64)
    head = head_k * GROUP
    first_key = tile * BLOCK_N
    cols = first_key + tl.arange(0, BLOCK_N)
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
    do_ptr += (batch * stride_dob + first_q * stride_dom + head * stride_doh) * UNIT
    stats = (batch * H + head) * T
    first_out = batch * N
    stored = N
    if cu_q_ptr is not None:
        stats = head * T + first_q
        first_out = first_k
        stored = n_k
    lse_ptr += stats
    delta_ptr += stats
    if lse_low_ptr is not None:
        lse_low_ptr += stats
    batch_q, first_q, _ = place_in_blocks(batch, first_q, head, cu_q_ptr)

    # Keys that no row sees are not read, nor the last rows if they see no key; they may hold NaN.
    seen = n_k
    if HAS_RIGHT:
        seen = tl.minimum(n_k, n_q + diagonal + right)
    low = 0
    if HAS_LEFT:
        low = diagonal - left
        n_q = tl.maximum(tl.minimum(n_q, n_k - low), 0)
    k = load_rows(
        k_ptr, first_key, stride_kn * UNIT, seen, BLOCK_N, D, BLOCK_D, True, low, HAS_LEFT
    )
    v = load_rows(
        v_ptr, first_key, stride_vn * UNIT, seen, BLOCK_N, DV, BLOCK_DV, True, low, HAS_LEFT
    )
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    # Tiles [begin, full) and [full_end, end) of rows see some of the keys, those between all.
    low_row = -diagonal - right  # the first that sees any key
    first_row = cols - diagonal - right  # the first and the last that see the key
    last_row = cols - diagonal + left
    last_key = tl.minimum(first_key + BLOCK_N, n_k) - 1
    begin, full = 0, 0
    full_end = n_q // BLOCK_M
    end = tl.cdiv(n_q, BLOCK_M)
    if HAS_RIGHT:
        begin = tl.maximum(first_key - diagonal - right, 0) // BLOCK_M
        full = tl.cdiv(tl.maximum(last_key - diagonal - right, 0), BLOCK_M)
    if HAS_LEFT:
        end = tl.cdiv(tl.minimum(n_q, tl.maximum(last_key - diagonal + left + 1, 0)), BLOCK_M)
        full_end = tl.minimum(n_q, tl.maximum(first_key - diagonal + left + 1, 0)) // BLOCK_M
    end = tl.where(first_key < seen, end, 0)
    full_end = tl.maximum(tl.minimum(full_end, end), full)
    masked = tl.maximum(tl.minimum(full, end) - begin, 0) + tl.maximum(end - full_end, 0)
    dk, dv = _add_dk_dv(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, lse_low_ptr, delta_ptr, stride_qm * UNIT,
        stride_qh * UNIT, stride_dom * UNIT, stride_doh * UNIT, GROUP, n_q, n_k, T, begin, masked,
        full, full_end - full, low_row, first_row, last_row, first_key, diagonal, scale, batch,
        head, options, seed_ptr, threshold, dropout_scale, q_desc, do_desc, batch_q, first_q, D, DV,
        True, HAS_LEFT, HAS_RIGHT, PLAIN, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    dk, dv = _add_dk_dv(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, lse_low_ptr, delta_ptr, stride_qm * UNIT,
        stride_qh * UNIT, stride_dom * UNIT, stride_doh * UNIT, GROUP, n_q, n_k, T, full,
        full_end - full, full, 0, low_row, first_row, last_row, first_key, diagonal, scale, batch,
        head, options, seed_ptr, threshold, dropout_scale, q_desc, do_desc, batch_q, first_q, D, DV,
        False, HAS_LEFT, HAS_RIGHT, PLAIN, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    if mask_ptr is not None or bias_ptr is not None:
        if has_nan(dk) or has_nan(dv):  # of a key or a row that is forbidden, maybe
            dk, dv = _add_dk_dv(
                tl.zeros_like(dk), tl.zeros_like(dv), k, v, q_ptr, do_ptr, lse_ptr, lse_low_ptr,
                delta_ptr, stride_qm * UNIT, stride_qh * UNIT, stride_dom * UNIT, stride_doh * UNIT,
                GROUP, n_q, n_k, T, begin, tl.maximum(end - begin, 0), end, 0, low_row, first_row,
                last_row, first_key, diagonal, scale, batch, head, options, seed_ptr, threshold,
                dropout_scale, q_desc, do_desc, batch_q, first_q, D, DV, True, HAS_LEFT, HAS_RIGHT,
                PLAIN, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    dk *= scale
    if seqlens_k_ptr is not None:
        dk = tl.where(cols[:, None] < n_k, dk, 0.0)
        dv = tl.where(cols[:, None] < n_k, dv, 0.0)
    stride = H_K.to(tl.int64)
    dk_ptr += (first_out * H_K + head_k) * D
    dv_ptr += (first_out * H_K + head_k) * DV
    store_rows(dk_ptr, first_key, stride * D, stored, dk, BLOCK_N, D, BLOCK_D)
    store_rows(dv_ptr, first_key, stride * DV, stored, dv, BLOCK_N, DV, BLOCK_DV)


def _delta_and_lse(do, out, lse, dlse, plain):
    """rowsum(do * out) - dlse, and lse for `exp2`: fp32 in the shape of lse both."""
    if out.dim() == 3:  # tokens are rows of one sequence here
        do, out = do[None], out[None]
    batch, seqlen_q, nheads, headdim = out.shape
    delta, safe_lse = torch.empty_like(lse), torch.empty_like(lse)
    block_d = max(16, next_power_of_2(headdim))
    block_m = 8192 // (block_d * do.element_size())
    unit, strides = aligned_strides(do)
    launch(
        _attention_bwd_delta_kernel, ceil_div(seqlen_q, block_m) * batch * nheads,
        do, out, lse, None if dlse is None else dlse.contiguous(), delta, safe_lse, *strides,
        H=nheads,
        M=seqlen_q,
        D=headdim,
        PLAIN=plain,
        UNIT=unit,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        enable_fp_fusion=True,
    )  # fmt: skip
    return delta, safe_lse


def attention_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lse_low: torch.Tensor | None,
    dlse: torch.Tensor | None,
    options: Options,
    need_dq: bool,
    need_dkv: bool,
    need_dbias: bool,
    need_dtable: bool,
    need_dalibi: bool,
    need_dsinks: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Launches the backward.

    Args:
        do: gradient of out, any strides; q, k, v, options: as in the forward.
        out, lse, lse_low: what the forward returned.
        dlse: gradient of lse, or None.
        need_...: what is not needed is returned as None.

    Returns:
        dq, dk, dv, dbias, dtable, dalibi, dsinks, contiguous, each in its input's dtype and shape.
    """
    packed = options.cu_seqlens_q is not None
    new = torch.zeros if packed else torch.empty  # tokens of no sequence are written by no program
    like = lambda x, needed: new(x.shape, dtype=x.dtype, device=q.device) if needed else None
    dq, dk, dv = like(q, need_dq), like(k, need_dkv), like(v, need_dkv)
    if do.stride(-1) != 1:  # such as the expanded gradient of a sum
        do = do.contiguous()
    nheads, headdim, headdim_v = q.shape[-2], q.shape[-1], v.shape[-1]
    lengths = options[-2:] if packed else (q.shape[1], k.shape[1])
    arguments = option_arguments(lengths, q.dtype, options)
    delta = lse
    if out.numel():
        delta, lse = _delta_and_lse(do, out, lse, dlse, arguments["PLAIN"])
    if packed:
        batch = len(options.cu_seqlens_q) - 1
        q, k, v, do = q[None], k[None], v[None], do[None]
    else:
        batch = q.shape[0]
    unit, strides = aligned_strides(q, k, v, do)
    call = dict(
        H=nheads,
        GROUP=nheads // k.shape[2],
        M=lengths[0],
        N=lengths[1],
        T=lse.shape[-1],
        scale=options.softmax_scale,
        **arguments,
        D=headdim,
        DV=headdim_v,
        UNIT=unit,
        PRECISION=dot_precision(q.dtype),
        BLOCK_D=max(16, next_power_of_2(headdim)),
        BLOCK_DV=max(16, next_power_of_2(headdim_v)),
    )
    rest = strides, batch, call
    if lse_low is not None and (need_dbias or need_dtable or need_dalibi or need_dsinks):
        delta = attention_delta((q, k, v, do, lse, lse_low, delta), *rest)
        delta = delta if dlse is None else delta - dlse
    inputs = (q, k, v, do, lse, lse_low, delta)
    if need_dq and dq.numel() and batch * lengths[0]:
        _launch("dq", inputs, (dq,), strides, batch, call, options)
    if need_dkv and dk.numel() and batch * lengths[1]:
        _launch("dkv", inputs, (dk, dv), strides, batch, call, options)
    return (
        dq,
        dk,
        dv,
        attention_dbias(options, dlse, inputs, *rest) if need_dbias else None,
        attention_dtable(options, inputs, *rest) if need_dtable else None,
        attention_dalibi(options.alibi_slopes, inputs, *rest) if need_dalibi else None,
        attention_dsinks(options.sinks, lse, lse_low, delta) if need_dsinks else None,
    )


def _launch(which, inputs, outputs, strides, batch, call, options: Options) -> None:
    """Runs the kernel of dq, or that of dk and dv."""
    q, k, v, do, *stats = inputs
    widest = max(call["D"], call["DV"])
    config = attention_config(which, q.device, widest, q.dtype, call["UNIT"], options.burden)
    row_bytes = (call["D"] + call["DV"]) * q.element_size()
    if which == "dq":
        kernel, heads, head_bytes = _attention_bwd_dq_kernel, call["H"], call["N"] * row_bytes
        tiles = ceil_div(call["M"], config.block_m)
        rows, blocks = config.block_n, (k, v)
    else:
        kernel, heads = _attention_bwd_dk_dv_kernel, k.shape[2]
        head_bytes = call["GROUP"] * call["M"] * row_bytes
        tiles = ceil_div(call["N"], config.block_n)
        rows, blocks = config.block_m, (q, do)
    section = attention_section(q.device, options.causal, head_bytes, batch * heads)
    descriptors = block_descriptors(rows, *blocks) if config.tma else (None, None)
    launch(
        kernel, tiles * batch * heads,
        q, k, v, do, *descriptors, *stats, *outputs, *strides, section=section, **call,
        **config.options(),
    )  # fmt: skip
